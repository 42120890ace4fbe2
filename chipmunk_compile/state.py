"""What is cached, for whom, and how many bytes: owners (parameters) and the tensors of one stream."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import telemetry
from .clock import InferredClock
from .passes.lower import StateTensor


@dataclass(eq=False)
class State:
    """The cache of one owner in one stream. `filled`: a refresh of this generation wrote it, and nothing failed since.

    `fits` is what it was made for: another graph of the same owner lays its state out in its own way.
    `weights` is what was derived from the owner's weights: all its streams share one, and it goes with the last.
    """

    tensors: list[torch.Tensor]
    fits: Any = None
    filled: bool = False
    weights: State | None = None
    kept_from: list | None = None  # what the kept gathers among `tensors` were made from (`kept.Keeper`)
    masks_from: list | None = None  # what the boolean key masks of the refresh were made from
    # Where a site's caches lie between uses, for those that may move: in host memory, or as they are in `tensors`.
    homes: list[torch.Tensor] = field(default_factory=list)
    ring: Any = None  # what `tensors` of sites in host memory are part of (`offloading.Ring`)
    lifted: list[torch.Tensor] | None = None  # all that its programs take behind a graph's own inputs
    alone: tuple[list, list] | None = None  # (caches, homes) of the graph's only site that may move, if it has moved
    follower: weakref.ref[State] | None = None  # of the block that was called next in its first forward
    bytes: int = 0  # on the device, its own
    host_bytes: int = 0


class Reserve:
    """Memory of states that ended, for the next ones like them: programs recorded as CUDA graphs know it by address.

    Where one of another layout is asked for, another picture size say, what waits is freed.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple, deque[list[torch.Tensor]]] = {}  # by layout
        # Given back and not yet sorted in: state dies whenever the garbage collector runs.
        self._returned: deque[tuple[int, tuple, list[torch.Tensor]]] = deque()
        self._epoch = 0
        telemetry.holders.add(self)

    host_state_bytes = 0

    @property
    def state_bytes(self) -> int:
        self._sort_in()
        lists = (tensors for waiting in list(self._waiting.values()) for tensors in list(waiting))
        return sum(tensor.untyped_storage().nbytes() for tensors in lists for tensor in tensors)

    def release(self) -> None:
        """Frees what waits, and does not keep what is in use now."""
        self._epoch += 1
        self._returned.clear()
        self._waiting.clear()

    def take(self, specs: Sequence[StateTensor]) -> list[torch.Tensor]:
        self._sort_in()
        waiting = self._waiting.get(tuple(specs))
        if waiting:
            return waiting.popleft()  # as they came: the blocks of a model end in the order in which they began
        scopes = {spec.scope for spec in specs}
        for layout in [layout for layout in self._waiting if layout[0].scope in scopes]:
            del self._waiting[layout]
        return [spec.empty() for spec in specs]

    def keep(self, state: State, specs: Sequence[StateTensor], tensors: list[torch.Tensor]) -> None:
        """Takes the tensors back when the state is gone."""
        weakref.finalize(state, self._returned.append, (self._epoch, tuple(specs), tensors))

    def _sort_in(self) -> None:
        while self._returned:
            epoch, layout, tensors = self._returned.popleft()
            if epoch == self._epoch and layout:
                self._waiting.setdefault(layout, deque()).append(tensors)


def allocate(
    specs: Sequence[StateTensor],
    fits: Any = None,
    borrowed: Mapping[str, torch.Tensor] | None = None,
    reserve: Reserve | None = None,
) -> State:
    """Tensors at addresses that stay; a refresh writes every element before a delta reads one.

    borrowed: by name, tensors that are there already and belong to somebody else. reserve: where memory comes from and
    goes to; if not given, the device's allocator.
    """
    borrowed = borrowed or {}
    mine = [spec for spec in specs if spec.name not in borrowed]
    made = reserve.take(mine) if reserve is not None else [spec.empty() for spec in mine]
    own = dict(zip((spec.name for spec in mine), made))
    tensors = [own[spec.name] if spec.name in own else borrowed[spec.name] for spec in specs]
    state = State(tensors, fits, bytes=sum(t.untyped_storage().nbytes() for t in made))
    if reserve is not None:
        reserve.keep(state, mine, made)
    return state


class Owner:
    """The parameters that a graph was called with. One compiled block shared by 40 layers has 40 owners."""

    def __init__(self, parameters: Sequence[torch.Tensor], root, clock: InferredClock | None) -> None:
        """root: the models.Root that the parameters belong to; clock: of a graph that receives the timestep."""
        self.key = frozenset(map(id, parameters))
        self.root, self.clock = root, clock
        self.misjudged = 0  # steps that were run early, and were others
        self._weights: weakref.ref[State] | None = None
        self._gone: list[weakref.ref] = []
        self._references = [weakref.ref(p, self._gone.append) for p in parameters]

    @property
    def alive(self) -> bool:
        """Whether all parameters are there: then no other object has the identity of one."""
        return not self._gone

    def weights(self, specs: Sequence[StateTensor], reserve: Reserve | None = None) -> State:
        """What is derived from weights, as the streams alive share it."""
        state = self._weights() if self._weights is not None else None
        if state is None:
            state = allocate(specs, reserve=reserve)
            self._weights = weakref.ref(state)
        return state

    @property
    def has_weights(self) -> bool:
        """Whether what is derived from weights is there."""
        return self._weights is not None and self._weights() is not None

    host_state_bytes = 0

    @property
    def state_bytes(self) -> int:
        state = self._weights() if self._weights is not None else None
        return state.bytes if state is not None else 0

    def release(self) -> None:
        self._weights = None  # streams go, and with them what it was; a frame that failed may hold one for a while yet
        if self.clock is not None:
            self.clock.release()
