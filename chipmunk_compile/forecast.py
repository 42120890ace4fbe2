"""What is known of a step without running the model, or beside running it: from the outputs of steps before.

All act on the output of a whole forward, per stream:

- *forecast*: outputs of computed steps, extrapolated in the step's own time (Lagrange: reuse, line or parabola, as many
  as are known). What it adds to the last output is damped by how much of it came true before;
- *repaying*: a computed step shows what the steps forecast before it should have been: on the line between the computed
  ones. What they left out of the latents is added to its output, by the lengths of the steps. Any sampler that adds up
  outputs takes it as it takes them; the corrector of UniPC (arXiv 2302.04867) does the same within a sampler;
- *residual*: at a refresh the delta program runs too, on the state of before. Its error `e = refresh - delta`, of age
  `a` since the refresh before, is what delta steps until the next refresh are expected to miss: at age b, `e * b / a`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .clock import Tick
from .config import ForecastOptions
from .judge import Arriving, Judge

# Extrapolating further than this many times the distance between the last two steps computes instead.
FURTHEST = 3.0
# What a forecast adds to the last output may prove to be too little, too, but not by more than this.
MOST_GROWTH = 1.2
# An output made from noise alone says nothing of steps that are further from it than this share of the whole way.
NOISE_REACHES = 1 / 8
# How much of a line came true over a gap so many times as long as itself says nothing of another that is not.
COMPARABLE = 2.0
# Forecasts of hidden states miss more of each channel than what the model makes of them misses: 1.7 to 3.9 times as
# much on the image and video models of docs/quality.md. Few channels may be huge, so each counts relative to itself.
HIDDEN = 2.0

Outputs = list[torch.Tensor]


@dataclass(eq=False)
class History:
    """Outputs of the last computed steps of one stream, newest last, in buffers that are used again."""

    options: ForecastOptions
    moments: list[float] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    fits: Any = None  # what it was made for, as of a State
    dtype: torch.dtype | None = None  # of the output, where what it stands for is remembered in its place
    leads: bool = False  # outputs of the last piece of a forward: hidden states, [..., channels]
    error: Outputs | None = None
    error_age: float = 0.0
    refreshed: float | None = None  # the moment of the last refresh
    judge: Judge | None = None
    reads: bool = True  # numbers from the device may be waited for
    waiting: list[float] = field(default_factory=list)  # moments forecast since the last computed one
    settled: tuple[float, bool] = (math.nan, False)  # a moment, and whether its step is forecast (council.py)
    host_bytes = 0  # as states have it: none of this lies in host memory

    def __post_init__(self) -> None:
        self._damping: list[float] | None = None
        self._lesson: Arriving | None = None  # of the last comparison, if it tells the damping
        self._from_noise = False  # the last known output is
        if self.options.tolerance is not None:
            self.judge = Judge(self.options.tolerance)
        # Of pieces the leader alone looks at what its forecasts are worth.
        self._damps = self.options.order > 0 and (self.judge is not None or (self.options.repay and self.reads))

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
            self.moments, self.outputs, self.waiting = [], [], []
            self.error = self.refreshed = self._lesson = self._damping = None
            self.settled = (math.nan, False)
            if self.judge is not None:
                self.judge.begin()

    @property
    def last(self) -> float | None:
        """The moment of the last step, computed or forecast."""
        known = self.waiting or self.moments
        return known[-1] if known else None

    def is_over(self, tick: Tick) -> bool:
        """Whether this step has nothing to do with those remembered.

        Where the clock has only just learned what conditioning is, they may be another stream's: a judge finds that out
        before it allows a forecast, and so the first generation is as any later one.
        """
        return tick.fresh and not (tick.learned and self.judge is not None)

    def keep(self, moment: float, computed: Sequence[torch.Tensor], span: float, step: int) -> Outputs:
        """Outputs of a computed step as they are to be returned, after they were recorded as they were computed."""
        outputs = self.repay(moment, computed)
        self.record(moment, computed, span, step)
        return outputs

    def record(self, moment: float, outputs: Sequence[torch.Tensor], span: float = 0.0, step: int = 1) -> None:
        """Keeps a copy: a program's outputs may lie in memory that its next run writes (CUDA graphs).

        span: of the moments of a generation, if known, else 0. step: of the generation, from 0; not its first, where
        nothing is said.
        """
        known = self.moments
        gap = abs(moment - known[-1]) if known and known[-1] != moment else None
        teaches = gap is not None and len(known) > 1 and gap <= COMPARABLE * abs(known[-1] - known[-2])
        told = None
        if gap is not None and (self.judge is not None or (teaches and self._damps)):
            told = Arriving(self._compare(moment, outputs))
        if teaches and self._damps:
            self._lesson = told
        if self.judge is not None:
            self.judge.weigh(moment, gap, told, span)
        if known and (gap is None or self._from_noise):
            # A time evaluated twice: the later evaluation counts. And what comes second takes the place of the first
            # step, which saw nothing but noise: a line through those two is worse than none.
            buffers = self.outputs.pop()
            self.moments.pop()
        elif len(known) > self.options.order:
            buffers = self.outputs.pop(0)
            self.moments.pop(0)
        else:
            buffers = [torch.empty_like(output, memory_format=torch.preserve_format) for output in outputs]
        self._from_noise = step == 0
        for buffer, output in zip(buffers, outputs):
            buffer.copy_(output)
        self.moments.append(moment)
        self.outputs.append(buffers)

    @property
    def known(self) -> bool:
        """Whether any step is known, so that others can be forecast."""
        return bool(self.moments)

    def reaches(self, moment: float) -> bool:
        """Whether steps are known, and near enough, to forecast this one."""
        if not self.known:
            return False
        gap = abs(moment - self.moments[-1])
        if self.judge is not None:
            return self.judge.allows(moment, gap, self._power())
        return len(self.moments) == 1 or gap <= FURTHEST * abs(self.moments[-1] - self.moments[-2])

    def is_near(self, tick: Tick) -> bool:
        """Whether the step is not too far from one that saw nothing but noise, if no other is known: a generation of
        four steps would be made of that one alone. Of an unknown way any step is too far."""
        return not self._from_noise or abs(tick.time - self.moments[-1]) <= NOISE_REACHES * tick.span

    def _power(self) -> float:
        """Errors of forecasts grow with the gap to this power: with the square of it where a line is followed whole."""
        shares = self.damping() or [1.0]
        return 1.0 + (len(self.moments) - 1) * min(sum(shares) / len(shares), 1.0)

    def forecast(self, moment: float) -> Outputs:
        """The outputs at `moment`, computed in float32 and rounded once."""
        self.waiting.append(moment)
        if self.judge is not None:
            self.judge.skip(moment)
        weights = self._weights(moment)
        damped = ([share * w for w in weights] for share in self.damping() or [1.0] * len(self.outputs[-1]))
        return [
            _combined(known, [*before, last + 1.0 - sum((*before, last))])
            for known, (*before, last) in zip(zip(*self.outputs), damped)
        ]

    def damping(self) -> list[float] | None:
        """How much of what a forecast adds to the last outputs is taken, for each: half what proved best at the last
        comparison, half what was learned before. Waits for the device, where `Judge.allows` did not yet."""
        if self._lesson is not None:
            best, self._lesson = self._lesson.values[1:], None
            learned = self._damping or best
            self._damping = [(one + other) / 2 for one, other in zip(best, learned)]
        return self._damping

    def repay(self, moment: float, outputs: Sequence[torch.Tensor]) -> Outputs:
        """Outputs of the computed step at `moment`, with what the forecasts since the last one left out.

        Called before they are recorded. How long the step from here will be is not known: as much longer than the one
        that led here as that was longer than the one before.
        """
        waiting, self.waiting = self.waiting, []
        if not self.options.repay or not waiting or moment == self.moments[-1]:
            return list(outputs)
        times = [self.moments[-1], *waiting, moment]
        steps = [after - before for before, after in zip(times, times[1:])]
        if 0.0 in steps:
            return list(outputs)
        growth = min(max(steps[-1] / steps[-2], 0.5), 2.0)
        told = [0.0] * len(self.moments)  # what all forecasts added up to: so much of each known output
        between = 0.0  # what they should have: the last known output, and so much of the way to this one
        for time, step in zip(waiting, steps[1:]):
            told = [total + step * weight for total, weight in zip(told, self._weights(time))]
            between += step * (time - self.moments[-1]) / (moment - self.moments[-1])
        told[-1] -= sum(steps[1:])
        paid = steps[-1] * growth
        repaid = []
        for output, share, known in zip(outputs, self.damping() or [1.0] * len(outputs), zip(*self.outputs)):
            owed = [-share * total / paid for total in told]
            owed[-1] -= between / paid
            repaid.append(_combined((*known, output), [*owed, 1.0 + between / paid]))
        return repaid

    def _weights(self, moment: float) -> list[float]:
        """Of the known outputs in the forecast at `moment`. Where nothing is judged, and nothing told yet how much of a
        line comes true, one is followed as far as it is long, and then taken back: at COMPARABLE lengths the last
        output is reused as it is."""
        if self.options.repay and self.judge is None and len(self.moments) > 1 and self.damping() is None:
            *_, before, last = self.moments
            lengths = abs((moment - last) / (last - before))
            if lengths > 1.0:
                lengths = max(0.0, COMPARABLE - lengths) / (COMPARABLE - 1.0)
            moment = last + math.copysign(lengths * (last - before), moment - last)
        return lagrange(self.moments, moment)

    def _moves(self, moment: float) -> Outputs:
        """What the polynomial through the known outputs adds to the last of them, in float32."""
        weights = lagrange(self.moments, moment)
        moves = []
        for known in zip(*self.outputs):
            move = known[-1].float() * (weights[-1] - 1.0)
            for tensor, weight in zip(known[:-1], weights):
                move.add_(tensor, alpha=weight)
            moves.append(move)
        return moves

    def _compare(self, moment: float, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1 + outputs]: the relative error that the forecast of these outputs would have had, and the damping of each
        that would have been best, by least squares."""
        wrong, whole, best = 0.0, 0.0, []
        damping = self.damping() or [1.0] * len(outputs)
        for move, share, known, output in zip(self._moves(moment), damping, self.outputs[-1], outputs):
            output = output.float()
            came = output - known
            missed = torch.sub(came, move, alpha=share)
            if self.leads:
                wrong = wrong + (_channels(missed) / _channels(output)).sum() / HIDDEN**2
                whole = whole + output.shape[-1]
            else:
                wrong = wrong + missed.square().sum()
                whole = whole + output.square().sum().clamp_min(1e-30)
            best.append(((came * move).sum() / move.square().sum().clamp_min(1e-30)).clamp(0.0, MOST_GROWTH))
        # Outputs may lie on several devices.
        return torch.stack([number.to(outputs[-1].device) for number in ((wrong / whole).sqrt(), *best)])

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


def _combined(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum, made in float32 and rounded once. Weights sum to 1."""
    if len(tensors) == 2 and tensors[0].is_floating_point():  # one kernel
        return torch.lerp(*tensors, weights[1])
    combined = tensors[-1].float() * weights[-1]
    for tensor, weight in zip(tensors, weights[:-1]):
        combined.add_(tensor, alpha=weight)
    return combined.to(tensors[-1].dtype)


def _channels(hidden: torch.Tensor) -> torch.Tensor:
    """The mean square of each channel: [..., channels] -> [channels]."""
    return hidden.square().flatten(0, -2).mean(0).clamp_min(1e-30)


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
