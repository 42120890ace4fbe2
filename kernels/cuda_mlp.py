"""The MLP delta by printed kernels: which of them run, with which tiles, on which workspaces.

    choose   a matrix product for the sampled tokens, mlp_scores, mlp_select, mlp_samples
    multiply mlp_hopper where it suits; else
        up       mlp_up: packs the change of the chosen activations
        down     mlp_down: multiplies it into the output

The change is packed as [chunk, column, token], so that both products read it as it lies.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from . import tuning
from .codegen import kernel
from .expression import lines_triton
from .launch import attempt, copies_16_bytes, launch, multiprocessors, precision, runs_hopper, with_rows


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
    region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta, with neurons chosen by scores that count as equal within 0.8%."""
    x, weights = with_rows(x), _alike([with_rows(w) for w in up_weights])
    batch, hidden, tokens = act_cache.shape
    rows, kept = batch * sample_tokens.shape[0], min(columns, hidden)
    chosen = torch.empty(rows, kept, dtype=torch.int32, device=x.device)
    everything = kept == hidden
    if everything:
        chosen.copy_(torch.arange(hidden, dtype=torch.int32, device=x.device).expand_as(chosen))
    else:
        _choose_neurons(x, weights, up_biases, down_norm, sample_tokens, sample_cache, chosen, region)
    site = (x, weights, up_biases, down_t, chunk_starts, chosen, act_cache, out_cache, region, chunk)
    suits = _suits_hopper(x, weights, down_t, act_cache, out_cache, chunk)
    out = _multiply_hopper(*site) if suits else None
    if out is None:
        out = _multiply(*site)
    if everything:
        sample_cache.copy_(act_cache.index_select(2, sample_tokens.flatten()).transpose(1, 2).view_as(sample_cache))
    return out


