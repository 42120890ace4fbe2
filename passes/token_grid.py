"""How a run of tokens lies in time and space: its grid (frames, height, width), read off the graph.

The evidence is a view that folds the token axis: [B, N, C] viewed as [B, h, w, p, p, c] by un-patchify, or
[B, C, t, h, w] flattened to [B, C, N] after a patch embedding, or a RoPE table built on the grid. Where
tokens come packed, position ids say it, at run time (`token_order.grids_from_ids`); else the user does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from operator import mul
from typing import NamedTuple

import torch
from torch import fx

from .token_axis import Piece, Rope, TokenAxes, query_and_key
from .token_links import RULES, is_tensor, shape_of
from .token_order import Grid
from .token_rules_shape import row_major, shape_groups

aten = torch.ops.aten


@dataclass(frozen=True)
class TokenRun:
    """A run of tokens that one permutation can reorder.

    pattern: the pieces of it, in every axis that holds it. grids: how it lies in time and space, one grid
    after the other; empty where only `ids` say it, at run time, or where the evidence contradicts itself.
    """

    pattern: Rope
    grids: tuple[Grid, ...]
    source: str  # what the grids were read from: the name of an op or of an input, or "option"
    ids: fx.Node | None = None  # position ids, [..., tokens, axes], that hold the run at `ids_start` of their tokens
    ids_start: int = 0
    contradicting: tuple[Grid, ...] = ()

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pattern)


def token_runs(gm: fx.GraphModule, axes: TokenAxes, attention: Iterable[fx.Node]) -> list[TokenRun]:
    """The runs with evidence of a grid that some op of `attention` has among its queries and among its keys.

    Disjoint; where two overlap, the longer one.
    """
    joint = _queried(axes, attention)
    runs = []
    for pattern, found in _folds(axes).items():
        if any(holds(rope, pattern) for rope in joint):
            grids = _finest(found)
            if len(grids) == 1:
                runs.append(TokenRun(pattern, grids, found[0].node.name))
            elif grids:
                runs.append(TokenRun(pattern, (), "contradicting views", contradicting=grids))
    runs += _runs_with_ids(gm, axes, joint)
    return _disjoint(runs)


def runs_of_option(axes: TokenAxes, attention: Iterable[fx.Node], grids: tuple[Grid, ...]) -> list[TokenRun]:
    """The runs of as many tokens as the user's grids have together, within the queries of some attention."""
    length = sum(prod(grid) for grid in grids)
    patterns: dict[Rope, None] = {}
    for rope in _queried(axes, attention):
        for i in range(len(rope)):
            for j in range(i + 1, len(rope) + 1):
                if sum(piece.length for piece in rope[i:j]) == length:
                    patterns[rope[i:j]] = None
    return _disjoint([TokenRun(pattern, grids, "option") for pattern in patterns])


def _queried(axes: TokenAxes, attention: Iterable[fx.Node]) -> list[Rope]:
    """What of the query axis of each attention is among its keys too, as runs of pieces."""
    out: dict[Rope, None] = {}
    for node in attention:
        query, key = query_and_key(node)
        keys = set(axes.rope(key, -2))
        for inside, pieces in itertools.groupby(axes.rope(query, -2), keys.__contains__):
            if inside:
                out[tuple(pieces)] = None
    return list(out)


def holds(rope: Rope, pattern: Rope) -> bool:
    """Whether the pattern lies in a rope, whole."""
    return any(rope[k : k + len(pattern)] == pattern for k in range(len(rope) - len(pattern) + 1))


def _disjoint(runs: list[TokenRun]) -> list[TokenRun]:
    """Of runs that share pieces, the longest."""
    out: list[TokenRun] = []
    taken: set[Piece] = set()
    for run in sorted(runs, key=lambda run: -run.length):
        if not taken.intersection(run.pattern):
            taken.update(run.pattern)
            out.append(run)
    return out


# --- views --------------------------------------------------------------------------------------------------


class _Fold(NamedTuple):
    """A view that makes one axis of several, or the reverse: their lengths, slowest first, and ropes."""

    node: fx.Node
    lengths: tuple[int, ...]
    ropes: tuple[Rope, ...]


