"""Softmax written out becomes aten.softmax: exp(x) / sum(exp(x)), with or without the maximum taken off."""

from __future__ import annotations

import operator

from torch import fx
from torch.fx import Node

from .nodes import aten, emit, is_static, is_tensor, shape, substitute

_MAXIMA = (aten.amax.default, aten.logsumexp.default)


def raise_softmax(gm: fx.GraphModule) -> fx.GraphModule:
    """In place; dead nodes stay for the caller to clean.

    div(exp(x), sum(exp(x), d, keepdim))  ->  softmax(x, d)
    exp(log_softmax(x, d)), exp(x - logsumexp(x, d)), _softmax, special_softmax  ->  softmax(x, d)
    softmax(x - amax(x, d), d)  ->  softmax(x, d)
    """
    for node in list(gm.graph.nodes):
        if not is_tensor(node) or not is_static(node):
            continue
        found = _softmax_of(node)
        if found is None:
            continue
        source, dim, *dtype = found
        source = _without_maximum(source, dim)
        if node.target is aten.softmax.int and source is node.args[0]:
            continue
        with gm.graph.inserting_before(node):
            softmax = emit(gm.graph, aten.softmax.int, source, dim, *dtype, like=node)
        if softmax.meta["val"].dtype != node.meta["val"].dtype:
            gm.graph.erase_node(softmax)
            continue
        substitute(node, softmax)
    return gm


def _softmax_of(node: Node) -> tuple | None:
    """(x, dim) or (x, dim, dtype) where `node` is softmax(x, dim)."""
    if node.target in (aten.softmax.int, aten.special_softmax.default):
        return (node.args[0], node.args[1] % len(shape(node)), *node.args[2:3]) if shape(node) else None
    if node.target is aten._softmax.default and not node.args[2]:
        return node.args[0], node.args[1] % len(shape(node))
    if node.target is aten.exp.default:
        return _exp_of_log(node)
    if node.target is aten.div.Tensor and not node.kwargs and isinstance(node.args[1], Node):
        return _normalised(node.args[0], node.args[1])
    if node.target is aten.mul.Tensor:
        for exponential, inverse in (node.args[:2], node.args[1::-1]):
            if isinstance(inverse, Node) and inverse.target is aten.reciprocal.default:
                return _normalised(exponential, inverse.args[0])
    return None


def _normalised(exponential: object, total: Node) -> tuple | None:
    """exponential / total, where total is the sum of exponential along one dimension."""
    if not is_tensor(exponential) or exponential.target is not aten.exp.default:
        return None
    dim = _kept_dim(total, (aten.sum.dim_IntList,), exponential)
    return None if dim is None else (exponential.args[0], dim)


def _exp_of_log(node: Node) -> tuple | None:
    logarithm = node.args[0]
    if logarithm.target is aten.log_softmax.int and len(logarithm.args) == 2:
        return logarithm.args[0], logarithm.args[1] % len(shape(node))
    if logarithm.target is aten.sub.Tensor and not logarithm.kwargs and is_tensor(logarithm.args[1]):
        source, offset = logarithm.args
        dim = _kept_dim(offset, (aten.logsumexp.default,), source)
        return None if dim is None else (source, dim)
    return None


def _without_maximum(source: Node, dim: int) -> Node:
    """x where `source` is x - max(x, dim): softmax does not see what is constant along its dimension."""
    if source.target is aten.sub.Tensor and not source.kwargs and is_tensor(source.args[1]):
        value, offset = source.args
        if offset.target is aten.detach.default:
            offset = offset.args[0]
        if offset.target is operator.getitem and offset.args[1] == 0 and offset.args[0].target is aten.max.dim:
            offset = offset.args[0]
        if _kept_dim(offset, (*_MAXIMA, aten.max.dim), value) == dim:
            return value
    return source


def _kept_dim(node: Node, targets: tuple, source: object) -> int | None:
    """The dimension along which `node`, one of `targets`, reduces `source`, keeping it at size one."""
    if not isinstance(node, Node) or node.target not in targets or node.kwargs:
        return None
    if not _same(node.args[0], source):
        return None
    dims = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    keepdim = node.args[2] if len(node.args) > 2 else False
    if not dims or len(dims) != 1 or not keepdim:
        return None
    return dims[0] % len(shape(source))


def _same(a: object, b: object) -> bool:
    """One node, or the same call twice."""
    if a is b or not (is_tensor(a) and is_tensor(b)) or a.op != "call_function":
        return a is b
    return (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)
