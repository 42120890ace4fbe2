"""What forecasts are worth for a model compiled as a whole, and block by block.

    python -m benchmarks.quality.pieces --checkpoint FOLDER [--model image] [--size 128] [--steps 28] [--preset fast ..]

On a CPU, at a size of choice, with guidance by two calls: a model that `python -m benchmarks.quality.train` left. PSNR
against the model as it is, and how many of the steps were computed; of the blocks, in the first generation and in the
second.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk  # the string names the same, where the package is installed

from . import checkpoints, frontier, metrics
from .methods import POINTS
from .sampling import captions, generate, pictures_of, starting_noise
from .subjects import SUBJECTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--model", choices=SUBJECTS, default="image")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--preset", nargs="+", default=POINTS)
    args = parser.parse_args()
    frontier.allow_many_programs()
    subject = replace(SUBJECTS[args.model], size=args.size)
    noise, text = starting_noise(subject, args.pictures, 1, "cpu"), captions(subject, args.pictures, 1)

    def load() -> torch.nn.Module:
        return checkpoints.load_weights(args.checkpoint, torch.device("cpu"), torch.float32)

    def denoise(called) -> torch.Tensor:
        return pictures_of(generate(called, subject, noise, text, args.steps, torch.float32))

    def cell(pictures: torch.Tensor, blocks: int = 1) -> str:
        computed = args.steps - chipmunk_compile.counters()["forecast"] / (2 * blocks)
        return f"{metrics.psnr(pictures, dense).mean():.1f} dB, {computed:g} of {args.steps} computed"

    dense = denoise(load())
    print("| preset | whole | in pieces | again |\n|---|---|---|---|")
    for preset in args.preset:
        options = {"preset": preset, "min_tokens": 256}
        chipmunk_compile.reset()
        cells = [cell(denoise(torch.compile(load(), backend=chipmunk, options=options)))]
        model = load()
        model.compile_repeated_blocks(backend=chipmunk, options=options)
        for _ in range(2):
            chipmunk_compile.reset()
            with chipmunk_compile.generation(model):
                cells.append(cell(denoise(model), len(model.blocks)))
        print(f"| {preset} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
