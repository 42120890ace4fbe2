"""The ops as calls into the native kernels: float32 on a CPU, where kernels/native_build.py could build them.

kernels/native_attention.cpp and kernels/native_mlp.cpp do the work, on raw pointers and any strides that BLAS
can read (others are copied). Sizes have been checked before, in kernels/ops.py; tables are checked there.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from . import blocked, native_build, reference


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts,
    scale: float, chunk: int, attended=(),
) -> torch.Tensor:  # fmt: skip
    """As reference.attention_refresh; dense attention included, because its weights serve the sparse part."""
    bias = reference.key_bias(key_mask)
    if bias is not None and (bias.amax(-1) <= 0.5 * reference.MASKED).any():
        # What dense attention gives an item without keys depends on how the mask is spelled: ask SDPA.
        return blocked.attention_refresh(
            query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale, chunk
        )
    tables, state = (chunk_starts, sample_tokens), (o_cache, columns, counts)
    return _attention("attention_refresh", query, key, value, bias, tables, state, scale, chunk)


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta."""
    bias, state = reference.key_bias(key_mask), (o_cache, columns, counts)
    return _attention("attention_delta", query, key, value, bias, (chunk_starts, None), state, scale, chunk)


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens,
    act_cache, sample_cache, out_cache, region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta."""
    library, inputs = native_build.library(region), len(up_weights)
    x, weights = _matrix(x), [_matrix(w) for w in up_weights]
    biases, down_norm = [b.contiguous() for b in up_biases], down_norm.contiguous()
    out = x.new_empty(out_cache.shape)
    batch, tokens, in_width = x.shape
    _, chunks, samples, hidden = sample_cache.shape
    pointers, integers = ctypes.c_void_p * inputs, ctypes.c_int64 * inputs
    arguments = _mlp_arguments(inputs)(
        native_build.sgemm(), x.data_ptr(), pointers(*(w.data_ptr() for w in weights)),
        pointers(*(b.data_ptr() for b in biases)), integers(*(_row_stride(w) for w in weights)),
        down_t.data_ptr(), down_norm.data_ptr(), chunk_starts.data_ptr(), sample_tokens.data_ptr(),
        act_cache.data_ptr(), sample_cache.data_ptr(), out_cache.data_ptr(), out.data_ptr(),
        batch, tokens, in_width, hidden, out_cache.shape[2], chunks, chunk, samples, min(columns, hidden),
        x.stride(0), _row_stride(x), act_cache.stride(0), act_cache.stride(1),
    )  # fmt: skip
    _run(library.mlp_delta, arguments)
    return out


def _attention(name: str, query, key, value, bias, tables, state, scale: float, chunk: int) -> torch.Tensor:
    library, (starts, samples), (o_cache, columns, counts) = native_build.library(None), tables, state
    query, key, value = _matrix(query), _matrix(key), _matrix(value)
    batch, heads, q_len, head_dim = query.shape
    _, kv_heads, kv_len, _ = key.shape
    o = query.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    arguments = _AttentionArguments(
        native_build.sgemm(), query.data_ptr(), key.data_ptr(), value.data_ptr(), _pointer(bias),
        starts.data_ptr(), _pointer(samples), o.data_ptr(), o_cache.data_ptr(), columns.data_ptr(),
        counts.data_ptr(), batch, heads, kv_heads, q_len, kv_len, head_dim, counts.shape[2], chunk,
        0 if samples is None else samples.shape[1], columns.shape[3],
        query.stride(0), query.stride(1), _row_stride(query), key.stride(0), key.stride(1), _row_stride(key),
        value.stride(0), value.stride(1), _row_stride(value), *o_cache.stride()[:3],
        0 if bias is None or len(bias) == 1 else kv_len, scale,
    )  # fmt: skip
    _run(getattr(library, name), arguments)
    return o


_FAULTS = {
    1: "chunk_starts must cover the tokens in order, in chunks of 1 to `chunk`, and sample_tokens lie in "
    "their chunks: chunk_table and sample_table of kernels/reference.py make such tables",
    2: "columns or counts point past the keys: run attention_refresh on this state first",
}


def _run(function, arguments: ctypes.Structure) -> None:
    fault = function(ctypes.byref(arguments), ctypes.c_int64(torch.get_num_threads()))
    if fault:
        raise ValueError(_FAULTS[fault])


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if BLAS can read its last two dimensions as rows of contiguous elements; else a copy."""
    if tensor.stride(-1) == 1 and (tensor.shape[-2] == 1 or tensor.stride(-2) >= tensor.shape[-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _row_stride(tensor: torch.Tensor) -> int:
    """Elements between rows: BLAS wants at least a row's, also for a single row, whose stride is anything."""
    return max(tensor.stride(-2), tensor.shape[-1])


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# --- the argument structures, as the C++ files declare them ---


def _fields(kind, names: str) -> list[tuple]:
    return [(name, kind) for name in names.split()]


class _AttentionArguments(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "sgemm query key value bias chunk_starts samples o o_cache columns counts"),
        *_fields(ctypes.c_int64, "batch heads kv_heads q_len kv_len head_dim chunks chunk per_chunk kept"),
        *_fields(ctypes.c_int64, "query_batch query_head query_token key_batch key_head key_token"),
        *_fields(ctypes.c_int64, "value_batch value_head value_token cache_batch cache_head cache_token"),
        *_fields(ctypes.c_int64, "bias_batch"),
        *_fields(ctypes.c_double, "scale"),
    ]


@functools.cache
def _mlp_arguments(inputs: int) -> type[ctypes.Structure]:
    fields = [
        *_fields(ctypes.c_void_p, "sgemm x"),
        *_fields(ctypes.c_void_p * inputs, "weights biases"),
        *_fields(ctypes.c_int64 * inputs, "weight_strides"),
        *_fields(ctypes.c_void_p, "down down_norm chunk_starts samples act_cache sample_cache out_cache out"),
        *_fields(ctypes.c_int64, "batch tokens in_width hidden out_width chunks chunk per_chunk kept"),
        *_fields(ctypes.c_int64, "x_batch x_token act_batch act_neuron"),
    ]
    return type("_MlpArguments", (ctypes.Structure,), {"_fields_": fields})
