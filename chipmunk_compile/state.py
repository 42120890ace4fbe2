"""What is cached, for whom, and how many bytes: owners (parameters), models (roots), and the tensors of one stream."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import telemetry
from .clock import Clock, CountedClock, InferredClock, Tick
from .config import Config
from .passes.lower import StateTensor


@dataclass(eq=False)
class State:
    """The cache of one owner in one stream. `filled`: a refresh of this generation wrote it, and nothing failed since.

    `weights` is what was derived from the owner's weights: all its streams share one, and it goes with the last.
    """

    tensors: list[torch.Tensor]
    filled: bool = False
    weights: State | None = None

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


def allocate(specs: Sequence[StateTensor]) -> State:
    """Tensors at addresses that stay; a refresh writes every element before a delta reads one."""
    return State([spec.empty() for spec in specs])


class Root:
    """One model: what links the graphs of one forward.

    A graph that receives the timestep has a clock of its own; the graphs called after it in the same forward take
    its tick. Where calls are counted, the first owner called (the leader) begins a forward.
    """

    def __init__(self, module: torch.nn.Module | None, config: Config) -> None:
        self.module = weakref.ref(module) if module is not None else None
        self._counted = CountedClock(config.steps, config.streams or 1) if config.steps else None
        self.block: generation | None = None  # the innermost one that this model runs in
        self.block_clock: CountedClock | None = None
        self.leader: frozenset[int] | None = None
        self.forward = 0
        self.now: Tick | None = None
        # Parameters of graphs that ran before the clock first ticked: a tick they see is that of the forward before.
        self.early: frozenset[int] = frozenset()
        self._clock: Clock | None = None
        self._calls = self._calls_before = 0

    @property
    def counted(self) -> CountedClock | None:
        """The counting clock, where counts were given outright; a `generation` block's word is above the options'."""
        return self.block_clock or self._counted

    def forget(self) -> None:
        """No forward before this one counts any more."""
        if self._counted is not None:
            self._counted.release()
        self.block = self.block_clock = self.leader = self.now = self._clock = None
        self.early, self._calls = frozenset(), 0

    def begin_forward(self, clock: Clock, tick: Tick) -> None:
        self.now, self._clock = tick, clock
        self.forward += 1
        self._calls, self._calls_before = 0, self._calls

    def end_call(self) -> None:
        """After the last call of a forward (known from the forward before), the clock may end the generation."""
        self._calls += 1
        if (
            self._clock is not None
            and self._calls >= max(self._calls_before, 1)
            and isinstance(self._clock, CountedClock)
        ):
            self._clock.finish()


class Owner:
    """The parameters that a graph was called with. One compiled block shared by 40 layers has 40 owners."""

    def __init__(self, parameters: Sequence[torch.Tensor], root: Root, latents: frozenset[int]) -> None:
        self.key = frozenset(map(id, parameters))
        self.root = root
        self.clock = InferredClock(latents)
        self.occurrence = 0
        self.forward = -1  # the forward of the root in which this owner was called last
        self._weights: weakref.ref[State] | None = None
        self._references = [weakref.ref(p) for p in parameters]

    def is_of(self, parameters: Sequence[torch.Tensor]) -> bool:
        return all(r() is p for r, p in zip(self._references, parameters))

    @property
    def alive(self) -> bool:
        return all(r() is not None for r in self._references)

    def weights(self, specs: Sequence[StateTensor]) -> State:
        """What is derived from weights, as the streams alive share it."""
        state = self._weights() if self._weights is not None else None
        if state is None:
            state = allocate(specs)
            self._weights = weakref.ref(state)
        return state

    @property
    def state_bytes(self) -> int:
        state = self._weights() if self._weights is not None else None
        return state.bytes if state is not None else 0

    def release(self) -> None:
        self.clock.release()


_roots: weakref.WeakKeyDictionary[torch.nn.Module, Root] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _outermost_compiled_module(parameters: Sequence[torch.Tensor]) -> torch.nn.Module | None:
    from torch._dynamo.eval_frame import OptimizedModule

    wanted = {id(p) for p in parameters}
    found, checked = None, set()
    frame = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames[: max(frame.f_code.co_argcount, 1)]:
            module = frame.f_locals.get("self")
            if isinstance(module, torch.nn.Module) and id(module) not in checked:
                checked.add(id(module))
                compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
                if compiled and wanted <= {id(p) for p in module.parameters()}:
                    found = module
        frame = frame.f_back
    return getattr(found, "_orig_mod", found)


class generation:
    """Says outright where a generation starts, and ends it: its state is freed when the block ends.

    ```python
    with chipmunk_compile.generation(model, steps=28, streams=2):
        for t in timesteps: ...
    ```

    model: the model that is compiled, or whose blocks are; None for every compiled model called in the block.
    steps: denoising steps, streams: calls per step. With either given, calls are counted and the timestep is not read.
    """

    def __init__(self, model: torch.nn.Module | None = None, *, steps: int | None = None, streams: int | None = None):
        for name, value in (("steps", steps), ("streams", streams)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"generation({name}={value!r}): a positive integer")
        self.module = getattr(model, "_orig_mod", model)
        self._parameters = {id(p) for p in self.module.parameters()} if self.module is not None else None
        self._counts = (steps, streams or 1) if steps or streams else None
        self._roots: list[Root] = []
        self._owners: list[Owner] = []

    def covers(self, parameters: Sequence[torch.Tensor]) -> bool:
        return self._parameters is None or all(id(p) in self._parameters for p in parameters)

    def take(self, root: Root, owner: Owner) -> None:
        """Puts a call's owner, and its model, under this block."""
        if root.block is not self:
            root.forget()
            root.block = self
            root.block_clock = CountedClock(*self._counts) if self._counts else None
            self._roots.append(root)
        self._owners.append(owner)

    def __enter__(self) -> generation:
        with _lock:
            _blocks.append(self)
            _epoch.value += 1
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _blocks.remove(self)
            _epoch.value += 1
            for root in self._roots:
                if root.block_clock is not None:
                    root.block_clock.release()
                root.forget()
            for owner in self._owners:
                owner.release()
            self._roots.clear()
            self._owners.clear()


