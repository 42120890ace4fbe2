"""Picture quality against time.

    python -m benchmarks.quality --quick [--steps 28] [--only NAME ...]
    python -m benchmarks.quality --model video --checkpoint FOLDER [--budget SECONDS] [--steps 28 50 12] [--seeds 64]
    python -m benchmarks.quality --draw benchmarks/results/quality-video-<device>.json

`--quick`: the shipped transformer (examples/tiny_dit) on this machine, in under ten minutes on two cores. Every method
denoises the same noise as compiled dense does; a dense generation is timed before every third of them, and speed-up is
the ratio of the median of the last three of those to theirs, median over repeats. PSNR, SSIM and relative L1 of the
picture tokens are means over pictures, against compiled dense with the same number of steps. Writes
benchmarks/results/quality-<model>-<device>.json, unless `--only` names some methods.

`--model`: a transformer that `python -m benchmarks.quality.train` left in FOLDER, on a GPU; see frontier.py. Rows are
written as they come, and those there already, of the same weights and sources, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

import chipmunk_compile
from examples.tiny_dit import sampling

from . import frontier, metrics, plot
from .methods import Method, quick_methods

log = logging.getLogger("quality")
RESULTS = pathlib.Path(__file__).parent.parent / "results"
BATCH = 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="the shipped model, a few settings each")
    what.add_argument("--model", choices=("video", "image"), help="a trained model, on a GPU")
    what.add_argument(
        "--draw",
        type=pathlib.Path,
        metavar="JSON",
        help="draw the rows of a file and print them as tables; needs no GPU",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[28])
    parser.add_argument("--repeats", type=int, default=2, help="timed generations of each method, each of other noise")
    parser.add_argument("--only", nargs="*", help="methods whose label holds one of these")
    trained = parser.add_argument_group("with --model")
    trained.add_argument("--checkpoint", type=pathlib.Path, help="folder of the weights")
    trained.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no new row")
    trained.add_argument("--seeds", type=int, default=64, help="clips a row, each of noise and caption of its own")
    trained.add_argument("--encoder-seconds", type=float, default=40.0, help="training of the Fréchet classifier; or 0")
    trained.add_argument("--mode", help='Inductor\'s mode of the dense model, as "reduce-overhead"')
    trained.add_argument("--again", action="store_true", help="measure rows that are there already")
    trained.add_argument("--output", type=pathlib.Path, help="the JSON file")
    trained.add_argument("--tiny", action="store_true", help="a --tiny checkpoint, on the CPU: that it runs")
    trained.add_argument("--eager", action="store_true", help="dense and rivals not compiled; for --tiny")
    args = parser.parse_args(arguments)
    if args.draw:
        print(plot.draw(args.draw))
        for steps in args.steps:
            print(plot.table(args.draw, steps))
    elif args.model:
        if args.checkpoint is None:
            parser.error("--model needs --checkpoint")
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s", stream=sys.stdout)
        frontier.run(args)
    else:
        quick(args)


def quick(args: argparse.Namespace) -> None:
    (args.steps,) = args.steps
    torch.manual_seed(0)
    frontier.allow_many_programs()
    model = sampling.load_model()
    dense = torch.compile(model)
    conditioning = sampling.prepare(list(sampling.CAPTIONS[:BATCH]), model)

    def denoise(called: Callable, seed: int, steps: int) -> tuple[torch.Tensor, float]:
        noise = sampling.starting_noise(BATCH, seed, model)
        started = time.perf_counter()
        tokens = sampling.denoise(called, noise, conditioning, steps)
        return tokens, time.perf_counter() - started

    denoise(dense, 0, 2)
    methods = quick_methods(model, dense, args.steps)
    if args.only:
        methods = [m for m in methods if any(name in m.label for name in args.only)]
    expected = [denoise(dense, seed, args.steps)[0] for seed in range(args.repeats)]
    rows, dense_seconds = [], []
    for number, method in enumerate(tqdm(methods, desc="methods", unit="method")):
        if number % 3 == 0:
            dense_seconds.append(denoise(dense, 0, args.steps)[1])
        rows.append(measure(method, statistics.median(dense_seconds[-3:]), expected, denoise, args.steps))
    if not args.only:
        write(rows)
    for row in sorted(rows, key=lambda r: r["speedup"]):
        computed = f"  ({row['steps'] - row['forecast']:g} steps computed)" if row["forecast"] else ""
        print(f"{row['speedup']:5.2f}x  {row['psnr']:5.1f} dB  ssim {row['ssim']:.4f}  {row['label']}{computed}")


def measure(method: Method, dense_seconds: float, expected: list[Tensor], denoise: Callable, steps: int) -> dict:
    """One row: generations of the method, one for each seed of `expected`; a dense one takes `dense_seconds`."""
    own_steps = method.steps or steps
    denoise(method.make(), 0, min(own_steps, 4))  # compiles
    seconds, scores, forecasts = [], [], 0
    for seed, reference_tokens in enumerate(expected):
        chipmunk_compile.reset()
        tokens, own = denoise(method.make(), seed, own_steps)
        seconds.append(own)
        forecasts += chipmunk_compile.counters()["forecast"]
        pictures, reference = (sampling.unpack(t).clamp(-1, 1) / 2 + 0.5 for t in (tokens, reference_tokens))
        scores.append([
            metrics.psnr(pictures, reference), metrics.ssim(pictures, reference),
            metrics.relative_l1(tokens, reference_tokens),
        ])  # fmt: skip
    psnr, ssim, rel_l1 = (torch.cat(values).mean().item() for values in zip(*scores))
    ratios = [dense_seconds / own for own in seconds]
    return {
        "model": "tiny-dit", "method": method.name, "setting": method.setting, "label": method.label,
        "steps": own_steps, "forecast": forecasts / len(expected),
        "ms_per_step": 1000 * statistics.median(seconds) / steps,
        "speedup": statistics.median(ratios), "speedups": ratios, "psnr": psnr, "ssim": ssim, "rel_l1": rel_l1,
        "frechet": None, "pictures": len(expected) * BATCH,
    }  # fmt: skip


def write(rows: list[dict]) -> None:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    name = "-".join("".join(c if c.isalnum() else " " for c in cpu.lower()).split()[:2])
    whole = {"device": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    path = RESULTS / f"quality-tiny-dit-{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    log.info("wrote %s", path)


if __name__ == "__main__":
    main()
