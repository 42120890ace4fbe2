"""The masks of spelled-out attention, written as the one mask argument of scaled_dot_product_attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx import Node

from .attention_scores import Mask, batch_sizes, size_along
from .nodes import aten, dtype, emit, emit_permute, emit_reshape, shape


def emit_mask(graph: fx.Graph, masks: Sequence[Mask], batch: tuple[int, int], to: torch.dtype) -> Node | None:
    """One mask for [*batch, queries, keys]: boolean (True = attend) if all exclude outright, else of dtype `to`."""
    if not masks:
        return None
    if all(m.fill == -math.inf for m in masks):
        return functools.reduce(
            lambda a, b: emit(graph, aten.logical_and.default, a, b), [_keeps(graph, m, batch) for m in masks]
        )
    return functools.reduce(
        lambda a, b: emit(graph, aten.add.Tensor, a, b), [_additive(graph, m, batch, to) for m in masks]
    )


def emit_aligned(graph: fx.Graph, mask: Mask, batch: tuple[int, int]) -> Node:
    """The mask's node as [batch or 1, heads or 1, queries or 1, keys or 1]."""
    rank, own = len(mask.dims), shape(mask.node)
    node = emit_reshape(graph, mask.node, (1,) * (rank - len(own)) + own)
    names = sorted(c for c in mask.dims if c.isupper())
    node = emit_permute(graph, node, [mask.dims.index(c) for c in (*names, "i", "j")])
    *outer, i, j = shape(node)
    if math.prod(outer) == 1:
        return emit_reshape(graph, node, (1, 1, i, j))
    full = batch_sizes(mask.dims, mask.sizes)
    if full == batch:
        return node
    if tuple(outer) != full:
        node = emit(graph, aten.expand.default, node, [*full, i, j], like=node)
    return emit_reshape(graph, node, (*batch, i, j))


def _keeps(graph: fx.Graph, mask: Mask, batch: tuple[int, int]) -> Node:
    node = mask.node if mask.keep else _negated(graph, mask.node)
    return emit_aligned(graph, _with(mask, node), batch)


def _negated(graph: fx.Graph, node: Node) -> Node:
    if node.target in (aten.logical_not.default, aten.bitwise_not.default) and dtype(node.args[0]) == torch.bool:
        return node.args[0]
    return emit(graph, aten.logical_not.default, node, like=node)


def _additive(graph: fx.Graph, mask: Mask, batch: tuple[int, int], to: torch.dtype) -> Node:
    if mask.fill is not None:
        # A finite fill, not -inf: a row that is masked throughout stays the mean of its values, as it was written.
        fill = mask.fill if math.isinf(mask.fill) else max(mask.fill, torch.finfo(to).min)
        device = mask.node.meta["val"].device
        values = [
            emit(graph, aten.full.default, [], number, like=mask.node, dtype=to, device=device)
            for number in ((0.0, fill) if mask.keep else (fill, 0.0))
        ]
        return emit_aligned(graph, _with(mask, emit(graph, aten.where.self, mask.node, *values, like=mask.node)), batch)
    node = mask.node
    if mask.factor != 1.0:
        node = emit(graph, aten.mul.Tensor, node, mask.factor, like=node)
    if dtype(node) != to:
        if torch.finfo(dtype(node)).min < torch.finfo(to).min:
            node = emit(graph, aten.clamp.default, node, torch.finfo(to).min, like=node)
        node = emit(graph, aten._to_copy.default, node, like=node, dtype=to)
    return emit_aligned(graph, _with(mask, node), batch)


def _with(mask: Mask, node: Node) -> Mask:
    return Mask(node, mask.dims, mask.sizes)


def emit_row_factor(graph: fx.Graph, factor: Mask, batch: tuple[int, int], query: Node) -> Node:
    """`query` times one factor for each of its rows."""
    rows = emit_aligned(graph, factor, batch)
    assert size_along(factor, "j") == 1
    return emit(graph, aten.mul.Tensor, query, rows, like=query)
