"""Which model a captured graph's call belongs to, and which forward of that model is running."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .budget import Ledger
from .clock import Clock, InferredClock, Stream, Tick
from .config import Config
from .counting import CountedClock
from .evidence import Inputs, Reader, Times
from .passes.reasons import Reason
from .prediction import SHORTEST, TIMESTEPS, USUAL_STEPS, FirstLook, NoisePrediction, is_noise_of
from .schedule import Program
from .state import Owner, Reserve

if TYPE_CHECKING:
    from .generations import generation

log = logging.getLogger(__name__)
# Forwards that are remembered: as many streams, or graphs that receive the timestep, may be called by turns.
RECENT = 8


@dataclass(eq=False)
class Forward:
    """One forward of a model, in one thread: what is called from one tick to the next."""

    tick: Tick
    clock: Clock
    epoch: int
    begun_by: frozenset[int] | None = None  # key of the owner whose call began it; None where the model's own did
    blind: bool = False  # the tick may be another stream's
    calls: int = 0  # of graphs with sites, until now
    pieces: int = 0  # of those, that can be forecast
    can_forecast: bool = True  # all with layers can
    due: Program | None = None  # what all of them run, once the first one settled it; None where each is by itself
    layers: int = 0  # that those held
    occurrences: dict[frozenset[int], int] = field(default_factory=dict)  # by the key of the owner


class Root:
    """One model: what links the graphs of one forward.

    A graph that receives the timestep has a clock of its own, and begins a forward; the graphs called after it in
    the same forward take its tick. Where calls are counted, the first owner called (the leader) begins a forward.
    """

    def __init__(self, module: torch.nn.Module | None, whole: bool) -> None:
        """whole: the module itself is compiled; else it holds blocks that are."""
        self.module = weakref.ref(module) if module is not None else None
        self.whole = whole
        self.lock = threading.RLock()
        self.has_timestep = False  # a graph of it receives one
        self.block: generation | None = None  # the innermost one that this model runs in
        self.block_clock: Clock | None = None
        self.hooked = False  # the block begins forwards itself
        self.wanted = False  # a graph with sites found no clock
        self.over_budget = False  # what its pieces' forecasts would remember is
        self.prediction: NoisePrediction | None = None  # of a model that predicts noise, once that is known
        self._warned = False
        self._counted: CountedClock | None = None
        self._leader: frozenset[int] | None = None
        # Parameters of graphs that ran before the clock first ticked: a tick they see is that of the forward before.
        self._early: frozenset[int] = frozenset()
        self._running = threading.local()
        self._epoch = 0
        self._recent: deque[Forward] = deque(maxlen=RECENT)  # complete; the last one comes last
        self.ledger, self.reserve = Ledger(), Reserve()

    def count(self, config: Config) -> None:
        """Counts calls from now on, where the options say how many there are."""
        if config.steps and self._counted is None:
            self._counted = CountedClock(config.steps, config.streams or 1, by_content=not self.whole)

    @property
    def counted(self) -> CountedClock | None:
        """The counting clock, where counts were given outright; a `generation` block's word is above the options'."""
        return self.block_clock if isinstance(self.block_clock, CountedClock) else self._counted

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in."""
        running = getattr(self._running, "forward", None)
        return running if running is not None and running.epoch == self._epoch else None

    @property
    def _last(self) -> Forward | None:
        """The complete forward that shows what the one of this thread will be."""
        last = getattr(self._running, "last", None)
        return last if last is not None and last.epoch == self._epoch else None

    def was_one_call_of(self, owner: Owner) -> bool:
        """Whether the forward that this thread is in, or was in last, was one call of `owner` until now."""
        forward = self.forward
        alone = self.whole and forward is not None and forward.calls == 1 and not forward.blind
        return alone and _are_equal(forward.begun_by, owner.key)

    @property
    def is_one_call(self) -> bool:
        """Whether a forward is one call of one graph, as far as is known: then its outputs are the model's.

        Where graphs of different parameters that receive the timestep take turns, none of them is: one hands on what
        the other needs, perhaps.
        """
        forward, last = self.forward, self._last
        only = forward.calls == 0 and (last is None or last.calls == 1)
        if not self.whole or not only:
            return False
        return all(_are_alike(past, forward) for past in tuple(self._recent) if past.layers or past.calls)

    @property
    def is_of_pieces(self) -> bool:
        """Whether a forward is calls of several graphs, all of which could be forecast, as far as is known.

        To be asked in the call of a graph that has layers. Those of others that begin a forward are none of these
        pieces' forwards; where two that have some do, nothing tells that they are forecast in the same steps.
        """
        forward = self.forward
        known = [*(past for past in tuple(self._recent) if past.layers), forward]
        together = all(past.can_forecast and _are_alike(past, forward) for past in known)
        return together and not self.is_one_call and not self.over_budget

    @property
    def is_last_piece(self) -> bool:
        """Whether this is the last call of a forward that can be forecast, as in the one before."""
        last = self._last
        return last is not None and self.forward.pieces == last.pieces

    def forget(self) -> None:
        """No forward before this one counts any more."""
        for clock in (self._counted, self.block_clock):
            if clock is not None:
                clock.release()
        self.block = self.block_clock = self._leader = None
        self._recent.clear()
        self.hooked, self._early = False, frozenset()
        self._epoch += 1

    def begin_forward(self, clock: Clock, inputs: Inputs, read: Reader, owner: Owner | None = None) -> None:
        """owner: of the graph whose inputs these are; None where they are the model's own."""
        before = self.forward
        if before is not None:
            self._recent.append(before)
        for stream in clock.live:  # before anything is read: what they tell arrives with it
            if stream.look is not None:
                stream.look.follow(inputs)
        if isinstance(clock, InferredClock):
            clock.course = self.course
        tick = clock.tick(inputs, read)
        if not isinstance(clock, InferredClock):
            self._decide(tick.stream, 1.0 / (SHORTEST * (tick.steps or USUAL_STEPS)))
        begun_by = owner.key if owner is not None else None
        forward = self._running.forward = Forward(tick, clock, self._epoch, begun_by)
        self._running.last = self._most_like(forward)
        # Two calls alike, one graph of several sees: guidance whose prompts go to other graphs, maybe. Until a call
        # follows that is not repeated, nothing tells its stream.
        if before is not None and owner is not None and before.occurrences.keys() - {owner.key}:
            forward.blind = tick.repeats or (before.tick.repeats and before.blind)
        if forward.blind:
            tick.stream.states.clear()
            if not self._warned:
                self._warned = True
                log.warning("%s: the graph that receives the timestep cannot tell calls apart", Reason.NO_CLOCK.value)

    def _most_like(self, forward: Forward) -> Forward | None:
        """The last complete forward like this one: of its stream, if there is any."""
        found = None
        for past in reversed(self._recent):
            if _are_alike(past, forward):
                if past.tick.stream is forward.tick.stream:
                    return past
                found = found or past
        return found

    def look_at(self, output: torch.Tensor, latents: torch.Tensor) -> None:
        """A model's output at the first step of a generation: does it predict the noise in its latents?"""
        forward = self.forward
        if self.prediction is not None or forward is None or forward.tick.stream.last is None:
            return
        objects = forward.tick.stream.last.objects
        position = next((p for p, reference in enumerate(objects) if reference() is latents), None)
        if position is not None:
            forward.tick.stream.look = FirstLook(output, latents, position)

    def look_among(self, outputs: Iterable[Any]) -> None:
        """The same where the model runs in pieces: any of what they return may be its output."""
        forward = self.forward
        if self.prediction is not None or forward is None or forward.tick.step or forward.tick.stream.last is None:
            return
        inputs = [reference() for reference in forward.tick.stream.last.objects]
        for output in outputs:
            latents = next((known for known in inputs if is_noise_of(output, known)), None)
            if latents is not None:
                self.look_at(output, latents)

    def course(self, stream: Stream, times: Times) -> tuple[float, float] | None:
        """As `InferredClock.course`: by the share of noise, where that is what the model predicts. Not at the first
        step, at which that is looked at: which input is the timestep shows at the second."""
        moved = next(((then, now) for then, now in zip(stream.first, times) if then != now), None)
        if moved is not None:
            then, now = moved
            self._decide(stream, abs(now - then) / (1.0 if max(moved) <= 1.0 else TIMESTEPS))
        return self.prediction.course(times, stream.first) if self.prediction is not None else None

    def _decide(self, stream: Stream, way: float) -> None:
        """What the output of its first step is, if anything tells by now: it is `way` of the time ago."""
        found = stream.look.predicts_noise(way) if stream.look is not None and self.prediction is None else None
        if found is not None:
            stream.look = None
        if found:
            self.prediction = NoisePrediction()
            log.info("the model predicts noise: steps are forecast as the velocity that its output stands for")

    def next_time(self, stream: Stream) -> float:
        """The time of the stream's next step, if it goes on as it did."""
        if self.prediction is None:
            return stream.time + stream.stride
        then, now = stream.first, stream.last.times
        return self.prediction.course(tuple(n + stream.stride * (n != t) for n, t in zip(now, then)), then)[0]

    def tick(self, owner: Owner, inputs: Inputs, read: Reader) -> tuple[Tick, int] | None:
        """Where a call of `owner` belongs, and how often it was called in this forward before; None where nothing
        tells. The call that begins a forward ticks the clock."""
        clock = self._clock_of(owner)
        if clock is not None:
            self.begin_forward(clock, inputs, read, owner)
        forward = self.forward
        if forward is None and not self.hooked:
            self._early |= owner.key
        if forward is None or (clock is None and owner.key & self._early):
            self.wanted = True
            return None
        occurrence = forward.occurrences.get(owner.key, 0)
        last = self._last
        if self._leader is not None and last is not None and occurrence >= max(last.occurrences.get(owner.key, 0), 1):
            # Called more often than in the forward before: the leader's graph is no more, and nobody counts.
            self._leader, self._epoch = None, self._epoch + 1
            return None
        forward.occurrences[owner.key] = occurrence + 1
        if forward.blind:
            self.wanted = True
            return None
        return forward.tick, occurrence

    def end_call(self, layers: int) -> None:
        """After the call of a graph that holds `layers` layers. After the last one of a forward (known from the forward
        before), the clock may end the generation."""
        forward = self.forward
        if forward is not None:
            forward.calls += 1
            forward.layers += layers
            last = self._last
            usual = last.calls if last is not None else 1
            if not self.hooked and forward.calls >= max(usual, 1):
                forward.clock.finish()

    def end_forward(self) -> None:
        """Where the end of a forward is known outright."""
        forward = self.forward
        if forward is not None:
            forward.clock.finish()
            self._recent.append(forward)
            self._running.forward = None

    def _clock_of(self, owner: Owner) -> Clock | None:
        if self.hooked:
            return None
        if self.counted is not None:
            self._leader = self._leader or owner.key
            return self.counted if _are_equal(owner.key, self._leader) else None
        return owner.clock


def _are_equal(one: frozenset[int] | None, two: frozenset[int] | None) -> bool:
    """Sets are compared item by item even where they are one and the same."""
    return one is two or one == two


def _are_alike(forward: Forward, other: Forward) -> bool:
    """Whether two forwards began with the same graph, or with variants of it (another branch for calls without a
    prompt, a LoRA loaded): those share most of their parameters. What is called one behind the other shares few."""
    one, two = forward.begun_by, other.begun_by
    if _are_equal(one, two):
        return True
    return one is not None and two is not None and 2 * len(one & two) > min(len(one), len(two))
