"""The ops on a GPU, by printed Triton kernels; what these cannot take runs as its meaning.

    attention_delta     kernels/cuda_attention.py
    attention_refresh   kernels/cuda_attention.py
    mlp_delta           kernels/cuda_mlp.py

Functions take and return what their namesakes in kernels/reference.py do. Nothing is read back to the host, so all of
it can be captured into a CUDA graph.
"""

from __future__ import annotations

import torch

from . import cuda_attention, cuda_mlp, reference
from .launch import runs_triton

MOST_HEAD_DIM = 256


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta."""
    path = cuda_attention if _takes_attention(query) else reference
    return path.attention_delta(query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale, chunk)


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_refresh, with columns chosen by levels of attention mass (cuda_attention says which)."""
    path = cuda_attention if _takes_attention(query) else reference
    return path.attention_refresh(
        query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale, chunk
    )


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
    region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta, with neurons chosen by scores that count as equal within 0.8%."""
    path = cuda_mlp if runs_triton(x) and act_cache.shape[1] <= cuda_mlp.MOST_HIDDEN else reference
    return path.mlp_delta(
        x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
        region, chunk, columns,
    )  # fmt: skip


def _takes_attention(query: torch.Tensor) -> bool:
    return runs_triton(query) and query.shape[3] <= MOST_HEAD_DIM
