"""Every spelling of softmax(QK^T)V becomes one scaled_dot_product_attention node.

    matmul(softmax(mask(scale * matmul(q, k^T))), v)  ->  scaled_dot_product_attention(q, k, v, mask, scale=scale)

Read from the softmax upwards (attention_scores) and downwards (here), by what the operations do to named dimensions:
matmul, bmm, einsum, baddbmm, any transposition, any grouping of batch and heads. What is not proven stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx import Node

from .attention_masks import emit_mask, emit_row_factor
from .attention_scores import Scores, batch_sizes, permutation, read_scores, regrouped_dims
from .canonical import clean
from .contractions import Contraction, read_contraction
from .fused_layers import split_encoder_layers
from .narrow_attention import narrow_attention
from .nodes import (
    VIEWS,
    aten,
    dtype,
    emit,
    emit_permute,
    emit_reshape,
    is_cast,
    is_identity,
    is_static,
    known_scalar,
    shape,
    substitute,
    under_autocast,
)
from .origin_labels import Origins
from .origins import feature_run
from .sdpa import Sdpa, emit_sdpa
from .softmax_forms import raise_softmax


def raise_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Raises all attention of a canonical graph, in place, and returns it.

    Each becomes aten.scaled_dot_product_attention.default(query, key, value, attn_mask, dropout_p, is_causal, scale=,
    enable_gqa=) on [batch, heads, tokens, head_dim]. Attention that already is such a node gets the same form: four
    dimensions, keys and values without repeated heads, the smallest mask that says the same (see narrow_attention).
    Equal to the original up to rounding. A row whose keys are all masked with -inf gives 0 instead of NaN.

    Left alone: attention weights with another use, an active dropout, softmax over another axis than the keys',
    masks by multiplication, operands of different dtypes, and whatever runs under autocast inside the graph.
    """
    split_encoder_layers(gm)
    clean(raise_softmax(gm))
    unreliable = under_autocast(gm.graph)
    origins = Origins()
    for node in list(gm.graph.nodes):
        if node.target is aten.softmax.int and node not in unreliable:
            found = _match(node)
            if found is not None:
                _rewrite(gm.graph, found, origins)
    return narrow_attention(clean(gm))


