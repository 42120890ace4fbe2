"""What each operation does to the labels of its operands' axes (see origins).

Rules are sound for "does not change along this axis"; a test runs whole models against that claim.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from . import collectives, origins
from .contractions import read_contraction
from .nodes import aten, is_identity, is_tensor, shape
from .origin_moves import MOVES, Labels, Rule, broadcast, getitem, node_root
from .origins import constant, feature, projected, union
from .sdpa import read_sdpa


def apply_rule(node: Node, known: dict[Node, Labels]) -> Labels | None:
    if node.target is operator.getitem:
        return getitem(node, known)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    rule = RULES.get(node.target.overloadpacket)
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


def _pointwise(node: Node, known: dict[Node, Labels]) -> Labels:
    return broadcast(node, [n for n in node.all_input_nodes if is_tensor(n)], known)


def _first(node: Node, known: dict[Node, Labels]) -> Labels:
    return known[node.args[0]]


def _copy(node: Node, known: dict[Node, Labels]) -> Labels:
    return broadcast(node, [node.args[1]], known)


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
    learned = any(shape(n)[d] > 1 for n, dims in sides for d, name in enumerate(dims) if name not in product.out_dims)
    labels = []
    for d, name in enumerate(product.out_dims):
        parts = [known[n][dims.index(name)] for n, dims in sides if name in dims]
        parts = [lb for lb in parts if origins.size_of(lb) == shape(node)[d]]
        label = union(parts) if parts else constant(shape(node)[d])
        labels.append(projected(label) if learned else label)
    if product.bias is not None:
        labels = [union(pair) for pair in zip(labels, broadcast(node, [product.bias], known))]
    return tuple(labels)


def _attention(node: Node, known: dict[Node, Labels]) -> Labels | None:
    """The output stands where its query stands."""
    attention = read_sdpa(node)
    query, value = attention.query, attention.value
    if attention.dropout_p:
        return None
    labels = list(broadcast(node, [query], known))
    if attention.is_causal:
        labels[-2] = union([labels[-2], feature(shape(node)[-2])])
    for d in range(len(labels) - 2):
        others = [known[n][d] for n in (attention.key, value) if origins.size_of(known[n][d]) == shape(node)[d]]
        labels[d] = union([labels[d], *others])
    if attention.mask is not None:
        for d, label in enumerate(broadcast(node, [attention.mask], known)[:-1]):
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
        labels.append(projected(label) if same else node_root(node, d, True))
    return tuple(labels)


def _embedding(node: Node, known: dict[Node, Labels]) -> Labels:
    return (*known[node.args[1]], feature(shape(node)[-1]))


RULES: dict[object, Rule] = MOVES | collectives.ORIGIN_RULES | {
    packet: rule
    for rule, packets in {
        _first: (
            aten._to_copy, aten.type_as, aten.real, aten.imag, aten.softmax, aten._softmax, aten.log_softmax,
            aten.special_softmax,
        ),
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
        _linear: (aten.linear,),
        _contraction: (aten.matmul, aten.bmm, aten.mm, aten.einsum, aten.baddbmm, aten.addmm),
        _attention: (aten.scaled_dot_product_attention,),
        _convolution: (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
        _embedding: (aten.embedding,),
    }.items()
    for packet in packets
}  # fmt: skip
