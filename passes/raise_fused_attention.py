"""Attention that was asked of one kernel by its name -> the one SDPA node."""

from __future__ import annotations

import operator

from torch import fx
from torch.fx import Node

from .canonical import clean
from .nodes import aten, substitute
from .reasons import Reason
from .sdpa import Sdpa, emit_sdpa

# Ops that return (output, log-sum-exp, ...); their masks are additive.
FUSED = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(aten, name)
)


def raise_fused_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """_scaled_dot_product_flash_attention(q, k, v)[0]  ->  scaled_dot_product_attention(q, k, v)

    and the same for cuDNN's, the memory-efficient and the CPU's kernel. Only where nothing but the output is read: a
    log-sum-exp that is read joins partial attentions (ring), which is another function.
    """
    fused = [node for node in gm.graph.nodes if node.target in FUSED and not joins_parts(node)]
    for node in fused:
        for output in [user for user in node.users if user.users]:
            with gm.graph.inserting_before(output):
                substitute(output, emit_sdpa(gm.graph, read_fused(node), like=output))
    return clean(gm) if fused else gm


def read_fused(node: Node) -> Sdpa:
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    mask = given.get("attn_mask", given.get("attn_bias"))
    options = {name: given[name] for name in ("dropout_p", "is_causal", "scale") if name in given}
    return Sdpa(given["query"], given["key"], given["value"], mask, **options)


def joins_parts(node: Node) -> bool:
    """Whether more than the output of a fused attention is read."""
    outputs = [user for user in node.users if user.users]
    return any(user.target is not operator.getitem or user.args[1] != 0 for user in outputs)


def why_fused(node: Node) -> tuple[Reason, dict[str, object]] | None:
    """Why a fused attention that is left stays dense; None for any other node."""
    if node.target not in FUSED:
        return None
    attention = read_fused(node)
    q_len, kv_len = (n.meta["val"].shape[-2] for n in (attention.query, attention.key))
    return Reason.PARTIAL_ATTENTION, {"q_len": q_len, "kv_len": kv_len}