class _Epoch:
    """Moves when a `generation` block begins or ends: every call then asks anew which model it belongs to."""

    value = 0


_blocks: list[generation] = []
_epoch = _Epoch()


class Owners:
    """The owners of one graph's calls."""

    def __init__(self, positions: Sequence[int], latents: frozenset[int], config: Config) -> None:
        self._positions, self._latents, self._config = positions, latents, config
        self._known: dict[tuple[int, ...], Owner] = {}
        self._epoch = _epoch.value

    def of(self, args: Sequence) -> Owner | None:
        """The owner of a call; None where the graph receives no parameters."""
        if not self._positions:
            return None
        if self._epoch != _epoch.value:
            for owner in self._known.values():
                owner.release()
            self._known.clear()
            self._epoch = _epoch.value
        parameters = [args[i] for i in self._positions]
        key = tuple(map(id, parameters))
        owner = self._known.get(key)
        if owner is None or not owner.is_of(parameters):
            self._known = {k: o for k, o in self._known.items() if o.alive}
            owner = self._known[key] = _make_owner(parameters, self._latents, self._config)
        return owner


def _make_owner(parameters: Sequence[torch.Tensor], latents: frozenset[int], config: Config) -> Owner:
    """The owner of the forward that is running, and the model it belongs to.

    Called once per owner, so the walk up the call stack costs nothing later. A function compiled by itself is a
    model of its own.
    """
    module = _outermost_compiled_module(parameters)
    with _lock:
        block = next((block for block in reversed(_blocks) if block.covers(parameters)), None)
        if block is not None and block.module is not None:
            module = block.module
        root = _roots.get(module) if module is not None else None
        if root is None:
            root = Root(module, config)
            if module is not None:
                _roots[module] = root
        owner = Owner(parameters, root, latents)
        if block is not None:
            block.take(root, owner)
    telemetry.holders.add(owner)
    return owner
