"""Gathers along the token axis: several tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .codegen import kernel
from .launch import launch, runs_triton

WORDS = (torch.int32, torch.int16, torch.uint8)  # rows are copied as the widest that divides them


def gather_tokens(tensors: Sequence[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """[t.index_select(1, order) for t in tensors], for tensors [B, N, ...] with one B, of any dtypes.

    order: int32 or int64 [M], each entry a token of 0..N-1. The results are contiguous.
    """
    batches = {t.shape[0] for t in tensors}
    if (
        not runs_triton(order.new_empty(0, dtype=torch.float32))
        or len(batches) != 1
        or not all(t.numel() for t in tensors)
    ):
        return [t.index_select(1, order) for t in tensors]
    results, arguments = [], []
    for tensor in tensors:
        result = tensor.new_empty(tensor.shape[0], len(order), *tensor.shape[2:])
        source, target = _as_words(tensor), _as_words(result)
        if source.dtype != target.dtype:  # strides that are not whole words
            source = _as_words(tensor.contiguous())
        arguments += [source, target, source.stride(0), source.stride(1), source.shape[2]]
        results.append(result)
    launch(
        kernel("gather_tokens", count=len(tensors)), (-(-len(order) // 8), batches.pop(), len(tensors)),
        order, *arguments, len(order), ROWS=8, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return results


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    """[B, N, ...] as [B, N, W] of the widest words that its rows, strides and address are multiples of."""
    tensor = tensor if tensor[0, 0].is_contiguous() else tensor.contiguous()
    rows = tensor.reshape(*tensor.shape[:2], -1)
    size = tensor.element_size()
    extents = (rows.shape[2] * size, rows.stride(0) * size, rows.stride(1) * size, rows.data_ptr())
    return rows.view(next(w for w in WORDS if not any(e % w.itemsize for e in extents)))
