"""Which order of tokens suits sparse attention: patches, a Hilbert curve, or rows as they come.

    python -m benchmarks.token_orders [--steps 28] [--pictures 4]

On the trained transformer of examples/tiny_dit. Recall: the share of attention mass in the columns that are
chosen for a chunk by the exact mean attention of its tokens, over all layers, heads and some of the steps.
PSNR: of the finished picture against the dense one, attention alone sparse, through the backend. Writes both
to benchmarks/results/token-orders.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import pathlib
import platform
import sys
from unittest import mock

import torch
import torch.nn.functional as F

from chipmunk_compile import plan
from chipmunk_compile.passes.token_order import Grid, chunk_lengths, token_order

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from tiny_dit import sampling

log = logging.getLogger("token_orders")
RESULTS = pathlib.Path(__file__).parent / "results" / "token-orders.json"
KINDS = ("raster", "hilbert", "patch")
CHUNKS = (32, 64, 128)
KEPT = (0.07, 0.165)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=4, choices=range(1, 5))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)

    model = sampling.load_model()
    captions = list(sampling.CAPTIONS[: options.pictures])
    conditioning, noise = sampling.prepare(captions, model), sampling.starting_noise(len(captions), 0, model)
    device = platform.processor() or platform.machine()
    record = {"torch": torch.__version__, "device": device, **vars(options)}
    record["recall"], dense = recall(model, noise, conditioning, options.steps)
    record["psnr"] = {}
    for kind in KINDS:
        for chunk in (64, 128):
            tokens = sparse(model, noise, conditioning, options.steps, kind, chunk)
            record["psnr"][f"{kind}, chunk {chunk}"] = round(psnr(tokens, dense), 2)
            log.info("%s, chunk %d: %.2f dB", kind, chunk, psnr(tokens, dense))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def recall(model, noise, conditioning, steps: int) -> tuple[dict[str, float], torch.Tensor]:
    """Mean recall by order, chunk and share of columns kept, at every sixth step; and the dense picture."""
    side = math.isqrt(noise.shape[1])
    grid, text = (1, side, side), conditioning.encoder_hidden_states.shape[1]
    sums: dict[str, list[float]] = {}
    plain = F.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        if step[0] % 6 == 3:
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            for name, share in chunk_recall(weights[..., text:, :], grid).items():
                sums.setdefault(name, []).append(share)
        return plain(query, key, value, *args, **kwargs)

    step = [0]

    def count(done: int, _: int) -> None:
        step[0] = done

    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        dense = sampling.denoise(model, noise, conditioning, steps, progress=count)
    log.info("recall over %d attentions", len(next(iter(sums.values()))))
    return {name: round(sum(shares) / len(shares), 4) for name, shares in sums.items()}, dense


def chunk_recall(weights: torch.Tensor, grid: Grid) -> dict[str, float]:
    """weights: [batch, heads, image tokens, all tokens], rows of softmax."""
    out = {}
    for kind in KINDS:
        for chunk in CHUNKS:
            order, lengths = token_order(grid, chunk, kind)
            lengths = lengths if kind == "patch" else chunk_lengths(len(order), chunk)
            parts = weights.index_select(2, order).split(lengths, 2)
            mass = torch.stack([part.mean(2) for part in parts], 2)  # [batch, heads, chunks, all tokens]
            size = torch.tensor(lengths, dtype=mass.dtype)
            for kept in KEPT:
                best = mass.topk(round(kept * mass.shape[-1]), -1).values.sum(-1)
                share = (best * size).sum(-1).mean() / size.sum()
                out[f"{kind}, chunk {chunk}, kept {kept}"] = share.item()
    return out


def sparse(model, noise, conditioning, steps: int, kind: str, chunk: int) -> torch.Tensor:
    """The picture by the backend, attention alone sparse, in one order."""
    options = {"attention.sparsity": 0.835, "attention.chunk": chunk, "mlp.sparsity": None, "steps": steps}
    ordered = functools.partial(plan.run_order, kind=kind)
    torch._dynamo.reset()
    with mock.patch.object(plan, "run_order", ordered):
        compiled = torch.compile(model, backend="chipmunk", options=options)
        return sampling.denoise(compiled, noise, conditioning, steps)


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise in dB, for values of about -1 to 1."""
    return 10 * math.log10(4 / (picture - reference).square().mean().item())


if __name__ == "__main__":
    main()
