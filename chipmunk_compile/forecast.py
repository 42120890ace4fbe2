"""What is known of a step without running the model, or beside running it: from the outputs of steps before.

Both act on the output of a whole forward, per stream:

- *forecast*: outputs of computed steps, extrapolated in the step's own time (Lagrange: reuse, line or parabola);
- *residual*: at a refresh the delta program runs too, on the state of before. Its error `e = refresh - delta`, of age
  `a` since the refresh before, is what delta steps until the next refresh are expected to miss: at age b, `e * b / a`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .config import ForecastOptions

# Extrapolating further than this many times the distance between the last two steps computes instead.
FURTHEST = 3.0

Outputs = list[torch.Tensor]


@dataclass(eq=False)
class History:
    """Outputs of the last computed steps of one stream, newest last, in buffers that are used again."""

    options: ForecastOptions
    moments: list[float] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    error: Outputs | None = None
    error_age: float = 0.0
    refreshed: float | None = None  # the moment of the last refresh

    @property
    def bytes(self) -> int:
        held = [*self.outputs, self.error or []]
        return sum(tensor.untyped_storage().nbytes() for outputs in held for tensor in outputs)

    @property
    def filled(self) -> bool:
        """Streams and their state share one life: a stream that starts again sets this to False."""
        return bool(self.moments)

    @filled.setter
    def filled(self, value: bool) -> None:
        if not value:
            self.moments, self.outputs, self.error, self.refreshed = [], [], None, None

    def record(self, moment: float, outputs: Sequence[torch.Tensor]) -> None:
        """Keeps a copy: a program's outputs may lie in memory that its next run writes (CUDA graphs)."""
        if self.moments and self.moments[-1] == moment:  # a time evaluated twice: the later evaluation counts
            buffers = self.outputs.pop()
            self.moments.pop()
        elif len(self.moments) > self.options.order:
            buffers = self.outputs.pop(0)
            self.moments.pop(0)
        else:
            buffers = [torch.empty_like(output, memory_format=torch.preserve_format) for output in outputs]
        for buffer, output in zip(buffers, outputs):
            buffer.copy_(output)
        self.moments.append(moment)
        self.outputs.append(buffers)

    def reaches(self, moment: float) -> bool:
        """Whether enough steps are known, and near enough, to forecast this one."""
        if len(self.moments) <= self.options.order:
            return False
        if self.options.order == 0:
            return True
        return abs(moment - self.moments[-1]) <= FURTHEST * abs(self.moments[-1] - self.moments[-2])

    def forecast(self, moment: float) -> Outputs:
        """The outputs at `moment`, in float32 and rounded once."""
        weights = lagrange(self.moments, moment)
        forecasts = []
        for known in zip(*self.outputs):
            total = known[-1].float() * weights[-1]
            for tensor, weight in zip(known[:-1], weights):
                total.add_(tensor, alpha=weight)
            forecasts.append(total.to(known[-1].dtype))
        return forecasts

    def learn(self, moment: float, refreshed: Sequence[torch.Tensor], delta: Sequence[torch.Tensor]) -> None:
        """What the delta program missed at `moment`, where both programs ran."""
        self.error = [(a.float() - b.float()).to(a.dtype) for a, b in zip(refreshed, delta)]
        self.error_age = moment - self.refreshed

    def correct(self, moment: float, outputs: Sequence[torch.Tensor]) -> Outputs:
        """A delta step's outputs with what they are expected to miss."""
        if self.error is None or not self.error_age:
            return list(outputs)
        share = self.options.residual * (moment - self.refreshed) / self.error_age
        return [torch.add(output, error, alpha=share) for output, error in zip(outputs, self.error)]


def lagrange(moments: Sequence[float], moment: float) -> list[float]:
    """Weights of values at `moments` (all different) in the value at `moment` of the polynomial through them."""
    weights = []
    for i, mine in enumerate(moments):
        weight = 1.0
        for j, other in enumerate(moments):
            if j != i:
                weight *= (moment - other) / (mine - other)
        weights.append(weight)
    return weights
