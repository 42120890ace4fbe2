"""Where one graph's state lies: which sites of a stream are in host memory, and the ring that they pass through."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from . import host_memory, telemetry
from .budget import ALIGN, Footprint, Ledger, footprint, place
from .passes.lower import StateTensor, site_caches
from .passes.offload import DEPTH
from .state import State, allocate

if TYPE_CHECKING:
    from .plan import Plan


class Ring:
    """Slots on the device, each as large as the largest site's caches. It lives as long as state that uses it."""

    def __init__(self, device: torch.device, slots: int, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.bytes = slots * nbytes
        self._last_used: torch.cuda.Stream | None = None
        telemetry.holders.add(self)

    def views(self, turn: int, specs: Sequence[StateTensor]) -> list[torch.Tensor]:
        """A site's caches in the slot of its turn, one behind the other."""
        slot, at, views = self._slots[turn % len(self._slots)], 0, []
        with torch.inference_mode(False):
            for spec in specs:
                part = slot[at : at + spec.bytes].view(spec.dtype)
                views.append(part.as_strided(spec.shape, spec.stride))
                at += -(-spec.bytes // ALIGN) * ALIGN
        return views

    def follow(self) -> None:
        """Before a program: one that was launched on another CUDA stream may still read the slots."""
        device = self._slots[0].device
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            if self._last_used is not None and self._last_used != stream:
                stream.wait_stream(self._last_used)
            self._last_used = stream

    state_bytes = property(lambda self: self.bytes)
    host_state_bytes = 0

    def release(self) -> None:
        """It goes with the state that uses it."""


class Offload:
    """Lays out the streams of one graph within the memory budget."""

    def __init__(self, plan: Plan, budget: int | None, streams: int | None) -> None:
        self._plan, self._budget, self._streams = plan, budget, streams
        self._ring: weakref.ref[Ring] | None = None
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
        size, ring = self._footprint, self._ring() if self._ring is not None else None
        shared = size.shared if new_shared else 0
        hosted = place(size, self._budget, self._streams, ledger.held(mine), shared, 0 if ring else size.ring)
        if hosted and sum(map(size.movable.__getitem__, hosted)) > host_memory.available_bytes():
            return None
        return hosted

    def allocate(self, specs: Sequence[StateTensor], fits, hosted: Collection[int], ledger: Ledger) -> State:
        """The state of one stream. specs: its tensors, in the order in which programs take them."""
        borrowed, homes, buffers = {}, {}, []
        ring = self._take_ring(specs[0].device, ledger) if hosted else None
        for turn, number in enumerate(self._plan.movable):
            if number in hosted:
                caches = site_caches(number, self._plan.treatments[number])
                borrowed |= zip((spec.name for spec in caches), ring.views(turn, caches))
                tensors, taken = host_memory.take(caches)
                homes |= zip((spec.name for spec in caches), tensors)
                buffers += taken
        state = allocate(specs, fits, borrowed)
        placed = dict(zip((spec.name for spec in specs), state.tensors)) | homes
        for number in self._plan.movable:
            for spec in site_caches(number, self._plan.treatments[number]):
                state.homes.append(placed[spec.name])
        state.ring, state.host_bytes = ring, sum(buffer.nbytes for buffer in buffers)
        if buffers:
            weakref.finalize(state, host_memory.give_back, buffers)
        ledger.add(state)
        return state

    def _take_ring(self, device: torch.device, ledger: Ledger) -> Ring:
        ring = self._ring() if self._ring is not None else None
        if ring is None:
            ring = Ring(device, min(DEPTH, len(self._plan.movable)), self._footprint.slot)
            self._ring = weakref.ref(ring)
            ledger.add(ring, shared=True)
        return ring
