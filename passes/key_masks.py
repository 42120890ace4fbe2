"""Boolean key masks, of text padding mostly: what they are made from, and which keys they are written to leave open.

    cat([text_mask, ones(image)])                                   ->  the image
    ones.masked_fill(arange(n) >= image + text_mask.sum(), False)   ->  the image, which is first

The second says what to expect, not what holds: a length may be negative. Kernels that use it look at the mask itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.fx import Node

from .collectives import is_collective
from .nodes import aten, dtype, is_tensor, shape
from .sites import AttentionSite, MlpSite

_SAME_VALUES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.expand.default, aten.repeat.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.to.dtype, aten._to_copy.default,
    aten.index_select.default,  # tokens in another order, among themselves
}  # fmt: skip
_BOTH = {aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.mul.Tensor}
_LESS = {aten.lt.Tensor, aten.lt.Scalar, aten.le.Tensor, aten.le.Scalar}
_NOT_LESS = {aten.ge.Tensor, aten.ge.Scalar, aten.gt.Tensor, aten.gt.Scalar}
_FILLED = {
    aten.ones.default: 1, aten.ones_like.default: 1, aten.new_ones.default: 1,
    aten.zeros.default: 0, aten.zeros_like.default: 0, aten.new_zeros.default: 0,
}  # fmt: skip

Span = tuple[int, int]  # (start, stop) along the keys


def has_boolean_mask(site: AttentionSite) -> bool:
    return site.key_mask is not None and dtype(site.key_mask) == torch.bool


def mask_inputs(gm: fx.GraphModule, sites: Iterable[AttentionSite | MlpSite]) -> tuple[int, ...]:
    """Positions of the graph's inputs that boolean key masks of the sites are made from; none where other ranks' inputs
    are among those, since nothing here would show that they changed."""
    stack = [s.key_mask for s in sites if isinstance(s, AttentionSite) and has_boolean_mask(s)]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if is_collective(node.target):
            return ()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    placeholders = (node for node in gm.graph.nodes if node.op == "placeholder")
    return tuple(position for position, node in enumerate(placeholders) if node in seen)


def attended_keys(mask: Node | None) -> Span | None:
    """The longest run of keys that a mask [batch or 1, 1, 1, keys] is expected to leave open; None if there is none."""
    if mask is None or dtype(mask) != torch.bool:
        return None
    return max(_spans(mask, True), key=lambda span: span[1] - span[0], default=None)


def _spans(node: Node, wanted: bool) -> list[Span]:
    """Where, along its last axis, a tensor of truth values is expected to be `wanted` throughout."""
    if node.op != "call_function" or not is_tensor(node) or not shape(node):
        return []
    length = shape(node)[-1]
    fill = _FILLED.get(node.target)
    if node.target in (aten.full.default, aten.full_like.default):
        fill = node.args[1]
    if fill is not None:
        return [(0, length)] if bool(fill) == wanted else []
    if node.target in _SAME_VALUES:
        (source,) = (node.args[0],)
        return _spans(source, wanted) if is_tensor(source) and shape(source)[-1:] == (length,) else []
    if node.target is aten.slice.Tensor:
        return _sliced(node, wanted)
    if node.target in (aten.logical_not.default, aten.bitwise_not.default):
        return _spans(node.args[0], not wanted)
    if node.target in _BOTH and wanted:
        return _common([_spans(n, True) for n in node.args if is_tensor(n)]) if all(map(is_tensor, node.args)) else []
    if node.target is aten.cat.default:
        return _joined(node.args[0], node, wanted)
    if node.target is aten.pad.default:
        return _padded(node, wanted)
    if node.target is aten.masked_fill.Scalar:
        value, mask, fill = node.args
        kept = _common([_spans(value, wanted), _spans(mask, False)])
        return kept + (_spans(mask, True) if bool(fill) == wanted else [])
    if node.target in _LESS | _NOT_LESS:
        fits = wanted == (node.target in _LESS)
        least = _least(node.args[1]) if fits and _counts_up(node.args[0], length) else 0
        return [(0, min(least, length))] if least > 0 else []
    return []


def _sliced(node: Node, wanted: bool) -> list[Span]:
    source, dim, start, stop, step = (*node.args, *(0, 0, 1 << 62, 1)[len(node.args) - 1 :])[:5]
    if dim % len(shape(source)) != len(shape(source)) - 1:
        return _spans(source, wanted)
    if step != 1:
        return []
    start, stop, _ = slice(start, stop).indices(shape(source)[-1])
    return [(a - start, b - start) for a, b in _common([_spans(source, wanted), [(start, stop)]])]


def _joined(parts: Sequence[Node], node: Node, wanted: bool) -> list[Span]:
    dim = node.args[1] if len(node.args) > 1 else 0
    if dim % len(shape(node)) != len(shape(node)) - 1:
        return _common([_spans(part, wanted) for part in parts])
    spans, at = [], 0
    for part in parts:
        spans += [(at + a, at + b) for a, b in _spans(part, wanted)]
        at += shape(part)[-1]
    return _merged(spans)


def _padded(node: Node, wanted: bool) -> list[Span]:
    source, sizes, *rest = node.args
    before, after = sizes[:2]
    length = shape(source)[-1]
    if any(sizes[2:]) or min(before, after) < 0 or (rest and rest[0] != "constant"):
        return []
    spans = [(before + a, before + b) for a, b in _spans(source, wanted)]
    if bool(rest[1] if len(rest) > 1 and rest[1] is not None else 0) == wanted:
        spans = [(0, before), *spans, (before + length, before + length + after)]
    return _merged(spans)


def _counts_up(node: Node, length: int) -> bool:
    """Whether a value is 0, 1, 2, ... along its last axis."""
    while node.target in _SAME_VALUES and is_tensor(node.args[0]) and shape(node.args[0])[-1:] == shape(node)[-1:]:
        node = node.args[0]
    return node.target is aten.arange.default and shape(node) == (length,)


def _least(bound: object) -> int:
    """What a length is expected to be at least: `image + number of words` is more than `image`."""
    if isinstance(bound, (int, float)):
        return int(bound)
    while isinstance(bound, Node) and bound.target in _SAME_VALUES:
        bound = bound.args[0]
    if isinstance(bound, Node) and bound.target in (aten.add.Tensor, aten.add.Scalar):
        return sum(_least(part) for part in bound.args[:2])
    return 0


def _common(several: Sequence[list[Span]]) -> list[Span]:
    """What all of several lists of spans have in common."""
    first, *others = several
    for other in others:
        pairs = [(max(a, c), min(b, d)) for a, b in first for c, d in other]
        first = [(a, b) for a, b in pairs if a < b]
    return first


def _merged(spans: list[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        elif start < stop:
            merged.append((start, stop))
    return merged
