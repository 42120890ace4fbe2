"""Which axes of which values are one sequence of tokens, and where its segments lie.

Every dimension of every value is a *rope*: a line of *cells*, each a run of positions. At first a dimension
is one cell. The links of each op (`token_links`) say which spans correspond; unifying two spans lays the
ropes side by side, splits cells where one ends and the other does not, and merges the pairs (union-find).
`cat` and `slice` so cut ropes into segments by themselves: where text and image tokens are joined, the joint
axis becomes [text cell, image cell], and every value that holds image tokens, anywhere in the graph, holds
the image cell.

Nothing here is proof. A wrong merge costs a permutation, never a wrong result: `token_proof` checks every op
anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from . import token_rules  # noqa: F401  (registers the rules)
from .collectives import is_exchange
from .collector import collector_paused
from .token_links import Call, Link, Span, call_of, element_of, is_element, shape_of

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Piece(NamedTuple):
    """A run of positions; equal `cell` means: the same tokens in the same order."""

    cell: int
    length: int


class Segment(NamedTuple):
    """Where a run of tokens of one kind lies on an axis."""

    start: int
    length: int
    cell: int


Rope = tuple[Piece, ...]


Value = tuple[fx.Node, int]  # output k of an op; (node, 0) for every node that is a tensor


@dataclass(frozen=True)
class TokenAxes:
    """The axes of every value of a graph.

    ropes: for each tensor, one rope a dimension (dimensions of size one: empty ropes).
    calls: for each op that has a rule, its links.
    ranks: axes that run over the ranks of a group, around the share of each.
    """

    ropes: Mapping[Value, tuple[Rope, ...]]
    calls: Mapping[fx.Node, Call]
    ranks: frozenset[Rope] = frozenset()

    def rope(self, node: fx.Node, dim: int) -> Rope:
        """One axis of a node that is a tensor."""
        return self.ropes[node, 0][dim]

    def segments(self, node: fx.Node, dim: int) -> tuple[Segment, ...]:
        """The segments of one axis, in order: text [0, 512), image [512, 4608), for a joint sequence."""
        rope = self.rope(node, dim)
        if not rope:  # an axis of one position
            return (Segment(0, 1, -1),)
        starts = [0]
        for piece in rope:
            starts.append(starts[-1] + piece.length)
        return tuple(Segment(start, piece.length, piece.cell) for start, piece in zip(starts, rope))


class Cell:
    """A run of positions: a union-find node that may be split in two."""

    __slots__ = ("length", "parent", "halves")

    def __init__(self, length: int):
        self.length = length
        self.parent: Cell | None = None
        self.halves: tuple[Cell, Cell] | None = None


def find(cell: Cell) -> Cell:
    root = cell
    while root.parent is not None:
        root = root.parent
    while cell.parent is not None:
        cell.parent, cell = root, cell.parent
    return root


def leaves(cells: Iterable[Cell]) -> list[Cell]:
    """The unsplit cells that a rope consists of by now."""
    out: list[Cell] = []
    stack = list(cells)[::-1]
    while stack:
        root = find(stack.pop())
        if root.halves is None:
            out.append(root)
        else:
            stack += root.halves[::-1]
    return out


def split(cell: Cell, at: int) -> tuple[Cell, Cell]:
    """Cuts an unsplit cell, everywhere it occurs, after `at` positions."""
    cell.halves = (Cell(at), Cell(cell.length - at))
    return cell.halves


def cut_out(rope: list[Cell], start: int, length: int) -> list[Cell]:
    """The cells of positions start .. start + length, splitting those at its ends."""
    rope[:] = leaves(rope)
    for edge in (start, start + length):
        position = 0
        for cell in rope:
            if position < edge < position + cell.length:
                split(cell, edge - position)
                rope[:] = leaves(rope)
                break
            position += cell.length
    out, position = [], 0
    for cell in rope:
        if start <= position < start + length:
            out.append(cell)
        position += cell.length
    return out


def merge(a: list[Cell], b: list[Cell]) -> None:
    """Makes two runs of cells of equal total length the same tokens, splitting where their cells differ."""
    left, right = a[::-1], b[::-1]
    while left:
        x, y = _next(left), _next(right)
        if x.length > y.length:
            split(x, y.length)
            left.append(x)
            right.append(y)
        elif x.length < y.length:
            split(y, x.length)
            left.append(x)
            right.append(y)
        elif x is not y:
            y.parent = x


def _next(stack: list[Cell]) -> Cell:
    while (root := find(stack.pop())).halves is not None:
        stack += root.halves[::-1]
    return root


def shifted(a: list[Cell], b: list[Cell]) -> bool:
    """Whether merging would merge a cell with itself some positions further on, as in x[1:] + x[:-1].

    That makes every position the same class, and splits the axis into single tokens. The cells are unsplit.
    """
    if len(a) == len(b) == 1:
        return False
    places: dict[Cell, list[int]] = {}
    position = 0
    for cell in a:
        places.setdefault(cell, []).append(position)
        position += cell.length
    position = 0
    for cell in b:
        if any(0 < abs(position - other) < cell.length for other in places.get(cell, ())):
            return True
        position += cell.length
    return False


@dataclass
class _Lines:
    """The ropes while they are being unified."""

    ropes: dict[Value, list[list[Cell]]] = field(default_factory=dict)

    def add(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        for k, tensor in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if isinstance(tensor, torch.Tensor):
                sizes = [size or 0 for size in shape_of(tensor)]
                self.ropes[node, k] = [[Cell(size)] if size > 1 else [] for size in sizes]

    def alias(self, node: fx.Node) -> None:
        """`node` takes one output of an op that has several."""
        if (output := element_of(node)) in self.ropes:
            self.ropes[node, 0] = self.ropes[output]
        else:  # an output within an output
            self.add(node)

    def rope(self, call: Call, span: Span) -> list[Cell]:
        key = (call.inputs[span.slot], 0) if span.slot >= 0 else (call.node, ~span.slot)
        return self.ropes[key][span.dim]

    def cells(self, call: Call, span: Span) -> list[Cell]:
        return cut_out(self.rope(call, span), span.start, span.length)

    def follow(self, call: Call, link: Link) -> None:
        """Merges all spans of a link, or none if that would merge positions with their neighbours."""
        first, *others = map(leaves, [self.cells(call, span) for span in link.spans])
        if not any(shifted(first, other) for other in others):
            for other in others:
                merge(first, other)

    def frozen(self) -> dict[Value, tuple[Rope, ...]]:
        """The ropes as they are now, equal ones shared."""
        pieces: dict[Cell, Piece] = {}
        shared: dict[Rope, Rope] = {}

        def freeze(rope: list[Cell]) -> Rope:
            for cell in (cells := leaves(rope)):
                if cell not in pieces:
                    pieces[cell] = Piece(len(pieces), cell.length)
            frozen = tuple(pieces[cell] for cell in cells)
            return shared.setdefault(frozen, frozen)

        return {value: tuple(map(freeze, dims)) for value, dims in self.ropes.items()}


@collector_paused()
def analyse_tokens(gm: fx.GraphModule) -> TokenAxes:
    """The token axes of every value of a canonical graph. Linear in the graph; no shapes are compared."""
    lines = _Lines()
    calls: dict[fx.Node, Call] = {}
    for node in gm.graph.nodes:
        if is_element(node):
            lines.alias(node)
            continue
        lines.add(node)
        if (call := call_of(node)) is not None:
            calls[node] = call
            for link in call.links:
                if not link.weak:
                    lines.follow(call, link)
    weak = [(call, link) for call in calls.values() for link in call.links if link.weak]
    exchanges = [node for node in gm.graph.nodes if node in calls and is_exchange(node)]
    weak = _follow_shares(lines, weak, exchanges)
    _follow_weak(lines, weak, [node for node in gm.graph.nodes if node.target is ATTENTION])
    ropes = lines.frozen()
    return TokenAxes(ropes, calls, frozenset(ropes[x, 0][0] for node in exchanges for x in (node, node.args[0])))


def query_and_key(attention: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The first two operands of an `aten.scaled_dot_product_attention` node, [..., tokens, head_dim] each."""
    query, key = (*attention.args, *attention.kwargs.values())[:2]
    return query, key


