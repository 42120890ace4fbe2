"""The clock that counts calls, for where steps and streams are said outright."""

from __future__ import annotations

from .clock import Clock, Stream, Tick
from .evidence import Evidence, Inputs, Reader


class CountedClock(Clock):
    """Steps and streams said outright: calls are counted and nothing is read from the device.

    Identity still guards the count: a stream whose steady inputs change has begun another generation. `by_content`:
    the inputs are those of an inner block, where hardly an object stays. Their content is then compared instead, for
    one small read a step: else a generation broken off would be taken up again by the next one.
    """

    def __init__(self, steps: int | None, streams: int, by_content: bool = False) -> None:
        super().__init__()
        self.steps, self.per_step, self._calls = steps, streams, 0
        self.by_content = by_content

    def tick(self, inputs: Inputs, read: Reader) -> Tick:
        index, step = self._calls % self.per_step, self._calls // self.per_step
        self.live = [s for s in self.live if not s.dead]
        lost = index < self._calls and index >= len(self.live)  # released in mid-generation
        evidence = Evidence(inputs)
        if self.by_content:
            _, evidence.prints = read(range(len(inputs)))
        if self._calls == 0 or lost or self._broken_off(index, evidence):
            self._calls = index = step = 0
            self._next_generation()
            for stream in self.live:
                stream.restart(self.generation)
        if index == len(self.live):
            self._stream()
        stream = self.live[index]
        stream.last, stream.step = evidence, step
        if self.by_content:
            stream.history.append(evidence.prints)
        self._calls += 1
        # Content proves nothing before it was seen to stay or to move.
        self.now = Tick(
            stream, step, fresh=step <= self.by_content, time=float(step), steps=self.steps, span=self.steps or 0
        )
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
        if self.by_content:
            held = {p for p in range(len(evidence)) if evidence.same_content(stream.last, p)}
        else:
            held = {p for p in range(len(evidence)) if evidence.same_object(stream.last, p, looked_into=False)}
        before, stream.steady = stream.steady, held if stream.steady is None else held & stream.steady
        if before is not None and before - held:
            return True
        if not self.by_content:
            return False
        repeated = len(stream.history) == 1 and len(held) == len(evidence)  # the first step, and nothing else
        return repeated or _returned(stream, evidence, held) or self._leaped(stream, evidence, held)

    def _leaped(self, stream: Stream, evidence: Evidence, held: set[int]) -> bool:
        """Everything that moves became something else altogether, after steps at which it did not."""
        changed, leaped, _ = stream.last.changes(evidence, set(range(len(evidence))) - held)
        if changed != leaped:
            stream.settled = True
        return changed == leaped > 0 and stream.settled


def _returned(stream: Stream, evidence: Evidence, held: set[int]) -> bool:
    """Whether something that moves took a value again that it had left: a time embedding of an earlier step.

    Samplers that evaluate one time twice do so in a row.
    """
    moving = set(evidence.prints) - held
    return any(evidence.prints[p] == past.get(p) for past in stream.history[:-1] for p in moving)
