"""Which generation, stream and step a call belongs to, found from evidence.

A *stream* is one sequence of calls with the same conditioning: guidance by two calls makes two. Evidence:

1. identity: inputs that stay the same object from step to step (prompt embeddings, ids) name the stream; where a
   pipeline makes new objects at every step, equal fingerprints stand in for it;
2. order: the timestep moves one way within a stream; a move against it, or a leap, is a new generation;
3. continuity: between two steps the latents change a little; another noise is a new generation;
4. counting, when `steps` (and `streams`) are given outright (counting.py).

Evidence that is missing or contradicts itself makes the call `fresh`: everything is recomputed. It never means guess.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import telemetry
from .evidence import Evidence, Fingerprint, Inputs, Reader, Times
from .rounding import Unrounded

# A step this many times longer than the one before is no step of the same schedule. Schedules in use stay below 2.
TIME_LEAP = 4.0
# Steps in a row at which the latents leaped and all else went on, until their leaping counts for nothing: some loops
# (profiling, tests) hand over new noise at every step.
RESTLESS = 2
# Latents that move so many times as fast as in the step before were changed by other hands than the sampler's.
JUMP = 3.0
# Generations in a row whose steps were few, until the next is taken to have no more.
SHORT_IN_A_ROW = 3
# Streams kept at a time when pipelines interleave on one model.
MAX_STREAMS = 8
# Calls that are remembered to learn which inputs recur.
MEMORY = 16


@dataclass(eq=False)
class Stream:
    """One sequence of calls. `states` is the cached state of every owner in it; releasing the stream frees it."""

    generation: int
    states: dict = field(default_factory=dict)
    programs: dict = field(default_factory=dict)  # by graph: those for the token order of this stream
    last: Evidence | None = None
    step: int = -1
    stride: float = 0.0  # last move of the time that was not zero; its sign is the direction
    first: Times | None = None  # of the first step
    moment: float = math.nan  # the time of the last step, as it was before it was rounded
    unrounded: Unrounded = field(default_factory=Unrounded)  # shared by the streams of a generation
    steady: set[int] | None = None  # positions that never changed in this stream
    history: list[dict[int, Fingerprint]] = field(default_factory=list)  # of each step, where content is compared
    settled: bool = False  # the inputs moved by small steps, once at least
    look: Any = None  # at the output of its first step (prediction.FirstLook), until it is known what that is
    pace: float = 0.0  # of the last move of the latents, as a share of them, in time; 0 if there was none
    ticks: int = 0  # ever
    dead: bool = False

    @property
    def time(self) -> float:
        return self.last.time if self.last is not None else math.nan

    def restart(self, generation: int) -> None:
        """The stream of the next generation, in the same memory."""
        self.generation, self.last, self.steady, self.history, self.settled = generation, None, None, [], False
        self.first, self.look, self.pace, self.moment = None, None, 0.0, math.nan
        self.programs.clear()
        for state in self.states.values():
            state.filled = False

    def release(self) -> None:
        self.dead = True
        self.states.clear()


@dataclass(frozen=True)
class Tick:
    """One forward of a model. `fresh`: state must be recomputed, whatever the schedule says. `time`: by the timestep,
    or by the step where that is not read. `repeats`: all that the clock sees is as it was in the call before.
    `steps`: how many the generation has, if that was said; else the most that any of the last few had. `span`: how far
    the time goes in the whole generation, where that is known; 0 if not. `learned`: it is fresh for no other reason
    than that an input has just proved to be conditioning."""

    stream: Stream
    step: int
    fresh: bool
    time: float
    repeats: bool = False
    steps: int | None = None
    span: float = 0.0
    learned: bool = False
    number: int = field(init=False)  # of the ticks of its stream

    def __post_init__(self) -> None:
        self.stream.ticks += 1
        object.__setattr__(self, "number", self.stream.ticks)

    @property
    def is_past(self) -> bool:
        """Whether the stream went on since: another thread's forward was taken for its next step."""
        return self.number != self.stream.ticks


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

    @property
    def host_state_bytes(self) -> int:
        return sum(state.host_bytes for stream in self.live for state in list(stream.states.values()))

    def release(self) -> None:
        """Frees all state; the next forward starts a generation."""
        for stream in self.live:
            stream.release()
        self.live, self.now = [], None

    def _stream(self, spare: dict | None = None) -> Stream:
        telemetry.count("streams")
        partners = [stream for stream in self.live if stream.generation == self.generation]
        stream = Stream(self.generation, states=spare or {})
        stream.restart(self.generation)
        if partners:
            stream.unrounded = partners[0].unrounded
        self.live.append(stream)
        return stream

    def _next_generation(self) -> None:
        self.generation += 1
        telemetry.count("generations")


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
        self._on_death: list[Callable[[weakref.ref], None]] = []  # of an input, by position
        self._direction = 0.0
        self._interleaved = False
        self._restless = 0
        self._suspended: list[Stream] = []
        self._spare: list[dict] = []
        self._first_time = math.nan
        self._length = 0  # of the generation before, in steps
        self._so_far, self._lengths = 0, deque(maxlen=SHORT_IN_A_ROW)  # of this generation, and before
        # (a stream, times of its step) -> (the time by which that is forecast, how far it goes); None: the timestep.
        self.course: Callable[[Stream, Times], tuple[float, float] | None] | None = None
        # Of the call that is being read: its stream and step, if the generation goes on.
        self.expected: tuple[Stream, int] | None = None

    def tick(self, inputs: Inputs, read: Reader) -> Tick:
        """Where the forward that begins now belongs.

        inputs: tensors that the caller passed, timestep, parameters and buffers left out.
        read(positions) -> (times, fingerprints): the timestep as numbers, and a few numbers for each of the inputs
        asked for (those not seen before). This is the one device read of a forward.
        """
        self._on_death += map(self._releases, range(len(self._on_death), len(inputs)))
        evidence = Evidence(inputs, self._on_death)
        evidence.recall(self._memory)
        unknown = [p for p in range(len(inputs)) if p not in evidence.prints]
        self.expected = self._expect(evidence)
        times, prints = read(unknown)
        evidence.at(times)
        self.expected = None
        evidence.prints.update(prints)

        repeats = bool(self._memory) and _is_same_call(self._memory[-1], evidence)
        learned = self._learn(evidence)
        self.live = [s for s in self.live if not s.dead]
        stream = self._match(evidence)
        changed, leaped, largest = self._changes(stream.last, evidence) if stream is not None else (0, 0, 0.0)
        if stream is not None and evidence.time == stream.time and changed == leaped > 0:
            stream = None  # another picture of the same conditioning, denoised beside this one: unrelated latents
        fresh, sound = True, False
        repeats |= stream is not None and stream.last is not None and _is_same_call(stream.last, evidence)
        if stream is None or not self._continues(stream, evidence, changed, leaped):
            stream = self._begin(stream, evidence)
            before, stream.moment = math.nan, self._moment(stream, evidence)
        else:
            before = stream.moment
            moves = evidence.time != stream.time or (changed and not repeats)
            stream.moment = self._moment(stream, evidence) if moves else before
            # A first step repeated may be a generation begun again, and what was just learned may not be all.
            repeated = stream.step == 0 and evidence.time == stream.time
            leaped = self._latents_leaped(evidence, changed == leaped == 1) or self._time_leaped(stream, evidence)
            sound = not (self._jumped(stream, before, largest) or leaped or repeated)
            fresh = learned or not sound
        if stream.last is not None and evidence.time != stream.time:
            if stream.stride:
                self._direction = math.copysign(1.0, stream.stride)
            stream.stride = evidence.time - stream.time
        stream.step += 1
        self._so_far = max(self._so_far, stream.step + 1)
        if stream.step == 1:
            self._spare.clear()
        stream.last, stream.first = evidence, stream.first or evidence.times
        self._memory.append(evidence)
        self.live.sort(key=lambda s: s is stream)  # the one called last comes last
        usual = max(self._lengths) if len(self._lengths) == SHORT_IN_A_ROW else None
        course = self.course(stream, evidence.times) if self.course is not None else None
        time, span = course or (stream.moment, evidence.way_since(stream.first))
        self.now = Tick(stream, stream.step, fresh, time, repeats, usual, span, learned and sound)
        return self.now

    def finish(self) -> None:
        """After a forward. Nothing ends here: the last step of a generation is not known before the next begins."""

    def release(self) -> None:
        super().release()
        self._spare.clear()
        self._suspended.clear()
        self._memory.clear()

    def _expect(self, evidence: Evidence) -> tuple[Stream, int] | None:
        """What the call is if nothing but objects is looked at: the next step of the one stream they name."""
        named = [
            stream
            for stream in self.live
            if not stream.dead
            and all(evidence.same_object(stream.last, p, looked_into=False) for p in self.conditioning)
        ]
        if len(named) != 1 or not self.conditioning:
            return None
        (stream,) = named
        regular = stream.step > 0 and stream.stride and stream.step + 1 != self._length
        return (stream, stream.step + 1) if regular else None

    def _learn(self, evidence: Evidence) -> bool:
        """Whether an input proved to be conditioning just now: it recurs at another time."""
        before = len(self.conditioning)
        memory = [past for past in self._memory if past.time != evidence.time]
        for position in range(len(evidence)):
            if position in self.latents or position in self._remade:
                continue
            known = position in self.conditioning
            for past in memory:
                gone = past.is_gone(position)
                # Of what is known to recur, only whether it does as another object is still to be learned.
                if (known and not gone) or not evidence.same(past, position):
                    continue
                # Zeros of one step are like those of any other: what is switched off (a control) may yet be on.
                if not evidence.same_object(past, position) and not any(evidence.prints[position]):
                    continue
                known = True
                self.conditioning.add(position)
                if gone:
                    self._remade.add(position)
                    break
        return len(self.conditioning) > before

    def _names(self, stream: Stream, evidence: Evidence) -> bool:
        last = stream.last
        return last is not None and all(
            evidence.same_object(last, p)
            # Two objects of one content, both alive: two pipelines given the same prompt.
            or (evidence.same_content(last, p) and last.is_gone(p))
            for p in self.conditioning
        )

    def _match(self, evidence: Evidence) -> Stream | None:
        """The live stream that this call's conditioning names; of several, the one whose latents are nearest.

        Without conditioning, order and continuity must do.
        """
        if not self.conditioning:
            return self.live[-1] if self.live and (len(evidence) <= 1 or self._all_move(evidence)) else None
        named = [stream for stream in reversed(self.live) if self._names(stream, evidence)]
        if len(named) < 2:
            return named[0] if named else None
        return min(named, key=lambda stream: self._changes(stream.last, evidence)[2])

    def _all_move(self, evidence: Evidence) -> bool:
        """Whether all inputs, several pictures' latents, say, moved by small steps since the last call."""
        last = self.live[-1].last
        moves = last is not None and last.time != evidence.time and len(last) == len(evidence)
        return moves and self._changes(last, evidence)[:2] == (len(evidence), 0)

    def _continues(self, stream: Stream, evidence: Evidence, changed: int, leaped: int) -> bool:
        """changed, leaped: how many inputs did since the last step of the stream."""
        move = evidence.time - stream.time
        direction = stream.stride or self._direction
        if move * direction < 0:
            if not stream.stride:
                self._direction = 0.0  # learned from another schedule, perhaps: learn it again
            return False
        if self._time_leaped(stream, evidence) and (leaped or not changed):
            return False  # where the latents go on, it is a schedule with a gap, as some distilled models have
        return not (leaped == changed and changed > 1)

    def _goes_on(self, stream: Stream, evidence: Evidence) -> bool:
        """Whether a call could be the next step of a stream."""
        return self._names(stream, evidence) and self._continues(
            stream, evidence, *self._changes(stream.last, evidence)[:2]
        )

    def _time_leaped(self, stream: Stream, evidence: Evidence) -> bool:
        return bool(stream.stride) and abs(evidence.time - stream.time) > TIME_LEAP * abs(stream.stride)

    def _moment(self, stream: Stream, evidence: Evidence) -> float:
        """The time of a stream's next step, as it was before it was rounded."""
        latest = self.live[-1]
        if latest.step > stream.step and latest.unrounded is stream.unrounded and latest.time == evidence.time:
            return latest.moment  # a partner in guidance was there already
        return stream.unrounded.follow(evidence.times, stream.first or evidence.times)

    def _jumped(self, stream: Stream, before: float, largest: float) -> bool:
        """Whether what varies moved much faster than in the step before: a callback edits latents, perhaps.

        before: the moment of that step. largest: the largest change of an input, as a share of it.
        """
        way = abs(stream.moment - before)
        pace, stream.pace = stream.pace, largest / way if way else 0.0
        return bool(pace) and stream.pace > JUMP * pace

    def _latents_leaped(self, evidence: Evidence, is_another: bool) -> bool:
        """The one input that varies is unrelated to what it was (`is_another`): another noise, though prompt and time
        go on.

        Not where it always is: then it is unrelated to all that was seen at other times. Of two pictures denoised by
        turns each goes on from one of those.
        """
        if not is_another:
            self._restless = 0
            return False
        others = (past for past in self._memory if past.time != evidence.time)
        new = all(changed == leaped == 1 for changed, leaped, _ in (self._changes(past, evidence) for past in others))
        self._restless = self._restless + 1 if new else 0
        return self._restless <= RESTLESS

    def _changes(self, past: Evidence, evidence: Evidence) -> tuple[int, int, float]:
        return past.changes(evidence, [p for p in range(len(evidence)) if p not in self.conditioning])

    def _next_generation(self) -> None:
        if self._so_far:
            self._lengths.append(self._so_far)
        self._so_far = 0
        super()._next_generation()

    def _begin(self, restarted: Stream | None, evidence: Evidence) -> Stream:
        """A new stream: of a new generation, or a partner in the one whose first step is being made."""
        over = False  # this generation, as a stream of it went on and begins again
        if restarted is not None:
            self._length = restarted.step + 1
            over = restarted.generation == self.generation and restarted.step > 0
            self._retire(restarted)
        partners = [s for s in self.live if s.generation == self.generation]
        first_step = bool(partners) and all(s.step == 0 for s in partners) and not over
        if not (first_step and evidence.time == self._first_time):
            self._next_generation()
            self._first_time = evidence.time
            self._interleaved |= any(self._goes_on(s, evidence) for s in self._suspended)
            for stream in self.live[: 1 - MAX_STREAMS] if self._interleaved else self.live[:]:
                self._retire(stream)
        return self._stream(self._spare.pop() if self._spare else None)

    def _retire(self, stream: Stream) -> None:
        """Ends a stream; its memory serves the generation that begins."""
        self.live.remove(stream)
        self._spare.append(dict(stream.states))
        stream.release()
        self._suspended = [*self._suspended, stream][-MAX_STREAMS:]

    def _releases(self, position: int) -> Callable[[weakref.ref], None]:
        """When the caller drops a prompt embedding, its stream can never be called again."""
        clock = weakref.ref(self)

        def died(reference: weakref.ref) -> None:
            owner = clock()
            if owner is not None and position in owner.conditioning - owner._remade:
                for stream in owner.live:
                    if stream.last is not None and stream.last.objects[position] is reference:
                        stream.release()

        return died


def _is_same_call(before: Evidence, now: Evidence) -> bool:
    return before.time == now.time and all(now.same(before, p) for p in range(len(now)))
