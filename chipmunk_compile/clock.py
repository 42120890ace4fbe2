"""Which generation, stream and step a call belongs to, found from evidence.

A *stream* is one sequence of calls with the same conditioning: guidance by two calls makes two. Evidence:

1. identity: inputs that stay the same object from step to step (prompt embeddings, ids) name the stream; where a
   pipeline makes new objects at every step, equal fingerprints stand in for it;
2. order: the timestep moves one way within a stream; a move against it, or a leap, is a new generation;
3. continuity: between two steps the latents change a little; another noise is a new generation;
4. counting, when `steps` (and `streams`) are given outright.

Evidence that is missing or contradicts itself makes the call `fresh`: everything is recomputed. It never means guess.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import telemetry

# A step this many times longer than the one before is no step of the same schedule. Schedules in use stay below 2.
TIME_LEAP = 4.0
# Latents that changed by this share of their norm in one step are others: independent noise differs by 1.4, a step of
# a 4-step schedule by up to 0.5.
LATENT_LEAP = 1.0
# Steps in a row at which the latents leaped and all else went on, until their leaping counts for nothing: some loops
# (profiling, tests) hand over new noise at every step.
RESTLESS = 2
# Streams kept at a time when pipelines interleave on one model.
MAX_STREAMS = 8
# Calls that are remembered to learn which inputs recur.
MEMORY = 16

Inputs = Sequence[torch.Tensor]
Fingerprint = tuple[float, ...]
Reader = Callable[[Sequence[int]], tuple[float, dict[int, Fingerprint]]]


def _version(tensor: torch.Tensor) -> int:
    """Moves when the tensor is written in place: a static buffer that is filled anew is another input."""
    return 0 if tensor.is_inference() else tensor._version


class Evidence:
    """One call: its time, and for each input the object (weakly), its version and its fingerprint."""

    def __init__(self, inputs: Inputs, on_death: Callable[[int], Callable] | None = None) -> None:
        self.time = math.nan
        self.objects = [weakref.ref(t, on_death(p) if on_death else None) for p, t in enumerate(inputs)]
        self.versions = [_version(t) for t in inputs]
        self.prints: dict[int, Fingerprint] = {}

    def __len__(self) -> int:
        return len(self.objects)

    def same_object(self, other: Evidence, position: int) -> bool:
        if position >= len(other) or position >= len(self):
            return False
        mine = self.objects[position]()
        return (
            mine is not None
            and mine is other.objects[position]()
            and self.versions[position] == other.versions[position]
        )

    def same(self, other: Evidence, position: int) -> bool:
        if self.same_object(other, position):
            return True
        mine = self.prints.get(position)
        return mine is not None and mine == other.prints.get(position)


@dataclass(eq=False)
class Stream:
    """One sequence of calls. `states` is the cached state of every owner in it; releasing the stream frees it."""

    generation: int
    states: dict = field(default_factory=dict)
    programs: dict = field(default_factory=dict)  # by graph: those for the token order of this stream
    last: Evidence | None = None
    step: int = -1
    stride: float = 0.0  # last move of the time that was not zero; its sign is the direction
    steady: set[int] | None = None  # positions that never changed in this stream
    dead: bool = False

    @property
    def time(self) -> float:
        return self.last.time if self.last is not None else math.nan

    def restart(self, generation: int) -> None:
        """The stream of the next generation, in the same memory."""
        self.generation, self.last, self.steady = generation, None, None
        self.programs.clear()
        for state in self.states.values():
            state.filled = False

    def release(self) -> None:
        self.dead = True
        self.states.clear()


@dataclass(frozen=True)
class Tick:
    """One forward of a model. `fresh`: state must be recomputed, whatever the schedule says."""

    stream: Stream
    step: int
    fresh: bool


class Clock:
    """What both clocks share: the live streams and their release."""

    def __init__(self) -> None:
        self.live: list[Stream] = []
        self.generation = 0
        self.now: Tick | None = None
        telemetry.holders.add(self)

    @property
    def state_bytes(self) -> int:
        return sum(state.bytes for stream in self.live for state in list(stream.states.values()))

    def release(self) -> None:
        """Frees all state; the next forward starts a generation."""
        for stream in self.live:
            stream.release()
        self.live, self.now = [], None

    def _stream(self, spare: dict | None = None) -> Stream:
        telemetry.count("streams")
        stream = Stream(self.generation, states=spare or {})
        stream.restart(self.generation)
        self.live.append(stream)
        return stream

    def _next_generation(self) -> None:
        self.generation += 1
        telemetry.count("generations")


class CountedClock(Clock):
    """Steps and streams said outright: calls are counted and nothing is read from the device.

    Identity still guards the count: a stream whose steady inputs change has begun another generation.
    """

    def __init__(self, steps: int | None, streams: int) -> None:
        super().__init__()
        self.steps, self.per_step, self._calls = steps, streams, 0

    def tick(self, inputs: Inputs, read: Reader) -> Tick:
        index, step = self._calls % self.per_step, self._calls // self.per_step
        self.live = [s for s in self.live if not s.dead]
        lost = index < self._calls and index >= len(self.live)  # released in mid-generation
        evidence = Evidence(inputs)
        if self._calls == 0 or lost or self._broken_off(index, evidence):
            self._calls = index = step = 0
            self._next_generation()
            for stream in self.live:
                stream.restart(self.generation)
        if index == len(self.live):
            self._stream()
        stream = self.live[index]
        stream.last, stream.step = evidence, step
        self._calls += 1
        self.now = Tick(stream, step, fresh=step == 0)
        return self.now

    def finish(self) -> None:
        """After a forward: the last one of a generation frees its state."""
        if self.steps is not None and self._calls >= self.steps * self.per_step:
            self._calls = 0
            self.release()

    def release(self) -> None:
        super().release()
        self._calls = 0

    def _broken_off(self, index: int, evidence: Evidence) -> bool:
        if index >= len(self.live) or self.live[index].last is None:
            return False
        stream = self.live[index]
        held = {p for p in range(len(evidence)) if evidence.same_object(stream.last, p)}
        before, stream.steady = stream.steady, held if stream.steady is None else held & stream.steady
        return before is not None and bool(before - held)


class InferredClock(Clock):
    """Steps, streams and generations from identity, order and continuity.

    Which inputs are conditioning is learned: those that recur at another time.
    """

    def __init__(self, latents: frozenset[int] = frozenset()) -> None:
        """latents: positions among the inputs that hold latents (they have an output's shape). Those are never
        conditioning, even where a profiling loop hands over the same ones at every step."""
        super().__init__()
        self.latents = latents
        self.conditioning: set[int] = set()
        self._remade: set[int] = set()  # conditioning that is a new object, of the same content, at every step
        self._memory: deque[Evidence] = deque(maxlen=MEMORY)
        self._direction = 0.0
        self._interleaved = False
        self._restless, self._ignore_latents = 0, False
        self._suspended: list[Stream] = []
        self._spare: list[dict] = []
        self._first_time = math.nan

    def tick(self, inputs: Inputs, read: Reader) -> Tick:
        """Where the forward that begins now belongs.

        inputs: tensors that the caller passed, timestep, parameters and buffers left out.
        read(positions) -> (time, fingerprints): the timestep as a number, and a few numbers for each of the inputs
        asked for (those not seen before). This is the one device read of a forward.
        """
        evidence = Evidence(inputs, self._on_death)
        for past in self._memory:
            evidence.prints.update({p: v for p, v in past.prints.items() if evidence.same_object(past, p)})
        unknown = [p for p in range(len(inputs)) if p not in evidence.prints]
        evidence.time, prints = read(unknown)
        evidence.prints.update(prints)

        learned = self._learn(evidence)
        self.live = [s for s in self.live if not s.dead]
        stream = self._match(evidence)
        fresh = True
        if stream is None or not self._continues(stream, evidence):
            stream = self._begin(stream, evidence)
        else:
            # A first step repeated may be a generation begun again, and what was just learned may not be all.
            repeated = stream.step == 0 and evidence.time == stream.time
            fresh = self._latents_leaped(stream, evidence) or learned or repeated
        if stream.last is not None and evidence.time != stream.time:
            if stream.stride:
                self._direction = math.copysign(1.0, stream.stride)
            stream.stride = evidence.time - stream.time
        stream.step += 1
        if stream.step == 1:
            self._spare.clear()
        stream.last = evidence
        self._memory.append(evidence)
        self.live.sort(key=lambda s: s is stream)  # the one called last comes last
        self.now = Tick(stream, stream.step, fresh)
        return self.now

    def finish(self) -> None:
        """After a forward. Nothing ends here: the last step of a generation is not known before the next begins."""

    def release(self) -> None:
        super().release()
        self._spare.clear()
        self._suspended.clear()
        self._memory.clear()

    def _learn(self, evidence: Evidence) -> bool:
        """Whether an input proved to be conditioning just now: it recurs at another time."""
        before = len(self.conditioning)
        for past in self._memory:
            if past.time != evidence.time:
                recurring = {p for p in range(len(evidence)) if evidence.same(past, p)} - self.latents
                self._remade |= {p for p in recurring if not evidence.same_object(past, p)}
                self.conditioning |= recurring
        return len(self.conditioning) > before

    def _names(self, stream: Stream, evidence: Evidence) -> bool:
        return stream.last is not None and all(evidence.same(stream.last, p) for p in self.conditioning)

    def _match(self, evidence: Evidence) -> Stream | None:
        """The live stream that this call's conditioning names. Without conditioning, order and continuity must do."""
        if not self.conditioning:
            return self.live[-1] if self.live and len(evidence) <= 1 else None
        for stream in reversed(self.live):
            if self._names(stream, evidence):
                return stream
        return None

    def _continues(self, stream: Stream, evidence: Evidence) -> bool:
        move = evidence.time - stream.time
        direction = stream.stride or self._direction
        if move * direction < 0:
            if not stream.stride:
                self._direction = 0.0  # learned from another schedule, perhaps: learn it again
            return False
        if stream.stride and abs(move) > TIME_LEAP * abs(stream.stride):
            return False
        changed, leaped = self._changes(stream, evidence)
        return not (leaped == changed and changed > 1)

    def _latents_leaped(self, stream: Stream, evidence: Evidence) -> bool:
        """The one input that varies is unrelated to what it was: another noise, though prompt and time go on."""
        changed, leaped = self._changes(stream, evidence)
        self._restless = self._restless + 1 if changed == leaped == 1 else 0
        self._ignore_latents |= self._restless > RESTLESS
        return changed == leaped == 1 and not self._ignore_latents

    def _changes(self, stream: Stream, evidence: Evidence) -> tuple[int, int]:
        return _changes(stream.last, evidence, set(range(len(evidence))) - self.conditioning)

    def _begin(self, restarted: Stream | None, evidence: Evidence) -> Stream:
        """A new stream: of a new generation, or a partner in the one whose first step is being made."""
        if restarted is not None:
            self._retire(restarted)
        partners = [s for s in self.live if s.generation == self.generation]
        first_step = bool(partners) and all(s.step == 0 for s in partners)
        if not (first_step and evidence.time == self._first_time):
            self._next_generation()
            self._first_time = evidence.time
            self._interleaved |= any(self._names(s, evidence) and self._continues(s, evidence) for s in self._suspended)
            for stream in self.live[: 1 - MAX_STREAMS] if self._interleaved else self.live[:]:
                self._retire(stream)
        return self._stream(self._spare.pop() if self._spare else None)

    def _retire(self, stream: Stream) -> None:
        """Ends a stream; its memory serves the generation that begins."""
        self.live.remove(stream)
        self._spare.append(dict(stream.states))
        stream.release()
        self._suspended = [*self._suspended, stream][-MAX_STREAMS:]

    def _on_death(self, position: int) -> Callable[[weakref.ref], None]:
        """When the caller drops a prompt embedding, its stream can never be called again."""
        clock = weakref.ref(self)

        def died(reference: weakref.ref) -> None:
            owner = clock()
            if owner is not None and position in owner.conditioning - owner._remade:
                for stream in owner.live:
                    if stream.last is not None and stream.last.objects[position] is reference:
                        stream.release()

        return died


def _changes(before: Evidence, after: Evidence, positions: set[int]) -> tuple[int, int]:
    """How many of the inputs changed, and how many of those became something else altogether."""
    changed = leaped = 0
    for position in positions:
        old, new = before.prints.get(position), after.prints.get(position)
        if old and new and len(old) == len(new) and old != new:
            changed += 1
            # The first number is a sum over the whole input; the others are samples of it.
            leaped += math.dist(old[1:], new[1:]) > LATENT_LEAP * math.hypot(*new[1:])
    return changed, leaped


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Float64 [1 + up to 64]: the sum of the tensor, and evenly spaced elements. Equal for equal contents."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().flatten()
    samples = flat[:: max(1, flat.numel() // 64)][:64]
    return torch.cat([flat.sum(dtype=torch.float64).view(1), samples.double()])
