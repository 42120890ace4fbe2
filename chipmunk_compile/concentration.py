"""How concentrated weights are: what the best columns hold, and how many columns it takes to hold so much.

Shapes: B batch, H heads, Hkv key heads (H is a multiple), R query rows, M key tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .kernels.reference import MASKED, masked_softmax, wide

# Elements of the softmax that are held at a time: 64 MB in float32.
BLOCK = 1 << 24


def held_by_best(weights: Tensor) -> Tensor:
    """The part of each row's sum that the best column holds, the best two, ...: [..., columns] for weights >= 0.

    A row of zeros gives zeros.
    """
    held = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    return held / held[..., -1:].clamp_min(torch.finfo(held.dtype).tiny)


def top_shares(held: Tensor, shares: Sequence[float]) -> Tensor:
    """What the best columns hold, [len(shares), ...] of `held_by_best`; shares: of the columns, one column at least."""
    return torch.stack([held[..., max(1, round(share * held.shape[-1])) - 1] for share in shares])


def columns_holding(held: Tensor, parts: Sequence[float]) -> Tensor:
    """The share of columns that is needed to hold so much: [len(parts), ...] of `held_by_best`."""
    return torch.stack([((held < part).sum(-1) + 1).clamp(max=held.shape[-1]) / held.shape[-1] for part in parts])


def attention_logits(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """[B, H, R, M] of query [B, H, R, D] and key [B, H, M, D]. bias: of a key mask, [B or 1, M]
    (`kernels.reference.key_bias`)."""
    dtype = wide(query.dtype)
    logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    return logits if bias is None else logits + bias[:, None, None]


def attention_weights(logits: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax over the columns that the key mask allows: what it forbids weighs nothing, as does a row without any."""
    return logits.softmax(-1) if bias is None else masked_softmax(logits, (bias > 0.5 * MASKED)[:, None, None])


def head_blocks(query: Tensor, key: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Heads in blocks whose weights for `rows` rows fit BLOCK elements: (which query heads, the key head of each)."""
    heads = query.shape[1]
    group = heads // key.shape[1]
    size = max(1, BLOCK // (query.shape[0] * rows * key.shape[2]))
    for start in range(0, heads, size):
        block = slice(start, min(heads, start + size))
        yield block, torch.arange(block.start, block.stop, device=key.device) // group
