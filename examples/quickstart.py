"""Denoise a batch of pictures with Inductor alone and with `backend="chipmunk"`, and compare time and pictures.

    python examples/quickstart.py

A small trained FLUX-class transformer from this repository, on a CPU; no download. Writes out/quickstart.png and ends
with the line `speedup=<x> psnr=<dB>`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from tiny_dit import png, sampling
from tqdm.auto import tqdm

import chipmunk_compile

ROWS = "row order"


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    model = sampling.load_model(args.weights)
    captions = list(sampling.CAPTIONS[: args.batch])
    conditioning = sampling.prepare(captions, model)
    noise = sampling.starting_noise(len(captions), args.seed, model)

    options = {"preset": args.preset}
    # Every step computed, four of five by sparse deltas; the control is held against it.
    deltas = {**options, "schedule.refresh_every": 5}

    def chipmunk(options: dict):
        return torch.compile(model, backend="chipmunk", options=options)

    methods = {
        "Inductor": torch.compile(model),
        "chipmunk": chipmunk(options),
        "deltas": chipmunk(deltas),
        # The control: the same schedule, the caches reused as they are, not one column recomputed.
        "cache only": chipmunk({**deltas, "attention.sparsity": 1.0, "mlp.sparsity": 1.0}),
    }
    if args.orders:  # chunks of the same size, of tokens as the model has them: row after row
        methods[ROWS] = chipmunk({**deltas, "order": "raster"})
    inputs = dict(
        hidden_states=noise,
        timestep=torch.ones(len(noise)),
        encoder_hidden_states=conditioning.encoder_hidden_states,
        pooled_projections=conditioning.pooled_projections,
        img_ids=conditioning.img_ids,
        txt_ids=conditioning.txt_ids,
        return_dict=False,
    )
    for shown in (options, deltas):
        print(chipmunk_compile.explain(model, options=shown, **inputs), end="\n\n")

    compile_seconds = {}
    for name, compiled in tqdm(methods.items(), desc="compiling", unit="method"):
        started = time.perf_counter()
        sampling.denoise(compiled, noise, conditioning, steps=4)
        compile_seconds[name] = time.perf_counter() - started
    tokens, seconds, state = measure(methods, noise, conditioning, args)
    psnr = {name: peak_signal_to_noise(tokens[name], tokens["Inductor"]) for name in methods}
    print_table(methods, seconds, psnr, state, compile_seconds, args)

    picture = write_picture({name: sampling.unpack(t) for name, t in tokens.items()}, Path(args.out))
    print(f"\npictures: {picture}")
    margin = psnr["deltas"] - psnr["cache only"]
    verdict = "beats" if margin >= 3 else "does NOT beat"
    print(f"recomputing the chosen columns {verdict} reusing the caches alone by 3 dB: {margin:+.1f} dB")
    if args.orders:
        gain = psnr["deltas"] - psnr[ROWS]
        print(f"chunks that are patches of the picture, not rows, are worth {gain:+.1f} dB at the same sparsity")
    speedup = statistics.median(seconds["Inductor"]) / statistics.median(seconds["chipmunk"])
    print(f"speedup={speedup:.2f} psnr={psnr['chipmunk']:.1f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, choices=range(1, 5), help="pictures (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations per method (default %(default)s)")
    parser.add_argument("--preset", default="balanced", help="exact, quality, balanced or fast (default %(default)s)")
    parser.add_argument("--orders", action="store_true", help="also run with tokens in the order the model has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default=sampling.WEIGHTS, help="folder of the transformer")
    parser.add_argument("--out", default="out/quickstart.png")
    return parser.parse_args()


def measure(methods, noise, conditioning, args) -> tuple[dict, dict, dict]:
    """Pictures, seconds of each repeat, state bytes, by method. Repeats interleave: a busy machine slows all alike."""
    tokens: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    state: dict[str, int] = {}
    with tqdm(total=args.repeats * len(methods) * args.steps, desc="denoising", unit="step") as bar:
        for _ in range(args.repeats):
            for name, compiled in methods.items():
                chipmunk_compile.reset()
                started = time.perf_counter()
                tokens[name] = sampling.denoise(
                    compiled, noise, conditioning, args.steps, progress=lambda done, steps: bar.update()
                )
                seconds[name].append(time.perf_counter() - started)
                state[name] = chipmunk_compile.counters()["state_bytes"]
    return tokens, seconds, state


def peak_signal_to_noise(tokens: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over the batch, in dB, of pictures in 0..1 after clamping, as they are shown."""
    shown, wanted = (sampling.unpack(t).clamp(-1, 1) / 2 for t in (tokens, reference))
    error = (shown - wanted).square().mean((1, 2, 3)).clamp_min(1e-12)
    return (-10 * error.log10()).mean().item()


def print_table(methods, seconds, psnr, state, compile_seconds, args) -> None:
    dense = statistics.median(seconds["Inductor"])
    print(f"\n{args.batch} pictures of 160x160, {args.steps} steps, {args.repeats} interleaved repeats, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':<12}{'ms per step (spread)':>26}{'speed-up':>10}{'PSNR dB':>9}{'state MB':>10}{'first run s':>13}")
    for name in methods:
        per_step = [1000 * s / args.steps for s in seconds[name]]
        spread = f"{statistics.median(per_step):.0f} ({min(per_step):.0f}-{max(per_step):.0f})"
        quality = "-" if name == "Inductor" else f"{psnr[name]:.1f}"
        speedup = dense / statistics.median(seconds[name])
        print(
            f"{name:<12}{spread:>26}{speedup:>9.2f}x{quality:>9}{state[name] / 1e6:>10.0f}"
            f"{compile_seconds[name]:>13.1f}"
        )


def write_picture(pictures: dict[str, torch.Tensor], path: Path) -> Path:
    """One row a method, one column a caption, and the difference of chipmunk to dense, eight times enlarged."""
    rows = {**pictures, "difference x8": 8 * (pictures["chipmunk"] - pictures["Inductor"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.cat(list(rows.values()))
    batch = len(pictures["Inductor"])
    labels = [name for name in rows for _ in range(batch)]
    png.save_grid(images, path, columns=batch, labels=labels, scale=2)
    return path


if __name__ == "__main__":
    main()
