"""Where one graph's state lies: which sites of a stream are in host memory, and the ring that they pass through."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from . import host_memory, telemetry
from .budget import ALIGN, Footprint, Ledger, footprint, place
from .kernels import transfer
from .passes.lower import StateTensor, site_caches
from .passes.offload import DEPTH
from .state import Reserve, State, allocate

if TYPE_CHECKING:
    from .plan import Plan


class Ring:
    """Slots on the device that the sites of a model take by turns. It lives as long as state that uses it."""

    state_bytes = property(lambda self: self.bytes)
    host_state_bytes = 0

    def __init__(self, device: torch.device, slot: int) -> None:
        with torch.inference_mode(False):
            self._slots = [torch.empty(slot, dtype=torch.uint8, device=device) for _ in range(DEPTH)]
        self.device, self.slot, self.bytes = self._slots[0].device, slot, DEPTH * slot
        self._turns = 0
        self._last_used: torch.cuda.Stream | None = None
        for memory in self._slots:  # what was fetched to where it lies is gone
            transfer.lane(self.device).forget(memory)
        telemetry.holders.add(self)

    def turn(self) -> int:
        """Whose turn comes next: blocks compiled one by one take slots in the order in which they are called."""
        self._turns += 1
        return self._turns

    def views(self, turn: int, specs: Sequence[StateTensor]) -> list[torch.Tensor]:
        """A site's caches in the slot of its turn, one behind the other."""
        slot, at, views = self._slots[turn % DEPTH], 0, []
        with torch.inference_mode(False):
            for spec in specs:
                part = slot[at : at + spec.bytes].view(spec.dtype)
                views.append(part.as_strided(spec.shape, spec.stride))
                at += -(-spec.bytes // ALIGN) * ALIGN
        return views

    def follow(self) -> None:
        """Before a program: one that was launched on another CUDA stream may still read the slots."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._last_used is not None and self._last_used != stream:
                stream.wait_stream(self._last_used)
            self._last_used = stream

    def release(self) -> None:
        """It goes with the state that uses it."""


class Offload:
    """Lays out the streams of one graph within the memory budget."""

    def __init__(self, plan: Plan, budget: int | None, streams: int | None) -> None:
        self._plan, self._budget, self._streams = plan, budget, streams
        self._footprint: Footprint | None = None
        if budget is not None:
            self._footprint = footprint(plan.treatments, plan.movable, plan.canonical)

    def place(self, ledger: Ledger, mine: Sequence[object], new_shared: bool) -> frozenset[int] | None:
        """Sites of one more stream that lie in host memory; None where it does not fit all the same.

        mine: state that the stream holds already, of other owners. new_shared: what is derived from weights is not
        there yet.
        """
        if self._footprint is None:
            return frozenset()
        size, ring = self._footprint, self._ring(ledger)
        shared = size.shared if new_shared else 0
        hosted = place(size, self._budget, self._streams, ledger.held(mine), shared, 0 if ring else size.ring)
        if hosted and sum(map(size.movable.__getitem__, hosted)) > host_memory.available_bytes():
            return None
        return hosted

    def allocate(
        self,
        specs: Sequence[StateTensor],
        fits,
        hosted: Collection[int],
        ledger: Ledger,
        reserve: Reserve | None = None,
    ) -> State:
        """The state of one stream. specs: its tensors, in the order in which programs take them."""
        ring, borrowed, homes, buffers = None, {}, {}, []
        if hosted:
            ring = self._ring(ledger) or self._make_ring(ledger)
        first = ring.turn() if ring and len(self._plan.movable) == 1 else 0
        for turn, number in enumerate(self._plan.movable):
            if number in hosted:
                caches = site_caches(number, self._plan.treatments[number])
                borrowed |= zip((spec.name for spec in caches), ring.views(first + turn, caches))
                tensors, taken = host_memory.take(caches)
                homes |= zip((spec.name for spec in caches), tensors)
                buffers += taken
        host_memory.get_pages(buffers)
        state = allocate(specs, fits, borrowed, reserve)
        placed = dict(zip((spec.name for spec in specs), state.tensors)) | homes
        for number in self._plan.movable:
            for spec in site_caches(number, self._plan.treatments[number]):
                state.homes.append(placed[spec.name])
        state.ring, state.host_bytes = ring, sum(buffer.nbytes for buffer in buffers)
        if ring and len(self._plan.movable) == 1:
            state.alone = list(borrowed.values()), list(homes.values())
        if buffers:
            weakref.finalize(state, host_memory.give_back, buffers)
        ledger.add(state)
        return state

    def _ring(self, ledger: Ledger) -> Ring | None:
        """One of the model's that has room for this graph's sites."""
        device = self._plan.treatments[0].site.node.meta["val"].device if self._plan.treatments else None
        fitting = (r for r in ledger.shared(Ring) if r.slot >= self._footprint.slot and r.device == device)
        return next(fitting, None)

    def _make_ring(self, ledger: Ledger) -> Ring:
        ring = Ring(self._plan.treatments[0].site.node.meta["val"].device, self._footprint.slot)
        ledger.add(ring, shared=True)
        return ring


def prefetch(state: State | None) -> None:
    """Begins to bring the caches of a block's only site, while the block before it computes."""
    if state is not None and state.alone is not None and state.filled:
        caches, home = state.alone
        state.ring.follow()
        transfer.begin(caches, home)
