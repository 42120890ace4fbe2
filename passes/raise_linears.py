"""Every spelling of a linear map by a matrix becomes aten.linear, where the matrix is an input of the graph.

x @ W, mm, addmm(b, x, W)                    ->  linear(x, W^T, b)
linear(x, W) + b                             ->  linear(x, W, b)
conv1x1(act(conv1x1(x))) on [B, C, ...]      ->  the same by linear on [B, ..., C], one permutation on each side
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx import Node
from torch.fx.node import map_arg

from .canonical import clean
from .linears import bias_of, is_input
from .nodes import aten, dtype, emit, emit_permute, is_identity, is_static, is_tensor, shape, substitute, under_autocast

_PRODUCTS = (aten.matmul.default, aten.mm.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def raise_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """In place; equal up to rounding. Convolutions are rewritten in pairs alone, with pointwise ops between them:
    a single one gains nothing by it."""
    unreliable = under_autocast(gm.graph)
    for node in list(gm.graph.nodes):
        if node in unreliable or not is_tensor(node) or not is_static(node):
            continue
        with gm.graph.inserting_before(node):
            new = _product(node) or _with_bias(node) or _pair_of_convolutions(node)
        if new is not None:
            substitute(node, new)
    return clean(gm)


def _product(node: Node) -> Node | None:
    if node.target in _PRODUCTS:
        (x, weight), bias = node.args, None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        if not is_input(bias) or shape(bias) != shape(weight)[1:]:
            return None
    else:
        return None
    if len(shape(x)) < 2 or len(shape(weight)) != 2 or shape(weight)[0] == 1 or not is_input(weight):
        return None  # over one feature it is an outer product: positions or a timestep by frequencies
    transposed = emit(node.graph, aten.t.default, weight, like=node)
    operands = [x, transposed] if bias is None else [x, transposed, bias]
    return emit(node.graph, aten.linear.default, *operands, like=node)


def _with_bias(node: Node) -> Node | None:
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, node.args)):
        return None
    for linear, bias in (node.args, node.args[::-1]):
        if linear.target is not aten.linear.default or bias_of(linear) is not None or len(linear.users) > 1:
            continue
        weight = linear.args[1]
        if "quantised" in weight.meta:
            continue
        if is_input(bias) and shape(bias) == shape(weight)[:1] and dtype(bias) == dtype(weight) == dtype(linear):
            return emit(node.graph, aten.linear.default, *linear.args[:2], bias, like=linear)
    return None


# --- 1x1 convolutions ---


def _pair_of_convolutions(last: Node) -> Node | None:
    if not _is_pointwise_convolution(last):
        return None
    between = _between(last.args[0])
    if between is None:
        return None
    graph, rank = last.graph, len(shape(last))
    features_last = (0, *range(2, rank), 1)
    moved: dict[Node, Node] = {}
    for node in between:  # in graph order: what a node reads has moved before it
        if _is_pointwise_convolution(node):
            moved[node] = _as_linear(node, emit_permute(graph, node.args[0], features_last))
        else:
            args = map_arg(node.args, lambda n: moved.get(n, n))
            moved[node] = emit(graph, node.target, *_on_last_dim(node, args), like=node, **node.kwargs)
    out = _as_linear(last, moved[last.args[0]])
    return emit_permute(graph, out, (0, rank - 1, *range(1, rank - 1)))


def _is_pointwise_convolution(node: Node) -> bool:
    if node.target not in _CONVOLUTIONS or len(shape(node.args[0])) != len(shape(node)) or node.kwargs:
        return False
    if any(size != 1 for size in shape(node.args[1])[2:]) or shape(node)[2:] != shape(node.args[0])[2:]:
        return False
    groups = node.args[6] if len(node.args) > 6 else 1
    return groups == 1 and is_input(node.args[1])


def _as_linear(convolution: Node, x: Node) -> Node:
    graph, weight = convolution.graph, convolution.args[1]
    matrix = emit(graph, aten.view.default, weight, list(shape(weight)[:2]), like=convolution)
    bias = convolution.args[2] if len(convolution.args) > 2 else None
    operands = [x, matrix] if bias is None else [x, matrix, bias]
    return emit(graph, aten.linear.default, *operands, like=convolution)


def _between(value: Node) -> list[Node] | None:
    """The nodes from 1x1 convolutions to `value`, those included, in graph order; None if anything else flows in."""
    found: set[Node] = set()
    stack, pointwise = [value], False
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if _is_pointwise_convolution(node):
            continue
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]
        if not tensors or not (_is_elementwise(node) or _cuts_channels(node)):
            return None
        pointwise = pointwise or _is_elementwise(node)
        stack += tensors
    return [n for n in value.graph.nodes if n in found] if pointwise else None


def _is_elementwise(node: Node) -> bool:
    """Of tensors of one size: what broadcasts along channels would have to be permuted too."""
    if not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node):
        return False
    if torch.Tag.pointwise not in node.target.tags and not is_identity(node):
        return False
    return all(shape(n) == shape(node) for n in node.all_input_nodes if is_tensor(n))


def _cuts_channels(node: Node) -> bool:
    if node.target in _SPLITS:
        return len(node.args) > 2 and node.args[2] == 1
    return getattr(node.target, "__name__", "") == "getitem" and node.args[0].target in _SPLITS


def _on_last_dim(node: Node, args: Sequence) -> Sequence:
    return (*args[:2], -1) if node.target in _SPLITS else args
