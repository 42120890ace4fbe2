"""What fits the memory budget: which sites' caches lie in host memory, and which sites stay dense.

The budget is for the state that all streams of one model hold on the device. Nothing here allocates: bytes come from
shapes, seconds from the bytes over a stated link and the work over a stated speed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .clock import Stream
from .config import Config
from .passes.flops import graph_flops
from .passes.lower import Treatment, kept_state, site_caches
from .passes.offload import DEPTH, movable_sites
from .passes.reasons import Reason
from .passes.sites import Declined

ALIGN = 512  # bytes, of each cache in a slot: what CUDA's allocator aligns to


@dataclass(frozen=True)
class Link:
    """How fast state comes to a device, and how fast the device computes meanwhile."""

    bytes_per_s: float = math.inf
    flops_per_s: float = math.inf


# Low rather than high: PCIe 4.0 with 16 lanes (5.0, as H100 and H200 have it, is twice as fast), and what sparse
# bfloat16 attention reaches on a Hopper GPU. On a CPU, state is in host memory wherever it lies.
LINKS = {"cuda": Link(25e9, 4e14)}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one graph's state, for one owner."""

    shared: int  # of all streams: what is derived from weights
    fixed: int  # of one stream, never moved
    movable: dict[int, int]  # of one stream, by the site's number, in the order of the graph
    kinds: dict[int, str]  # of those sites

    @property
    def slot(self) -> int:
        return max(self.movable.values(), default=0)

    @property
    def ring(self) -> int:
        """Device memory that caches pass through. It is left free where all fits too: blocks compiled one by one come
        one by one, and the last of them needs it."""
        return self.slot * DEPTH

    @property
    def stream(self) -> int:
        """All of one stream, wherever it lies."""
        return self.fixed + sum(self.movable.values())

    def place(self, room: int) -> frozenset[int] | None:
        """Sites whose caches go to the host, so that the rest of a stream fits `room`: as few as do it, spread over the
        depth so that copies find compute beside them; attention first, which only a refresh writes. None where nothing
        does it."""
        held = self.stream
        if held <= room:
            return frozenset()
        hosted: list[int] = []
        for kind in ("attention", "mlp"):
            tier = [number for number in self.movable if self.kinds[number] == kind]
            for count in range(1, len(tier) + 1):
                chosen = hosted + [tier[i] for i in spread(count, len(tier))]
                if held - sum(map(self.movable.__getitem__, chosen)) <= room:
                    return frozenset(chosen)
            hosted += tier
        return None