@dataclass(frozen=True)
class _Operand:
    """factor * node, its dimensions to be permuted to (batch..., tokens, features)."""

    node: Node
    order: tuple[int, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class _Attention:
    """softmax(scores) @ value: what is replaced, and how its dimensions stand."""

    softmax: Node
    scores: Scores
    query: _Operand
    key: _Operand
    value: _Operand
    batch: tuple[int, ...]  # where weights meet value, letters in alphabetical order
    node: Node  # the product of the weights and the value
    out_order: tuple[int, ...]  # permutation of (batch..., queries, head_dim) to that product's dimensions


def _match(softmax: Node) -> _Attention | None:
    scores = read_scores(softmax)
    below = scores and _weights_product(softmax, scores.dims)
    if not below:
        return None
    product, weights, dims = below
    aligned = _align_value(product, weights, dims)
    if aligned is None:
        return None
    value, out_order = aligned
    operands = _in_one_dtype(
        _Operand(scores.query, scores.query_order), _Operand(scores.key, scores.key_order), value, product.node
    )
    if operands is None or _is_plain_matrix_input(scores) or not all(is_static(o.node) for o in operands):
        return None
    if any(dtype(f.node) != dtype(operands[0].node) for f in scores.row_factors):
        return None
    batch = batch_sizes(dims, shape(weights))
    return _Attention(softmax, scores, *operands, batch, product.node, out_order)


def _weights_product(softmax: Node, dims: str) -> tuple[Contraction, Node, str] | None:
    """The product that alone reads the attention weights, its weights operand, and that one's dimensions."""
    node = softmax
    while dims is not None and len(node.users) == 1:
        (user,) = node.users
        product = read_contraction(user)
        if product is not None:
            plain = product.bias is None and product.alpha == 1.0
            return (product, node, dims) if plain and node in (product.lhs, product.rhs) else None
        if user.target in (aten.transpose.int, aten.permute.default):
            dims = "".join(dims[d] for d in permutation(user))
        elif user.target in VIEWS:
            dims = regrouped_dims(dims, shape(node), shape(user))
        elif not (is_identity(user) or is_cast(user) or _expands_nothing(user)):
            return None
        node = user
    return None


def _expands_nothing(node: Node) -> bool:
    return node.target is aten.expand.default and shape(node) == shape(node.args[0])


def _align_value(product: Contraction, weights: Node, dims: str) -> tuple[_Operand, tuple[int, ...]] | None:
    """The value, and the order of the output's dimensions; None unless the product sums over the keys alone."""
    sides = [(product.lhs, product.lhs_dims), (product.rhs, product.rhs_dims)]
    (_, letters), (value, value_letters) = sides if weights is product.lhs else reversed(sides)
    letter = dict(zip(dims, letters))
    batch = [letter[c] for c in sorted(dims) if c.isupper()]
    features = [c for c in value_letters if c not in letters]
    if len(features) != 1 or sorted(value_letters) != sorted([*batch, letter["j"], *features]):
        return None
    out = [*batch, letter["i"], *features]
    sizes = dict(zip(letters, shape(weights)))
    if sorted(product.out_dims) != sorted(out) or shape(value)[value_letters.index(letter["j"])] != sizes[letter["j"]]:
        return None
    if any(shape(value)[value_letters.index(c)] > sizes[c] for c in batch):
        return None
    order = tuple(value_letters.index(c) for c in (*batch, letter["j"], *features))
    return _Operand(value, order), tuple(out.index(c) for c in product.out_dims)


def _is_plain_matrix_input(scores: Scores) -> bool:
    """x @ W with a two-dimensional input W is a linear map, whatever its result is used for."""
    sources = (_peel(_Operand(n, tuple(range(len(shape(n))))))[-1].node for n in (scores.query, scores.key))
    return any(n.op != "call_function" and len(shape(n)) == 2 for n in sources)


def _peel(operand: _Operand) -> list[_Operand]:
    """The operand, then the same one further and further up, through casts, factors and permutations."""
    peeled = [operand]
    while True:
        node, order, factor = operand.node, operand.order, operand.factor
        if is_identity(node) or (is_cast(node) and dtype(node).itemsize >= dtype(node.args[0]).itemsize):
            operand = _Operand(node.args[0], order, factor)
        elif node.target in (aten.transpose.int, aten.permute.default):
            inner = permutation(node)
            operand = _Operand(node.args[0], tuple(inner[d] for d in order), factor)
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            number = None if node.kwargs else known_scalar(node.args[1])
            if number is None or number <= 0 or shape(node.args[0]) != shape(node):
                return peeled
            divides = node.target in (aten.div.Tensor, aten.div.Scalar)
            operand = _Operand(node.args[0], order, factor / number if divides else factor * number)
        else:
            return peeled
        peeled.append(operand)


def _in_one_dtype(
    query: _Operand, key: _Operand, value: _Operand, out: Node
) -> tuple[_Operand, _Operand, _Operand] | None:
    """Query, key and value as they were before they were widened for the softmax; None if no dtype is common.

    Wide products of narrow operands, narrowed again by every reader, are narrow attention (which accumulates wide
    inside). Operands that are wide by nature are never narrowed.
    """
    wide = dtype(out)
    narrow = {dtype(user) for user in out.users if is_cast(user)} if all(is_cast(u) for u in out.users) else set()
    for wanted in (*narrow, wide) if len(narrow) == 1 else (wide,):
        found = [[o for o in _peel(operand) if dtype(o.node) == wanted] for operand in (query, key, value)]
        if all(found):
            return found[0][-1], found[1][-1], [o for o in found[2] if o.factor == 1.0][-1]
    return None


def _rewrite(graph: fx.Graph, found: _Attention, origins: Origins) -> None:
    scores = found.scores
    batch = _batch_and_heads(found, origins)
    kind = dtype(found.query.node)
    with graph.inserting_before(found.node):
        query = _emit_operand(graph, found.query, scores.batches[0], batch)
        for factor in scores.row_factors:
            query = emit_row_factor(graph, factor, batch, query)
        key = _emit_operand(graph, found.key, scores.batches[0], batch)
        value = _emit_operand(graph, found.value, found.batch, batch)
        mask = emit_mask(graph, scores.masks, batch, kind)
        scale = scores.scale * found.query.factor * found.key.factor
        out = emit_sdpa(graph, Sdpa(query, key, value, mask, scale=scale), like=found.softmax)
        out = emit_reshape(graph, out, (*found.batch, *shape(out)[2:]))
        out = emit_permute(graph, out, found.out_order)
        if dtype(out) != dtype(found.node):
            out = emit(graph, aten._to_copy.default, out, like=found.softmax, dtype=dtype(found.node))
    substitute(found.node, out)


def _emit_operand(graph: fx.Graph, operand: _Operand, full: Sequence[int], batch: tuple[int, int]) -> Node:
    """[batch, heads, tokens, head_dim]; `full` are the batch sizes that the product broadcasts to."""
    node = emit_permute(graph, operand.node, operand.order)
    rest = shape(node)[-2:]
    if shape(node)[:-2] != tuple(full):
        node = emit(graph, aten.expand.default, node, [*full, *rest], like=node)
    return emit_reshape(graph, node, (*batch, *rest))


def _batch_and_heads(found: _Attention, origins: Origins) -> tuple[int, int]:
    """How the flat batch splits: by any place of the chain that shows it, else by where the query comes from."""
    shapes = [*found.scores.batches, found.batch]
    for size in shapes:
        if len(size) >= 2:
            return math.prod(size[:-1]), size[-1]
    if not shapes[0]:
        return 1, 1
    (size,), source = shapes[0], found.query.node
    if found.query.order == (0, 1, 2):
        while source.target in VIEWS or is_identity(source):
            source = source.args[0]
            if len(shape(source)) == 4 and shape(source)[2:] == shape(found.query.node)[1:]:
                return shape(source)[:2]
    heads = feature_run(origins.of(found.query.node)[found.query.order[0]])
    return size // heads, heads
