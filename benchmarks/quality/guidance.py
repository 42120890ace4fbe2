"""What it is worth that both streams of guidance are forecast at the same steps.

    python -m benchmarks.quality.guidance --checkpoint FOLDER [--size 128] [--steps 28] [--guidance 2.5 6]

The image model that `python -m benchmarks.quality.train --model image` left in FOLDER, on a CPU, eager and in float32.
Every step calls it twice, with caption and without. "apart": each stream forecasts what it may; "together": a step is
forecast if both may be (chipmunk_compile/council.py). PSNR is against the same loop with every step computed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History

from . import checkpoints
from .simulated import guided_model
from .subjects import IMAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="pixels a side; the model was trained at 256")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5, 6.0])
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.008, 0.02, 0.06])
    parser.add_argument("--order", type=int, default=1, choices=(0, 1, 2), help="of the forecasts")
    args = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.float32
    weights = checkpoints.load_weights(args.checkpoint, device, dtype)
    print("| guidance | tolerance | apart | together |\n|---|---|---|---|")
    for guidance in args.guidance:
        subject = replace(IMAGE, size=args.size, guidance=guidance, measured=args.pictures)
        model = guided_model(subject, weights, args.pictures, device, dtype)
        for tolerance in args.tolerance:
            options, cells = ForecastOptions(tolerance=tolerance, order=args.order, repay=True), []
            for together in (False, True):
                with torch.no_grad():
                    psnr, computed, _ = model.judged(lambda o=options: History(o), args.steps, together)
                cells.append(f"{psnr:.1f} dB, {computed:g} of {args.steps} computed")
            print(f"| {guidance:g} | {tolerance:g} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
