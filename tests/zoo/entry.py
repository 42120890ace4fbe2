"""What one model of the zoo is: how to build it tiny, and what changes from one denoising step to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.tiny_parts import Tiny

STEPS = 6


@dataclass(frozen=True)
class Entry:
    """One model: `build()` gives the module in eval mode, all weights random, and the inputs of one call."""

    name: str
    build: Callable[[], Tiny]
    latents: tuple[str, ...] = ("hidden_states",)  # inputs that are new tensors at every step, a little further on
    times: tuple[str, ...] = ("timestep",)  # inputs that fall towards zero
    tolerance: float = 1e-4  # of the error at sparsity 0; more where the model itself rounds to bfloat16
    batch: int | None = None  # samples, where the first dimension of the latents does not tell

    def batch_of(self, latents: dict[str, Any]) -> int:
        first = latents[self.latents[0]]
        return self.batch or (len(first) if isinstance(first, (list, tuple)) else first.shape[0])

    def tiny(self) -> tuple[torch.nn.Module, Callable[[int], dict[str, Any]]]:
        """The model, and step -> its inputs: new latents, a new timestep, and for all else the same objects."""
        model, kwargs = self.build()

        def inputs(step: int) -> dict[str, Any]:
            share = step / STEPS
            moved = {name: _moved(kwargs[name], share) for name in self.latents}
            later = {name: _earlier(kwargs[name], 1 - share) for name in self.times}
            return {**kwargs, **moved, **later}

        return model, inputs


def _moved(value: Any, share: float) -> Any:
    """New latents, on the straight way from the first ones to others, as a sampler goes."""
    if isinstance(value, (list, tuple)):
        return [_moved(v, share) for v in value]
    goal = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=value.dtype)
    return torch.lerp(value, goal, share)


def _earlier(value: Any, share: float) -> Any:
    if isinstance(value, torch.Tensor):
        return (value * share).to(value.dtype)
    return type(value)(value * share)
