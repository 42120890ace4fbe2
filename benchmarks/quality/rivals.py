"""What people use instead, written for comparison alone: none of it shares code with the package.

Each is a callable like the transformer, made anew for every generation, around a compiled dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch


class StepReuse:
    """Computes one step in `every` after two; between them the last output stands in (step skipping)."""

    WARM_UP = 2

    def __init__(self, model: Callable, every: int) -> None:
        self.model, self.every = model, every
        self.step, self.last = 0, None

    def __call__(self, **inputs):
        due = self.step < self.WARM_UP or (self.step - self.WARM_UP) % self.every == self.every - 1
        self.step += 1
        if due:
            self.last = self.model(**inputs)[0].clone()
            self.computed(self.last)
        return (self.last if due else self.told(),)

    def computed(self, output: torch.Tensor) -> None:
        pass

    def told(self) -> torch.Tensor:
        return self.last


class TaylorSteps(StepReuse):
    """The same steps, the others told by a Taylor series of backward differences in the step's index, as TaylorSeer
    (arXiv 2503.06923) does for features, here for the model's output."""

    def __init__(self, model: Callable, every: int, order: int) -> None:
        super().__init__(model, every)
        self.order, self.at, self.derivatives = order, 0, []

    def computed(self, output: torch.Tensor) -> None:
        distance, self.at = self.step - self.at, self.step
        derivatives = [output]
        for before in self.derivatives[: self.order]:
            derivatives.append((derivatives[-1] - before) / distance)
        self.derivatives = derivatives

    def told(self) -> torch.Tensor:
        ahead, total, factor = self.step - self.at, torch.zeros_like(self.last), 1.0
        for order, derivative in enumerate(self.derivatives):
            factor = factor * ahead / order if order else 1.0
            total = total + factor * derivative
        return total


def first_block_cache(model: torch.nn.Module, threshold: float) -> Callable:
    """diffusers' own hook: all blocks after the first are skipped while the first one's output hardly changes."""
    from diffusers import FirstBlockCacheConfig

    hooked = copy.deepcopy(model)
    hooked.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    compiled = torch.compile(hooked)

    def call(**inputs):
        with hooked.cache_context("only"):
            return compiled(**inputs)

    call.restart = hooked._reset_stateful_cache
    return call
