"""From noise and captions to latents: Euler steps of a rectified flow with guidance by two calls, as pipelines do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples.tiny_dit.scenes import sample_scenes

from .subjects import Subject, unfold
from .video import scenes as video


def schedule(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 down to 0, steps + 1 of them."""
    even = [1 - k / steps for k in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def starting_noise(subject: Subject, count: int, seed: int, device) -> Tensor:
    """[count, *subject.latents], drawn on the CPU: a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *subject.latents, generator=generator).to(device)


def captions(subject: Subject, count: int, seed: int) -> Tensor:
    """Text of scenes never trained on (their seeds are), [count, phrases, 64], on the CPU."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return video.sample_scenes(count, generator).text if subject.frames > 1 else sample_scenes(count, generator).words


@torch.no_grad()
def generate(
    called: Callable, subject: Subject, noise: Tensor, text: Tensor, steps: int, dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:  # fmt: skip
    """Latents like `noise` (float32), after two calls of the model a step: with the caption, and without.

    called: the transformer, or anything called like it. The same text tensors go into every step.
    """
    scale = subject.guidance if guidance is None else guidance
    levels = schedule(steps, subject.shift)
    conditional = text.to(noise.device, dtype)
    unconditional = torch.zeros_like(conditional)
    times = torch.tensor(levels[:-1], device=noise.device).mul(1000)[:, None].expand(-1, len(noise)).contiguous()
    latents = noise
    for k in range(steps):
        hidden, now = latents.to(dtype), times[k]
        # Used up before the next call: a compiled model may write its output where the last one lies.
        velocity = called(
            hidden_states=hidden, timestep=now, encoder_hidden_states=conditional, return_dict=False
        )[0].float()  # fmt: skip
        if scale != 1.0:
            free = called(
                hidden_states=hidden, timestep=now, encoder_hidden_states=unconditional, return_dict=False
            )[0].float()  # fmt: skip
            velocity = torch.lerp(free, velocity, scale)
        latents = latents + (levels[k + 1] - levels[k]) * velocity
    return latents


def pictures_of(latents: Tensor) -> Tensor:
    """[n, 3 * frames, height, width] in 0..1: frames as channels, so that metrics never look across a frame's edge."""
    return (unfold(latents).flatten(1, 2).clamp(-1, 1) + 1) / 2
