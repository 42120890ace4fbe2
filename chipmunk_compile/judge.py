"""Whether a forecast would do, judged by the ones that could be held against what was computed.

At every computed step the forecast that might have stood there is compared with the output. Its relative error `e`,
over a gap `g` since the step computed before, says what to expect over another gap `h`: `e * (h / g) ** (order + 1)`.
A step that covers the share `s` of the whole way then moves the latents by about `s` times that error. Steps are
forecast as long as what they leave in the latents, summed since the last computed step, is expected to stay below the
tolerance.
"""

from __future__ import annotations

import math

import torch

# Forecasts in a row.
MOST = 8
# A forecast this wrong, relative to the output, knows nothing of it: samplers that add noise at every step have such
# steps, and however short those are, a forecast would leave in the latents what the model was to take out.
WORST = 1.0


class Judge:
    """Of one stream. Times are those of the clock: timesteps, or counted steps."""

    def __init__(self, tolerance: float, order: int) -> None:
        self.tolerance, self.order = tolerance, order
        self.begin()

    def begin(self) -> None:
        """A generation begins: nothing is known of it."""
        self.computed = 0  # steps so far
        self._span = self._last = 0.0  # of the whole generation; the time of the last step, computed or not
        self._gap, self._told = 0.0, None
        self._left, self._row = 0.0, 0  # of the forecasts since the last computed step

    def weigh(self, moment: float, gap: float | None, told: Arriving | None, span: float) -> None:
        """A step was computed, and the forecast over `gap` would have been wrong by the first of the numbers `told`, a
        relative error.

        span: of the times of the generation; 0 where it is not known, and nothing is forecast.
        """
        self._span = span
        self.computed += 1
        if told is not None:
            self._gap, self._told = gap, told
        self._last, self._left, self._row = moment, 0.0, 0

    def allows(self, moment: float, gap: float) -> bool:
        """Whether this step may be forecast over `gap`. Reads the last error."""
        if self._row >= MOST or moment == self._last:  # a time evaluated twice (Heun): no gap says anything of it
            return False
        return self._expected(gap) < WORST and self._left_after(moment, gap) <= self.tolerance  # both false for nan

    @property
    def waits(self) -> bool:
        """Whether the last error is still on its way: `allows` would wait for it."""
        return self._told is not None and not self._told.arrived

    def skip(self, moment: float, gap: float) -> None:
        """This step is forecast over `gap`."""
        self._left, self._row = self._left_after(moment, gap), self._row + 1
        self._last = moment

    def _left_after(self, moment: float, gap: float) -> float:
        if not self._span:
            return math.inf
        return self._left + self._expected(gap) * abs(moment - self._last) / self._span

    def _expected(self, gap: float) -> float:
        """The relative error of a forecast over `gap`."""
        if self._told is None or not self._gap:
            return math.inf
        return self._told.values[0] * (gap / self._gap) ** (self.order + 1)


class Arriving:
    """Numbers [n] on their way from the device. The read of the next timestep waits for as much anyway."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event = self._values = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    @property
    def values(self) -> list[float]:
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values, self._event, self._host = self._host.tolist(), None, None
        return self._values