def mlp_weights(weight: torch.Tensor, down_t: torch.Tensor, down_norm: torch.Tensor) -> None:
    """As reference.mlp_weights, in one pass: torch's copy of a matrix turned over runs far below the memory's speed."""
    (features, hidden), tiles = weight.shape, tuning.mlp_weights()
    weight = with_rows(weight)
    launch(
        kernel("mlp_weights"), (-(-hidden // tiles["BF"]),),
        weight, down_t, down_norm, weight.stride(0), features, hidden, **tiles,
    )  # fmt: skip


def _choose_neurons(x, weights, biases, down_norm, sample_tokens, sample_cache, chosen, region: str) -> None:
    """Fills chosen [rows, kept], and sample_cache at the chosen neurons."""
    (rows, kept), (samples, hidden) = chosen.shape, sample_cache.shape[2:]
    sampled = x.index_select(1, sample_tokens.flatten())  # [B, C * s, I]
    pre = [F.linear(sampled, w, b) for w, b in zip(weights, list(biases) or [None] * len(weights))]
    fresh = pre[0]  # each program writes where it has read
    stride = -(-hidden // 16) * 16
    scores = torch.empty(rows, stride, dtype=torch.int16, device=x.device)
    score, update = tuning.mlp_scores(), tuning.mlp_samples()
    launch(
        kernel("mlp_scores", **_facts(region, len(weights), 0)), (rows, -(-stride // score["BF"])),
        *pre, sample_cache, down_norm, scores, fresh, hidden, stride, SAMPLES=samples, **score,
    )  # fmt: skip
    width = 1 << (hidden - 1).bit_length()
    launch(kernel("mlp_select"), (rows,), scores, chosen, hidden, stride, kept, WIDTH=width, **tuning.mlp_select(width))
    launch(
        kernel("mlp_samples"), (rows * samples, -(-kept // update["BF"])), fresh, sample_cache, chosen, hidden, kept,
        SAMPLES=samples, **update,
    )  # fmt: skip


def _suits_hopper(x, weights, down_t, act_cache, out_cache, chunk: int) -> bool:
    """Whether the warp-specialised kernel takes these tensors: blocks of 128 tokens, 64 inputs at a time."""
    return (
        len(weights) <= 2
        and x.dtype in (torch.bfloat16, torch.float16)
        and tuning.fits_128(chunk)
        and x.shape[2] % 64 == 0
        and runs_hopper(x)
        and copies_16_bytes(x, *weights, down_t, act_cache, out_cache)
    )


def _multiply_hopper(
    x, weights, biases, down_t, chunk_starts, chosen, act_cache, out_cache, region: str, chunk: int
) -> torch.Tensor | None:
    """As _multiply in one launch; None where the kernel cannot be had."""
    (rows, kept), width, chunks = chosen.shape, x.shape[2], chunk_starts.shape[0] - 1
    batch, tokens, out_features = out_cache.shape
    blocks = -(-chunk // 128)
    change, out = x.new_empty(rows, kept, blocks * 128), x.new_empty(batch, tokens, out_features)
    ready = torch.zeros(rows * blocks, dtype=torch.int32, device=x.device)
    up_tiles = -(-kept // (256 // len(weights))) * rows * blocks
    down_tiles = -(-out_features // 256) * rows * blocks
    wide = max(x.shape[1] * x.stride(1), down_t.numel(), *(w.shape[0] * w.stride(0) for w in weights)) >= 1 << 31
    facts = _facts(region, len(weights), len(biases))
    function = kernel("mlp_hopper", **facts, wide=wide, even=out_features % 256 == 0)
    launched = attempt(
        function, (min(multiprocessors(x.device), up_tiles),),
        x, *weights, *biases, down_t, chunk_starts, chosen, act_cache, out_cache, change, out, ready,
        *x.stride()[:2], weights[0].stride(0), *act_cache.stride()[:2],
        up_tiles, down_tiles, chunks, rows, blocks, tokens, width, out_features, kept,
        launch_cooperative_grid=True, **tuning.mlp_hopper(len(weights), rows, x.device),
    )  # fmt: skip
    return out if launched else None


def _multiply(
    x, weights, biases, down_t, chunk_starts, chosen, act_cache, out_cache, region: str, chunk: int
) -> torch.Tensor:
    """The output [batch, tokens, out_features], act_cache and out_cache brought up to date at the chosen neurons."""
    change = _up(x, weights, biases, chunk_starts, chosen, act_cache, region, chunk)
    return _down(change, down_t, chunk_starts, chosen, out_cache, chunk)


def _up(x, weights, biases, chunk_starts, chosen, act_cache, region: str, chunk: int) -> torch.Tensor:
    """The change of the chosen activations, [rows, kept, tokens of a chunk]; act_cache is brought up to date."""
    (rows, kept), width, chunks = chosen.shape, x.shape[2], chunk_starts.shape[0] - 1
    facts = _facts(region, len(weights), len(biases))
    tiles = tuning.mlp_up(x.dtype, chunk, len(weights), x.device)
    blocks = -(-chunk // tiles["BM"])
    change = x.new_empty(rows, kept, blocks * tiles["BM"])
    function = kernel("mlp_up", **facts, even=width % tiles["BK"] == 0, precision=precision(x.dtype))
    launch(
        function, (-(-kept // tiles["BF"]) * rows * blocks,),
        x, *weights, *biases, chunk_starts, chosen, act_cache, change,
        *x.stride()[:2], weights[0].stride(0), *act_cache.stride()[:2],
        chunks, rows, width, kept, BLOCKS=blocks, **tiles,
    )  # fmt: skip
    return change


def _down(change, down_t, chunk_starts, chosen, out_cache, chunk: int) -> torch.Tensor:
    """out_cache, with the change of the chosen neurons multiplied into it, rounded."""
    (rows, kept), chunks, (batch, tokens, out_features) = chosen.shape, chunk_starts.shape[0] - 1, out_cache.shape
    out = change.new_empty(batch, tokens, out_features)
    tiles = tuning.mlp_down(change.dtype, chunk, change.device)
    blocks = change.shape[2] // tiles["BM"]
    function = kernel("mlp_down", even=out_features % tiles["BO"] == 0, precision=precision(change.dtype))
    launch(
        function, (-(-out_features // tiles["BO"]) * rows * blocks,),
        change, down_t, chunk_starts, chosen, out_cache, out,
        chunks, rows, tokens, out_features, kept, BLOCKS=blocks, **tiles,
    )  # fmt: skip
    return out


@functools.cache
def _facts(region: str, inputs: int, biases: int) -> dict:
    """What a template needs to print the region, and the names of its arguments."""

    def names(stem: str, count: int) -> str:
        return ", ".join(f"{stem}{i}" for i in range(count))

    return {
        "region": region,
        "inputs": inputs,
        "lines": tuple(lines_triton(region, [f"h{i}" for i in range(inputs)], "act")),
        "hiddens": names("h", inputs),
        "weights": names("weight", inputs),
        "biases": names("bias", biases) + ", " if biases else "",  # where others follow
    }


def _alike(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Matrices with one row stride: as they are, or copies."""
    return tensors if len({t.stride(0) for t in tensors}) == 1 else [t.contiguous() for t in tensors]
