"""Which order of tokens suits sparse attention: patches, a Hilbert curve, or rows as they come.

    python -m benchmarks.token_orders [--steps 28] [--pictures 4]

On the trained transformer of examples/tiny_dit, at a size that divides by patches of 8x8 tokens and at one that does
not. Recall: the share of attention mass in the columns that are chosen for a chunk by the exact mean attention of its
tokens, over all layers, heads and some of the steps. PSNR: of the finished picture against the dense one, through the
backend: with attention alone sparse, and with the deltas of examples/quickstart.py. Writes both
to benchmarks/results/token-orders.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import platform
import sys
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

import chipmunk_compile
from chipmunk_compile.passes.token_order import Grid, token_order

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from tiny_dit import sampling

log = logging.getLogger("token_orders")
RESULTS = pathlib.Path(__file__).parent / "results" / "token-orders.json"
KINDS = ("raster", "hilbert", "patch")
CHUNKS = (32, 64, 128)
KEPT = (0.07, 0.165)
ATTENTION, WIDE, QUICKSTART = "attention alone, chunk 64", "attention alone, chunk 128", "quickstart, chunk 64"
DELTAS = {"schedule.refresh_every": 5}  # of examples/quickstart.py
OPTIONS = {ATTENTION: {"mlp.sparsity": None}, WIDE: {"mlp.sparsity": None, "attention.chunk": 128}, QUICKSTART: DELTAS}
# Pixels: 40x40 tokens, and 36x44, where along a Hilbert curve chunks of 64 are no squares.
SIZES = {(160, 160): (QUICKSTART, ATTENTION, WIDE), (144, 176): (ATTENTION,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=4, choices=range(1, 5))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)

    model = sampling.load_model()
    device = platform.processor() or platform.machine()
    record = {"torch": torch.__version__, "device": device, **vars(options), "sizes": {}}
    RESULTS.parent.mkdir(exist_ok=True)
    for size in SIZES:
        for found in compare(model, size, options):
            record["sizes"]["{}x{}".format(*size)] = found
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def compare(model, size: tuple[int, int], options: argparse.Namespace) -> Iterator[dict[str, dict[str, float]]]:
    """Recall and PSNR at one size of picture, of one more order each time."""
    captions = list(sampling.CAPTIONS[: options.pictures])
    conditioning = sampling.prepare(captions, model, *size)
    noise = sampling.starting_noise(len(captions), 0, model, *size)
    grid = (1, size[0] // sampling.PATCH, size[1] // sampling.PATCH)
    with ChunkRecall(grid) as watched:
        dense = sampling.denoise(model, noise, conditioning, options.steps, progress=watched.count)
    log.info("%dx%d: recall over %d attentions", *size, watched.attentions)
    found: dict[str, float] = {}
    for name in SIZES[size]:
        for kind in KINDS:
            torch._dynamo.reset()
            chipmunk_compile.reset()
            chosen = {**OPTIONS[name], "order": kind, "steps": options.steps}
            compiled = torch.compile(model, backend="chipmunk", options=chosen)
            tokens = sampling.denoise(compiled, noise, conditioning, options.steps)
            found[f"{kind}, {name}"] = round(psnr(tokens, dense, size), 2)
            log.info("%s, %s: %.2f dB", kind, name, found[f"{kind}, {name}"])
            yield {"recall": watched.mean(), "psnr": found}


class ChunkRecall(TorchFunctionMode):
    """Watches attention while a model runs, at every sixth step: the mean recall by order, chunk and share kept."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.step, self.attentions = grid, 0, 0
        self._sums: dict[str, float] = {}

    def count(self, done: int, _: int) -> None:
        """To be called after each step."""
        self.step = done

    def mean(self) -> dict[str, float]:
        return {name: round(total / self.attentions, 4) for name, total in self._sums.items()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention and self.step % 6 == 3:
            query, key = (*args, *kwargs.values())[:2]
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            tokens = self.grid[1] * self.grid[2]
            for name, share in chunk_recall(weights[..., -tokens:, :], self.grid).items():  # text comes first
                self._sums[name] = self._sums.get(name, 0.0) + share
            self.attentions += 1
        return function(*args, **kwargs)


def chunk_recall(weights: torch.Tensor, grid: Grid) -> dict[str, float]:
    """weights: [batch, heads, image tokens, all tokens], rows of softmax."""
    out = {}
    for kind in KINDS:
        for chunk in CHUNKS:
            order, lengths = token_order(grid, chunk, kind)
            parts = weights.index_select(2, order).split(lengths, 2)
            mass = torch.stack([part.mean(2) for part in parts], 2)  # [batch, heads, chunks, all tokens]
            size = torch.tensor(lengths, dtype=mass.dtype)
            for kept in KEPT:
                best = mass.topk(round(kept * mass.shape[-1]), -1).values.sum(-1)
                share = (best * size).sum(-1).mean() / size.sum()
                out[f"{kind}, chunk {chunk}, kept {kept}"] = share.item()
    return out


def psnr(tokens: torch.Tensor, reference: torch.Tensor, size: tuple[int, int]) -> float:
    """Mean over the pictures, in dB, of pictures in 0..1 after clamping, as they are shown."""
    shown, wanted = (sampling.unpack(t, *size).clamp(-1, 1) / 2 for t in (tokens, reference))
    error = (shown - wanted).square().mean((1, 2, 3)).clamp_min(1e-12)
    return (-10 * error.log10()).mean().item()


if __name__ == "__main__":
    main()
