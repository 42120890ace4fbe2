"""Fused linear maps come apart where an MLP site needs it, by views of their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from .canonical import clean
from .linears import Mlp, bias_of, is_input, is_map, parts_of, piece_of, read_mlp, takes_apart
from .nodes import dtype, emit, shape, under_autocast
from .token_streams import find_token_streams

aten = torch.ops.aten


def split_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """In place; equal up to the order of a sum.

    linear(cat(a, act(linear(x))), W, b)  ->  linear(a, W[:, :k], b) + linear(act(linear(x)), W[:, k:])
    up, gate = split(linear(x, W, b))     ->  linear(x, W[:f], b[:f]), linear(x, W[f:], b[f:])

    Only where a token MLP with a known activation comes of it. Columns that no such MLP reads stay together
    in one linear (a fused QKV), and a linear is left whole where something reads across its pieces.
    """
    streams = find_token_streams(gm)
    autocast = under_autocast(gm.graph)
    plain = {node for node in gm.graph.nodes if is_map(node) and node not in autocast and _is_plain(node)}
    fusions = [
        fusion
        for down in gm.graph.nodes
        if down in plain
        for fusion in _read_fusions(down)
        if plain.issuperset(fusion.mlp.linears) and streams.rows(fusion.mlp.input) is not None
    ]

    needed: dict[Node, set[Node]] = {}
    for fusion in fusions:
        for piece, hidden in zip(fusion.mlp.pieces, fusion.mlp.region.hidden, strict=True):
            if not piece.is_whole:
                needed.setdefault(piece.linear, set()).add(hidden)
    cuts = {linear: _plan_cut(linear, pieces) for linear, pieces in needed.items()}
    fusions = [f for f in fusions if f.down not in cuts and all(cuts.get(n, True) for n in f.mlp.linears)]

    used = {linear for fusion in fusions for linear in fusion.mlp.linears}
    for linear, cut in cuts.items():
        if linear in used:
            _cut_columns(linear, cut)
    parts: dict[Node, set[int]] = {}
    for fusion in fusions:
        if fusion.part is not None:
            parts.setdefault(fusion.down, set()).add(fusion.part)
    for down, chosen in parts.items():
        _cut_rows(down, chosen)
    return clean(gm)


@dataclass(frozen=True)
class _Fusion:
    """An MLP hidden by fusion: `part` is its place in the cat that `down` reads, None without a cat."""

    down: Node
    part: int | None
    mlp: Mlp


def _read_fusions(down: Node) -> list[_Fusion]:
    """The MLPs that end in `down` and hide in a cat before it or in a fused linear before them."""
    parts, chain = parts_of(down)
    found = []
    for i, part in enumerate(parts):
        mlp = read_mlp(part)
        if mlp is None or mlp.input is None or mlp.region.unsupported:
            continue
        if len(parts) == 1 and all(piece.is_whole for piece in mlp.pieces):
            continue
        between = {*mlp.region.inside, *mlp.region.hidden, *chain}
        if all(user in between or user is down for node in between for user in node.users):
            found.append(_Fusion(down, None if len(parts) == 1 else i, mlp))
    return found


def _is_plain(linear: Node) -> bool:
    """One dtype throughout, weights that are inputs: cutting them costs nothing at run time."""
    operands = linear.all_input_nodes
    return all(map(is_input, operands[1:])) and len({dtype(n) for n in (linear, *operands)}) == 1


# --- linear(x) -> split ---


@dataclass(frozen=True)
class _Columns:
    """Columns start to stop of a linear, and the (value, start, stop) that hold some or all of them."""

    start: int
    stop: int
    values: tuple[tuple[Node, int, int], ...]


def _plan_cut(linear: Node, needed: set[Node]) -> list[_Columns] | None:
    """Each needed piece for itself, the other columns in runs as long as possible; None if that cannot be."""
    above: set[Node] = set()
    for node in needed:
        while node is not linear:
            node = node.args[0]
            above.add(node)
    values = _values(linear, needed, above)
    if values is None:
        return None
    pieces = {value: piece_of(value) for value in values}
    spans = [(p.start, p.stop, value) for value, p in pieces.items()]
    alone = {(start, stop) for start, stop, value in spans if value in needed}
    runs: list[tuple[int, int]] = []
    for start, stop in sorted((start, stop) for start, stop, value in spans if value not in needed):
        if runs and start <= runs[-1][1] and (start, stop) not in alone:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    columns = sorted(alone.union(runs))
    if any(a[1] > b[0] for a, b in zip(columns, columns[1:])):
        return None
    return [
        _Columns(start, stop, tuple((value, a, b) for a, b, value in spans if start <= a and b <= stop))
        for start, stop in columns
    ]


def _values(fused: Node, needed: set[Node], above: set[Node]) -> list[Node] | None:
    """Pieces that serve every reader of `fused`, cut no finer than needed; None if one reads all of it."""
    if fused not in above:
        return [fused]
    found = []
    for user in fused.users:
        for piece in _pieces_below(user):
            values = None if piece is None else _values(piece, needed, above)
            if values is None:
                return None
            found += values
    return found


def _pieces_below(node: Node) -> list[Node | None]:
    if piece_of(node) is not None and not is_map(node):
        return [node]
    return [piece for user in node.users for piece in _pieces_below(user)] if takes_apart(node) else [None]


def _cut_columns(linear: Node, cut: list[_Columns]) -> None:
    graph, (x, weight, *_), bias = linear.graph, linear.args, bias_of(linear)
    for columns in cut:
        first, last = columns.start, columns.stop
        with graph.inserting_before(linear):
            whole = [weight] if bias is None else [weight, bias]
            operands = [emit(graph, aten.slice.Tensor, n, 0, first, last, like=linear) for n in whole]
            part = emit(graph, aten.linear.default, x, *operands, like=linear)
        for value, start, stop in columns.values:
            new = part
            if (start, stop) != (first, last):
                with graph.inserting_before(value):
                    new = emit(graph, aten.slice.Tensor, part, -1, start - first, stop - first, like=value)
            value.replace_all_uses_with(new)


# --- linear(cat) ---


def _cut_rows(down: Node, chosen: set[int]) -> None:
    graph, weight, bias = down.graph, down.args[1], bias_of(down)
    groups: list[list[Node]] = []
    for i, part in enumerate(parts_of(down)[0]):
        if groups and i not in chosen and i - 1 not in chosen:
            groups[-1].append(part)
        else:
            groups.append([part])
    total, start = None, 0
    with graph.inserting_before(down):
        for group in groups:
            part = group[0] if len(group) == 1 else emit(graph, aten.cat.default, group, -1, like=down)
            stop = start + shape(part)[-1]
            rows = emit(graph, aten.slice.Tensor, weight, 1, start, stop, like=down)
            operands = [part, rows] if bias is None or start else [part, rows, bias]
            term = emit(graph, aten.linear.default, *operands, like=down)
            total = term if total is None else emit(graph, aten.add.Tensor, total, term, like=down)
            start = stop
    down.replace_all_uses_with(total)
    graph.erase_node(down)
