"""Attention rows of the kernel benchmarks: deltas of three kinds of columns, and refreshes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.kernels_inputs import (
    BF16,
    DEVICE,
    HEAD_DIM,
    SCALE,
    AttentionShape,
    local_attention,
    queries_keys_values,
    random_state,
    tables,
)
from benchmarks.kernels_report import Case
from benchmarks.kernels_timing import against, dense_attention, distance, milliseconds, temporary_bytes
from chipmunk_compile.kernels import cuda, cuda_attention, reference

PICKS = 12  # chunks at which a result is checked in float64


def deltas(shape: AttentionShape, *chunks: int) -> Iterator[Case]:
    for chunk in chunks:
        for counts in ("equal", "varying", "selected"):
            measure = functools.partial(_selected if counts == "selected" else _random, shape, chunk, counts)
            yield Case("attention_delta", shape.name, counts, chunk, measure)


def refreshes(shape: AttentionShape, *chunks: int) -> Iterator[Case]:
    for chunk in chunks:
        yield Case("attention_refresh", shape.name, "equal", chunk, functools.partial(_refresh, shape, chunk))


@functools.lru_cache(maxsize=8)
def _dense(shape: AttentionShape) -> tuple[str, float]:
    """Times do not hang on the values, as long as these are random."""
    return dense_attention(*queries_keys_values(shape))


def _random(shape: AttentionShape, chunk: int, counts: str) -> dict:
    starts, _ = tables([shape.tokens], chunk)
    state = random_state(shape, len(starts) - 1, varying=counts == "varying")
    return _delta(shape, *queries_keys_values(shape), starts, state, chunk)


def _selected(shape: AttentionShape, chunk: int, counts: str) -> dict:
    query, key, value, starts, state, longest = local_attention(shape, chunk)
    return {**_delta(shape, query, key, value, starts, state, longest), "chunks": len(starts) - 1}


def _delta(shape: AttentionShape, query, key, value, starts, state, chunk: int) -> dict:
    def run():
        return cuda.attention_delta(query, key, value, None, starts, *state, SCALE, chunk)

    error = distance(_sparse_pairs(query, key, value, starts, *state, run(), 1.0))
    ms, dense = milliseconds(run), _dense(shape)
    lengths, o_counts = starts.diff().double(), state[2][0].double()
    share = ((o_counts * lengths).sum() / shape.heads / shape.tokens**2).item()  # of all query and key pairs
    return dict(
        sparsity=1 - share, ms=ms, tflops=shape.dense_flops * share / ms / 1e9, **against(dense, ms),
        ideal_ratio=1 / share, rel_error=error, peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _refresh(shape: AttentionShape, chunk: int) -> dict:
    query, key, value = queries_keys_values(shape)
    starts, sampled = tables([shape.tokens], chunk)
    state = reference.attention_state(
        1, shape.heads, shape.tokens, shape.tokens, HEAD_DIM, shape.kept, len(starts) - 1, BF16, DEVICE
    )

    def run():
        return cuda.attention_refresh(query, key, value, None, starts, sampled, *state, SCALE, chunk)

    o = run()
    error = max(
        distance(_sparse_pairs(query, key, value, starts, o, *state[1:], state[0], -1.0)),
        distance(_dense_pairs(query, key, value, starts, o)),
    )
    ms, dense = milliseconds(run), _dense(shape)
    lse = (cuda_attention._fused(query, key, value, SCALE) or (None, None))[1]
    if lse is None:
        lse = cuda_attention._lse(query, key, None, sampled, SCALE)
    choose = milliseconds(lambda: cuda_attention._choose_columns(query, key, None, sampled, lse, *state[1:], SCALE))
    return dict(
        sparsity=1 - shape.kept / shape.tokens, ms=ms, tflops=shape.dense_flops / ms / 1e9, **against(dense, ms),
        ideal_ratio=1.0, cost=ms / dense[1], choose_ms=choose, rel_error=error,
        mass_lacking=_mass_lacking(query, key, sampled, *state[1:]), peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _some(heads: int, chunks: int, picks: int = PICKS) -> Iterator[tuple[int, int]]:
    """(head, chunk): the last ones, then random ones."""
    yield heads - 1, chunks - 1
    for _ in range(picks - 1):
        yield torch.randint(heads, ()).item(), torch.randint(chunks, ()).item()


def _sparse_pairs(query, key, value, starts, base, columns, counts, out, sign: float):
    """(result, base + sign * attention over the chosen columns in float64) for some chunks."""
    for h, c in _some(*counts.shape[1:]):
        rows = slice(starts[c].item(), starts[c + 1].item())
        chosen = columns[0, h, c, : counts[0, h, c]].long()
        logits = query[0, h, rows].double() @ key[0, h].index_select(0, chosen).double().T * SCALE
        sparse = logits.softmax(-1) @ value[0, h].index_select(0, chosen).double()
        yield out[0, h, rows], base[0, h, rows].double() + sign * sparse


def _dense_pairs(query, key, value, starts, out):
    """(result, dense attention in float64) for some chunks."""
    for h, c in _some(query.shape[1], len(starts) - 1):
        rows = slice(starts[c].item(), starts[c + 1].item())
        logits = query[0, h, rows].double() @ key[0, h].double().T * SCALE
        yield out[0, h, rows], logits.softmax(-1) @ value[0, h].double()


def _mass_lacking(query, key, sampled, columns, counts) -> float:
    """The part of the best columns' attention mass, at the sampled queries, that the chosen ones miss; the mean."""
    lacking = []
    for h, c in _some(*counts.shape[1:]):
        mass = (query[0, h, sampled[c].long()].double() @ key[0, h].double().T * SCALE).softmax(-1).sum(0)
        chosen = columns[0, h, c, : counts[0, h, c]].long()
        lacking.append(1 - (mass[chosen].sum() / mass.topk(len(chosen)).values.sum()).item())
    return sum(lacking) / len(lacking)
