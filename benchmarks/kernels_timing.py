"""Measuring on a GPU: medians of graph replays with a cold L2 cache, memory, the host's share, distances."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ENOUGH_MS = 60.0  # of measuring, in all
FEWEST, MOST = 7, 50  # replays
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@functools.cache
def _flusher() -> torch.Tensor:
    """Larger than any L2 cache."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def milliseconds(run: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
    """The median of graph replays; before each, `prepare` runs and the L2 cache is flushed, both untimed."""
    _ready(run, prepare)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < MOST and sum(times) < ENOUGH_MS):
        if prepare is not None:
            prepare()
        _flusher().zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[1:])


def _ready(run: Callable[[], object], prepare: Callable[[], object] | None) -> None:
    """Twice before capture: compilers and libraries have made all that they make."""
    for _ in range(2):
        if prepare is not None:
            prepare()
        run()
    torch.cuda.synchronize()


def temporary_bytes(run: Callable[[], torch.Tensor]) -> int:
    """The most memory that a call holds beyond its arguments and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    return torch.cuda.max_memory_allocated() - before - (out.nbytes if isinstance(out, torch.Tensor) else 0)


def host_microseconds(run: Callable[[], object]) -> float:
    """What a call costs the host, for calls so small that the GPU is always done first."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 200 * 1e6


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """||actual - expected|| / ||expected|| over pairs of tensors, in float64."""
    off, norm = 0.0, 0.0
    for actual, expected in pairs:
        off += (actual.double() - expected).square().sum().item()
        norm += expected.double().square().sum().item()
    return math.sqrt(off / norm)


def dense_attention(query, key, value) -> tuple[str, float]:
    """The fastest dense attention on this machine: its name and milliseconds."""
    times = {}
    for name, backend in SDPA.items():
        if query.shape[2] > 70_000 and times:  # a fifth of a second a call, and never the fastest where cuDNN runs
            continue
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            times[name] = milliseconds(lambda: F.scaled_dot_product_attention(query, key, value))
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func

        heads_last = [t.transpose(1, 2) for t in (query, key, value)]
        times["FlashAttention-3"] = milliseconds(lambda: flash_attn_func(*heads_last))
    name = min(times, key=times.get)
    return name, times[name]


def against(dense: tuple[str, float], ms: float) -> dict:
    """The columns of a row that compare it with a dense kernel, of (name, milliseconds)."""
    return {"baseline": dense[0], "baseline_ms": dense[1], "ratio": dense[1] / ms}
