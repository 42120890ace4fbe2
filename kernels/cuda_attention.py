"""Attention by printed kernels: which of them run, with which tiles, on which workspaces.

    attention_delta     attention_delta_hopper where it suits, else attention_delta
    attention_refresh   the SDPA that torch would choose, attention_scores + attention_select for the columns (after
                        attention_lse, where SDPA keeps its log-sum-exp to itself), and the delta's kernel with a minus.
                        Where a boolean mask closes only keys at an end (text padding), SDPA runs without it on the
                        others, and attention_delta + attention_lse with it on those

Columns are chosen by how much attention the chunk's sampled queries pay to each key, on a logarithmic scale of 127
levels: about 6 to the octave, so the last columns taken lie within 13% of the best left out.
"""

from __future__ import annotations

import math

import torch
from torch.nn.attention import SDPBackend

from . import reference, tuning
from .codegen import kernel, parts
from .launch import attempt, copies_16_bytes, launch, multiprocessors, precision, runs_hopper, with_rows

LEVEL_BYTES = 128 << 20  # the most that the levels of keys take at once, where those of one head take less
LEVELS = 127
FLOOR = 6  # octaves below a key's mean share of the attention where levels begin


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta."""
    batch, heads, tokens, head_dim = query.shape
    out = query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    _attend(query, key, value, key_mask, chunk_starts, o_cache, columns, counts, out, scale, chunk, sign="+")
    return out


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale: float, chunk: int,
    attended=(),
) -> torch.Tensor:  # fmt: skip
    """As reference.attention_refresh, but for the columns of nearly equal mass that it chooses."""
    query, key, value = with_rows(query), with_rows(key), with_rows(value)
    boolean = key_mask is not None and key_mask.dtype == torch.bool
    found = None
    if key_mask is None:
        found = _fused(query, key, value, scale) if query.is_cuda else None
    elif boolean and attended:
        found = _mostly_open(query, key, value, key_mask, chunk_starts, columns, counts, scale, chunk, *attended)
    out, lse = found or (reference.dense_attention(query, key, value, key_mask, scale), None)
    if lse is None:
        lse = _lse(query, key, key_mask, sample_tokens, scale)
    _choose_columns(query, key, key_mask, sample_tokens, lse, columns, counts, scale)
    mask = None if boolean else key_mask  # the columns are open ones
    _attend(query, key, value, mask, chunk_starts, out, columns, counts, o_cache, scale, chunk, sign="-")
    return out


# --- the sparse term ---


def _attend(query, key, value, key_mask, chunk_starts, base, columns, counts, out, scale, chunk, sign: str) -> None:
    """out = base, plus or minus softmax over the chosen columns alone @ V."""
    query, key, value = with_rows(query), with_rows(key), with_rows(value)
    if key_mask is None and _suits_hopper(query, key, value, base, out):
        site = (query, key, value, chunk_starts, base, columns, counts, out, scale, chunk)
        if _attend_hopper(*site, sign):
            return
    batch, heads, _, head_dim = query.shape
    mask = _as_rows(key_mask)
    tiles = tuning.attention_delta(query.dtype, head_dim, chunk, query.device)
    blocks = -(-chunk // tiles["BM"])
    function = kernel(
        "attention_delta",
        sign=sign,
        # float16 has too few exponents for weights relative to anything but the true maximum.
        fixed=query.dtype != torch.float16,
        wide=_is_wide(key, value),
        **_facts(query, key_mask),
    )
    launch(
        function, (counts.shape[2] * blocks, batch * heads),
        query, key, value, mask, chunk_starts, base, columns, counts, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], _mask_stride(mask), *base.stride()[:3],
        *out.stride()[:3], heads, heads // key.shape[1], columns.shape[3], key.shape[2], scale, BLOCKS=blocks, **tiles,
    )  # fmt: skip


def _suits_hopper(query, *others) -> bool:
    """Whether the warp-specialised kernel takes these tensors."""
    return (
        query.dtype == torch.bfloat16
        and query.shape[3] in (64, 128)
        and runs_hopper(query)
        and copies_16_bytes(query, *others)
    )


def _attend_hopper(query, key, value, chunk_starts, base, columns, counts, out, scale, chunk, sign: str) -> bool:
    """As _attend, for tensors that suit; False if the kernel cannot be had here."""
    batch, heads, _, head_dim = query.shape
    chunks = counts.shape[2]
    facts, tiles = tuning.attention_delta_hopper(head_dim, chunk, columns.shape[3], query.device)
    function = kernel("attention_delta_hopper", sign=sign, head_dim=head_dim, wide=_is_wide(key, value), **facts)
    halves = -(-chunk // 64)
    blocks = 1 if facts["shared"] else halves
    count = batch * heads * chunks * blocks
    programs = min(multiprocessors(query.device), count if facts["shared"] else -(-count // 2))
    redo = torch.empty(programs * 2 + batch * heads * chunks * halves, dtype=torch.int32, device=query.device)
    return attempt(
        function, (programs,), query, key, value, chunk_starts, base, columns, counts, out, redo,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *base.stride()[:3], *out.stride()[:3],
        count, blocks, chunks, heads, heads // key.shape[1], columns.shape[3], key.shape[2], scale, **tiles,
    )  # fmt: skip


# --- a refresh: the dense output, and the choice of columns ---


def _fused(query, key, value, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Dense attention and its log-sum-exp [B, H, N], where the kernel that SDPA would choose hands that out."""
    if query.shape[1] != key.shape[1]:
        return None
    aten = torch.ops.aten
    if not query.is_cuda:  # Triton's interpreter
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        return _heads_last(o), lse.contiguous()
    backend = SDPBackend(torch._fused_sdp_choice(query, key, value, scale=scale))
    if backend == SDPBackend.CUDNN_ATTENTION:
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
        return _heads_last(o), lse.view(query.shape[:3])
    if backend == SDPBackend.FLASH_ATTENTION and query.shape[3] % 8 == 0:
        o, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return _heads_last(o), lse
    return None


