"""The sparse ops on this CPU against dense: scaled_dot_product_attention, and an MLP compiled by Inductor.

    python benchmarks/cpu_kernels.py [--repeats 30] [--threads 1 2] [--quick]

Float32, random input and weights. All candidates of one shape run once per round, in turn, so that other work on the
machine hits them alike; each is reported by its median, least and quartiles over the rounds. On one thread the clock
is that thread's CPU time, which other work disturbs least; on more it is the wall's, good on an idle machine only.
Writes benchmarks/results/cpu-kernels-<cpu>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from chipmunk_compile.kernels import cpu, ops, reference  # noqa: F401  (ops defines torch.ops.chipmunk)

log = logging.getLogger("cpu_kernels")
RESULTS = pathlib.Path(__file__).parent / "results"

CHUNK, SAMPLES, HEAD_DIM = 64, 8, 64
REGION = "gelu_tanh(h0)"
SHAPES = [  # batch, tokens, heads; width = heads * 64, hidden = 4 * width
    (1, 1616, 4),
    (2, 1616, 4),
    (1, 4160, 6),
]
ATTENTION_KEPT = (0.165, 0.07)
MLP_KEPT = (0.3,)
PATHS = ("native", "blocked")


def forced(path: str, op, *args) -> Callable[[], torch.Tensor]:
    """A call of `op` that takes one of the CPU's paths."""

    def call() -> torch.Tensor:
        with cpu.force(path):
            return op(*args)

    return call


def attention_candidates(batch: int, tokens: int, heads: int) -> dict[str, Callable[[], torch.Tensor]]:
    """SDPA, and refresh and delta on each path, on [B, N, H, D] tensors seen as [B, H, N, D]."""
    query, key, value = (torch.randn(batch, tokens, heads, HEAD_DIM).transpose(1, 2) for _ in range(3))
    starts = reference.chunk_table([tokens], CHUNK)
    samples = reference.sample_table(starts, SAMPLES)
    options = (HEAD_DIM**-0.5, CHUNK)
    candidates = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value)}
    for share in ATTENTION_KEPT:
        sizes = (batch, heads, tokens, tokens, HEAD_DIM, round(share * tokens), len(starts) - 1)
        state = reference.attention_state(*sizes, torch.float32, "cpu")
        refresh = (torch.ops.chipmunk.attention_refresh, query, key, value, None, starts, samples, *state, *options)
        delta = (torch.ops.chipmunk.attention_delta, query, key, value, None, starts, *state, *options)
        for path in PATHS:
            candidates[f"refresh {share:.1%} {path}"] = forced(path, *refresh)
            candidates[f"delta {share:.1%} {path}"] = forced(path, *delta)
    return candidates


def mlp_candidates(batch: int, tokens: int, heads: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The MLP compiled whole by Inductor, and the delta on each path, neurons chosen anew at each call."""
    width, hidden = heads * HEAD_DIM, 4 * heads * HEAD_DIM
    up, down = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
    mlp = torch.compile(torch.nn.Sequential(up, torch.nn.GELU(approximate="tanh"), down))
    x = torch.randn(batch, tokens, width)
    starts = reference.chunk_table([tokens], CHUNK)
    samples = reference.sample_table(starts, SAMPLES)
    down_t = down.weight.detach().t().contiguous()
    weights = ([up.weight], [up.bias], down_t, down_t.norm(dim=1))
    candidates = {"compiled dense": lambda: mlp(x)}
    for share in MLP_KEPT:
        for path in PATHS:
            sizes = (batch, tokens, hidden, width, SAMPLES, len(starts) - 1)
            caches = [cache.normal_() for cache in reference.mlp_state(*sizes, torch.float32, "cpu")]
            options = (REGION, CHUNK, round(share * hidden))
            delta = (torch.ops.chipmunk.mlp_delta, x, *weights, starts, samples, *caches, *options)
            candidates[f"delta {share:.1%} {path}"] = forced(path, *delta)
    return candidates


def measure(candidates: dict[str, Callable[[], torch.Tensor]], repeats: int, clock: Callable[[], float]) -> dict:
    """Milliseconds of each candidate, and its speed-up over the first one by medians and by minima."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(3):
        for call in candidates.values():
            call()
    for _ in range(repeats):
        for name, call in candidates.items():
            began = clock()
            call()
            times[name].append(1e3 * (clock() - began))
    dense = next(iter(times.values()))
    table = {}
    for name, values in times.items():
        low, median, high = (round(q, 3) for q in statistics.quantiles(values, n=4))
        table[name] = {
            "median_ms": median,
            "least_ms": round(min(values), 3),
            "quartiles_ms": [low, high],
            "speedup_median": round(statistics.median(dense) / statistics.median(values), 3),
            "speedup_least": round(min(dense) / min(values), 3),
        }
    return table


def processor() -> str:
    """The CPU's name."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--output", type=pathlib.Path, help="where to write the JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    report = {
        "device": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "chunk": CHUNK,
        "samples": SAMPLES,
        "repeats": options.repeats,
        "results": [],
    }
    runs = itertools.product(options.threads, SHAPES[: 1 if options.quick else None])
    for threads, (batch, tokens, heads) in runs:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        shape = {"threads": threads, "clock": clock.__name__, "batch": batch, "tokens": tokens, "heads": heads}
        for kind, make in (("attention", attention_candidates), ("mlp", mlp_candidates)):
            log.info("%s %s", kind, shape)
            with torch.no_grad():
                table = measure(make(batch, tokens, heads), options.repeats, clock)
            for name, row in table.items():
                log.info(
                    "  %-24s %8.2f ms (least %.2f)  %5.2fx (by least %.2fx)",
                    name, row["median_ms"], row["least_ms"], row["speedup_median"], row["speedup_least"],
                )  # fmt: skip
            report["results"].append({"kind": kind, **shape, "head_dim": HEAD_DIM, "times": table})
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = options.output or RESULTS / f"cpu-kernels-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    log.info("wrote %s", path)


if __name__ == "__main__":
    main()
