"""What passes ask of a node, and how they make a new one."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

_CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
_SAME_VALUES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
# These only move, repeat or drop elements: of one value throughout they leave that value.
_REARRANGEMENTS = (
    *VIEWS,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
    aten.select.int,
)
_FILLS = {
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
}
_VALUED_FILLS = (
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.scalar_tensor.default,
)
_LIKE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.empty_like.default)


def shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def readers(node: Node) -> list[Node]:
    """The users that read values; ones_like and its kind read a shape only."""
    return [user for user in node.users if user.target not in _LIKE]


def is_static(node: Node) -> bool:
    """No dimension is symbolic; true of nodes that are no tensors too."""
    return not is_tensor(node) or all(isinstance(size, int) for size in shape(node))


def is_cast(node: Node) -> bool:
    """From one floating-point type to another, nothing else changed."""
    if node.target not in _CASTS or node.kwargs.get("device") is not None:
        return False
    return dtype(node).is_floating_point and dtype(node.args[0]).is_floating_point


def is_identity(node: Node) -> bool:
    """The same values at the same indices; dropout counts when it is off."""
    if node.target is aten.dropout.default:
        return node.args[1] == 0 or not node.args[2]
    return node.target in _SAME_VALUES


def emit(graph: fx.Graph, target, *args, like: Node | None = None, **kwargs) -> Node:
    """A new call at the graph's insertion point, with `meta["val"]`, and the module path of `like`."""
    node = graph.call_function(target, args, kwargs)
    values = _values(args), _values(kwargs)
    mode = detect_fake_mode((values, like.meta.get("val") if like is not None else None))
    with torch.no_grad(), mode or contextlib.nullcontext():
        node.meta["val"] = target(*values[0], **values[1])
    for key in ("nn_module_stack", "stack_trace"):
        if like is not None and key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def substitute(old: Node, new: Node) -> None:
    """`new` for all readers of `old`; then `old` goes, and above it whatever only it has read.

    Dead-code elimination alone would keep attention and dropout: for all it knows they draw random numbers.
    """
    old.replace_all_uses_with(new)
    dead = [old]
    while dead:
        node = dead.pop()
        if not node.users and node.op == "call_function":
            dead += [n for n in node.all_input_nodes if len(n.users) == 1]  # once only: its last reader goes here
            node.graph.erase_node(node)


def emit_reshape(graph: fx.Graph, node: Node, size: Sequence[int]) -> Node:
    """`node` in another shape; a value that already has that shape is looked for above first."""
    size = tuple(size)
    source = node
    while shape(source) != size:
        if source.target not in (*VIEWS, aten.clone.default):
            break
        source = source.args[0]
    if shape(source) == size:
        return source
    return emit(graph, aten.reshape.default, node, list(size), like=node)


def emit_permute(graph: fx.Graph, node: Node, order: Sequence[int]) -> Node:
    """`node` with its dimensions in another order; nothing when the order is theirs."""
    if list(order) == list(range(len(order))):
        return node
    return emit(graph, aten.permute.default, node, list(order), like=node)


def known_value(value: object, depth: int = 32) -> torch.Tensor | None:
    """The one number that every element holds, as a tensor of no dimensions, where the graph alone says so.

    Numbers that come in as weights or inputs are never known: they may change between two calls.
    Looks `depth` nodes up, no further.
    """
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not is_tensor(value) or value.op != "call_function" or not depth:
        return None
    depth -= 1
    target, args = value.target, value.args
    if target in _FILLS:
        return torch.tensor(_FILLS[target], dtype=dtype(value))
    if target in _VALUED_FILLS:
        number = known_value(args[0] if target is aten.scalar_tensor.default else args[1], depth)
        return None if number is None else number.to(dtype(value))
    if target is aten.lift_fresh_copy.default and args[0].op == "get_attr":
        constant = operator.attrgetter(args[0].target)(value.graph.owning_module)
        return constant.detach().reshape(()).cpu() if constant.numel() == 1 else None
    if target in _CASTS or is_identity(value) or target in _REARRANGEMENTS:
        number = known_value(args[0], depth)
        return None if number is None else number.to(dtype(value))
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        numbers = {}
        for node in value.all_input_nodes:
            numbers[node] = known_value(node, depth)
            if numbers[node] is None:
                return None
        return target(*map_arg(args, numbers.get), **map_arg(dict(value.kwargs), numbers.get)).to(dtype(value))
    return None


def known_scalar(value: object) -> float | None:
    """`known_value` as a float; None for what is not known or not finite."""
    number = known_value(value)
    if number is None or number.dtype == torch.bool or number.is_complex():
        return None
    return float(number) if math.isfinite(float(number)) else None


def under_autocast(graph: fx.Graph) -> set[Node]:
    """Nodes between entering and leaving an autocast region: their dtypes in `meta` are not those at run time."""
    inside, open_regions = set(), set()
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            if len(node.args) < 3 or node.args[2]:
                open_regions.add(node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            open_regions.discard(node.args[0])
        elif open_regions:
            inside.add(node)
    return inside


def _values(args):
    return map_arg(args, lambda n: n.meta["val"])
