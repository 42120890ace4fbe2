"""Who is forecast together: the streams of a step, and the pieces of a forward.

Guidance takes the difference of two outputs and multiplies it. Two outputs forecast from the same steps are wrong in
much the same way, and the difference hardly is; where one is forecast and the other computed, the whole error is
multiplied. On the image model of docs/quality.md (28 steps, guidance 2.5, 11 of 28 computed) that is 43 dB, not 33.

A piece computed from what the piece before it forecast would be neither the one nor the other. The last piece called is
the leader: its outputs are what the model's are made from, and the rest of the forward does as it does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

from .clock import Stream
from .forecast import History


def others_of(history: History | None, stream: Stream, live: Iterable[Stream], key: Hashable) -> list[History]:
    """What is remembered of the other streams that took part in the step before: under `key` in their states. None of
    them where nothing is remembered of this one.

    Two pipelines side by side may be at one timestep too. Their streams then wait for one another, which is a step
    computed more at times, and never one less.
    """
    found = []
    for other in live if history is not None else ():
        theirs = other.states.get(key)
        if other is not stream and theirs is not None and theirs.filled and theirs.last == history.last:
            found.append(theirs)
    return found


def may_forecast(history: History, others: Iterable[History], moment: float) -> bool:
    """Whether this stream's step at `moment` may be forecast: as was settled at the first call of the step, which this
    may be."""
    settled, forecast = history.settled
    if settled == moment:
        return forecast and history.reaches(moment)
    return history.reaches(moment) and all(other.reaches(moment) for other in others)


def is_computed(history: History, others: Iterable[History], moment: float) -> bool:
    """Whether this stream's next step cannot be forecast, if it is at `moment`. False, too, where telling would take a
    wait."""
    settled, forecast = history.settled
    if not math.isnan(settled) and settled != history.last:
        return not forecast
    return any(not one.judge.waits and not one.reaches(moment) for one in (history, *others))


def settle(others: Iterable[History], moment: float, forecast: bool) -> None:
    """What this step is, for the streams that are still to be called. Said once all ranks agree on it."""
    for other in others:
        other.settled = (moment, forecast)


def leader_of(stream: Stream) -> Hashable | None:
    """Under which key the leader's history lies in the states of a stream; None where none is known."""
    return next((key for key, held in stream.states.items() if isinstance(held, History) and held.leads), None)


def all_reach(stream: Stream, moment: float, leader: History) -> bool:
    """Whether the pieces behind the leader can be forecast, too."""
    pieces = (held for held in stream.states.values() if isinstance(held, History) and held is not leader)
    return all(piece.reaches(moment) for piece in pieces)
