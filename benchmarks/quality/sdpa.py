"""Which of torch's attention kernels is the fastest that works, for a shape: names as in benchmarks.models_timing."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks.models_timing import SDPA, fastest_sdpa

from .subjects import Subject


def inference_sdpa(subject: Subject, batch: int, device: torch.device) -> tuple[str | None, dict[str, float]]:
    """The fastest for the model's self-attention, and milliseconds of each; nothing on a CPU."""
    found = {name: seconds for name in SDPA if (seconds := _time(subject, batch, False, device, False)(name))}
    return min(found, key=found.get, default=None), {name: 1e3 * seconds for name, seconds in found.items()}


def training_sdpa(subject: Subject, batch: int, coarse: bool, device: torch.device) -> str | None:
    """The same with the gradient. cuDNN's has failed (torch 2.11, 1616 tokens of head dim 64, H200): one that does not
    run, or whose gradients differ from the other's, is left out."""
    timed = _time(subject, batch, coarse, device, True)
    found = {name: seconds for name in SDPA if (seconds := timed(name))}
    return min(found, key=found.get, default=None)


def _time(subject: Subject, batch: int, coarse: bool, device: torch.device, backward: bool):
    heads, head_dim = subject.heads
    tokens = subject.tokens // 4 if coarse else subject.tokens

    def run(name: str) -> float | None:
        """Seconds of one call; None where it does not run, or its gradient is wrong."""
        if device.type != "cuda":
            return None
        generator = torch.Generator(device).manual_seed(0)
        # As the model makes them: heads last but one in memory.
        q, k, v = (
            torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device, dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_(backward)
            for _ in range(3)
        )

        def once() -> torch.Tensor:
            out = F.scaled_dot_product_attention(q, k, v)
            return torch.autograd.grad(out, q, v)[0] if backward else out

        try:
            with fastest_sdpa(name), torch.set_grad_enabled(backward):
                result = once()
                if backward and not _is_near(result, once, name):
                    return None
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(5):
                    once()
                torch.cuda.synchronize()
                return (time.perf_counter() - started) / 5
        except RuntimeError:
            return None

    return run


def _is_near(gradient: torch.Tensor, once, name: str) -> bool:
    """Whether it is finite, and as the other kernel has it."""
    (other,) = (backend for backend in SDPA if backend != name)
    with fastest_sdpa(other):
        expected = once()
    error = (gradient.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < 2e-2)