def _mostly_open(
    query, key, value, key_mask, chunk_starts, columns, counts, scale: float, chunk: int, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Dense attention under a boolean mask that is expected to be open from key `start` to `stop`, and its log-sum-exp.

    A mask keeps SDPA off its fast kernels. They run on the keys expected to be open, the portable kernel on the rest,
    and the two are merged. No size depends on what the mask holds. A batch item whose mask is not as expected is
    computed by the portable kernel; where there is none, that only copies.
    """
    fused = _fused(query, key[:, :, start:stop], value[:, :, start:stop], scale)
    if fused is None:
        return None
    out, lse = fused
    total = key.shape[2]
    if stop - start < total:
        rest = [torch.cat([t[:, :, :start], t[:, :, stop:]], 2) for t in (key, value)]
        mask = torch.cat([key_mask[..., :start], key_mask[..., stop:]], -1)
        other, everything = torch.empty_like(out), torch.full_like(counts, total - (stop - start))
        nothing = torch.zeros_like(out)
        _attend(query, *rest, mask, chunk_starts, nothing, columns, everything, other, scale, chunk, sign="+")
        tokens = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
        reference.merge(out, lse, other, _lse(query, rest[0], mask, tokens, scale))
    as_expected = key_mask[..., start:stop].all(-1, keepdim=True)  # [B or 1, 1, 1, 1]
    base = out.masked_fill_(~as_expected, 0.0)
    everything = torch.where(as_expected[..., 0], 0, total).to(torch.int32).expand_as(counts).contiguous()
    out = torch.empty_like(base)
    _attend(query, key, value, key_mask, chunk_starts, base, columns, everything, out, scale, chunk, sign="+")
    return out, lse


def _heads_last(o: torch.Tensor) -> torch.Tensor:
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def _lse(query, key, key_mask, sample_tokens, scale: float) -> torch.Tensor:
    """log-sum-exp [B, H, N] at the sampled tokens; the rest is not written."""
    batch, heads, tokens, head_dim = query.shape
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    mask, sampled = _as_rows(key_mask), sample_tokens.numel()
    function = kernel("attention_lse", wide=_is_wide(key), **_facts(query, key_mask))
    tiles = tuning.attention_lse(query.dtype, head_dim)
    launch(
        function, (-(-sampled // tiles["BM"]), batch * heads), query, key, mask, sample_tokens, lse,
        *query.stride()[:3], *key.stride()[:3], _mask_stride(mask), *lse.stride()[:2],
        heads, heads // key.shape[1], sampled, key.shape[2], scale * math.log2(math.e), **tiles,
    )  # fmt: skip
    return lse


def _choose_columns(query, key, key_mask, sample_tokens, lse, columns, counts, scale: float) -> None:
    """Fills columns and counts, for as many heads at once as the workspace of levels holds."""
    batch, heads, _, head_dim = query.shape
    kv_len, (chunks, samples), kept = key.shape[2], sample_tokens.shape, columns.shape[3]
    mask = _as_rows(key_mask)
    row_bytes = -(-kv_len // 16) * 16
    at_once = min(max(1, LEVEL_BYTES // (chunks * row_bytes)), batch * heads)
    levels = torch.empty(at_once * chunks * row_bytes, dtype=torch.uint8, device=query.device)
    low, high = math.log2(samples / kv_len) - FLOOR, math.log2(samples)  # the highest: all attention on one key
    padded = max(2, 1 << (samples - 1).bit_length())
    score = tuning.attention_scores(query.dtype, head_dim, padded, query.device)
    select = tuning.attention_select()
    scores = kernel("attention_scores", wide=_is_wide(key), **_facts(query, key_mask))
    span, group = score["BN"] * score["TILES"], score["BM"] // padded
    for first in range(0, batch * heads, at_once):
        some = min(at_once, batch * heads - first)
        launch(
            scores, (-(-kv_len // span), -(-chunks // group), some), query, key, mask, sample_tokens, lse, levels,
            *query.stride()[:3], *key.stride()[:3], _mask_stride(mask), *lse.stride()[:2],
            heads, heads // key.shape[1], chunks, samples, kv_len, row_bytes, first, low, LEVELS / (high - low),
            scale * math.log2(math.e), SAMPLES=padded, **score,
        )  # fmt: skip
        launch(
            kernel("attention_select"), (some * chunks,), levels, columns, counts, row_bytes, kept, first * chunks,
            **select,
        )  # fmt: skip


# --- what the kernels are told ---


def _facts(query, key_mask) -> dict:
    head_dim = query.shape[3]
    kind = None if key_mask is None else "bool" if key_mask.dtype == torch.bool else "float"
    return {"head_dim": head_dim, "parts": parts(head_dim), "mask": kind, "precision": precision(query.dtype)}


def _as_rows(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A key mask as [B or 1, M] with contiguous rows; booleans as bytes."""
    if key_mask is None:
        return None
    mask = with_rows(key_mask[:, 0, 0])
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _mask_stride(mask: torch.Tensor | None) -> int:
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def _is_wide(*tensors: torch.Tensor) -> bool:
    """Whether offsets along the token axis outgrow 32 bits."""
    return any(t.shape[2] * t.stride(2) >= 1 << 31 for t in tensors)
