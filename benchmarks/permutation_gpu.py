"""What the token permutation costs on a GPU: the gathers of full-size cuts, timed, as a share of a dense step.

    python -m benchmarks.permutation_gpu                            # on a GPU with 40 GB or more; minutes
    python -m benchmarks.permutation_gpu --device cpu --shrink 16   # to see that it runs

Shapes, strides and dtypes of what is gathered come from tests/golden/token_cuts.json, which a test holds against the
models; the orders are patches of 64 tokens. A gather is timed as eager torch and as Inductor compiles it; a step's
cost is that of the compiled ones, those that are kept left out. The dense step is measured too, as a lower bound: the
matrix products and the attention of one layer, on this device, times the number of layers. Where an H100's whole step
or layer is known, the share of that is given as well. Needs torch, triton and this package. Writes
benchmarks/results/permutation-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from chipmunk_compile.passes.token_order import Grid, token_order

log = logging.getLogger("permutation_gpu")
HERE = pathlib.Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden" / "token_cuts.json"
LIMIT = 0.005  # of a dense step
CHUNK = 64


@dataclass(frozen=True)
class Dense:
    """A model's dense step: what one layer multiplies, how many layers, and what an H100 was measured to take."""

    grid: Grid
    text: int  # tokens that attention sees besides the grid's
    width: int
    heads: int
    hidden: int  # of the MLP
    square: int  # linears of width x width in a layer
    layers: int
    known_ms: float | None = None  # a whole step, compiled by Inductor, on an H100


MODELS = {
    "flux": Dense((1, 64, 64), 512, 3072, 24, 12288, 4, 57, known_ms=126.0),  # known at 4352 tokens
    "wan": Dense((21, 45, 80), 0, 5120, 40, 13824, 6, 40, known_ms=283.0 * 40),
    "hunyuan_video": Dense((33, 45, 80), 256, 3072, 24, 12288, 4, 60, known_ms=354.0 * 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the grid's height and width by this")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/permutation-<device>.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    record = {"device": name, "versions": _versions(), "shrink": options.shrink, "models": {}}
    cuts = json.loads(GOLDEN.read_text())
    for model in options.models or MODELS:
        record["models"][model] = measure(MODELS[model], cuts[model]["gathers"], device, options.shrink)
        _log(model, record["models"][model])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = options.out or HERE / "results" / f"permutation-{slug}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    log.info("wrote %s", out)


def measure(dense: Dense, gathers: list[dict], device: torch.device, shrink: int) -> dict:
    """Milliseconds of every gather of a cut, of a step's together, and of the dense step."""
    tokens = math.prod(dense.grid)
    frames, height, width = dense.grid
    grid = (frames, max(1, height // shrink), max(1, width // shrink))
    order, _ = token_order(grid, CHUNK)
    timed = [_gather(gather, order, tokens, device) for gather in gathers]
    step = sum(gather["compiled_ms"] for gather in timed if not gather["kept"])
    layer = _layer_ms(dense, len(order), device)
    found = {
        "grid": grid,
        "gathers": timed,
        "step_ms": step,
        "kept_ms": sum(gather["compiled_ms"] for gather in timed if gather["kept"]),
        "dense_ms_at_least": layer * dense.layers,
        "share": step / (layer * dense.layers),
    }
    if dense.known_ms is not None and shrink == 1:
        found |= {"dense_ms_known_h100": dense.known_ms, "share_of_known": step / dense.known_ms}
    return found | {"limit": LIMIT, "within": max(found["share"], found.get("share_of_known", 0.0)) < LIMIT}


def _gather(gather: dict, order: torch.Tensor, tokens: int, device: torch.device) -> dict:
    """One gather along each of its dims in turn."""
    shape, stride, dims = gather["shape"], gather["stride"], gather["dims"]
    if len(order) != tokens:  # shrunk: the same layout, smaller
        shape = [size - tokens + len(order) if dim in dims else size for dim, size in enumerate(shape)]
        stride = _like(shape, stride)
    index = order.argsort() if gather["direction"] == "out" else order
    indices = [torch.cat([index, torch.arange(len(index), shape[dim])]).to(device) for dim in dims]
    dtype = getattr(torch, gather["dtype"])
    x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    x = x.normal_() if dtype.is_floating_point or dtype.is_complex else x.random_()

    def reordered(x: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        for dim, index in zip(dims, indices):
            x = x.index_select(dim, index)
        return x

    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(reordered, dynamic=False)
        assert torch.equal(compiled(x, *indices), reordered(x, *indices))
        eager, fused = (_ms(lambda run=run: run(x, *indices), device) for run in (reordered, compiled))
    moved = 2 * len(dims) * x.numel() * x.element_size()
    return {
        **{key: gather[key] for key in ("value", "direction", "dims", "dtype")},
        "shape": shape,
        "stride": stride,
        "kept": gather["fixed"],
        "bytes": moved,
        "eager_ms": eager,
        "compiled_ms": fused,
        "gb_per_s": moved / fused / 1e6,
    }


def _like(shape: list[int], stride: list[int]) -> list[int]:
    """Strides of a dense tensor whose dims lie in the same order in memory."""
    out, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        out[dim] = step
        step *= shape[dim]
    return out


def _layer_ms(dense: Dense, tokens: int, device: torch.device) -> float:
    """The matrix products and the self-attention of one layer in bfloat16; norms and pointwise work are left out."""
    n, d = tokens + dense.text, dense.width
    make = dict(dtype=torch.bfloat16, device=device)
    x, hidden = torch.randn(n, d, **make), torch.randn(n, dense.hidden, **make)
    square, up, down = (torch.randn(s, **make) for s in ((d, d), (dense.hidden, d), (d, dense.hidden)))
    qkv = torch.randn(3, 1, dense.heads, n, d // dense.heads, **make)
    with torch.no_grad():
        linears = dense.square * _ms(lambda: F.linear(x, square), device)
        linears += _ms(lambda: F.linear(x, up), device) + _ms(lambda: F.linear(hidden, down), device)
        return linears + _ms(lambda: F.scaled_dot_product_attention(*qkv), device)


def _ms(run: Callable[[], object], device: torch.device) -> float:
    """The median of repeated runs; on a GPU with a cold L2 before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=300, return_mode="median")
    run()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def _log(model: str, found: dict) -> None:
    known = f", {found['share_of_known']:.3%} of the known step" if "share_of_known" in found else ""
    log.info(
        "%s: %.3f ms a step of at least %.1f ms dense, %.3f%%%s; kept %.3f ms once: %s",
        model,
        found["step_ms"],
        found["dense_ms_at_least"],
        100 * found["share"],
        known,
        found["kept_ms"],
        "within the limit" if found["within"] else "OVER the limit",
    )
    for gather in found["gathers"]:
        log.info(
            "  %-3s %s %s: eager %.3f ms, compiled %.3f ms, %.0f GB/s",
            *(gather[key] for key in ("direction", "value", "shape", "eager_ms", "compiled_ms", "gb_per_s")),
        )


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    return found


if __name__ == "__main__":
    main()
