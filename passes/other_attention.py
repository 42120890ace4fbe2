"""Attention that was not raised, for the report: what it is and why it stays dense."""

from __future__ import annotations

from torch import fx
from torch.fx import Node

from .attention_scores import score_path
from .contractions import Contraction, read_contraction
from .naming import module_path
from .nodes import VIEWS, aten, is_cast, is_identity, is_static, is_tensor, shape, under_autocast
from .origin_labels import Origins
from .origins import Label, has_identity
from .raise_fused_attention import why_fused
from .reasons import Reason
from .sites import Declined

_REARRANGED = (*VIEWS, aten.transpose.int, aten.permute.default, aten.slice.Tensor)


def find_other_attention(gm: fx.GraphModule, origins: Origins) -> list[Declined]:
    """Softmax attention in no form of its own op, parts of one, and linear attention: value times key summed over the
    tokens."""
    unreliable = under_autocast(gm.graph)
    declined = []
    for node in gm.graph.nodes:
        found = why_fused(node)
        if found is None and (not is_tensor(node) or not is_static(node)):
            continue
        found = found or _softmax_attention(node, node in unreliable) or _linear_attention(node, origins)
        if found is not None:
            declined.append(Declined("attention", module_path(node), *found))
    return declined


def _softmax_attention(node: Node, autocast: bool) -> tuple[Reason, dict[str, object]] | None:
    if node.target is not aten.softmax.int or score_path(node.args[0], exclusive=False) is None:
        return None
    readers, reader, dropout = 0, node, False
    stack = list(node.users)
    while stack:
        reader = stack.pop()
        if read_contraction(reader) is not None:
            readers += 1
        elif reader.target is aten.dropout.default or is_cast(reader) or is_identity(reader) or reader.target in VIEWS:
            dropout = dropout or (reader.target is aten.dropout.default and not is_identity(reader))
            stack += reader.users
    if not readers:
        return None
    detail = {"scores": shape(node), "readers": len(node.users)}
    return (Reason.MIXED_DTYPE if autocast else Reason.DROPOUT if dropout else Reason.ATTENTION_FORM), detail


def _linear_attention(node: Node, origins: Origins) -> tuple[Reason, dict[str, object]] | None:
    outer = read_contraction(node)
    if outer is None:
        return None
    for operand in (outer.lhs, outer.rhs):
        while is_tensor(operand) and (is_cast(operand) or is_identity(operand) or operand.target in _REARRANGED):
            operand = operand.args[0]
        inner = read_contraction(operand)
        tokens = 0 if inner is None else _tokens_summed(inner, origins)
        if tokens:
            return Reason.NOT_SOFTMAX_ATTENTION, {"tokens": tokens}
    return None


def _tokens_summed(product: Contraction, origins: Origins) -> int:
    """How many tokens of one sequence both operands are summed over; 0 if they are summed over features."""
    for name in set(product.lhs_dims) & set(product.rhs_dims) - set(product.out_dims):
        lhs = origins.of(product.lhs)[product.lhs_dims.index(name)]
        rhs = origins.of(product.rhs)[product.rhs_dims.index(name)]
        if _tracks(lhs) & _tracks(rhs):
            return shape(product.lhs)[product.lhs_dims.index(name)]
    return 0


def _tracks(label: Label) -> set:
    return {(e.track, e.start) for segment in label for e in segment.entries if e.projected and has_identity(e)}
