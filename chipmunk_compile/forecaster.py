"""Whether the steps of one graph are forecast, by which rules, and what is remembered for it.

A graph that is the whole forward is forecast by its outputs, which are the model's. Where a forward is calls of several
graphs, each is a piece: all are forecast in the same steps, each from its own outputs. The last one tells which steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import telemetry
from .clock import Stream, Tick
from .config import Config, ForecastOptions
from .council import all_reach, is_computed, leader_of, may_forecast, others_of
from .forecast import History
from .models import Root
from .passes.reasons import Reason
from .pieces import Parts
from .schedule import Program, program_at
from .state import Owner

log = logging.getLogger(__name__)


class Forecaster:
    """Of one graph.

    as_one, as_piece: the options that hold where the graph is the whole forward, and where it is a piece of it.
    """

    def __init__(
        self, config: Config, computes: bool, has_layers: bool, parts: Parts | None, latents: int | None = None
    ) -> None:
        """computes: the graph does nothing but that, so it may be a whole forward that is forecast. parts: of its
        outputs; None where it cannot be forecast as a piece: if it has layers, the other pieces cannot be either.
        latents: the argument that holds them, where one is known to."""
        self.as_one, self.as_piece = config.where_forecast(), config.where_forecast(in_pieces=True)
        self._computes, self._has_layers, self._parts, self._latents = computes, has_layers, parts, latents
        self._said_unweighed = False

    def way(self, root: Root) -> Config | None:
        """The options that hold for this call, if any outputs are to be remembered; else None."""
        root.forward.pieces += self._parts is not None
        root.forward.can_forecast &= self._parts is not None or not self._has_layers
        if root.is_one_call:
            if root.prediction is not None and (self._latents is None or not _is_flow_time(root.forward.tick.time)):
                return self._cannot_weigh()
            asked = self.as_one.forecasts or self.as_one.forecast.residual > 0
            return self.as_one if asked and self._computes else None
        is_piece = self._parts is not None and self.as_piece.forecasts and root.is_of_pieces
        if is_piece and root.prediction is not None:  # what pieces hand on stands for nothing of the kind
            return self._cannot_weigh()
        return self.as_piece if is_piece else None

    def _cannot_weigh(self) -> None:
        if not self._said_unweighed and (self.as_one.forecasts or self.as_one.forecast.residual):
            self._said_unweighed = True
            log.warning("%s: none is forecast", Reason.UNKNOWN_NOISE.value)

    def history(self, way: Config | None, owner: Owner, stream: Stream, occurrence: int) -> History | None:
        """What is remembered of this call's outputs in earlier steps of the stream."""
        if way is None:
            return self.forget(owner, stream, occurrence)
        leads = way is self.as_piece and owner.root.is_last_piece
        key, fits = _key(owner, occurrence), (self, way is self.as_piece, leads, owner.root.prediction)
        history = stream.states.get(key)
        if history is None or history.fits != fits:
            options = way.forecast if leads or way is self.as_one else ForecastOptions(way.forecast.order)
            history = stream.states[key] = History(options, fits=fits, leads=leads, reads=owner.root.counted is None)
            if way is self.as_piece:
                owner.root.ledger.add(history)
                owner.root.ledger.streams.add(stream)
        return history

    def forget(self, owner: Owner, stream: Stream, occurrence: int) -> None:
        stream.states.pop(_key(owner, occurrence), None)

    def others(self, history: History | None, owner: Owner, stream: Stream, occurrence: int) -> list[History]:
        """What is remembered of this call in the step's other streams."""
        return others_of(history, stream, owner.root.forward.clock.live, _key(owner, occurrence))

    def due(
        self, way: Config, root: Root, others: list[History], history: History, tick: Tick, unforeseen: Program
    ) -> Program:
        """What this step runs where steps may be forecast, `unforeseen` where this one is due for it and cannot be."""
        if way is self.as_one:
            return _due(way, history, others, tick, unforeseen)
        forward = root.forward
        if forward.due is None and (key := leader_of(tick.stream)) is not None:
            leader = tick.stream.states[key]
            due = _due(way, leader, others_of(leader, tick.stream, forward.clock.live, key), tick, unforeseen)
            reached = due is not Program.FORECAST or all_reach(tick.stream, tick.time, leader)
            forward.due = due if reached else unforeseen
        due = forward.due or unforeseen
        return due if due is not Program.FORECAST or history.known else unforeseen  # a new piece among them is computed

    def is_computed(self, owner: Owner, stream: Stream, step: int) -> bool:
        """Whether the stream's next step, a whole forward, cannot be forecast, as far as is known without waiting."""
        history = stream.states.get(_key(owner, 0))
        if history is None:
            return False
        if history.judge is None:
            return program_at(step, self.as_one.schedule) is not Program.FORECAST
        others = self.others(history, owner, stream, 0)
        warms_up = history.judge.computed < self.as_one.schedule.warmup
        return warms_up or is_computed(history, others, owner.root.next_time(stream))

    def forecast(self, way: Config, history: History, root: Root, tick: Tick, args: Sequence) -> Sequence:
        """The outputs of a step that is not computed."""
        telemetry.count("forecast")
        forecast = history.forecast(tick.time)
        if way is self.as_piece:
            return self._parts.with_still(forecast, args)
        if root.prediction is not None:
            return [root.prediction.noise(forecast[0], args[self._latents], tick.time, history.dtype)]
        return forecast

    def keep(
        self, way: Config, history: History, root: Root, tick: Tick, computed: Sequence, args: Sequence
    ) -> Sequence:
        """The outputs of a computed step, remembered: those of pieces as long as the memory budget has room."""
        if way is self.as_one:
            return self._keep_as_one(history, root, tick, computed, args)
        root.look_among(computed)
        moving = history.keep(tick.time, self._parts.moving(computed), tick.span, tick.step)
        outputs, budget = self._parts.with_moving(moving, computed), way.memory_budget
        if budget is not None:
            held = root.ledger.held(())
            if held.shared + held.others > budget:
                root.over_budget = True
                log.warning("%s (%s bytes): no step is forecast", Reason.OVER_BUDGET.value, budget)
                for key in [key for key, kept in tick.stream.states.items() if isinstance(kept, History)]:
                    del tick.stream.states[key]
        return outputs

    def _keep_as_one(self, history: History, root: Root, tick: Tick, computed: Sequence, args: Sequence) -> Sequence:
        latents = args[self._latents] if self._latents is not None else None
        if root.prediction is None:
            if latents is not None and tick.step == 0:
                root.look_at(computed[0], latents)
            return history.keep(tick.time, computed, tick.span, tick.step)
        history.dtype = computed[0].dtype
        velocity = root.prediction.velocity(computed[0], latents, tick.time)
        (repaid,) = history.keep(tick.time, [velocity], tick.span, tick.step)
        if repaid is velocity:
            return computed
        return [root.prediction.noise(repaid, latents, tick.time, history.dtype)]


def _due(way: Config, history: History, others: list[History], tick: Tick, unforeseen: Program) -> Program:
    """Where forecasts are judged, the computed steps are the ones counted for refreshes."""
    judge = history.judge
    step = tick.step if judge is None else judge.computed
    due = program_at(step, way.schedule)
    may_wait = due is Program.FORECAST if judge is None else step >= way.schedule.warmup
    if may_wait and history.is_near(tick) and may_forecast(history, others, tick.time):
        return Program.FORECAST
    return unforeseen if due is Program.FORECAST else due


def _is_flow_time(time: float) -> bool:
    """Not a counted step, nor nothing."""
    return 0.0 < time < 1.0


def _key(owner: Owner, occurrence: int) -> tuple:
    """Under which a stream's states hold the history of a call."""
    return History, owner.key, occurrence
