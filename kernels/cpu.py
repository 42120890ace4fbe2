"""The ops on a CPU: which of three equal paths runs, and the calls into the native one.

    native      float32, where the C++ kernels could be built: fastest
    blocked     every dtype, in torch
    reference   what is left (float64), and tests
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from . import blocked, native, reference

PATHS = ("native", "blocked", "reference")

_forced: str | None = None


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """All CPU ops take `path` ("native", "blocked" or "reference") inside the block. For tests and benchmarks.

    Raises ValueError for another name; inside, an op raises RuntimeError if the native path cannot take its inputs.
    """
    global _forced
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}: choose one of {', '.join(PATHS)}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def prepare(region: str | None = None) -> str:
    """Builds what float32 ops on the CPU will need (None: attention; else the MLP with this region), if need be.

    To be called when a program is planned, so that no compiler runs inside a denoising step. Returns the path that
    such ops will take: "native", or "blocked" where the native kernels cannot be had (logged, with the cause).
    """
    library = native.attention() if region is None else native.mlp(region)
    return "blocked" if library is None else "native"


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_refresh, on the path that suits the inputs."""
    library = _native(query.dtype, native.attention)
    if library is None or _some_item_all_masked(key_mask):
        args = (query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale, chunk)
        return _torch_path(query.dtype).attention_refresh(*args)
    o = _empty_output(query)
    state = (o, o_cache, columns, counts)
    _run_attention(
        library.attention_refresh, query, key, value, key_mask, chunk_starts, sample_tokens, *state, scale, chunk
    )
    return o


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta, on the path that suits the inputs."""
    library = _native(query.dtype, native.attention)
    if library is None:
        args = (query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale, chunk)
        return _torch_path(query.dtype).attention_delta(*args)
    o = _empty_output(query)
    state = (o, o_cache, columns, counts)
    _run_attention(library.attention_delta, query, key, value, key_mask, chunk_starts, None, *state, scale, chunk)
    return o


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
    region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta, on the path that suits the inputs."""
    library = _native(x.dtype, functools.partial(native.mlp, region))
    if library is None:
        return _torch_path(x.dtype).mlp_delta(
            x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache,
            out_cache, region, chunk, columns,
        )  # fmt: skip
    x, weights = _rows(x), [_rows(w) for w in up_weights]
    biases = [b.contiguous() for b in up_biases]
    down_norm = down_norm.contiguous()
    out = x.new_empty(out_cache.shape)
    batch, tokens, in_width = x.shape
    chunks, samples = sample_tokens.shape
    hidden, inputs = act_cache.shape[1], len(weights)
    pointers, strides = ctypes.c_void_p * inputs, ctypes.c_int64 * inputs
    arguments = _mlp_structure(inputs)(
        native.sgemm(), x.data_ptr(), pointers(*(w.data_ptr() for w in weights)),
        pointers(*(b.data_ptr() for b in biases)), strides(*(_row_stride(w) for w in weights)),
        down_t.data_ptr(), down_norm.data_ptr(), chunk_starts.data_ptr(), sample_tokens.data_ptr(),
        act_cache.data_ptr(), sample_cache.data_ptr(), out_cache.data_ptr(), out.data_ptr(),
        batch, tokens, in_width, hidden, out_cache.shape[2], chunks, chunk, samples, min(columns, hidden),
        x.stride(0), _row_stride(x), act_cache.stride(0), act_cache.stride(1),
    )  # fmt: skip
    _run(library.mlp_delta, arguments)
    return out


# --- choosing a path ---


def _native(dtype: torch.dtype, load) -> ctypes.CDLL | None:
    """The library that will do the work, or None for a path in torch."""
    if _forced is not None and _forced != "native":
        return None
    library = load() if dtype == torch.float32 else None
    if library is None and _forced == "native":
        raise RuntimeError(f"the native path was forced, but it cannot take {dtype} or could not be built (see the log)")
    return library


