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
from torch import Tensor

from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History

from . import checkpoints, metrics
from .sampling import captions, pictures_of, schedule, starting_noise
from .subjects import IMAGE

WARMUP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="pixels a side; the model was trained at 256")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5, 6.0])
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.001, 0.004, 0.016])
    parser.add_argument("--order", type=int, default=1, choices=(0, 1, 2), help="of the forecasts")
    args = parser.parse_args()
    subject = replace(IMAGE, size=args.size)
    model = checkpoints.load_weights(args.checkpoint, torch.device("cpu"), torch.float32)
    noise = starting_noise(subject, args.pictures, 1, "cpu")
    texts = captions(subject, args.pictures, 1).float()
    texts = (texts, torch.zeros_like(texts))
    print("| guidance | tolerance | apart | together |\n|---|---|---|---|")
    for guidance in args.guidance:
        dense, _ = generate(model, subject, noise, texts, guidance, args.steps)
        for tolerance in args.tolerance:
            cells = []
            for together in (False, True):
                options = ForecastOptions(tolerance=tolerance, order=args.order, repay=True)
                made, computed = generate(model, subject, noise, texts, guidance, args.steps, options, together)
                psnr = metrics.psnr(pictures_of(made), pictures_of(dense)).mean()
                cells.append(f"{psnr:.1f} dB, {computed:g} of {args.steps} computed")
            print(f"| {guidance:g} | {tolerance:g} | {cells[0]} | {cells[1]} |", flush=True)


@torch.no_grad()
def generate(
    model, subject, noise: Tensor, texts: tuple[Tensor, Tensor], guidance: float, steps: int,
    forecast: ForecastOptions | None = None, together: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """Latents like `noise`, and how many steps were computed, on the mean of both streams; all if not `forecast`."""
    levels = schedule(steps, subject.shift)
    streams = [History(forecast) for _ in texts] if forecast else []
    latents, calls = noise, 0
    for level, after in zip(levels, levels[1:]):
        moment, outputs = 1000 * level, []
        may = [stream.judge.computed >= WARMUP and stream.reaches(moment) for stream in streams]
        if together:
            may = [all(may)] * len(may)
        for number, text in enumerate(texts):
            if streams and may[number]:
                outputs += streams[number].forecast(moment)
                continue
            times = torch.full((len(noise),), moment)
            computed = model(hidden_states=latents, timestep=times, encoder_hidden_states=text, return_dict=False)[0]
            outputs += streams[number].keep(moment, [computed], 1000.0) if streams else [computed]
            calls += 1
        latents = latents + (after - level) * torch.lerp(outputs[1], outputs[0], guidance)
    return latents, calls / len(texts)


if __name__ == "__main__":
    main()
