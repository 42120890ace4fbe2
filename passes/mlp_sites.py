"""Finds the MLPs on tokens: linear, pointwise region, linear."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

import torch
from torch import fx
from torch.fx import Node

from .adapters import adapter_before, adapter_behind, enters_adapter, readers
from .linears import Mlp, bias_of, is_input, is_map, parts_of, read_mlp
from .naming import module_path
from .nodes import dtype, shape, under_autocast
from .reasons import Reason
from .sites import Declined, MlpSite, Projection
from .token_streams import find_token_streams

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_mlps(gm: fx.GraphModule, *, min_tokens: int) -> tuple[list[MlpSite], list[Declined]]:
    """The MLP sites of a graph that split_linears has seen, and the candidates that are none, in graph order.

    down(act(up(x)))            GELU, SiLU, ReLU^2, ...: any region that kernels/expression.py can say
    down(act(gate(x)) * up(x))  gated

    A candidate is a linear whose input comes from linears through pointwise ops alone, not all of them
    affine. Where those linears read different values it is no MLP; that is mentioned on conditioning, and where
    an adapter is the cause. Of two candidates that share a linear (three in a row), the first is taken.
    """
    streams = find_token_streams(gm)
    lengths = {length for _, length in streams.sequences}
    inside_autocast = under_autocast(gm.graph)
    sites: list[MlpSite] = []
    declined: list[Declined] = []
    taken: dict[Node, str] = {}
    for down, mlp in _candidates(gm.graph):
        rows = next(filter(None, (streams.rows(linear.args[0]) for linear in mlp.linears)), None)
        if rows is not None and rows[1] < min_tokens <= rows[0] in lengths:
            rows = 1, rows[0] * rows[1]  # tokens with the batch second, the frames of every pixel: no rows mix
        if rows is None:
            refusal = Reason.CONDITIONING_MLP, {"input": shape(mlp.linears[0].args[0])}
        elif mlp.input is None:
            refusal = _refuse_adapter(adapter_before(mlp))
        else:
            refusal = (
                _refuse_size(down, mlp, rows[1], min_tokens)
                or _refuse_dtype(down, mlp, inside_autocast)
                or _refuse_region(down, mlp, taken)
            )
        name = _name(down, mlp)
        if refusal is not None:
            declined.append(Declined("mlp", name, *refusal))
        elif mlp.input is not None:
            sites.append(_site(down, mlp, name, *rows))
            taken.update(dict.fromkeys((down, *mlp.linears), name))
    return sites, declined


def _candidates(graph: fx.Graph) -> Iterator[tuple[Node, Mlp]]:
    for down in graph.nodes:
        if is_map(down) and not enters_adapter(down):
            for part in parts_of(down)[0]:
                mlp = read_mlp(part)
                if mlp is not None:
                    yield down, mlp


Refusal = tuple[Reason, dict[str, object]]


def _refuse_adapter(rank: int | None) -> Refusal | None:
    return None if rank is None else (Reason.UNFUSED_ADAPTER, {"rank": rank})


def _refuse_size(down: Node, mlp: Mlp, tokens: int, min_tokens: int) -> Refusal | None:
    if tokens < min_tokens:
        return Reason.TOO_FEW_TOKENS, {"tokens": tokens, "min_tokens": min_tokens}
    in_features, hidden, out_features = shape(mlp.input)[-1], shape(mlp.region.hidden[0])[-1], shape(down)[-1]
    if 2 * hidden < max(in_features, out_features):  # a bottleneck: few neurons, and an overhead of wide rows
        widths = {"hidden": hidden, "in_features": in_features, "out_features": out_features}
        return Reason.NOT_PROFITABLE, widths
    return None


def _refuse_dtype(down: Node, mlp: Mlp, inside_autocast: set[Node]) -> Refusal | None:
    linears = (*mlp.linears, down)
    if not inside_autocast.isdisjoint(linears):
        return Reason.MIXED_DTYPE, {"autocast": True}
    weights = [n for linear in linears for n in linear.all_input_nodes[1:]]
    computed = next((w for w in weights if not is_input(w)), None)
    if computed is not None:
        quantised = computed.meta.get("quantised")
        return Reason.WEIGHT_NOT_INPUT, {"quantised": quantised} if quantised else {"computed_by": str(computed.target)}
    dtypes = dict.fromkeys(dtype(n) for n in (mlp.input, *weights, *linears))
    if len(dtypes) > 1:
        return Reason.MIXED_DTYPE, {"dtypes": [str(d) for d in dtypes]}
    if dtype(down) not in _DTYPES:
        return Reason.UNSUPPORTED_DTYPE, {"dtype": str(dtype(down))}
    return None


def _refuse_region(down: Node, mlp: Mlp, taken: dict[Node, str]) -> Refusal | None:
    region = mlp.region
    if "dropout" in region.unsupported:
        return Reason.DROPOUT, {}
    if region.unsupported:
        return Reason.UNSUPPORTED_ACTIVATION, {"ops": list(region.unsupported)}
    parts, between = parts_of(down)
    inside = {*region.inside, *region.hidden, *between}
    outside = set(readers(inside)) - inside - {down}
    adapted = _refuse_adapter(adapter_behind(outside))
    if adapted is not None:
        return adapted
    fused = [piece.linear for piece in mlp.pieces if not piece.is_whole]
    if len(parts) > 1:
        fused.append(down)
    if fused:  # split_linears left it whole
        return Reason.SHARED_HIDDEN, {"fused_linear": module_path(fused[0]) or fused[0].name}
    if outside:
        reader = min(outside, key=lambda n: n.name)
        return Reason.SHARED_HIDDEN, {"read_by": module_path(reader) or reader.name}
    other = next((taken[linear] for linear in (*mlp.linears, down) if linear in taken), None)
    return (Reason.SHARED_HIDDEN, {"read_by": other}) if other is not None else None


def _site(down: Node, mlp: Mlp, name: str, batch: int, tokens: int) -> MlpSite:
    return MlpSite(
        node=down,
        name=name,
        input=mlp.input,
        up=tuple(Projection(linear.args[1], bias_of(linear)) for linear in mlp.linears),
        down=Projection(down.args[1], bias_of(down)),
        region=mlp.region.text,
        batch=batch,
        tokens=tokens,
        in_features=shape(mlp.input)[-1],
        hidden=shape(down.args[0])[-1],
        out_features=shape(down)[-1],
    )


def _name(down: Node, mlp: Mlp) -> str:
    """The module that holds all its linears, where that is the last one's parent; else the last one."""
    last = module_path(down).split(".")
    common = os.path.commonprefix([last, *(module_path(linear).split(".") for linear in mlp.linears)])
    return ".".join(common if len(common) >= len(last) - 1 else last) or down.name
