"""What the callables of all graphs share, and the one of a graph that stays dense: whose call it is, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from .clock import Tick
from .config import Config
from .evidence import TimesRead
from .models import Root
from .owners import Owners
from .plan import Inputs
from .state import Owner


class Called:
    """What all graphs' callables share: whose call it is, and the evidence it shows."""

    def __init__(self, inputs: Inputs, config: Config) -> None:
        self._inputs = inputs
        self._times = TimesRead()
        self._owners = Owners(inputs.parameters, inputs.latents, bool(inputs.timesteps), config)

    def _tick(
        self, owner: Owner, args: Sequence, meanwhile: Callable[[], None] | None = None
    ) -> tuple[Tick, int] | None:
        """meanwhile: called where the host would wait for what it reads from the device."""
        user = [args[i] for i in self._inputs.user]
        times = [args[i] for i in self._inputs.timesteps]
        return owner.root.tick(owner, user, lambda positions: self._times.read(times, user, positions, meanwhile))


class Timekeeper(Called):
    """A graph that stays dense and receives the timestep: it begins the forward of the graphs called after it."""

    # Forwards without any graph that uses the tick, until it is no longer taken.
    IDLE = 3

    def __init__(self, inputs: Inputs, dense: Callable, config: Config) -> None:
        super().__init__(inputs, config)
        self._dense = dense
        self._idle: Counter[Root] = Counter()

    def __call__(self, *args):
        owner = self._owners.of(args)
        if owner is None:
            return self._dense(*args)
        root = owner.root
        with root.lock:
            before = root.forward
            self._idle[root] = self._idle[root] + 1 if before is not None and before.calls == 0 else 0
            if self._idle[root] < self.IDLE or root.wanted:
                self._tick(owner, args)
        return self._dense(*args)
