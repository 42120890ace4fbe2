"""Which values of a graph carry tokens; the rest is conditioning: timesteps, pooled text, positions.

Decided by dataflow from what a graph receives. An input with an axis of tokens begins a stream, and whatever
is computed from a stream carries it on, except through sin and cos: those embed timesteps and positions. A
learned table with such an axis begins one too; it is no conditioning, and nothing here tells it from an
input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from .nodes import is_tensor, shape

aten = torch.ops.aten

# Of these, the first argument alone gives values; the others are weights, or lend a dtype or a size.
_FIRST_ALONE = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.convolution.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.batch_norm.default,
    aten.type_as.default,
    aten.expand_as.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
# Of these, none does.
_EMBEDS_OR_FILLS = {
    aten.sin.default,
    aten.cos.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}


@dataclass(frozen=True)
class TokenStreams:
    """carriers: the values that depend on tokens. sequences: (batch, length) that attention works on."""

    carriers: frozenset[Node]
    sequences: frozenset[tuple[int, int]]

    def rows(self, node: Node) -> tuple[int, int] | None:
        """(batch, tokens) of a value [..., C], with batch * tokens rows in that order; None for conditioning.

        [B, N, C] has N tokens. [M, C], [M, 1, C] and [B, X, Y, C] have as many as the last leading
        dimensions that multiply to the length of an attention's sequence, or of a segment of one, or to
        batch times such a length.
        """
        if node not in self.carriers:
            return None
        *leading, _ = shape(node)
        rows = math.prod(leading)
        if len(leading) == 2 and leading[1] > 1:
            return leading[0], leading[1]
        lengths = {length for _, length in self.sequences if length > 1}
        for first in reversed(range(len(leading))):
            tokens = math.prod(leading[first:])
            if tokens in lengths:
                return rows // tokens, tokens
        for batch, length in sorted(self.sequences):
            if batch * length == rows and length > 1:
                return batch, length
        return (rows // leading[-1], leading[-1]) if len(leading) > 2 and leading[-1] > 1 else None


def find_token_streams(gm: fx.GraphModule) -> TokenStreams:
    """Reads lengths off the scaled_dot_product_attention nodes, then follows the streams."""
    sequences = _sequences(gm.graph)
    carriers: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            carries = is_tensor(node) and _has_tokens(shape(node), sequences)
        elif node.target is aten.embedding.default:
            carries = _has_tokens((*shape(node.args[1]), 1), sequences)
        elif isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            carries = not carriers.isdisjoint(_read_for_values(node))
        else:
            carries = False  # a size, a number
        if carries:
            carriers.add(node)
    return TokenStreams(frozenset(carriers), frozenset(sequences))


def _read_for_values(node: Node) -> list[Node]:
    if node.target in _EMBEDS_OR_FILLS:
        return []
    if node.target in _FIRST_ALONE:
        return node.all_input_nodes[:1]
    return node.all_input_nodes


def _has_tokens(size: tuple[int, ...], sequences: set[tuple[int, int]]) -> bool:
    """[B, ..., C] with something in between, or [M, ...] with a known number of rows."""
    if not _is_known(size):
        return len(size) >= 3
    if len(size) >= 3 and math.prod(size[1:-1]) > 1:
        return True
    rows = {length * n for batch, length in sequences for n in (1, batch)}
    return len(size) >= 2 and size[0] > 1 and size[0] in rows


def _is_known(size: tuple[int, ...]) -> bool:
    return all(isinstance(n, int) for n in size)


def _sequences(graph: fx.Graph) -> set[tuple[int, int]]:
    """(batch, length) of queries and keys, and of the segments that a cat joins to such a length."""
    found: set[tuple[int, int]] = set()
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            query, key = node.args[:2]
            found |= {(shape(n)[0], shape(n)[-2]) for n in (query, key) if _is_known(shape(n))}
    lengths: dict[int, set[int]] = {}
    for batch, length in found:
        lengths.setdefault(length, set()).add(batch)
    for node in graph.nodes:
        if node.target is aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            size = shape(node)
            if dim not in (-1, len(size) - 1) and _is_known(size):
                parts = {shape(part)[dim] for part in node.args[0] if len(shape(part)) == len(size)}
                found |= {(batch, part) for batch in lengths.get(size[dim], ()) for part in parts}
    return found
