"""Measures tiles: for one class of shape on a new GPU, or for all, to write tuning.json.

    python -m chipmunk_compile.kernels.tuner [--write] [--only mlp_hopper ...] [--budget SECONDS]

Each class is timed on inputs of its own making, a few milliseconds of work. A candidate that does not fit the GPU is
passed over, and so is one whose result is not that of the portable kernel at its default tiles.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from unittest import mock

import torch

from . import cuda_attention, cuda_mlp, launch, reference, tuning

logger = logging.getLogger("chipmunk_compile")

CANDIDATES: dict[str, dict[str, tuple]] = {
    "attention_delta": {"BM": (64, 128), "BN": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "attention_scores": {"BN": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "mlp_up": {"BF": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "mlp_down": {"BO": (128, 256), "BK": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)},
}
# Of the warp-specialised kernels: what differs from the default. Each was compiled for sm_90 and fits its shared
# memory; docs/kernels.md says what each is for.
SHARED = ({}, {"turns": False}, {"turns": False, "BN": 64, "K_STAGES": 6, "V_STAGES": 6})
APART = ({}, {"K_STAGES": 4, "V_STAGES": 2}, {"K_STAGES": 2, "V_STAGES": 4})
MLP = ({}, *({"UP_GROUP": up, "DOWN_GROUP": down} for up, down in ((8, 8), (8, 16), (16, 32), (32, 16), (32, 32))))
WORST = 2e-2  # relative distance of two bf16 results that are both right


def measure(key: str, default: dict, device: torch.device, without: Collection[str] = ()) -> dict[str, dict]:
    """{key: the fastest tiles}. Takes seconds, most of them compiling. without: names that keep their defaults."""
    words = key.split(" ")
    run = (_mlp if words[0].startswith("mlp") else _attention)(words, device)
    hopper = words[0].endswith("_hopper")
    expected = _portable(run)
    timed: list[tuple[float, dict]] = []
    for tiles in candidates(words, default):
        if any(tiles[name] != default[name] for name in without if name in default):
            continue
        with tuning.override({key: tiles}), _only(hopper):
            took = _milliseconds(run, expected)
        changed = {name: value for name, value in tiles.items() if value != default[name]}
        logger.info("  %s %s: %s", key, changed, took if isinstance(took, str) else f"{took:.4f} ms")
        if not isinstance(took, str):
            timed.append((took, tiles))
    best = min(timed, key=lambda pair: pair[0], default=(None, default))[1]
    logger.info("tiles for %s: %s", key, best)
    return {key: best}


def candidates(words: list[str], default: dict) -> Iterator[dict]:
    if words[0].endswith("_hopper"):
        changes = MLP if words[0].startswith("mlp") else SHARED if default["shared"] else APART
        yield from ({**default, **change} for change in changes)
        return
    names = CANDIDATES[words[0]]
    for choice in itertools.product(*names.values()):
        tiles = {**default, **dict(zip(names, choice))}
        if tiles.get("BM", 0) <= max(default.get("BM", 0), _number(words, "chunk", 128)):
            yield tiles


@contextlib.contextmanager
def _only(hopper: bool) -> Iterator[None]:
    """Inside, the warp-specialised kernels run, or none of them; what was refused before is tried again."""
    available = launch._has_gluon if hopper else lambda: False
    with mock.patch.object(launch, "_refused", set()), mock.patch.object(launch, "_has_gluon", available):
        yield


def _portable(run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    with _only(False):
        result = run()
    return None if result is None else result.double()


def _milliseconds(run: Callable[[], torch.Tensor | None], expected: torch.Tensor | None) -> float | str:
    """The median of ten runs with a cold L2 cache; or why there is none."""
    try:
        result = run()
    except Exception as error:
        if not launch.is_refusal(error):
            raise
        return f"does not fit ({type(error).__name__})"
    if launch._refused:
        return "does not compile"
    if expected is not None:
        distance = ((result.double() - expected).norm() / expected.norm()).item()
        if not distance < WORST:
            return f"WRONG by {distance:.1e}"
    times = []
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=_device())
    for _ in range(10):
        flush.zero_(), flush.zero_()  # long enough for the host to have launched what follows
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _number(words: list[str], name: str, default: int) -> int:
    return int(words[words.index(name) + 1]) if name in words else default


def _attention(words: list[str], device: torch.device) -> Callable[[], torch.Tensor | None]:
    """A call whose time is that of attention_delta, or of the choice of columns."""
    head_dim, chunk = _number(words, "head_dim", 128), _number(words, "chunk", 64)
    tokens, heads, kept = (4608, 24, 768) if words[-1] == "few" else (16384, 12, 1152)
    samples = _number(words, "samples", 8)
    starts = reference.chunk_table([tokens], chunk)
    sampled = reference.sample_table(starts, samples).to(device)
    starts = starts.to(device)
    query, key, value = (
        torch.randn(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(3)
    )
    o_cache, columns, counts = reference.attention_state(
        1, heads, tokens, tokens, head_dim, kept, len(starts) - 1, torch.bfloat16, device
    )
    spread = torch.arange(kept, device=device) * (tokens // kept)
    columns.copy_(spread + torch.randint(tokens // kept, columns.shape, device=device))
    counts.fill_(kept)
    o_cache.zero_()  # nothing beside which a wrong sparse term would look small
    scale = head_dim**-0.5
    if words[0] == "attention_scores":
        lse = torch.full((1, heads, tokens), 9.0, device=device)
        return lambda: cuda_attention._choose_columns(query, key, None, sampled, lse, columns, counts, scale)
    state = (o_cache, columns, counts)
    return lambda: cuda_attention.attention_delta(query, key, value, None, starts, *state, scale, chunk)


def _mlp(words: list[str], device: torch.device) -> Callable[[], torch.Tensor]:
    """A call whose time is that of mlp_up, mlp_down, or mlp_hopper, and of setting the caches back."""
    inputs, chunk = _number(words, "inputs", 1), _number(words, "chunk", 128)
    tokens, hopper = 16384 if words[-1] == "many" else 4096, words[0] == "mlp_hopper"
    width, hidden, kept = (3072, 12288, 3712) if hopper else (2048, 8192, 2432)

    def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    starts = reference.chunk_table([tokens], chunk)
    rows = len(starts) - 1
    starts = starts.to(device)
    spread = torch.arange(kept, device=device) * (hidden // kept)
    chosen = (spread + torch.randint(hidden // kept, (rows, kept), device=device)).int()
    out_cache, down_t = normal(1, tokens, width, dtype=torch.float32), normal(hidden, width) * hidden**-0.5
    out_before = out_cache.clone()
    if words[0] == "mlp_down":
        change = normal(rows, kept, -(-chunk // 64) * 64 if chunk > 64 else chunk)

        def down() -> torch.Tensor:
            out_cache.copy_(out_before)
            return cuda_mlp._down(change, down_t, starts, chosen, out_cache, chunk)

        return down
    x, cache = normal(1, tokens, width), normal(1, hidden, tokens)
    weights, biases = [normal(hidden, width) * width**-0.5 for _ in range(inputs)], [normal(hidden)] * (2 - inputs)
    region = "gelu_tanh(h0)" if inputs == 1 else "mul(silu(h0), h1)"
    before = cache.clone()

    def up() -> torch.Tensor:
        cache.copy_(before)
        return cuda_mlp._up(x, weights, biases, starts, chosen, cache, region, chunk)

    def both() -> torch.Tensor:
        cache.copy_(before), out_cache.copy_(out_before)
        site = (x, weights, biases, down_t, starts, chosen, cache, out_cache, region, chunk)
        out = cuda_mlp._multiply_hopper(*site) if launch._has_gluon() else None
        return cuda_mlp._multiply(*site) if out is None else out

    return both if hopper else up


def classes(device: torch.device, hopper: bool = True) -> list[tuple[str, dict]]:
    """The classes that tuning.json names, with their defaults; those of Hopper first."""
    found: list[tuple[str, dict]] = []
    bf16 = torch.bfloat16
    with mock.patch.object(tuning, "_find", lambda key, default, _: found.append((key, default)) or default):
        if hopper:
            for chunk, kept in itertools.product((128, 64), (768, 2304)):
                tuning.attention_delta_hopper(128, chunk, kept, device)
            for rows in (32, 256):
                tuning.mlp_hopper(1, rows, device)
                tuning.mlp_hopper(2, rows, device)
        for head_dim, chunk in itertools.product((64, 128, 256), (64, 128)):
            tuning.attention_delta(bf16, head_dim, chunk, device)
        for head_dim in (64, 128):
            tuning.attention_scores(bf16, head_dim, 8, device)
        for chunk in (64, 128):
            tuning.mlp_up(bf16, chunk, 1, device)
            tuning.mlp_up(bf16, chunk, 2, device)
            tuning.mlp_down(bf16, chunk, device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiles of all classes of shape on this GPU.")
    parser.add_argument("--write", action="store_true", help="into tuning.json, under this GPU's compute capability")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="or the start of a class: 'mlp_hopper inputs 1'")
    parser.add_argument("--without", nargs="+", default=(), metavar="NAME", help="do not try others: turns, BN, ...")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no class")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began, device = time.monotonic(), _device()
    capability = launch.capability(device)
    for key, default in classes(device, hopper=capability[0] == 9):
        if options.only and not any(f"{key} ".startswith(f"{name} ") for name in options.only):
            continue
        if time.monotonic() - began > options.budget:
            logger.info("out of budget before %s", key)
            break
        measured = measure(key, default, device, options.without)
        if options.write:  # at once: what is cut off has lost nothing
            tuning.commit(capability, measured)
        else:
            tuning.remember(device, measured)


if __name__ == "__main__":
    with torch.no_grad():
        main()
