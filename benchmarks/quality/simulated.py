"""Forecasts as this package makes them, around a model that is called as it is: nothing is compiled or captured."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from chipmunk_compile.council import may_forecast, settle
from chipmunk_compile.forecast import History

WAY = 1000.0  # of the timesteps, from the first to 0


class Simulated:
    """The model, called with and without a caption; each of the two is a stream. computed: calls that ran the model.

    history: makes what is remembered of a stream. together: a step is forecast if it may be in both streams. warmup:
    first steps that are computed.
    """

    def __init__(self, model: Callable, history: Callable[[], History], together: bool = True, warmup: int = 2) -> None:
        self.model, self.together, self.warmup, self.computed = model, together, warmup, 0
        self._steps = {True: -1, False: -1}
        self._histories = {True: history(), False: history()}

    def __call__(self, *, timestep: Tensor, encoder_hidden_states: Tensor, **inputs) -> tuple[Tensor, ...]:
        moment, captioned = timestep[0].item(), bool(encoder_hidden_states.any())
        history, other = self._histories[captioned], self._histories[not captioned]
        self._steps[captioned] += 1
        others = [other] if self.together and other.filled and other.last == history.last else []
        forecast = history.judge.computed >= self.warmup and may_forecast(history, others, moment)
        settle(others, moment, forecast)
        if forecast:
            return tuple(history.forecast(moment))
        self.computed += 1
        computed = self.model(timestep=timestep, encoder_hidden_states=encoder_hidden_states, **inputs)
        return tuple(history.keep(moment, computed, WAY, self._steps[captioned]))
