"""Pictures of the shipped model where timesteps come rounded to bfloat16, as bfloat16 pipelines hand them over.

    python -m benchmarks.quality.rounded          minutes on a CPU

Each row compares presets with the dense model given the same timesteps: exact ones; rounded ones; rounded ones taken
as they are, which is what `chipmunk_compile.rounding` mends. A shift of 3.2 is FLUX's at 1024x1024, one of 11 at
2304x1280. Weights and latents are float32: rounding of the timestep alone is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.rounding import Unrounded
from examples.tiny_dit import sampling

from .sampling import schedule

PRESETS = ("quality", "fast")


def denoise(called: Callable, noise: torch.Tensor, conditioning, levels: list[float], rounds: bool) -> torch.Tensor:
    latents = noise
    for level, following in zip(levels, levels[1:]):
        time = torch.full((len(noise),), level)
        if rounds:  # as FLUX's pipeline does: 1000 times the level, and a thousandth of that
            time = (1000 * time).bfloat16().div(1000)
        velocity = called(
            hidden_states=latents, timestep=time, encoder_hidden_states=conditioning.encoder_hidden_states,
            pooled_projections=conditioning.pooled_projections, txt_ids=conditioning.txt_ids,
            img_ids=conditioning.img_ids, return_dict=False,
        )[0]  # fmt: skip
        latents = latents + (following - level) * velocity
    return latents


def psnr(tokens: torch.Tensor, reference: torch.Tensor) -> float:
    pictures = [sampling.unpack(t).clamp(-1, 1) / 2 for t in (tokens, reference)]
    return (-10 * (pictures[0] - pictures[1]).square().mean((1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--shift", type=float, nargs="+", default=[3.2, 11.0])
    options = parser.parse_args()
    model = sampling.load_model()
    conditioning = sampling.prepare(list(sampling.CAPTIONS[:2]), model)
    noise = sampling.starting_noise(2, 0, model)
    mended = Unrounded.follow
    print(f"| shift | steps | timesteps | {' | '.join(f'{p}: computed | dB' for p in PRESETS)} |")
    print(f"|---|---|---{'|---|---' * len(PRESETS)}|")
    for steps in options.steps:
        for shift in options.shift:
            levels = schedule(steps, shift)
            dense = {}
            for name, rounds in (("exact", False), ("rounded", True), ("rounded, as they are", True)):
                if rounds not in dense:
                    dense[rounds] = denoise(torch.compile(model, dynamic=False), noise, conditioning, levels, rounds)
                Unrounded.follow = (lambda self, times, first: sum(times)) if "are" in name else mended
                cells = []
                for preset in PRESETS:
                    torch._dynamo.reset()
                    chipmunk_compile.reset()
                    compiled = torch.compile(model, backend=chipmunk, dynamic=False, options={"preset": preset})
                    made = denoise(compiled, noise, conditioning, levels, rounds)
                    cells += [str(chipmunk_compile.counters()["dense"]), f"{psnr(made, dense[rounds]):.1f}"]
                print(f"| {shift} | {steps} | {name} | {' | '.join(cells)} |", flush=True)
    Unrounded.follow = mended


if __name__ == "__main__":
    main()
