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
    latents: tuple[str, ...] = ("hidden_states",)  # inputs that are new tensors at every step
    times: tuple[str, ...] = ("timestep",)  # inputs that fall towards zero
    batch: int | None = None  # samples, where the first dimension of the latents does not tell

    def batch_of(self, latents: dict[str, Any]) -> int:
        first = latents[self.latents[0]]
        return self.batch or (len(first) if isinstance(first, (list, tuple)) else first.shape[0])

    def tiny(self) -> tuple[torch.nn.Module, Callable[[int], dict[str, Any]]]:
        """The model, and step -> its inputs: new latents, a new timestep, and for all else the same objects."""
        model, kwargs = self.build()

        def inputs(step: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(step)
            fresh = {name: _renewed(kwargs[name], generator) for name in self.latents}
            later = {name: _earlier(kwargs[name], 1 - step / STEPS) for name in self.times}
            return {**kwargs, **fresh, **later}

        return model, inputs


def _renewed(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, (list, tuple)):
        return [_renewed(v, generator) for v in value]
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)


def _earlier(value: Any, share: float) -> Any:
    if isinstance(value, torch.Tensor):
        return (value * share).to(value.dtype)
    return type(value)(value * share)
