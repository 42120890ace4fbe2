"""The sparse-delta operators, `torch.ops.chipmunk.*`: schemas, shapes, work, and what a device runs.

    attention_refresh   dense attention; chooses columns, fills o_cache
    attention_delta     o_cache + softmax over the chosen columns alone @ V
    mlp_delta           out_cache += (new activation - cached one) @ W2, over the chosen neurons
    mlp_weights         W2 as mlp_delta wants it: turned over, and the norms of its neurons

kernels/reference.py says what each computes. State is an argument and is changed in place, as the schema
declares; outputs are always new tensors. Importing this module defines the operators.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import cpu, cuda, launch, reference

library = torch.library.Library("chipmunk", "DEF")

# What runs where, by dispatch key: other devices run the meaning until they have kernels.
IMPLEMENTATIONS = {"CPU": cpu, "CUDA": cuda, "CompositeExplicitAutograd": reference}


def column_step(device: torch.device) -> int:
    """Columns are best planned in multiples of this."""
    return cuda.COLUMN_STEP if device.type == "cuda" else 1


def why_slow(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a device would run the ops as their meaning, slower than dense; None where it has kernels for them."""
    return launch.why_no_triton(dtype, device) if device.type == "cuda" else None


# --- what an op demands of its arguments: kernels take raw pointers, so this stands before every one ---


def _check_attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale, chunk, attended=()
) -> None:
    _check_attention_delta(query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale, chunk)
    _check_tables(sample_tokens)
    if len(attended) and not 0 <= attended[0] < attended[-1] <= key.shape[2]:
        raise ValueError(f"attended must be nothing or (start, stop) of {key.shape[2]} keys: got {tuple(attended)}")


def _check_attention_delta(query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale, chunk) -> None:
    batch, heads, _, head_dim = query.shape
    _, kv_heads, total, _ = key.shape
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, head_dim) or heads % kv_heads:
        raise ValueError(
            "query must be [B, H, N, D], key and value [B, Hkv, M, D] with H a multiple of Hkv: "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype == o_cache.dtype:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}, {o_cache.dtype}"
        raise ValueError(f"query, key, value and o_cache must have one dtype: got {dtypes}")
    if key_mask is not None and (key_mask.shape[0] not in (1, batch) or key_mask.shape[1:] != (1, 1, total)):
        raise ValueError(f"key_mask must be [{batch} or 1, 1, 1, {total}]: got {tuple(key_mask.shape)}")
    if o_cache.shape != query.shape or o_cache.stride(3) != 1:
        raise ValueError(f"o_cache must be shaped as query, {tuple(query.shape)}, with stride 1 along D")
    chunks = (batch, heads, chunk_starts.shape[0] - 1)
    if counts.shape != chunks or columns.shape[:3] != chunks or not 1 <= columns.shape[3] <= total:
        raise ValueError(
            f"columns must be {chunks} + [K] with 1 <= K <= {total}, counts {chunks}: "
            f"got {tuple(columns.shape)}, {tuple(counts.shape)}"
        )
    _check_tables(chunk_starts, columns, counts)