def _follow_shares(lines: _Lines, weak: list[tuple[Call, Link]], exchanges: list[fx.Node]) -> list:
    """Follows the links by which [ranks, share] becomes [all tokens]: every rank has its share in the same order.
    What is left of `weak`."""
    ranks = {cell for node in exchanges for x in (node, node.args[0]) for cell in leaves(lines.ropes[x, 0][0])}
    rest = []
    for call, link in weak:
        short = link.spans[0]
        around = lines.rope(call, short._replace(dim=short.dim - 1)) if short.dim and ranks else []
        cells = leaves(around)
        if cells and ranks.issuperset(cells) and sum(c.length for c in cells) == len(link.spans) - 1:
            lines.follow(call, link)
        else:
            rest.append((call, link))
    return rest


def _follow_weak(lines: _Lines, weak: list[tuple[Call, Link]], sites: list[fx.Node]) -> None:
    """Reads a long axis as copies of a short one only where attention reads the short one and not the long
    one, or where the long one is known to be copies already.

    So [batch, tokens] -> [batch * tokens] is followed, and [frames, height, width] -> [tokens] is not.
    """
    changed = True
    while changed and weak:
        attended = set()
        for site in sites:
            for x in query_and_key(site):
                attended.update(leaves(lines.ropes[x, 0][-2]))
        rest = []
        for call, link in weak:
            short, long = (leaves(lines.rope(call, span)) for span in link.spans[:2])
            copies = len(link.spans) - 1
            if (attended.issuperset(short) and attended.isdisjoint(long)) or _repeats(long, copies):
                lines.follow(call, link)
            else:
                rest.append((call, link))
        changed = len(rest) < len(weak)
        weak = rest


def _repeats(cells: list[Cell], copies: int) -> bool:
    """Whether a rope is a shorter one, `copies` times."""
    return len(cells) > 1 and len(cells) % copies == 0 and cells == cells[: len(cells) // copies] * copies
