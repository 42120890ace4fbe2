"""Whether a forecast would do, judged by the ones that could be held against what was computed.

At every computed step the forecast that might have stood there is compared with the output. Its relative error `e`,
over a gap `g` since the step computed before, says what to expect over another gap `h`: `e * (h / g) ** power`, where
the power is 1 for reuse and 2 for a line, if lines come true.

What an error costs is more than itself and less than what it adds up to over the gap: later steps see latents that are
off, and take part of it back. Steps are forecast as long as the expected error, times the square root of the share of
the whole way that the gap is, stays below the tolerance. The square root is what measured best between the error alone
and the error times the gap (docs/quality.md).
"""

from __future__ import annotations

import torch

# Forecasts in a row.
MOST = 10
# A forecast this wrong, relative to the output, knows nothing of it: samplers that add noise at every step have such
# steps, and however short those are, a forecast would leave in the latents what the model was to take out.
WORST = 1.0
# An error seen over a gap says what to expect of gaps so many times as long. The first one is seen over a single step.
FARTHEST = 4.0


class Judge:
    """Of one stream. Times are those of the clock: timesteps, or counted steps."""

    farthest = FARTHEST

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.begin()

    def begin(self) -> None:
        """A generation begins: nothing is known of it."""
        self.computed = 0  # steps so far
        self._span = self._last = 0.0  # of the whole generation; the time of the last step, computed or not
        self._gap, self._told = 0.0, None
        self._row = 0  # forecasts since the last computed step

    def weigh(self, moment: float, gap: float | None, told: Arriving | None, span: float) -> None:
        """A step was computed, and the forecast over `gap` would have been wrong by the first of the numbers `told`, a
        relative error.

        span: of the times of the generation; 0 where it is not known, and nothing is forecast.
        """
        self._span = span
        self.computed += 1
        if told is not None:
            self._gap, self._told = gap, told
        self._last, self._row = moment, 0

    def allows(self, moment: float, gap: float, power: float) -> bool:
        """Whether this step may be forecast over `gap`, if errors grow with that power of it. Reads the last error."""
        if self._row >= MOST or moment == self._last:  # a time evaluated twice (Heun): no gap says anything of it
            return False
        if self._told is None or not self._span or not 0.0 < gap <= self.farthest * self._gap:
            return False
        error = self._told.values[0] * (gap / self._gap) ** power
        return error < WORST and self._cost(error, gap / self._span) <= self.tolerance  # both are false for nan

    def _cost(self, error: float, share: float) -> float:
        """Of an error over that share of the whole way."""
        return error * share**0.5

    @property
    def waits(self) -> bool:
        """Whether the last error is still on its way: `allows` would wait for it."""
        return self._told is not None and not self._told.arrived

    def skip(self, moment: float) -> None:
        """This step is forecast."""
        self._row += 1
        self._last = moment


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
