"""Which of torch's attention kernels is the fastest that works, for a shape: names as in benchmarks.models_timing."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks.models_timing import SDPA, fastest_sdpa

from .subjects import Subject


def inference_sdpa(subject: Subject, batch: int, device: torch.device) -> tuple[str | None, dict[str, float]]:
    """The fastest for the model's self-attention, and milliseconds of each; nothing on a CPU."""
    return _fastest(device, subject.heads, batch, subject.tokens, (subject.tokens,), backward=False)


def training_sdpa(subject: Subject, batch: int, coarse: bool, device: torch.device) -> str | None:
    """The same with the gradient, for self-attention and attention to the text. cuDNN's gradient has failed
    (torch 2.11, 1616 tokens of head dim 64, H200): what does not run, or differs from the other, is left out."""
    tokens = subject.tokens // 4 if coarse else subject.tokens
    return _fastest(device, subject.heads, batch, tokens, (tokens, subject.phrases), backward=True)[0]


def _fastest(
    device: torch.device, heads: tuple[int, int], batch: int, tokens: int, kv_lens: tuple[int, ...], backward: bool
) -> tuple[str | None, dict[str, float]]:
    if device.type != "cuda":
        return None, {}
    found = {}
    for name in SDPA:
        try:
            parts = [_milliseconds(name, heads, batch, tokens, kv_len, device, backward) for kv_len in kv_lens]
        except RuntimeError:  # it does not take this shape
            continue
        if None not in parts:
            found[name] = sum(parts)
    return min(found, key=found.get, default=None), found


def _milliseconds(
    name: str, heads: tuple[int, int], batch: int, tokens: int, kv_len: int, device: torch.device, backward: bool
) -> float | None:
    """Of one call; None where its gradient is wrong."""
    generator = torch.Generator(device).manual_seed(0)
    # As the model makes them: heads last but one in memory.
    query, key, value = (
        torch.randn(batch, length, *heads, generator=generator, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_(backward)
        for length in (tokens, kv_len, kv_len)
    )

    def once() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(out, (query, key, value), query) if backward else (out,)

    with torch.set_grad_enabled(backward):
        with fastest_sdpa(name):
            results = once()
        with fastest_sdpa(next(other for other in SDPA if other != name)):
            expected = once()
        if not all(_relative_error(a, b) < 2e-2 for a, b in zip(results, expected)):
            return None
        with fastest_sdpa(name):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                once()
            torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / 5


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())
