"""What a model's output is a prediction of, as far as forecasts must know.

Of flow matching it is the velocity: a step adds so much of it to the latents as its time is long. That is what judge.py
weighs by, and what `History.repay` makes good. A model that predicts the noise in its latents (DDPM, arXiv 2006.11239;
PixArt, DiT, Latte) is another matter: while there is little but noise, its output is nearly the latents, and the little
that it differs by is the picture, which the sampler divides by the picture's share, down to 0.006. What looks like a
small error of the output is a large one of the picture.

Its outputs are therefore forecast as the velocity of the flow between the same picture and noise:

    latents = a * picture + s * noise,   a * a + s * s = 1            as the model has them
    latents / (a + s) = (1 - time) * picture + time * noise,   time = s / (a + s)            the same, of a flow
    velocity = noise - picture = (noise - latents / (a + s)) / (1 - time)

How much noise there is at which timestep, the graph does not say. DDPM's own schedule is assumed (variances that grow
linearly from 0.0001 to 0.02 over 1000 timesteps), as all of these models have it. The formulas can be undone whatever
the truth is, so another schedule costs some straightness and nothing else: with Stable Diffusion's ("scaled linear")
forecasts were as good (`tests/test_prediction.py` has both).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .evidence import Inputs, Times
from .judge import Arriving

# At its first step a model that predicts noise returns nearly its latents: it differs by the picture's share of them,
# 0.006 in DDPM's schedule and 0.07 in Stable Diffusion's. A velocity differs by the picture that is expected before
# anything is known of it: mostly by 0.3 and more, but by as little where pictures are grey on the average.
NEAR = 0.15
# A flow's latents move along its output, as far as its time does. Of the noise in them that was predicted, latents keep
# nearly all at first: they move along it by 0.04 of that in Stable Diffusion's schedule, and less in DDPM's.
ALONG = 0.3
# Schedules that spend most steps on noise begin with steps that are shorter than the average by this factor.
SHORTEST = 6.0
# Where it is not said how many: few, since taking a flow for noise only means that nothing is forecast there.
USUAL_STEPS = 28
TIMESTEPS = 1000
FIRST_VARIANCE, LAST_VARIANCE = 1e-4, 0.02


def distance(output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[1]: how far the output is from the latents, as a share of those."""
    noise, latents = (tensor.float() for tensor in _channels_of_both(output, latents))
    return ((noise - latents).norm() / latents.norm().clamp_min(1e-30)).view(1)


def is_noise_of(output: Any, latents: Any) -> bool:
    """Whether an output could be the noise in these latents, by its shape: a learned variance may follow it."""
    if not all(isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() >= 3 for t in (output, latents)):
        return False
    return output.shape == latents.shape or output.shape == (len(latents), 2 * latents.shape[1], *latents.shape[2:])


class FirstLook:
    """A model's output at the first step of a generation, and where its latents go from there: does it predict the
    noise in them?"""

    def __init__(self, output: torch.Tensor, latents: torch.Tensor, position: int) -> None:
        """position: of the latents among a call's inputs."""
        self._position = position
        # As they are now: a pipeline may write to both.
        self._output, self._latents = (tensor.clone() for tensor in _channels_of_both(output, latents))
        self._distance = distance(output, latents)
        self._told: Arriving | None = None

    def follow(self, inputs: Inputs) -> None:
        """A later call's inputs. Nothing is waited for."""
        if self._position >= len(inputs):
            return
        latents = inputs[self._position]
        if latents.shape[:1] != self._latents.shape[:1] or latents.dim() != self._latents.dim():
            return
        _, latents = _channels_of_both(self._output, latents)
        if latents.shape != self._latents.shape:
            return
        output, moved = self._output.float(), latents.float() - self._latents
        along = (moved * output).sum() / output.square().sum().clamp_min(1e-30)
        self._told = Arriving(torch.cat([self._distance, along.view(1), moved.square().sum().view(1)]))

    def predicts_noise(self, way: float) -> bool | None:
        """way: how far the time went, of the whole way from 1 to 0. None: nothing tells yet."""
        if self._told is None:
            return None
        near, along, moved = self._told.values
        if not moved or math.isnan(moved):
            return None
        return near < NEAR and abs(along) < ALONG * way


class NoisePrediction:
    """Of one model that predicts the noise in its latents."""

    def __init__(self) -> None:
        self._timestep: int | None = None  # which of the candidates for it: the one that moves

    def course(self, times: Times, first: Times) -> tuple[float, float]:
        """The flow's time of a step, and how far it goes in the whole generation: (nan, 0) where no candidate moved yet
        in any generation.

        times, first: of this step, and of the first of its generation.
        """
        moved = [i for i, (now, then) in enumerate(zip(times, first)) if now != then]
        if moved:
            self._timestep = moved[0]
        if self._timestep is None or self._timestep >= len(times):
            return math.nan, 0.0
        scale = TIMESTEPS if first[self._timestep] <= 1.0 else 1  # some models are told shares of it
        now, begun = (scale * known[self._timestep] for known in (times, first))
        return _flow_time(now), _flow_time(begun)

    def velocity(self, output: torch.Tensor, latents: torch.Tensor, time: float) -> torch.Tensor:
        """What the output stands for, in float32. Channels beyond the noise (a learned variance) are as they were."""
        return _replaced(output, latents, lambda noise, scaled: (noise - scaled) / (1.0 - time), time)

    def noise(self, velocity: torch.Tensor, latents: torch.Tensor, time: float, dtype: torch.dtype) -> torch.Tensor:
        """The output that stands for this velocity."""
        return _replaced(velocity, latents, lambda moving, scaled: scaled + (1.0 - time) * moving, time).to(dtype)


def _replaced(output: torch.Tensor, latents: torch.Tensor, formula, time: float) -> torch.Tensor:
    """`output` in float32, the channels of the latents by a formula of them and of the latents as the flow has them."""
    result = output.float()
    result = result.clone() if result is output else result
    mine, latents = _channels_of_both(result, latents)
    mine.copy_(formula(mine, latents.float() * math.hypot(time, 1.0 - time)))
    return result


def _channels_of_both(output: torch.Tensor, latents: torch.Tensor) -> Sequence[torch.Tensor]:
    """The two without channels that only one has: a learned variance behind the noise, a mask behind the latents."""
    axis = next((d for d, (one, other) in enumerate(zip(output.shape, latents.shape)) if one != other), None)
    if axis is None:
        return output, latents
    both = min(output.shape[axis], latents.shape[axis])
    return output.narrow(axis, 0, both), latents.narrow(axis, 0, both)


def _flow_time(timestep: float) -> float:
    left = _log_pictures()
    timestep = min(max(timestep, 0.0), TIMESTEPS - 1.0)
    below = min(int(timestep), TIMESTEPS - 2)
    log = left[below] + (left[below + 1] - left[below]) * (timestep - below)
    picture, noise = math.exp(log / 2), math.sqrt(-math.expm1(log))
    return noise / (picture + noise)


@functools.cache
def _log_pictures() -> list[float]:
    """By timestep: the logarithm of the picture's share in the variance."""
    step = (LAST_VARIANCE - FIRST_VARIANCE) / (TIMESTEPS - 1)
    total, found = 0.0, []
    for k in range(TIMESTEPS):
        total += math.log1p(-(FIRST_VARIANCE + k * step))
        found.append(total)
    return found