def spread(count: int, of: int) -> list[int]:
    """`count` of the numbers 0 to `of` - 1, evenly, the first as late as that allows: the first use comes soonest."""
    return [i for i in range(of) if (i + 1) * count // of > i * count // of]


@dataclass(frozen=True)
class Held:
    """Device bytes that a model's state holds."""

    shared: int = 0  # of all streams: rings, what is derived from weights
    stream: int = 0  # of the stream that asks
    others: int = 0


def place(footprint: Footprint, budget: int, streams: int | None, held: Held, new_shared: int, ring: int):
    """As Footprint.place, for one more state of a stream.

    streams: how many share the budget; where that is not known, the first leaves room for one more that lies in host
    memory. new_shared: shared bytes that this state brings. ring: bytes of its ring, 0 where it is there already.
    """
    for_streams = budget - held.shared - new_shared - ring
    room = for_streams - held.stream - held.others
    if streams is not None:
        room = min(room, for_streams // streams - held.stream)
    elif not held.others and footprint.movable:
        room -= footprint.fixed
    return footprint.place(room)


class Ledger:
    """Who holds device bytes of one model's state: what has `bytes`."""

    def __init__(self) -> None:
        self._shared: weakref.WeakSet = weakref.WeakSet()
        self._streams: weakref.WeakSet = weakref.WeakSet()
        self.streams: weakref.WeakSet = weakref.WeakSet()  # those that hold any of it

    def evict(self, beginning: Stream) -> bool:
        """Frees what streams hold that are past their first step, for one that begins: another picture size, say, with
        the same prompt. Those at their first step may be its partners in guidance."""
        past = [stream for stream in self.streams if stream is not beginning and stream.states and stream.step > 0]
        for stream in past:
            stream.states.clear()
        return bool(past)

    def add(self, holder, shared: bool = False) -> None:
        (self._shared if shared else self._streams).add(holder)

    def shared(self, kind: type) -> list:
        """What is held for all streams, of one kind."""
        return [holder for holder in self._shared if isinstance(holder, kind)]

    def held(self, mine: Sequence[object]) -> Held:
        """mine: what the stream that asks holds."""
        stream = sum(holder.bytes for holder in self._streams if holder in mine)
        everything = sum(holder.bytes for holder in self._streams)
        return Held(sum(holder.bytes for holder in self._shared), stream, everything - stream)


@dataclass(frozen=True)
class Fit:
    """What a graph's sites are under a budget."""

    treatments: tuple[Treatment, ...]
    movable: tuple[int, ...] = ()  # numbers of treatments whose caches may lie in host memory
    hosted: frozenset[int] = frozenset()  # those that do, where streams come as foreseen
    declined: tuple[Declined, ...] = ()


def footprint(treatments: Sequence[Treatment], movable: Sequence[int], canonical: fx.GraphModule) -> Footprint:
    caches = {n: site_caches(n, t) for n, t in enumerate(treatments)}
    moved = {n: sum(-(-tensor.bytes // ALIGN) * ALIGN for tensor in caches[n]) for n in movable}
    fixed = [tensor for n in caches if n not in moved for tensor in caches[n]] + kept_state(canonical)
    shared = sum(tensor.bytes for n, t in enumerate(treatments) for tensor in site_caches(n, t, "weights"))
    kinds = {n: treatments[n].site.kind for n in movable}
    return Footprint(shared, sum(tensor.bytes for tensor in fixed), moved, kinds)


def fit(treatments: Sequence[Treatment], canonical: fx.GraphModule, config: Config, link: Link | None = None) -> Fit:
    """The sites that a graph's programs treat within config.memory_budget, and which of them may move."""
    treatments = tuple(treatments)
    if config.memory_budget is None or not treatments:
        return Fit(treatments)
    link = link or LINKS.get(treatments[0].site.node.meta["val"].device.type, Link())
    can_move = not config.replays_cuda_graphs
    declined: list[Declined] = []
    while True:
        for kinds in (("attention",), ("attention", "mlp")) if can_move else ((),):
            movable = _worth_moving(treatments, canonical, kinds, link)
            size = footprint(treatments, movable, canonical)
            hosted = place(size, config.memory_budget, config.streams, Held(), size.shared, size.ring)
            if hosted is not None:
                return Fit(treatments, movable, hosted, tuple(declined))
        worst = _least_valuable(treatments, movable)
        detail = {"bytes": sum(t.bytes for t in site_caches(0, worst)), "memory_budget": config.memory_budget}
        reason = Reason.OVER_BUDGET if can_move else Reason.NO_OFFLOAD
        declined.append(Declined(worst.site.kind, worst.site.name, reason, detail))
        treatments = tuple(t for t in treatments if t is not worst)
        if not treatments:
            return Fit((), declined=tuple(declined))


def _worth_moving(treatments, canonical: fx.GraphModule, kinds: Sequence[str], link: Link) -> tuple[int, ...]:
    """Sites whose copies cost less than their sparsity saves, or cost nothing: all together run beside the compute."""
    numbers = movable_sites(canonical, treatments, kinds)
    seconds = {n: _copied(n, treatments[n]) / link.bytes_per_s for n in numbers}
    saved = {n: (t.dense_flops - t.delta_flops) / link.flops_per_s for n, t in enumerate(treatments)}
    compute = graph_flops(canonical) / link.flops_per_s - sum(saved.values())
    if sum(seconds.values()) <= compute:
        return numbers
    return tuple(n for n in numbers if seconds[n] <= saved[n])


def _copied(number: int, treatment: Treatment) -> int:
    """Bytes that a delta step moves, of a site in host memory: it writes an MLP's caches too."""
    return sum(t.bytes for t in site_caches(number, treatment)) * (2 if treatment.site.kind == "mlp" else 1)


def _least_valuable(treatments: Sequence[Treatment], movable: Sequence[int]) -> Treatment:
    """The site that saves the least work for its bytes; of those that cannot move, if there are any."""
    numbered = [n for n in range(len(treatments)) if n not in movable] or range(len(treatments))

    def value(number: int) -> float:
        t = treatments[number]
        state = site_caches(number, t) + site_caches(number, t, "weights")
        return (t.dense_flops - t.delta_flops) / sum(tensor.bytes for tensor in state)

    return treatments[min(numbered, key=value)]
