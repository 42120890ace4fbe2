"""Look before you leap, then set a budget: what sparse steps and forecasts can give on a model, and the fastest setting
that keeps its pictures at a target PSNR.

    python examples/calibrate.py --target 35

The small trained transformer of this repository, on a CPU; no download. Writes out/calibration.json, and out/probe.png
where matplotlib is installed. With your own pipeline only `run` changes: see docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tiny_dit import sampling

import chipmunk_compile


def main() -> None:
    args = parse_arguments()
    model = sampling.load_model()
    conditioning = sampling.prepare(list(sampling.CAPTIONS[: args.batch]), model)
    noise = sampling.starting_noise(args.batch, args.seed, model)

    def run(called: torch.nn.Module) -> torch.Tensor:
        """One generation with the model that it is given: the same noise and captions at every call."""
        return sampling.unpack(sampling.denoise(called, noise, conditioning, args.steps))

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    look(model, run, folder)
    if args.probe_only:
        return
    found = chipmunk_compile.calibrate(model, run, args.target, peak=2.0)  # pictures are in -1..1
    print(f"\n{found}\n")
    path = found.save(folder / "calibration.json")
    compiled = torch.compile(model, backend="chipmunk", options={"calibration": str(path)})
    error = (run(compiled) - run(torch.compile(model))).div(2.0).square().mean((1, 2, 3))
    print(
        f"run again with options={json.dumps({'calibration': str(path)})}: {-10 * error.max().log10():.1f} dB at worst"
    )


def look(model: torch.nn.Module, run, folder: Path) -> None:
    started = time.perf_counter()
    run(model)
    eager = time.perf_counter() - started
    started = time.perf_counter()
    with chipmunk_compile.probe(model) as seen:
        run(model)
    print(seen)
    print(f"\n  the run took {eager:.1f} s eagerly, {time.perf_counter() - started:.1f} s with the probe")
    try:
        seen.plot(folder / "probe.png")
        print(f"  picture: {folder / 'probe.png'}")
    except ImportError as error:
        print(f"  {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=35.0, help="PSNR of every picture, dB (default %(default)s)")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, choices=range(1, 5), help="pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out", help="folder (default %(default)s)")
    parser.add_argument("--probe-only", action="store_true", help="look, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
