"""What the tiny models are made of: random weights and inputs, the same at every call."""

from __future__ import annotations

import torch

Tiny = tuple[torch.nn.Module, dict]


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: matrices at 1/sqrt(fan in), norm weights around one, the rest small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            noise = noise / max(1, parameter[0].numel()) ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        parameter.data.copy_(noise)
    return model.eval().requires_grad_(False)


class Random:
    """Seeded normal tensors, one generator per model."""

    def __init__(self, seed: int = 1):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def built(cls: type, **config) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(cls(**config))


def timestep(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def image_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """[height * width, axes] float: (0, row, column), zeros behind when there are more axes."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(height * width, axes)
