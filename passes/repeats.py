"""Layers that repeat: runs of equal regions, each to be compiled once.

    a b | c d e f | c d e f | c d e f | g   ->   a b, 3 x (c d e f), g

Regions are equal when they have the same ops with the same constants, reading one another at the same places and the
same number of values from outside in the same pattern. Which values those are is each one's own matter: its weights,
its state, what the region before it made. Where in a layer the cuts go is chosen by what they cost (`cuts`): mostly
right behind a matrix multiplication in its middle.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .cuts import Cuts, Uncuttable, find_cuts, is_apart, ops_of, value_of

# Fewer gain too little: what stands before and behind a run is compiled apart from it, and mostly cut from a layer too.
FEWEST_REPEATS = 3
# Calling a compiled piece costs the host some 30 us.
FEWEST_OPS = 12
_PERIODS = 48  # that are tried, those of most ops first
_ROTATIONS = 6
_NEXT = 3  # a layer may hold so many ops that look alike
_PLAIN = (int, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Call:
    """One piece of a graph where it stands."""

    kind: int  # calls of one kind are equal regions
    ops: tuple[Node, ...]
    inputs: tuple[Node, ...]  # placeholders, attributes, and what other pieces make
    made: tuple[int, ...]  # which of the ops other pieces, or the graph's caller, read: the same of all of one kind


def find_repeats(gm: fx.GraphModule) -> list[Call]:
    """The graph as calls in its order, some of which are of one kind; empty where no layer repeats.

    Raises Uncuttable.
    """
    ops = ops_of(gm)
    if len(ops) < FEWEST_REPEATS * FEWEST_OPS:
        return []
    labels = _Labels(ops)
    runs = _runs_that_may_be(labels.of_ops, [is_apart(node) for node in ops])
    if not runs:
        return []
    found = _choose(runs, labels, find_cuts(gm))
    if not found:
        return []
    return _calls(gm, labels, found)


# --- labels -------------------------------------------------------------------------------------------------


class _Labels:
    """What can be told of each op by itself, as a small number, and what it reads."""

    def __init__(self, ops: Sequence[Node]) -> None:
        self.ops = ops
        self.place = {node: position for position, node in enumerate(ops)}
        self.reads: list[list[Node]] = []  # of each op, in the order of its arguments
        self._numbers: dict[Any, int] = {}
        self._of_inputs: dict[Node, int] = {}
        self.of_ops = [self._label(node) for node in ops]

    def _label(self, node: Node) -> int:
        reads: list[Node] = []
        arguments = _as_told(node.args, reads), _as_told(node.kwargs, reads)
        self.reads.append(reads)
        return self._number((node.op, node.target, arguments, _layout(value_of(node))))

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def of_input(self, node: Node) -> int:
        """Of what a region reads from outside. State that may move and state that does not are never alike; what the
        layout of a value is shows when it is there."""
        if node in self.place:
            return -1
        if node not in self._of_inputs:
            lifted, static = (
                node.meta.get("lifted"),
                (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"),
            )
            told = (lifted.scope, lifted.shape, lifted.stride, lifted.dtype) if lifted is not None else None
            self._of_inputs[node] = self._number((node.op, told, static, _layout(value_of(node))))
        return self._of_inputs[node]

    def region(self, start: int, stop: int) -> tuple[list, list[Node]]:
        """All that makes a region what it is, to be compared; and its inputs in the order in which it reads them."""
        told: list = self.of_ops[start:stop]
        inputs: dict[Node, int] = {}
        for position in range(start, stop):
            for node in self.reads[position]:
                place = self.place.get(node, -1)
                if place >= start:
                    told.append(place - start)
                else:
                    number = inputs.setdefault(node, len(inputs))
                    told.append((number, self.of_input(node)))
        return told, list(inputs)


def _as_told(argument: Any, reads: list[Node]) -> Any:
    """An argument as something that equals that of an op alike, with what it reads left out and put into `reads`."""
    kind = type(argument)
    if isinstance(argument, Node):
        reads.append(argument)
        return Node
    if isinstance(argument, tuple | list):
        return (kind is tuple, *(_as_told(part, reads) for part in argument))
    if isinstance(argument, dict):
        return (dict, *((key, _as_told(part, reads)) for key, part in argument.items()))
    if isinstance(argument, slice):
        return (slice, *(_as_told(part, reads) for part in (argument.start, argument.stop, argument.step)))
    if kind in (float, complex):
        return kind, repr(argument)  # -0.0 equals 0.0, and a NaN not even itself
    if kind not in _PLAIN:
        raise Uncuttable(f"an argument that is a {kind.__name__}")
    return kind, argument


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return type(value)


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class _Run:
    """Ops in which each is labelled as the one `period` before it."""

    start: int
    stop: int
    period: int

    @property
    def saves(self) -> int:
        """Ops that need not be compiled."""
        repeats = (self.stop - self.start) // self.period
        return (repeats - 1) * self.period if repeats >= FEWEST_REPEATS else 0


def _runs_that_may_be(labels: Sequence[int], apart: Sequence[bool]) -> list[_Run]:
    """By labels alone, for the distances at which the most ops have their like."""
    places = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    distances: Counter[int] = Counter()
    for found in places.values():
        for further in range(1, _NEXT + 1):
            distances.update(b - a for a, b in zip(found, found[further:]) if b - a >= FEWEST_OPS)
    likely = sorted(distances, key=lambda distance: -distances[distance])[:_PERIODS]
    numbers = torch.tensor(labels)
    runs = []
    for period in likely:
        differs = (numbers[period:] != numbers[:-period]).nonzero().flatten().tolist()
        for before, behind in zip([-1, *differs], [*differs, len(labels) - period]):
            run = _Run(before + 1, behind + period, period)
            if run.saves and any(apart[run.start : run.start + period]):
                runs.append(run)
    return runs


def _choose(runs: Sequence[_Run], labels: _Labels, cuts: Cuts) -> list[list[range]]:
    """Runs that do not overlap, those that save the most first, each as its regions; in the order of the graph."""
    queue = [(-run.saves, run) for run in runs]
    heapq.heapify(queue)
    taken: list[tuple[int, int]] = []
    found = []
    while queue:
        _, run = heapq.heappop(queue)
        free = _free(run, taken)
        if free != [run]:
            for part in free:
                heapq.heappush(queue, (-part.saves, part))
            continue
        regions = _cut(run, labels, cuts)
        if regions:
            found.append(regions)
            taken.append((regions[0].start, regions[-1].stop))
    return sorted(found, key=lambda regions: regions[0].start)


def _free(run: _Run, taken: Sequence[tuple[int, int]]) -> list[_Run]:
    """What is left of a run."""
    parts = [(run.start, run.stop)]
    for start, stop in taken:
        parts = [
            part for a, b in parts for part in ((a, min(b, start)), (max(a, stop), b)) if part[0] < part[1]
        ]  # fmt: skip
    return [left for left in (_Run(a, b, run.period) for a, b in parts) if left.saves]


def _cut(run: _Run, labels: _Labels, cuts: Cuts) -> list[range]:
    """The regions of a run, cut where that costs least of what is possible; empty where they are not alike."""
    rotations = []
    for start in range(run.start, run.start + run.period):
        places = range(start, run.stop + 1, run.period)
        if len(places) > FEWEST_REPEATS and all(cuts.allowed[place] for place in places):
            lost, crossing = (
                sum(costs[place] for place in places) / len(places) for costs in (cuts.lost, cuts.crossing)
            )
            # Before a matrix multiplication rather than behind one: what follows it may be fused into it.
            rotations.append((lost, crossing, not is_apart(labels.ops[start]), start))
    for *_, start in sorted(rotations)[:_ROTATIONS]:
        regions = _longest_alike(labels, [range(at, at + run.period) for at in range(start, run.stop, run.period)], run)
        if len(regions) >= FEWEST_REPEATS:
            return regions
    return []


def _longest_alike(labels: _Labels, regions: Sequence[range], run: _Run) -> list[range]:
    best: list[range] = []
    alike: list[range] = []
    first = None
    for region in regions:
        if region.stop > run.stop:
            break
        told, _ = labels.region(region.start, region.stop)
        if told != first:
            first, alike = told, []
        alike = [*alike, region]
        best = max(best, alike, key=len)
    return best


# --- calls --------------------------------------------------------------------------------------------------


def _calls(gm: fx.GraphModule, labels: _Labels, found: Sequence[Sequence[range]]) -> list[Call]:
    last = _last_readers(gm, labels)
    calls: list[Call] = []
    done = kinds = 0

    def add(region: range, kind: int, made: tuple[int, ...] | None = None) -> None:
        ops = tuple(labels.ops[region.start : region.stop])
        if made is None:
            made = tuple(sorted(_made(region, labels, last)))
        calls.append(Call(kind, ops, tuple(labels.region(region.start, region.stop)[1]), made))

    for regions in found:
        inner = set().union(*(_made(region, labels, last) for region in regions[1:-1]))
        # What stands before a run may be of use to all of it, and what the last one makes to what comes behind: such
        # a region is no repeat, for the others would have to hand out the same.
        while regions and not _made(regions[0], labels, last) <= inner:
            regions = regions[1:]
        while regions and not _made(regions[-1], labels, last) <= inner:
            regions = regions[:-1]
        if len(regions) < FEWEST_REPEATS:
            continue
        if done < regions[0].start:
            add(range(done, regions[0].start), kinds)
            kinds += 1
        for region in regions:
            add(region, kinds, tuple(sorted(inner)))
        kinds += 1
        done = regions[-1].stop
    if not calls:
        return []
    if done < len(labels.ops):
        add(range(done, len(labels.ops)), kinds)
    return calls


def _last_readers(gm: fx.GraphModule, labels: _Labels) -> dict[Node, int]:
    last = dict.fromkeys(labels.ops, -1)
    for place, reads in enumerate(labels.reads):
        for node in reads:
            last[node] = place
    for node in next(iter(reversed(gm.graph.nodes))).all_input_nodes:
        last[node] = len(labels.ops)
    return last


def _made(region: range, labels: _Labels, last: dict[Node, int]) -> set[int]:
    """Which ops of a region are read behind it."""
    return {place - region.start for place in region if last[labels.ops[place]] >= region.stop}
