"""The proof that a permutation may stand where it is put: each op by itself, nothing believed from the
analysis.

The analysis names *occurrences*: places (value, dim, start) that hold the same run of tokens. The
transformation permutes, by one permutation, every occurrence in every value of some region. An op may lie
inside the region if its own links say so: every occurrence in its inputs and outputs lies whole within one
span of a link, and at the same offset every other span of that link holds an occurrence too. Then, by what a
link claims, permuting all of them in the inputs permutes all of them in the outputs, and no other place. By
induction over the region the whole is right, however the occurrences were found.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .token_axis import Rope, TokenAxes, Value
from .token_links import Call, Link, Span, element_of, is_element

Places = frozenset[tuple[int, int]]  # (dim, start) of each occurrence in one value


def occurrences(axes: TokenAxes, pattern: Rope) -> dict[Value, Places]:
    """Where `pattern`, a run of pieces, lies in every value; values without it are left out."""
    known: dict[Rope, tuple[int, ...]] = {}
    out: dict[Value, Places] = {}
    for value, ropes in axes.ropes.items():
        places = []
        for dim, rope in enumerate(ropes):
            if rope not in known:
                known[rope] = _find(rope, pattern)
            places += [(dim, start) for start in known[rope]]
        if places:
            out[value] = frozenset(places)
    return out


def _find(rope: Rope, pattern: Rope) -> tuple[int, ...]:
    starts, position, k = [], 0, 0
    while k < len(rope):
        if rope[k : k + len(pattern)] == pattern:
            starts.append(position)
            position += sum(piece.length for piece in pattern)
            k += len(pattern)
        else:
            position += rope[k].length
            k += 1
    return tuple(starts)


def unproven(call: Call, held: Mapping[Value, Places], length: int) -> tuple[int, int, int] | None:
    """None if the call may lie inside; else the (slot, dim, start) of an occurrence that its links do not
    carry.

    held: occurrences of `length` tokens by value.
    """
    places: dict[int, Places] = {}
    for k, node in enumerate(call.inputs):
        places[k] = held.get((node, 0), frozenset())
    for out in call.signature.outs:
        places[out.slot] = held.get((call.node, ~out.slot), frozenset())

    carried: set[tuple[int, int, int]] = set()
    for link in call.links:
        for offset in _offsets(link, places, length):
            spots = [(span.slot, span.dim, span.start + offset) for span in link.spans]
            if all((dim, start) in places[slot] for slot, dim, start in spots):
                carried.update(spots)
    for slot, spots in places.items():
        for dim, start in spots:
            if (slot, dim, start) not in carried:
                return slot, dim, start
    return None


def _offsets(link: Link, places: Mapping[int, Places], length: int) -> list[int]:
    """At which offsets of the link's first span an occurrence lies whole."""
    first: Span = link.spans[0]
    last = first.length - length
    return [s - first.start for d, s in places[first.slot] if d == first.dim and 0 <= s - first.start <= last]


def walls(gm: fx.GraphModule, axes: TokenAxes, held: Mapping[Value, Places], length: int) -> dict[fx.Node, str]:
    """Every op that touches an occurrence and may not lie inside, with the reason, in graph order."""
    out: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_element(node) or not touches(node, held):
            continue
        if not _agrees(node, held):
            out[node] = "what is read of it is not what it holds"
        elif node not in axes.calls:
            out[node] = "no rule for this op"
        elif (spot := unproven(axes.calls[node], held, length)) is not None:
            slot, dim, start = spot
            side = f"input {slot}" if slot >= 0 else f"output {~slot}"
            out[node] = f"rigid along dim {dim} of {side} from {start} to {start + length}"
    return out


def _agrees(node: fx.Node, held: Mapping[Value, Places]) -> bool:
    """Whether the elements of an op's outputs hold what those do: the links speak of the outputs, readers have the
    elements."""
    elements = filter(is_element, node.users)
    return all(held.get((e, 0)) == held.get(element_of(e)) and _agrees(e, held) for e in elements)


def touches(node: fx.Node, held: Mapping[Value, Places]) -> bool:
    """Whether any input or output of an op holds an occurrence."""
    values = [node, *node.all_input_nodes, *filter(is_element, node.users)]
    return any((value, 0) in held for value in values)
