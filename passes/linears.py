"""What passes ask of linear maps: which columns of a fused one a value holds, whose views its weights are."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..kernels.expression import is_linear
from .nodes import is_cast, is_identity, is_tensor, shape
from .pointwise import Region, read_region, source

aten = torch.ops.aten

_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_UNFLATTENS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unflatten.int}
_WEIGHT_VIEWS = {
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
}


@dataclass(frozen=True)
class Piece:
    """Output columns start to stop of a linear."""

    linear: Node
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, shape(self.linear)[-1])


@dataclass(frozen=True)
class Mlp:
    """`region` over `pieces` of linears, one a hidden value. `input`: what all read; None if they differ."""

    region: Region
    pieces: tuple[Piece, ...]
    input: Node | None

    @property
    def linears(self) -> tuple[Node, ...]:
        return tuple(piece.linear for piece in self.pieces)


def read_mlp(value: Node) -> Mlp | None:
    """The MLP up to its activation, `value`: linears, then a pointwise region that is not merely affine."""
    region = read_region(value, is_hidden)
    if region is None or (not region.unsupported and is_linear(region.text)):
        return None
    pieces = tuple(piece_of(h) for h in region.hidden)
    inputs = {source(piece.linear.args[0]) for piece in pieces}
    return Mlp(region, pieces, inputs.pop() if len(inputs) == 1 else None)


def parts_of(down: Node) -> tuple[list[Node], list[Node]]:
    """(parts, between): what a linear reads, a cat of columns part by part, and the nodes in between."""
    between, value = [], down.args[0]
    while is_identity(value):
        between.append(value)
        value = value.args[0]
    if value.target is aten.cat.default and _is_last(value, _argument(value, 1, "dim", 0)):
        parts = list(value.args[0])
        if len(set(parts)) == len(parts) > 1:
            return parts, [*between, value]
    return [value], between


def is_map(node: Node) -> bool:
    """A linear map by a matrix [out_features, in_features], of known sizes."""
    if node.target is not aten.linear.default:
        return False
    output, matrix = shape(node), shape(node.args[1])
    known = all(isinstance(n, int) for n in (*output, *shape(node.args[0]), *matrix))
    return known and len(output) >= 2 and len(matrix) == 2


def bias_of(linear: Node) -> Node | None:
    return linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")


def is_hidden(node: Node) -> bool:
    """Where a region may begin: a linear, or a piece cut out of one."""
    return is_map(node) or (not is_identity(node) and piece_of(node) is not None)


def piece_of(node: Node) -> Piece | None:
    """Which columns of a linear `node` holds: by split, chunk, slice, narrow, or a view and unbind or select.

    linear(x) [.., 2 F]  ->  split(F, -1)[1]                  columns F to 2 F
                         ->  view [.., 2, F]  ->  [.., 1, :]  the same
    """
    if not is_tensor(node):
        return None
    if is_map(node):
        return Piece(node, 0, shape(node)[-1])
    if is_identity(node):
        return piece_of(node.args[0])
    cut = _cut(node)
    if cut is None:
        return None
    fused, start = cut
    whole = piece_of(fused)
    if whole is None or shape(node)[:-1] != shape(fused)[:-1]:
        return None
    return Piece(whole.linear, whole.start + start, whole.start + start + shape(node)[-1])


def takes_apart(node: Node) -> bool:
    """The half of a cut that is no piece itself: a split's or unbind's tuple, the view before an unbind."""
    return node.target in _SPLITS or node.target in _UNFLATTENS or node.target is aten.unbind.int


def _cut(node: Node) -> tuple[Node, int] | None:
    """(fused, start): `node` is `fused[..., start : start + its size]`."""
    if node.target is operator.getitem:
        split, index = node.args
        if split.target in _SPLITS and _is_last(split.args[0], _argument(split, 2, "dim", 0)):
            return split.args[0], sum(part.shape[-1] for part in split.meta["val"][:index])
        if split.target is aten.unbind.int:
            return _cut_unflattened(split.args[0], _argument(split, 1, "dim", 0), index)
        return None
    if node.target is aten.slice.Tensor:
        fused, dim = node.args[0], _argument(node, 1, "dim", 0)
        if _is_last(fused, dim) and _argument(node, 4, "step", 1) == 1:
            window = slice(_argument(node, 2, "start", None), _argument(node, 3, "end", None))
            return fused, window.indices(shape(fused)[-1])[0]
        return None
    if node.target is aten.narrow.default and _is_last(node.args[0], node.args[1]):
        return node.args[0], node.args[2] % shape(node.args[0])[-1]
    if node.target is aten.select.int:
        return _cut_unflattened(*node.args)
    return None


def _cut_unflattened(view: Node, dim: int, index: int) -> tuple[Node, int] | None:
    """`view` [.., K, F] of [.., K F], at `index` of dimension K."""
    if view.target not in _UNFLATTENS:
        return None
    fused, size = view.args[0], shape(view)
    if len(size) < 2 or dim % len(size) != len(size) - 2 or shape(fused) != (*size[:-2], size[-2] * size[-1]):
        return None
    return fused, index % size[-2] * size[-1]


def _is_last(node: Node, dim: int) -> bool:
    return dim % len(shape(node)) == len(shape(node)) - 1


def _argument(node: Node, position: int, name: str, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_input(weight: Node) -> bool:
    """An input or attribute of the graph, or a view of one, in whatever dtype: no more than a cast is computed.

    What is quantised is none: there are no rows in it to gather.
    """
    while weight.target in _WEIGHT_VIEWS or is_cast(weight):
        weight = weight.args[0]
    return weight.op in ("placeholder", "get_attr") and "quantised" not in weight.meta
