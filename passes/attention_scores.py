"""The scores below a softmax, read upwards to the product of queries and keys: scale, masks, dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.fx import Node

from .contractions import Contraction, read_contraction
from .nodes import VIEWS, aten, is_cast, is_identity, is_static, is_tensor, known_scalar, known_value, readers, shape

# exp(x - max) is zero in every format for such x, unless nothing else in the row is larger.
_EXCLUDES = -1e4


@dataclass(frozen=True)
class Mask:
    """What stands between the product and the softmax, besides the scale, at one place of the chain.

    Either `fill` is None and factor * node is added, or `fill` is what replaces a score where `node` (boolean)
    differs from `keep`. The node broadcasts against the scores as they are there: named `dims`, of size `sizes`.
    """

    node: Node
    dims: str
    sizes: tuple[int, ...]
    factor: float = 1.0
    fill: float | None = None
    keep: bool = True


@dataclass(frozen=True)
class Scores:
    """softmax over "j" of masks(scale * product), with dimensions named: capital letters a batch, i queries, j keys.

    A view may group the batch anew on the way; letters in alphabetical order always run over the same flat batch.
    """

    product: Contraction
    query: Node
    query_order: tuple[int, ...]  # permutation of `query` to batch..., i, features
    key: Node
    key_order: tuple[int, ...]  # permutation of `key` to batch..., j, features
    dims: str  # of the scores at this place of the chain
    sizes: tuple[int, ...]
    scale: float
    masks: tuple[Mask, ...] = ()
    row_factors: tuple[Mask, ...] = ()  # tensors that scale whole rows, by the fields of an added mask
    batches: tuple[tuple[int, ...], ...] = ()  # batch shapes seen, outer to inner


def read_scores(softmax: Node) -> Scores | None:
    """What `softmax` (aten.softmax.int) normalises; None where that is no masked product of queries and keys.

    No node on the way may have another reader.
    """
    path = score_path(softmax.args[0])
    if path is None or not all(map(is_static, path)):
        return None
    # The first guess, that the last dimension is the keys', holds unless the softmax runs over the other side.
    for keys_last in (True, False):
        scores = _start(path[0], keys_last)
        for upper, node in zip(path, path[1:]):
            scores = scores and _step(scores, upper, node)
        if scores is not None and scores.dims[softmax.args[1]] == "j":
            return scores
    return None


def score_path(node: Node, exclusive: bool = True) -> list[Node] | None:
    """The chain from a product down to `node`, through what scales, masks and rearranges scores.

    `exclusive`: no node of it may have another reader.
    """
    if not is_tensor(node) or (exclusive and len(readers(node)) != 1):
        return None
    if read_contraction(node) is not None:
        return [node]
    if node.op != "call_function":
        return None
    for operand in node.all_input_nodes:
        if is_tensor(operand) and math.prod(shape(operand)) == math.prod(shape(node)):
            path = score_path(operand, exclusive) if _carries(node, operand) else None
            if path is not None:
                return [*path, node]
    return None


def _carries(node: Node, operand: Node) -> bool:
    """`operand` may be the scores of which `node` makes the next ones; `_step` decides what that means."""
    first = node.args[0] is operand
    if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.where.self, aten.where.ScalarSelf):
        return True
    if node.target is aten.where.ScalarOther:
        return node.args[1] is operand
    return first and (
        is_cast(node)
        or is_identity(node)
        or node.target in VIEWS
        or node.target in _PERMUTATIONS
        or node.target in (aten.div.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar)
        or node.target in (aten.div.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.expand.default)
    )


def _start(node: Node, keys_last: bool) -> Scores | None:
    product = read_contraction(node)
    shared = set(product.lhs_dims) & set(product.rhs_dims)
    summed = shared - set(product.out_dims)
    batch = [c for c in product.out_dims if c in shared]
    sides = [
        (n, dims, [c for c in dims if c not in shared])
        for n, dims in ((product.lhs, product.lhs_dims), (product.rhs, product.rhs_dims))
    ]
    if any(len(own) != 1 for _, _, own in sides) or len(summed) != 1 or len(product.out_dims) != len(batch) + 2:
        return None
    last = product.out_dims[-1]
    (query, query_dims, (i,)), (key, key_dims, (j,)) = sides
    if (j == last) != keys_last:
        (query, query_dims, i), (key, key_dims, j) = (key, key_dims, j), (query, query_dims, i)
    names = dict(zip(batch, "ABCDEFGH")) | {i: "i", j: "j"}
    sizes = shape(node)
    features = summed.pop()
    scores = Scores(
        product,
        query,
        tuple(query_dims.index(c) for c in (*batch, i, features)),
        key,
        tuple(key_dims.index(c) for c in (*batch, j, features)),
        "".join(names[c] for c in product.out_dims),
        sizes,
        product.alpha,
    )
    scores = replace(scores, batches=(batch_sizes(scores.dims, sizes),))
    if product.bias is not None:
        added = Mask(product.bias, scores.dims, sizes, product.beta)
        return _add_mask(scores, added)
    return scores


def _step(scores: Scores, upper: Node, node: Node) -> Scores | None:
    """The scores after `node`, which reads them from `upper`."""
    target, args = node.target, node.args
    if is_identity(node) or is_cast(node):
        return scores
    if target is aten.expand.default:
        return scores if shape(node) == shape(upper) else None
    if target in _PERMUTATIONS:
        order = permutation(node)
        return replace(scores, dims="".join(scores.dims[d] for d in order), sizes=tuple(scores.sizes[d] for d in order))
    if target in VIEWS:
        return _regroup(scores, shape(node))
    if shape(node) != shape(upper):
        return None
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return _scaled(scores, upper, node)
    if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        return _shifted(scores, upper, node)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _filled(scores, args[1], False, args[2])
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        kept = args[1] is upper
        if not kept and args[2] is not upper:
            return None
        return _filled(scores, args[0], kept, args[2] if kept else args[1])
    return None


def _scaled(scores: Scores, upper: Node, node: Node) -> Scores | None:
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    other = node.args[1] if node.args[0] is upper else node.args[0]
    if node.kwargs or other is upper:
        return None
    number = known_scalar(other)
    if number is None:
        return None if divides or not is_tensor(other) else _row_scaled(scores, other)
    if number <= 0:
        return None
    factor = 1 / number if divides else number
    masks = tuple(
        replace(m, factor=m.factor * factor) if m.fill is None else replace(m, fill=m.fill * factor)
        for m in scores.masks
    )
    return replace(scores, scale=scores.scale * factor, masks=masks)


def _row_scaled(scores: Scores, other: Node) -> Scores | None:
    """A tensor that has one factor for all keys of a row scales the query instead."""
    factors = Mask(other, scores.dims, scores.sizes)
    if scores.masks or size_along(factors, "j") != 1:
        return None
    return replace(scores, row_factors=(*scores.row_factors, factors))


def _shifted(scores: Scores, upper: Node, node: Node) -> Scores | None:
    first, other = node.args[:2]
    alpha = known_scalar(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))
    sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
    if other is upper:
        if first is upper or sign < 0 or alpha != 1:
            return None
        other = first
    if alpha is None:
        return None
    if known_scalar(other) is not None:
        return scores  # softmax does not see what is added to every score
    if not is_tensor(other) or not other.meta["val"].dtype.is_floating_point:
        return None
    return _add_mask(scores, Mask(other, scores.dims, scores.sizes, sign * alpha))


def _filled(scores: Scores, condition: object, keep: bool, value: object) -> Scores | None:
    number = known_value(value)
    if number is None or not is_tensor(condition) or len(shape(condition)) > len(scores.sizes):
        return None
    fill = float(number)
    if math.isnan(fill) or fill > _EXCLUDES:
        return None
    return _add_mask(scores, Mask(condition, scores.dims, scores.sizes, fill=fill, keep=keep))


def _add_mask(scores: Scores, mask: Mask) -> Scores | None:
    if len(shape(mask.node)) > len(mask.sizes) or not is_static(mask.node):
        return None
    return replace(scores, masks=(*scores.masks, mask))


def _regroup(scores: Scores, sizes: tuple[int, ...]) -> Scores | None:
    dims = regrouped_dims(scores.dims, scores.sizes, sizes)
    if dims is None:
        return None
    return replace(scores, dims=dims, sizes=sizes, batches=(*scores.batches, batch_sizes(dims, sizes)))


# --- named dimensions -------------------------------------------------------------------------------------------

_PERMUTATIONS = (aten.transpose.int, aten.permute.default)


def permutation(node: Node) -> list[int]:
    """Of a transposition or permutation: output dimension d is input dimension permutation[d]."""
    rank = len(shape(node))
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]
    order = list(range(rank))
    a, b = node.args[1:3]
    order[a], order[b] = order[b], order[a]
    return order


def regrouped_dims(dims: str, sizes: tuple[int, ...], new_sizes: tuple[int, ...]) -> str | None:
    """The names after a view that leaves the last two dimensions, queries and keys in either order, as they are."""
    batch = dims[:-2]
    if len(new_sizes) < 2 or tuple(sizes[-2:]) != tuple(new_sizes[-2:]):
        return None
    if set(dims[-2:]) != {"i", "j"} or list(batch) != sorted(batch):
        return None
    return "ABCDEFGH"[: len(new_sizes) - 2] + dims[-2:]


def batch_sizes(dims: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the batch dimensions, in alphabetical order."""
    named = dict(zip(dims, sizes))
    return tuple(named[c] for c in sorted(dims) if c.isupper())


def size_along(mask: Mask, name: str) -> int:
    """The mask's own size along a dimension of the scores; 1 where it broadcasts."""
    back = mask.dims.index(name) - len(mask.dims)
    own = shape(mask.node)
    return own[back] if len(own) >= -back else 1