def _check_mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens,
    act_cache, sample_cache, out_cache, region, chunk, columns,
) -> None:  # fmt: skip
    batch, tokens, width = x.shape
    hidden, out_features = down_t.shape
    chunks, samples = sample_tokens.shape
    if not up_weights or any(w.shape != (hidden, width) for w in up_weights):
        shapes = [tuple(w.shape) for w in up_weights]
        raise ValueError(f"up_weights must be [{hidden}, {width}] each: got {shapes}")
    if len(up_biases) not in (0, len(up_weights)) or any(b.shape != (hidden,) for b in up_biases):
        raise ValueError(f"up_biases must be [{hidden}], one for each weight or none: got {len(up_biases)}")
    if any(t.dtype != x.dtype for t in (*up_weights, *up_biases, down_t, act_cache, sample_cache)):
        raise ValueError(f"weights, biases, act_cache and sample_cache must have the dtype of x, {x.dtype}")
    arithmetic = reference.wide(x.dtype)
    if down_norm.dtype != arithmetic or out_cache.dtype != arithmetic:
        raise ValueError(f"down_norm and out_cache must be {arithmetic}")
    for name, tensor, shape in (
        ("down_t", down_t, (hidden, out_features)),
        ("down_norm", down_norm, (hidden,)),
        ("sample_cache", sample_cache, (batch, chunks, samples, hidden)),
        ("out_cache", out_cache, (batch, tokens, out_features)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {shape}: got {tuple(tensor.shape)}")
    if act_cache.shape != (batch, hidden, tokens) or act_cache.stride(2) != 1:
        wanted = (batch, hidden, tokens)
        raise ValueError(f"act_cache must be {wanted}, with token stride 1: got {tuple(act_cache.shape)}")
    if chunk_starts.shape != (chunks + 1,) or columns < 1:
        raise ValueError(f"chunk_starts must be [{chunks + 1}] and columns at least 1: got {columns}")
    _check_tables(chunk_starts, sample_tokens)


def _check_tables(*tables: torch.Tensor) -> None:
    if any(t.dtype != torch.int32 or not t.is_contiguous() for t in tables):
        raise ValueError("chunk_starts, sample_tokens, columns and counts must be contiguous int32")


# --- what the compiler sees of an output ---


def _like_query(query, *rest) -> torch.Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _like_out_cache(x, *rest) -> torch.Tensor:
    out_cache = rest[-4]
    return x.new_empty(out_cache.shape)


# --- work, for torch.utils.flop_counter: the multiplications that an op of these shapes really does ---


def _attention_refresh_flops(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, *rest, out_shape=None
) -> int:
    (batch, heads, tokens, head_dim), total, kept = query, key[2], columns[3]
    chunks, samples = sample_tokens
    choice = 0 if kept == total and key_mask is None else chunks * samples * total
    return 2 * batch * heads * head_dim * (2 * tokens * (total + kept) + choice)


def _attention_delta_flops(query, key, value, key_mask, chunk_starts, o_cache, columns, *rest, out_shape=None) -> int:
    (batch, heads, tokens, head_dim), kept = query, columns[3]
    return 4 * batch * heads * tokens * kept * head_dim


def _mlp_delta_flops(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens,
    act_cache, sample_cache, out_cache, region, chunk, columns, out_shape=None,
) -> int:  # fmt: skip
    (batch, tokens, width), (hidden, out_features), (chunks, samples) = x, down_t, sample_tokens
    up = len(up_weights) * width
    choice = batch * chunks * samples * hidden * up if columns < hidden else 0
    return 2 * (batch * tokens * min(columns, hidden) * (up + out_features) + choice)


# --- definitions ---


def _define(schema: str, check, empty, flops) -> None:
    """Defines an op: `check` stands before every implementation and before `empty`, its fake."""

    def checked(function):
        def op(*args):
            check(*args)
            return function(*args)

        return op

    # Every implementation takes any strides, so Inductor may lay inputs out as suits their producers.
    name = library.define(" ".join(schema.split()), tags=(torch.Tag.flexible_layout,))
    for key, module in IMPLEMENTATIONS.items():
        library.impl(name, checked(getattr(module, name)), key)
    torch.library.register_fake(f"chipmunk::{name}", checked(empty), lib=library)
    register_flop_formula(getattr(torch.ops.chipmunk, name))(flops)


_define(
    """attention_refresh(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor chunk_starts,
    Tensor sample_tokens, Tensor(a!) o_cache, Tensor(b!) columns, Tensor(c!) counts, float scale, int chunk,
    int[] attended=[]) -> Tensor""",
    _check_attention_refresh,
    _like_query,
    _attention_refresh_flops,
)
_define(
    """attention_delta(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor chunk_starts,
    Tensor o_cache, Tensor columns, Tensor counts, float scale, int chunk) -> Tensor""",
    _check_attention_delta,
    _like_query,
    _attention_delta_flops,
)
_define(
    """mlp_delta(Tensor x, Tensor[] up_weights, Tensor[] up_biases, Tensor down_t, Tensor down_norm,
    Tensor chunk_starts, Tensor sample_tokens, Tensor(a!) act_cache, Tensor(b!) sample_cache,
    Tensor(c!) out_cache, str region, int chunk, int columns) -> Tensor""",
    _check_mlp_delta,
    _like_out_cache,
    _mlp_delta_flops,
)

# Not for compiled programs: it runs once a generation.
library.define("mlp_weights(Tensor weight, Tensor(a!) down_t, Tensor(b!) down_norm) -> ()")
for _key, _module in IMPLEMENTATIONS.items():
    library.impl("mlp_weights", _module.mlp_weights, _key)
