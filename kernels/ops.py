"""The sparse-delta operators, `torch.ops.chipmunk.*`: schemas, shapes, and which implementation a device runs.

    attention_refresh   dense attention; chooses columns, fills o_cache
    attention_delta     o_cache + softmax over the chosen columns alone @ V
    mlp_delta           out_cache += (new activation - cached one) @ W2, over the chosen neurons

kernels/reference.py says what each computes. State is an argument and is changed in place, as the schema declares;
outputs are always new tensors. Importing this module defines the operators.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import cpu, reference

library = torch.library.Library("chipmunk", "DEF")

SCHEMAS = (
    "attention_refresh(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor chunk_starts, "
    "Tensor sample_tokens, Tensor(a!) o_cache, Tensor(b!) columns, Tensor(c!) counts, float scale, int chunk) -> Tensor",
    "attention_delta(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor chunk_starts, Tensor o_cache, "
    "Tensor columns, Tensor counts, float scale, int chunk) -> Tensor",
    "mlp_delta(Tensor x, Tensor[] up_weights, Tensor[] up_biases, Tensor down_t, Tensor down_norm, "
    "Tensor chunk_starts, Tensor sample_tokens, Tensor(a!) act_cache, Tensor(b!) sample_cache, Tensor(c!) out_cache, "
    "str region, int chunk, int columns) -> Tensor",
)


# --- what an op demands of its arguments: kernels take raw pointers, so this stands before every one ---


def _check_attention(query, key, value, key_mask, chunk_starts, o_cache, columns, counts) -> None:
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


def _check_mlp(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache, columns
) -> None:
    batch, tokens, width = x.shape
    hidden, out_features = down_t.shape
    chunks, samples = sample_tokens.shape
    if not up_weights or any(w.shape != (hidden, width) for w in up_weights):
        raise ValueError(f"up_weights must be [{hidden}, {width}] each: got {[tuple(w.shape) for w in up_weights]}")
    if len(up_biases) not in (0, len(up_weights)) or any(b.shape != (hidden,) for b in up_biases):
        raise ValueError(f"up_biases must be [{hidden}], one for each weight or none: got {len(up_biases)}")
    if any(t.dtype != x.dtype for t in (*up_weights, *up_biases, down_t, act_cache, sample_cache)):
        raise ValueError(f"weights, biases, act_cache and sample_cache must have the dtype of x, {x.dtype}")
    if down_norm.dtype != reference.wide(x.dtype) or out_cache.dtype != reference.wide(x.dtype):
        raise ValueError(f"down_norm and out_cache must be {reference.wide(x.dtype)}")
    if down_norm.shape != (hidden,) or not down_t.is_contiguous():
        raise ValueError(f"down_t must be [F, O] contiguous and down_norm [{hidden}]: got {tuple(down_norm.shape)}")
    if act_cache.shape != (batch, hidden, tokens) or act_cache.stride(2) != 1:
        raise ValueError(f"act_cache must be {(batch, hidden, tokens)}, stride 1 last: got {tuple(act_cache.shape)}")
    if sample_cache.shape != (batch, chunks, samples, hidden) or not sample_cache.is_contiguous():
        raise ValueError(f"sample_cache must be {(batch, chunks, samples, hidden)}: got {tuple(sample_cache.shape)}")
    if out_cache.shape != (batch, tokens, out_features) or not out_cache.is_contiguous():
        raise ValueError(f"out_cache must be {(batch, tokens, out_features)}: got {tuple(out_cache.shape)}")
    if chunk_starts.shape != (chunks + 1,) or columns < 1:
        raise ValueError(f"chunk_starts must be [{chunks + 1}] and columns at least 1: got {columns}")
    _check_tables(chunk_starts, sample_tokens)


def _check_tables(*tables: torch.Tensor) -> None:
    if any(t.dtype != torch.int32 or not t.is_contiguous() for t in tables):
        raise ValueError("chunk_starts, sample_tokens, columns and counts must be contiguous int32")


# --- shapes: what the compiler sees ---


def _fake_attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale, chunk
) -> torch.Tensor:
    _check_attention(query, key, value, key_mask, chunk_starts, o_cache, columns, counts)
    _check_tables(sample_tokens)
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _fake_attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale, chunk
) -> torch.Tensor:
    _check_attention(query, key, value, key_mask, chunk_starts, o_cache, columns, counts)
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _fake_mlp_delta(x, *args) -> torch.Tensor:
    *tensors, out_cache, _, _, columns = args
    _check_mlp(x, *tensors, out_cache, columns)
    return x.new_empty(out_cache.shape)


# --- work: what torch.utils.flop_counter counts, from the shapes that an op really multiplies ---


def _attention_refresh_flops(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, *args, out_shape=None, **kwargs
) -> int:
    (batch, heads, tokens, head_dim), total, kept = query, key[2], columns[3]
    chunks, samples = sample_tokens
    choice = 0 if kept == total and key_mask is None else chunks * samples * total
    return 2 * batch * heads * head_dim * (2 * tokens * (total + kept) + choice)


def _attention_delta_flops(
    query, key, value, key_mask, chunk_starts, o_cache, columns, *args, out_shape=None, **kwargs
) -> int:
    (batch, heads, tokens, head_dim), kept = query, columns[3]
    return 4 * batch * heads * tokens * kept * head_dim


def _mlp_delta_flops(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
    region, chunk, columns, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    (batch, tokens, width), (hidden, out_features), (chunks, samples) = x, down_t, sample_tokens
    up = len(up_weights) * width
    choice = batch * chunks * samples * hidden * up if columns < hidden else 0
    return 2 * (batch * tokens * min(columns, hidden) * (up + out_features) + choice)


# --- implementations: the CPU has its own, other devices run the meaning until they have kernels ---


def _checked(path, name: str):
    """The op `name` of a module, behind the checks that its fake makes."""
    function = getattr(path, name)
    if name == "mlp_delta":

        def op(*args):
            *tensors, _, _, columns = args
            _check_mlp(*tensors, columns)
            return function(*args)

    else:
        skip = 6 if name == "attention_refresh" else 5  # past sample_tokens, which delta lacks

        def op(*args):
            _check_attention(*args[:5], *args[skip : skip + 3])
            _check_tables(*args[5:skip])
            return function(*args)

    return op


for schema, fake, flops in (
    (SCHEMAS[0], _fake_attention_refresh, _attention_refresh_flops),
    (SCHEMAS[1], _fake_attention_delta, _attention_delta_flops),
    (SCHEMAS[2], _fake_mlp_delta, _mlp_delta_flops),
):
    # Every implementation takes any strides, so Inductor may lay inputs out as suits their producers.
    name = library.define(schema, tags=(torch.Tag.flexible_layout,))
    library.impl(name, _checked(cpu, name), "CPU")
    library.impl(name, _checked(reference, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"chipmunk::{name}", fake, lib=library)
    register_flop_formula(getattr(torch.ops.chipmunk, name))(flops)
