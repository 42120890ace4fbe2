"""Measures tiles: for one class of shape on a new GPU, or for all, to write tuning.json.

    python -m chipmunk_compile.kernels.tuner [--write]

Each class is timed on inputs of its own making, a few milliseconds of work, each candidate by CUDA events; one that
does not fit the GPU is passed over. The warp-specialised kernels for Hopper are left out: their tiles are one choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
from collections.abc import Callable
from unittest import mock

import torch

from . import cuda_attention, cuda_mlp, reference, tuning
from .launch import capability

logger = logging.getLogger("chipmunk_compile")

CANDIDATES: dict[str, dict[str, tuple]] = {
    "attention_delta": {"BM": (64, 128), "BN": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "attention_scores": {"BN": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "mlp_up": {"BF": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "mlp_down": {"BO": (128, 256), "BK": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)},
}


def measure(key: str, default: dict, device: torch.device) -> dict[str, dict]:
    """{key: the fastest tiles}. Takes seconds, most of them compiling."""
    words = key.split(" ")
    name = words[0]
    run = (_mlp if name.startswith("mlp") else _attention)(words, device)
    timed = {}
    for choice in itertools.product(*CANDIDATES[name].values()):
        tiles = {**default, **dict(zip(CANDIDATES[name], choice))}
        if tiles.get("BM", 0) > default.get("BM", 0) and tiles["BM"] > _chunk(words):
            continue
        with tuning.override({key: tiles}), mock.patch.object(cuda_attention, "_suits_hopper", lambda *a: False):
            time = _milliseconds(run)
        if time is not None:
            timed[time] = tiles
    best = min(timed, default=None)
    logger.info("tiles for %s on %s: %s", key, torch.cuda.get_device_name(device), timed.get(best, default))
    return {key: timed.get(best, default)}


def _milliseconds(run: Callable[[], object]) -> float | None:
    """The median of ten runs; None if the tiles ask for more than the GPU has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except (OutOfResources, CompilationError):
        return None
    times = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _chunk(words: list[str]) -> int:
    return int(words[words.index("chunk") + 1]) if "chunk" in words else 128


def _attention(words: list[str], device: torch.device) -> Callable[[], object]:
    """A call whose time is that of attention_delta, or of the choice of columns."""
    head_dim, chunk, tokens, heads, kept = int(words[words.index("head_dim") + 1]), _chunk(words), 8192, 16, 768
    samples = int(words[words.index("samples") + 1]) if "samples" in words else 8
    starts = reference.chunk_table([tokens], chunk)
    sampled = reference.sample_table(starts, samples).to(device)
    starts = starts.to(device)
    chunks = len(starts) - 1
    query, key, value = (
        torch.randn(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(3)
    )
    o_cache, columns, counts = reference.attention_state(
        1, heads, tokens, tokens, head_dim, kept, chunks, torch.bfloat16, device
    )
    spread = torch.arange(kept, device=device) * (tokens // kept)
    columns.copy_(spread + torch.randint(tokens // kept, columns.shape, device=device))
    counts.fill_(kept)
    o_cache.normal_()
    scale = head_dim**-0.5
    if words[0] == "attention_scores":
        lse = torch.full((1, heads, tokens), 9.0, device=device)
        return lambda: cuda_attention._choose_columns(query, key, None, sampled, lse, columns, counts, scale)
    state = (o_cache, columns, counts)
    return lambda: cuda_attention.attention_delta(query, key, value, None, starts, *state, scale, chunk)


def _mlp(words: list[str], device: torch.device) -> Callable[[], object]:
    """A call whose time is that of mlp_up or mlp_down."""
    inputs = int(words[words.index("inputs") + 1]) if "inputs" in words else 1
    chunk, tokens, width, hidden, kept = _chunk(words), 4096, 2048, 8192, 2432

    def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    starts = reference.chunk_table([tokens], chunk)
    rows = len(starts) - 1
    starts = starts.to(device)
    spread = torch.arange(kept, device=device) * (hidden // kept)
    chosen = (spread + torch.randint(hidden // kept, (rows, kept), device=device)).int()
    if words[0] == "mlp_down":
        change, down_t = normal(rows, kept, -(-chunk // 64) * 64 if chunk > 64 else chunk), normal(hidden, width)
        out_cache = normal(1, tokens, width, dtype=torch.float32)
        return lambda: cuda_mlp._down(change, down_t, starts, chosen, out_cache, chunk, False)
    x, weights, cache = (
        normal(1, tokens, width),
        [normal(hidden, width) for _ in range(inputs)],
        normal(1, hidden, tokens),
    )
    region = "gelu_tanh(h0)" if inputs == 1 else "mul(silu(h0), h1)"
    return lambda: cuda_mlp._up(x, weights, [], starts, chosen, cache, region, chunk, False)


def classes(device: torch.device) -> list[tuple[str, dict]]:
    """The classes that tuning.json names, with their defaults."""
    found: list[tuple[str, dict]] = []
    with mock.patch.object(tuning, "_find", lambda key, default, _: found.append((key, default)) or default):
        for head_dim, chunk in itertools.product((64, 128, 256), (64, 128)):
            tuning.attention_delta(torch.bfloat16, head_dim, chunk, device)
        for head_dim in (64, 128):
            tuning.attention_scores(torch.bfloat16, head_dim, 8, device)
        for chunk in (64, 128):
            tuning.mlp_up(torch.bfloat16, chunk, 1, device)
            tuning.mlp_up(torch.bfloat16, chunk, 2, device)
            tuning.mlp_down(torch.bfloat16, chunk, device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiles of all classes of shape on this GPU.")
    parser.add_argument("--write", action="store_true", help="into tuning.json, under this GPU's compute capability")
    write = parser.parse_args().write
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    table = {}
    for key, default in classes(device):
        table |= measure(key, default, device)
    if write:
        committed = json.loads(tuning.COMMITTED.read_text())
        committed[tuning._name(capability(device))] = table
        tuning.COMMITTED.write_text(json.dumps(committed, indent=1, sort_keys=True) + "\n")
    else:
        tuning.remember(device, table)


if __name__ == "__main__":
    main()