def _folds(axes: TokenAxes) -> dict[Rope, list[_Fold]]:
    """Every fold of every axis, by the rope of the axis; equal ones of many layers once."""
    found: dict[Rope, dict[tuple, _Fold]] = {}
    for node, call in axes.calls.items():
        if RULES.get(node.target) is not row_major:
            continue
        x, y = call.signature["self"], call.signature.out
        if None in x.shape or None in y.shape or 0 in x.shape:
            continue
        ropes = axes.ropes[call.inputs[0], 0], axes.ropes[node, 0]
        for sides in shape_groups(x.shape, y.shape):
            if any(rope[d] in axes.ranks for rope, dims in zip(ropes, sides) for d in dims):
                continue  # ranks and their shares are no rows and columns
            ends = [(shape, dims, rope) for shape, dims, rope in zip((x.shape, y.shape), sides, ropes)]
            for (shape, dims, rope), (other, others, other_ropes) in (ends, ends[::-1]):
                fold = _fold(node, shape[dims[-1]], [(other[d], other_ropes[d]) for d in others])
                if fold is not None:
                    found.setdefault(rope[dims[-1]], {}).setdefault((fold.lengths, fold.ropes), fold)
    return _unfolded({rope: list(folds.values()) for rope, folds in found.items()})


def _fold(node: fx.Node, length: int, parts: list[tuple[int, Rope]]) -> _Fold | None:
    """`length` as a product of the last sizes of `parts`; of the slowest, a divisor will do (a batch)."""
    lengths, ropes = [], []
    for size, rope in reversed(parts):
        factor = size if length % size == 0 else length if size % length == 0 else 0
        if not factor:
            return None
        lengths.insert(0, factor)
        ropes.insert(0, rope if factor == size else ())
        length //= factor
        if length == 1:
            break
    return _Fold(node, tuple(lengths), tuple(ropes)) if length == 1 and len(lengths) > 1 else None


def _unfolded(folds: dict[Rope, list[_Fold]]) -> dict[Rope, list[_Fold]]:
    """Folds with parts that fold themselves: tokens = frames x places, places = height x width."""
    out: dict[Rope, list[_Fold]] = {rope: list(found) for rope, found in folds.items()}
    for rope, found in folds.items():
        for fold in found:
            for k, part in enumerate(fold.ropes):
                for inner in folds.get(part, ()):
                    lengths = fold.lengths[:k] + inner.lengths + fold.lengths[k + 1 :]
                    out[rope].append(_Fold(inner.node, lengths, ()))
    return out


def _finest(folds: list[_Fold]) -> tuple[Grid, ...]:
    """The grids of two or three axes, without coarser readings of them; if several, they contradict."""
    candidates = {fold.lengths for fold in folds if len(fold.lengths) <= 3}
    finest = [a for a in candidates if not any(a != b and _coarser(a, b) for b in candidates)]
    return tuple(sorted((1,) * (3 - len(lengths)) + lengths for lengths in finest))


def _coarser(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether `a` is `b` with neighbours multiplied together."""
    return set(itertools.accumulate(a, mul)) <= set(itertools.accumulate(b, mul))


# --- ids ----------------------------------------------------------------------------------------------------


def _runs_with_ids(gm: fx.GraphModule, axes: TokenAxes, joint: list[Rope]) -> Iterator[TokenRun]:
    """Runs whose positions are an input: [..., tokens, two to four axes], from which angles are computed.

    Text has ids too. Tokens that the graph returns are the picture's; where it returns none by that axis, the
    longest run is taken.
    """
    returned = {piece for value in _outputs(gm) for rope in axes.ropes[value, 0] for piece in rope}
    found = []
    for node in position_inputs(gm):
        start = 0
        for piece in axes.rope(node, -2):
            if any(piece in rope for rope in joint):
                found.append(TokenRun((piece,), (), node.name, ids=node, ids_start=start))
            start += piece.length
    pictures = [run for run in found if run.pattern[0] in returned]
    return iter(pictures or sorted(found, key=lambda run: -run.length)[:1])


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    output = next(iter(reversed(gm.graph.nodes)))
    return list(filter(is_tensor, output.all_input_nodes))


def position_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Position ids: placeholders of their shape, [..., tokens, two to four axes], that reach a sine or cosine."""
    seen: set[fx.Node] = set()
    stack = [node for node in gm.graph.nodes if node.target in _ANGLES]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and is_tensor(n) and n in seen]
    shapes = [shape_of(n.meta["val"]) for n in inputs]
    return [n for n, shape in zip(inputs, shapes) if len(shape) in (2, 3) and shape[-1] in (2, 3, 4)]


_ANGLES = (aten.sin.default, aten.cos.default, aten.polar.default)