def _torch_path(dtype: torch.dtype):
    return reference if _forced == "reference" or dtype == torch.float64 else blocked


# --- native calls ---


def _empty_output(query) -> torch.Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _some_item_all_masked(key_mask) -> bool:
    """What dense attention gives then depends on the mask's spelling, so SDPA itself must answer."""
    if key_mask is None:
        return False
    return bool((reference.key_bias(key_mask).amax(-1) <= 0.5 * reference.MASKED).any())


def _fields(kind, names: str) -> list[tuple]:
    return [(name, kind) for name in names.split()]


class _Attention(ctypes.Structure):
    """Declared again in native_attention.cpp."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "sgemm query key value bias chunk_starts samples o o_cache columns counts"),
        *_fields(ctypes.c_int64, "batch heads kv_heads q_len kv_len head_dim chunks chunk per_chunk kept"),
        *_fields(ctypes.c_int64, "query_batch query_head query_token key_batch key_head key_token"),
        *_fields(ctypes.c_int64, "value_batch value_head value_token cache_batch cache_head cache_token bias_batch"),
        *_fields(ctypes.c_double, "scale"),
    ]


@functools.lru_cache(maxsize=None)
def _mlp_structure(inputs: int) -> type[ctypes.Structure]:
    class Mlp(ctypes.Structure):
        """Declared again in native_mlp.cpp."""

        _fields_ = [
            *_fields(ctypes.c_void_p, "sgemm x"),
            *_fields(ctypes.c_void_p * inputs, "weights biases"),
            *_fields(ctypes.c_int64 * inputs, "weight_strides"),
            *_fields(ctypes.c_void_p, "down down_norm chunk_starts samples act_cache sample_cache out_cache out"),
            *_fields(ctypes.c_int64, "batch tokens in_width hidden out_width chunks chunk per_chunk kept"),
            *_fields(ctypes.c_int64, "x_batch x_token act_batch act_neuron"),
        ]

    return Mlp


def _run_attention(
    function, query, key, value, key_mask, chunk_starts, samples, o, o_cache, columns, counts, scale, chunk
) -> None:
    query, key, value = _rows(query), _rows(key), _rows(value)
    bias = reference.key_bias(key_mask)
    batch, heads, q_len, head_dim = query.shape
    arguments = _Attention(
        native.sgemm(), query.data_ptr(), key.data_ptr(), value.data_ptr(), None if bias is None else bias.data_ptr(),
        chunk_starts.data_ptr(), None if samples is None else samples.data_ptr(), o.data_ptr(), o_cache.data_ptr(),
        columns.data_ptr(), counts.data_ptr(),
        batch, heads, key.shape[1], q_len, key.shape[2], head_dim,
        counts.shape[2], chunk, 0 if samples is None else samples.shape[1], columns.shape[3],
        query.stride(0), query.stride(1), _row_stride(query), key.stride(0), key.stride(1), _row_stride(key),
        value.stride(0), value.stride(1), _row_stride(value), o_cache.stride(0), o_cache.stride(1), o_cache.stride(2),
        0 if bias is None or len(bias) == 1 else bias.stride(0), scale,
    )  # fmt: skip
    _run(function, arguments)


def _run(function, arguments: ctypes.Structure) -> None:
    if function(ctypes.byref(arguments), ctypes.c_int64(torch.get_num_threads())):
        raise ValueError(
            "chunk_starts must cover the tokens in order, in chunks of 1 to `chunk` tokens, and sample_tokens must lie "
            "in their chunks: make them with chunk_table and sample_table of chipmunk_compile.kernels.reference"
        )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if BLAS can read its last two dimensions as a matrix with contiguous rows; else a copy."""
    width = tensor.shape[-1]
    if tensor.stride(-1) == 1 and (tensor.shape[-2] == 1 or tensor.stride(-2) >= width):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _row_stride(tensor: torch.Tensor) -> int:
    """Elements between rows: BLAS wants at least a row, also where there is only one and its stride means nothing."""
    return max(tensor.stride(-2), tensor.shape[-1])
