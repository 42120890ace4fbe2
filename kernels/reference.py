"""What each op means, in plain torch, and the tables and state that all of them share.

Every fast path equals the functions `attention_refresh`, `attention_delta` and `mlp_delta` of this module up
to rounding. They run on any device and dtype (float64 too), read nothing back to the host, and compute every
column and mask what is not chosen: clear, but no faster than dense.

Shapes: B batch, H heads, Hkv key heads (H is a multiple), N query tokens, M key tokens, D head_dim, C chunks,
s sampled tokens per chunk, K kept columns; I, F, O the widths of the MLP's input, hidden layer and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .expression import evaluate

# An additive mask at or below this leaves a column no weight (exp underflows), so it counts as masked: masks
# are written with -inf, with a dtype's smallest number and with -10000 (-9984 in bfloat16).
MASK_EDGE = -9e3
MASKED = -1e30  # what a masked column's bias becomes: finite, so that differences of two stay numbers


# --- tables: where chunks begin, which tokens speak for a chunk ---


def chunk_table(segments: Sequence[int], chunk: int) -> torch.Tensor:
    """Where chunks begin, restarting at each segment: int32 [C + 1], the last entry the number of tokens.

    segments: token counts, in order; each is cut into chunks of `chunk` tokens and one shorter rest.
    """
    if chunk < 1 or any(length < 1 for length in segments):
        raise ValueError(f"chunk and segments must be positive, got chunk {chunk}, segments {tuple(segments)}")
    starts, end = [], 0
    for length in segments:
        starts.extend(range(end, end + length, chunk))
        end += length
    return torch.tensor([*starts, end], dtype=torch.int32)


def sample_table(chunk_starts: torch.Tensor, samples: int) -> torch.Tensor:
    """The tokens whose rows choose a chunk's columns: int32 [C, s], positions, one from each equal stretch.

    Within its stretch a token's place moves on by the golden ratio: a chunk that is a square patch of an
    image would otherwise be sampled in one column of pixels. In a chunk of fewer than s tokens some repeat.
    """
    starts = chunk_starts.to("cpu", torch.float64)
    stretch = torch.arange(samples, dtype=torch.float64)
    place = (stretch + (0.5 + stretch * 0.6180339887498949) % 1) / samples  # [s], in [0, 1)
    lengths = starts.diff()
    offset = (place * lengths[:, None]).floor()
    return (starts[:-1, None] + offset).to(torch.int32)


# --- state: what a refresh leaves for the deltas ---


def attention_state(
    batch: int, heads: int, q_len: int, kv_len: int, head_dim: int, kept: int, chunks: int, dtype, device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for one attention's (o_cache, columns, counts), to be filled by a refresh.

    o_cache: [B, H, N, D] in the memory order [B, N, H, D]; columns: int32 [B, H, C, K]; counts: int32
    [B, H, C].
    """
    o_cache = torch.empty(batch, q_len, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    columns = torch.zeros(batch, heads, chunks, min(kept, kv_len), dtype=torch.int32, device=device)
    return o_cache, columns, columns.new_zeros(batch, heads, chunks)


def mlp_state(
    batch: int, tokens: int, hidden: int, out_features: int, samples: int, chunks: int, dtype, device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for one MLP's (act_cache, sample_cache, out_cache), to be filled by a refresh.

    act_cache: [B, F, N] with token stride 1, rows padded to 16 tokens so that each begins aligned;
    sample_cache: [B, C, s, F]; out_cache: float32 [B, N, O] (float64 where dtype is).
    """
    row = -(-tokens // 16) * 16
    act_cache = torch.empty(batch, hidden, row, dtype=dtype, device=device)[:, :, :tokens]
    sample_cache = torch.empty(batch, chunks, samples, hidden, dtype=dtype, device=device)
    return act_cache, sample_cache, torch.empty(batch, tokens, out_features, dtype=wide(dtype), device=device)


# --- pieces that the fast paths use too ---


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def key_bias(key_mask: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """A key mask [B or 1, 1, 1, M], boolean (True attends) or additive, as a finite bias [B or 1, M]."""
    if key_mask is None:
        return None
    mask = key_mask.flatten(1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED)
    mask = mask.to(dtype)
    return mask.masked_fill(mask <= MASK_EDGE, MASKED)


def dense_attention(query, key, value, key_mask, scale: float) -> torch.Tensor:
    """SDPA as the model would run it, [B, H, N, D] in the memory order [B, N, H, D]: heads merge for free.

    Without NaN: a batch item whose keys are all masked gives zeros where the backend gives NaN.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cpu":  # enable_gqa takes SDPA's unfused path there
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        grouped = False
    o = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, scale=scale, enable_gqa=grouped)
    if key_mask is not None:
        nothing = key_bias(key_mask).amax(-1) <= 0.5 * MASKED  # [B or 1]
        o = torch.where(nothing[:, None, None, None] & o.isnan(), 0.0, o)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def merge(o, lse, other, other_lse) -> None:
    """In place: attention over some keys, with its log-sum-exp [B, H, N], becomes attention over others' keys, too.

    softmax over both is each softmax by its share of the weight. The first attends something; the other may attend
    nothing: its log-sum-exp is -inf then, and its output zero.
    """
    share = (other_lse - lse).sigmoid()[..., None]  # of the other one, [B, H, N, 1]
    o.mul_(1.0 - share).addcmul_(other, share)
    torch.logaddexp(lse, other_lse, out=lse)


def choose(scores: torch.Tensor, valid: torch.Tensor | None, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` best columns of each row of scores [..., M], of those that are valid (None: all).

    Returns (columns int32 [..., K], ascending, 0 past the count; counts int32 [...]).
    """
    if valid is None:
        columns = scores.topk(kept, sorted=False).indices.sort(-1).values
        return columns.int(), torch.full_like(columns[..., 0], kept, dtype=torch.int32)
    total = scores.shape[-1]
    best = scores.masked_fill(~valid, -1.0).topk(kept).indices
    counts = valid.expand_as(scores).sum(-1).clamp(max=kept)
    unused = torch.arange(kept, device=scores.device) >= counts[..., None]
    columns = best.masked_fill(unused, total).sort(-1).values
    return columns.masked_fill(columns == total, 0).int(), counts.int()


def masked_softmax(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax over the allowed entries of each row; a row that allows nothing is all zeros."""
    logits = logits.masked_fill(~allowed, MASKED)
    weights = (logits - logits.amax(-1, keepdim=True)).exp().masked_fill(~allowed, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


# --- the meaning ---


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts,
    scale: float, chunk: int, attended=(),
) -> torch.Tensor:  # fmt: skip
    """Dense attention. State: columns by attention mass, o_cache = dense - softmax over them alone @ V.

    attended: (start, stop) of keys that a boolean mask is expected to leave open, or nothing. It changes no result.
    """
    o = dense_attention(query, key, value, key_mask, scale)
    kept, total = columns.shape[-1], key.shape[2]
    bias = key_bias(key_mask, wide(query.dtype))
    valid = None if bias is None else bias > 0.5 * MASKED
    allowed = torch.ones(1, 1, total, dtype=torch.bool, device=key.device) if valid is None else valid[:, None]
    for head in range(query.shape[1]):
        sampled = query[:, head].index_select(1, sample_tokens.flatten())  # [B, C * s, D]
        logits = _logits(sampled, _key_head(query, key, head), bias, scale)
        mass = masked_softmax(logits, allowed).unflatten(1, sample_tokens.shape).sum(2)  # [B, C, M]
        best, count = choose(mass, None if valid is None else valid[:, None].expand_as(mass), kept)
        columns[:, head].copy_(best)
        counts[:, head].copy_(count)
    sparse = _sparse_attention(query, key, value, bias, chunk_starts, columns, counts, scale)
    o_cache.copy_(o - sparse)
    return o


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """o_cache + softmax over the chosen columns alone @ V."""
    bias = key_bias(key_mask, wide(query.dtype))
    sparse = _sparse_attention(query, key, value, bias, chunk_starts, columns, counts, scale)
    o = (o_cache + sparse).to(query.dtype)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def _key_head(query, tensor, head: int) -> torch.Tensor:
    """The keys or values [B, M, D] that a query head reads."""
    return tensor[:, head // (query.shape[1] // tensor.shape[1])]


def _logits(query, key, bias, scale: float) -> torch.Tensor:
    """[B, rows, M]: scale * query @ key^T + bias."""
    dtype = wide(query.dtype)
    logits = query.to(dtype) @ key.to(dtype).transpose(1, 2) * scale
    return logits if bias is None else logits + bias[:, None]


def _chunk_of_token(chunk_starts: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.bucketize(torch.arange(tokens, device=chunk_starts.device), chunk_starts[1:].long(), right=True)


def _sparse_attention(query, key, value, bias, chunk_starts, columns, counts, scale: float) -> torch.Tensor:
    """[B, H, N, D]: softmax over each chunk's columns @ V, head by head to bound the [B, N, M] logits."""
    total, kept = key.shape[2], columns.shape[-1]
    chunks = _chunk_of_token(chunk_starts, query.shape[2])
    everything = counts == total  # then the list is not read
    used = (torch.arange(kept, device=columns.device) < counts[..., None]) & ~everything[..., None]
    spill = columns.long().masked_fill(~used, total)  # entries past the count go to a column that is cut off
    chosen = torch.zeros(*counts.shape, total + 1, dtype=torch.bool, device=columns.device)
    chosen = (chosen.scatter_(-1, spill, True)[..., :total] | everything[..., None]).transpose(0, 1)  # [H, B, C, M]
    outputs = []
    for head, mask in enumerate(chosen):
        allowed = mask.index_select(1, chunks)  # [B, N, M]
        if bias is not None:
            allowed = allowed & (bias > 0.5 * MASKED)[:, None]
        weights = masked_softmax(_logits(query[:, head], _key_head(query, key, head), bias, scale), allowed)
        outputs.append(weights @ _key_head(query, value, head).to(weights.dtype))
    return torch.stack(outputs, 1)


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens,
    act_cache, sample_cache, out_cache, region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """out_cache += (new activation - act_cache) @ W2, over each chunk's neurons that changed most."""
    dtype, hidden = wide(x.dtype), act_cache.shape[1]
    biases = list(up_biases) or [None] * len(up_weights)
    ups = [F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)) for w, b in zip(up_weights, biases)]
    fresh = evaluate(region, ups)  # [B, N, F]
    rounded = fresh.to(x.dtype)
    flat = sample_tokens.flatten()
    sampled = fresh.index_select(1, flat).view_as(sample_cache)  # [B, C, s, F]
    chosen = torch.ones_like(sampled[:, :, 0], dtype=torch.bool)  # [B, C, F]
    if columns < hidden:
        scores = (sampled - sample_cache).abs().sum(2) * down_norm
        best, _ = choose(scores, None, columns)
        chosen = torch.zeros_like(chosen).scatter_(-1, best.long(), True)
    by_token = chosen.index_select(1, _chunk_of_token(chunk_starts, x.shape[1]))  # [B, N, F]
    old = act_cache.transpose(1, 2)
    # The rounded activation, which the cache keeps: with the unrounded one the error grows with every step.
    change = (rounded.to(dtype) - old.to(dtype)).masked_fill(~by_token, 0.0)
    out_cache += (change @ down_t.to(dtype)).to(out_cache.dtype)
    act_cache.copy_(torch.where(by_token, rounded, old).transpose(1, 2))
    fresh_samples = rounded.index_select(1, flat).view_as(sample_cache)
    sample_cache.copy_(torch.where(chosen[:, :, None], fresh_samples, sample_cache))
    return out_cache.to(x.dtype, copy=True)


def mlp_weights(weight: torch.Tensor, down_t: torch.Tensor, down_norm: torch.Tensor) -> None:
    """Fills down_t [hidden, out_features] with weight [out_features, hidden] turned over, and down_norm [hidden] with
    the norms of its columns."""
    down_t.copy_(weight.t())
    down_norm.copy_(torch.linalg.vector_norm(weight, dim=0, dtype=down_norm.dtype))
