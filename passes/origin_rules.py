"""What each operation does to the labels of its operands' axes (see origins). Unknown operations make new roots.

Only the operations between a sequence and the queries and keys made of it need a rule: what lies above is the same
node for both. Rules are sound for "does not change along this axis"; a test runs whole models against that claim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.fx import Node

from . import origins
from .contractions import read_contraction
from .nodes import aten, dtype, is_identity, is_static, is_tensor, shape
from .origins import Label, concatenate, constant, cut, feature, projected, regroup, root, union
from .sdpa import read_sdpa

Labels = tuple[Label, ...]


class Origins:
    """The labels of a graph's values, made when asked for; nodes may be added in between."""

    def __init__(self) -> None:
        self._known: dict[Node, Labels] = {}

    def of(self, node: Node) -> Labels:
        """One label for each dimension of a tensor-valued node."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in self._known]
            if top in self._known or not missing:
                stack.pop()
                if top not in self._known:
                    self._known[top] = self._label(top)
            else:
                stack += missing
        return self._known[node]

    def _label(self, node: Node) -> Labels:
        if not is_tensor(node):
            return ()
        labels = None
        if node.op == "call_function" and 0 not in shape(node) and all(map(is_static, (node, *node.all_input_nodes))):
            labels = _rule(node, self._known)
        if labels is None:
            labels = _roots(node, self._known)
        return tuple(_root(node, d) if origins.too_large(label) else label for d, label in enumerate(labels))


def _root(node: Node, dim: int, flag: bool = False) -> Label:
    size = shape(node)[dim]
    return root("node", (node, dim), size if isinstance(size, int) else 0, flag)


def _roots(node: Node, known: dict[Node, Labels]) -> Labels:
    """Every axis a root: an input, or an operation without a rule."""
    flag = any(
        entry.projected for n in node.all_input_nodes for lb in known[n] for segment in lb for entry in segment.entries
    )
    return tuple(_root(node, d, flag) for d in range(len(shape(node))))


def _rule(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if node.target is operator.getitem:
        return _getitem(node, known)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    rule = _RULES.get(node.target.overloadpacket)
    if rule is not None:
        return rule(node, known)
    if is_identity(node):
        return known[node.args[0]]
    if torch.Tag.pointwise in node.target.tags and torch.Tag.nondeterministic_seeded not in node.target.tags:
        return _pointwise(node, known)
    if {"dim", "keepdim"} <= {a.name for a in node.target._schema.arguments}:
        return _reduction(node, known)
    return None


# --- values at the same positions ------------------------------------------------------------------------------


def _broadcast(node: Node, operands: list[Node], known: dict[Node, Labels]) -> Labels:
    """The label of each dimension of an elementwise function; an operand of size one there does not count."""
    labels = []
    for d, size in enumerate(shape(node)):
        back = d - len(shape(node))
        parts = [known[n][back] for n in operands if len(shape(n)) >= -back and shape(n)[back] == size]
        labels.append(union(parts) if parts else constant(size))
    return tuple(labels)


def _pointwise(node: Node, known: dict[Node, Labels]) -> Labels:
    return _broadcast(node, [n for n in node.all_input_nodes if is_tensor(n)], known)


def _first(node: Node, known: dict[Node, Labels]) -> Labels:
    return known[node.args[0]]


def _copy(node: Node, known: dict[Node, Labels]) -> Labels:
    return _broadcast(node, [node.args[1]], known)


def _dropout(node: Node, known: dict[Node, Labels]) -> Labels | None:
    return known[node.args[0]] if is_identity(node) else None


def _norm_of_last(node: Node, known: dict[Node, Labels]) -> Labels:
    """layer_norm, rms_norm: the normalised dimensions meet weights of their own."""
    kept = len(shape(node)) - len(node.args[1])
    return (*known[node.args[0]][:kept], *(feature(s) for s in shape(node)[kept:]))


def _group_norm(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    labels[1] = feature(shape(node)[1])
    return tuple(labels)


def _cumulative(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    dim = node.args[1]
    labels[dim] = union([labels[dim], feature(shape(node)[dim])])
    return tuple(labels)


def _fill(node: Node, known: dict[Node, Labels]) -> Labels:
    return tuple(constant(s) for s in shape(node))


def _made(node: Node, known: dict[Node, Labels]) -> Labels:
    """arange, random numbers, uninitialised memory: values without a sequence."""
    return tuple(feature(s) if s > 1 else constant(1) for s in shape(node))


# --- positions moved, merged, cut -------------------------------------------------------------------------------


def _view(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source = node.args[0]
    if dtype(source) != dtype(node) or 0 in shape(source):
        return None
    return tuple(regroup(known[source], shape(source), shape(node)))


def _permute(node: Node, known: dict[Node, Labels]) -> Labels:
    return tuple(known[node.args[0]][d] for d in node.args[1])


def _transpose(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    if labels and len(labels) > 1:
        a, b = node.args[1:3] if len(node.args) > 2 else (-1, -2)
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


def _expand(node: Node, known: dict[Node, Labels]) -> Labels:
    return _broadcast(node, [node.args[0]], known)


def _repeat(node: Node, known: dict[Node, Labels]) -> Labels:
    source, times = node.args[:2]
    added = len(times) - len(shape(source))
    labels = [constant(1)] * added + list(known[source])
    return tuple(
        constant(origins.size_of(label) * r) if origins.is_constant(label) else concatenate([label] * r)
        for label, r in zip(labels, times)
    )


def _repeat_interleave(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, times, dim = (*node.args, None)[:3]
    if dim is None or not isinstance(times, int):
        return None
    labels, size = list(known[source]), shape(source)[dim]
    merged = regroup([labels[dim], constant(times)], [size, times], [size * times])
    labels[dim] = merged[0]
    return tuple(labels)


def _cat(node: Node, known: dict[Node, Labels]) -> Labels:
    parts, dim = node.args[0], (*node.args, 0)[1] % len(shape(node))
    parts = [p for p in parts if shape(p) != (0,)]
    return tuple(
        concatenate([known[p][d] for p in parts]) if d == dim else union([known[p][d] for p in parts])
        for d in range(len(shape(node)))
    )


def _stack(node: Node, known: dict[Node, Labels]) -> Labels:
    parts, dim = node.args[0], (*node.args, 0)[1] % len(shape(node))
    labels = [union([known[p][d] for p in parts]) for d in range(len(shape(node)) - 1)]
    labels.insert(dim, feature(len(parts)) if len(parts) > 1 else constant(1))
    return tuple(labels)


def _interval(node: Node, first: int, size: int) -> tuple[int, int, int]:
    """(start, end, step) of a slice whose arguments stand from `first` on, as Python counts."""
    start, end, step = (*node.args[first:], *(None, None, 1)[len(node.args) - first :])
    start, end, _ = slice(start, end).indices(size)
    return start, end, step


def _slice(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim = node.args[0], (*node.args, 0)[1]
    start, end, step = _interval(node, 2, shape(source)[dim])
    labels = list(known[source])
    if step == 1:
        labels[dim] = cut(labels[dim], start, end - start)
    else:
        labels[dim] = _rearranged(node, dim, labels[dim], (start, end, step))
    return tuple(labels)


def _rearranged(node: Node, dim: int, label: Label, key: tuple) -> Label:
    """The same positions in another order, or some of them: equal for equal labels treated equally."""
    size = shape(node)[dim]
    if origins.is_constant(label):
        return constant(size)
    flag = any(entry.projected for segment in label for entry in segment.entries)
    return root("rearranged", (node.target, key, label), size, flag)


def _flip(node: Node, known: dict[Node, Labels]) -> Labels:
    labels = list(known[node.args[0]])
    for dim in node.args[1]:
        labels[dim] = _rearranged(node, dim, labels[dim], ())
    return tuple(labels)


def _roll(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if len(node.args) < 3 or not node.args[2]:
        return None
    labels = list(known[node.args[0]])
    for shift, dim in zip(node.args[1], node.args[2]):
        labels[dim] = _rearranged(node, dim, labels[dim], (shift,))
    return tuple(labels)


def _index_select(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim, index = node.args
    labels = list(known[source])
    labels[dim] = _rearranged(node, dim, labels[dim], (index,))
    return tuple(labels)


def _index(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, indices = node.args
    dims = [d for d, index in enumerate(indices) if index is not None]
    if len(dims) != 1 or len(shape(indices[dims[0]])) != 1 or len(shape(node)) != len(shape(source)):
        return None
    labels = list(known[source])
    labels[dims[0]] = _rearranged(node, dims[0], labels[dims[0]], (indices[dims[0]],))
    return tuple(labels)


def _pad(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if len(node.args) > 2 and isinstance(node.args[2], str) and node.args[2] != "constant":
        return None
    labels, pads = list(known[node.args[0]]), node.args[1]
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        dim = len(labels) - 1 - i
        size = origins.size_of(labels[dim])
        inner = cut(labels[dim], max(-before, 0), size + min(before, 0) + min(after, 0))
        rims = [constant(n) if n > 0 else () for n in (before, after)]
        if before > 0 or after > 0:
            inner = inner if not origins.is_constant(inner) else feature(origins.size_of(inner))
        labels[dim] = concatenate([rims[0], inner, rims[1]])
    return tuple(_with_roots(node, labels))


def _with_roots(node: Node, labels: list[Label]) -> list[Label]:
    return [lb if origins.size_of(lb) == s else _root(node, d) for d, (lb, s) in enumerate(zip(labels, shape(node)))]


def _select(node: Node, known: dict[Node, Labels]) -> Labels:
    source, dim, index = node.args
    return _selected(known[source], dim, index % shape(source)[dim])


def _selected(labels: Labels, dim: int, index: int) -> Labels:
    rest = list(labels)
    gone = rest.pop(dim)
    return tuple(origins.pinned(rest, [cut(gone, index, 1)]))


def _slice_scatter(node: Node, known: dict[Node, Labels]) -> Labels:
    base, source, dim = (*node.args, 0)[:3]
    size = shape(base)
    dim %= len(size)
    start, end, step = _interval(node, 3, size[dim])
    labels = [union([known[base][d], known[source][d]]) if d != dim else known[base][d] for d in range(len(size))]
    if step == 1:
        whole = known[base][dim]
        labels[dim] = concatenate([cut(whole, 0, start), known[source][dim], cut(whole, end, size[dim] - end)])
    else:
        labels[dim] = _root(node, dim)
    return tuple(labels)


def _select_scatter(node: Node, known: dict[Node, Labels]) -> Labels:
    base, source, dim = node.args[:3]
    dim %= len(shape(base))
    rest = list(known[source])
    rest.insert(dim, known[base][dim])
    labels = [union([a, b]) for a, b in zip(known[base], rest)]
    labels[dim] = union([labels[dim], feature(shape(base)[dim])])
    return tuple(labels)


def _getitem(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source, index = node.args
    packet = getattr(source.target, "overloadpacket", None)
    if packet not in (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind):
        return None
    value = source.args[0]
    dim = (*source.args, 0)[1] if packet is aten.unbind else (*source.args, 0)[2]
    if packet is aten.unbind:
        return _selected(known[value], dim, index)
    labels = list(known[value])
    start = sum(v.shape[dim] for v in source.meta["val"][:index])
    labels[dim] = cut(labels[dim], start, shape(node)[dim])
    return tuple(labels)


def _view_as_complex(node: Node, known: dict[Node, Labels]) -> Labels:
    return known[node.args[0]][:-1]


def _view_as_real(node: Node, known: dict[Node, Labels]) -> Labels:
    return (*known[node.args[0]], feature(2))


# --- sums over an axis ------------------------------------------------------------------------------------------


def _reduction(node: Node, known: dict[Node, Labels]) -> Labels | None:
    source = node.args[0]
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    dims = given.get("dim")
    dims = range(len(shape(source))) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    dims = {d % len(shape(source)) for d in dims} if shape(source) else set()
    if len(shape(node)) == len(shape(source)):
        return tuple(constant(shape(node)[d]) if d in dims else lb for d, lb in enumerate(known[source]))
    return tuple(lb for d, lb in enumerate(known[source]) if d not in dims)


def _linear(node: Node, known: dict[Node, Labels]) -> Labels:
    return (*map(projected, known[node.args[0]][:-1]), feature(shape(node)[-1]))


def _contraction(node: Node, known: dict[Node, Labels]) -> Labels | None:
    """A product over features is a learned map; an outer product (angles = position x frequency) is none."""
    product = read_contraction(node)
    if product is None:
        return None
    sides = [(product.lhs, product.lhs_dims), (product.rhs, product.rhs_dims)]
    learned = any(
        shape(n)[d] > 1 for n, dims in sides for d, name in enumerate(dims) if name not in product.out_dims
    )
    labels = []
    for d, name in enumerate(product.out_dims):
        parts = [known[n][dims.index(name)] for n, dims in sides if name in dims]
        parts = [lb for lb in parts if origins.size_of(lb) == shape(node)[d]]
        label = union(parts) if parts else constant(shape(node)[d])
        labels.append(projected(label) if learned else label)
    if product.bias is not None:
        labels = [union(pair) for pair in zip(labels, _broadcast(node, [product.bias], known))]
    return tuple(labels)


def _attention(node: Node, known: dict[Node, Labels]) -> Labels | None:
    """The output stands where its query stands."""
    attention = read_sdpa(node)
    query, value = attention.query, attention.value
    if attention.dropout_p:
        return None
    labels = list(_broadcast(node, [query], known))
    if attention.is_causal:
        labels[-2] = union([labels[-2], feature(shape(node)[-2])])
    for d in range(len(labels) - 2):
        others = [known[n][d] for n in (attention.key, value) if origins.size_of(known[n][d]) == shape(node)[d]]
        labels[d] = union([labels[d], *others])
    if attention.mask is not None:
        for d, label in enumerate(_broadcast(node, [attention.mask], known)[:-1]):
            labels[d] = union([labels[d], label])
    labels[-1] = known[value][-1]
    return tuple(labels)


def _convolution(node: Node, known: dict[Node, Labels]) -> Labels | None:
    """Where the grid keeps its size (1x1, or padded, stride 1) its positions stay; else it is a new grid."""
    source, weight = node.args[:2]
    if len(shape(source)) != len(shape(node)):
        return None
    batch, _, *grid = known[source]
    labels = [projected(batch), feature(shape(node)[1])]
    for d, label in enumerate(grid, 2):
        same = shape(source)[d] == shape(node)[d] and shape(weight)[d] % 2
        if same and shape(weight)[d] > 1:  # neighbours mix, and padding shows at the rim
            label = union([label, feature(shape(node)[d])])
        labels.append(projected(label) if same else _root(node, d, True))
    return tuple(labels)


def _embedding(node: Node, known: dict[Node, Labels]) -> Labels:
    return (*known[node.args[1]], feature(shape(node)[-1]))


_RULES: dict[object, Callable[[Node, dict[Node, Labels]], Labels | None]] = {
    packet: rule
    for rule, packets in {
        _first: (aten._to_copy, aten.type_as, aten.real, aten.imag, aten.softmax, aten._softmax, aten.log_softmax, aten.special_softmax),
        _dropout: (aten.dropout,),
        _copy: (aten.copy,),
        _pointwise: (aten.where, aten.complex, aten.polar, aten.__and__, aten.__or__, aten.__xor__),
        _norm_of_last: (aten.layer_norm, aten.rms_norm),
        _group_norm: (aten.group_norm,),
        _cumulative: (aten.cumsum, aten.cumprod),
        _fill: (
            aten.full, aten.ones, aten.zeros, aten.scalar_tensor, aten.full_like, aten.ones_like, aten.zeros_like,
            aten.new_full, aten.new_ones, aten.new_zeros, aten.fill,
        ),
        _made: (
            aten.arange, aten.linspace, aten.rand, aten.randn, aten.rand_like, aten.randn_like, aten.empty,
            aten.empty_like, aten.new_empty, aten.eye,
        ),
        _view: (
            aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
        ),
        _permute: (aten.permute,),
        _transpose: (aten.transpose, aten.t, aten.mT),
        _expand: (aten.expand, aten.expand_as),
        _repeat: (aten.repeat,),
        _repeat_interleave: (aten.repeat_interleave,),
        _cat: (aten.cat,),
        _stack: (aten.stack,),
        _slice: (aten.slice,),
        _flip: (aten.flip,),
        _roll: (aten.roll,),
        _index_select: (aten.index_select,),
        _index: (aten.index,),
        _pad: (aten.constant_pad_nd, aten.pad),
        _select: (aten.select,),
        _slice_scatter: (aten.slice_scatter,),
        _select_scatter: (aten.select_scatter,),
        _view_as_complex: (aten.view_as_complex,),
        _view_as_real: (aten.view_as_real,),
        _linear: (aten.linear,),
        _contraction: (aten.matmul, aten.bmm, aten.mm, aten.einsum, aten.baddbmm, aten.addmm),
        _attention: (aten.scaled_dot_product_attention,),
        _convolution: (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
        _embedding: (aten.embedding,),
    }.items()
    for packet in packets
}  # fmt: skip
