"""Attention nodes say no more than they must: four dimensions, no repeated heads, the smallest mask."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from torch import fx
from torch.fx import Node

from .attention_masks import emit_aligned
from .attention_scores import Mask
from .canonical import clean
from .nodes import aten, dtype, emit, emit_reshape, is_static, is_tensor, known_value, shape, substitute, under_autocast
from .origin_labels import Origins
from .origins import constant_run, feature_run, is_constant
from .sdpa import SDPA, Sdpa, emit_sdpa, read_sdpa

_CONJUNCTIONS = (aten.mul.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)


def narrow_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """In place, on every scaled_dot_product_attention node:

    [batch, tokens, d] or more than four dimensions  ->  [batch, heads, tokens, d]
    keys and values repeated for groups of query heads  ->  every r-th head, enable_gqa=True
    a mask that is all True, or zero  ->  no mask
    a mask that does not change along heads or queries  ->  size one there ([batch or 1, 1, 1, keys] for a key mask)
    a mask "this key counts and this query counts"  ->  the key mask; the other queries' output is 0, as before

    Repetition and constancy are proven from the graph (see origins), however they are spelled.
    """
    unreliable = under_autocast(gm.graph)
    origins = Origins()
    for node in list(gm.graph.nodes):
        if node.target is not SDPA or node in unreliable:
            continue
        attention = read_sdpa(node)
        tensors = [attention.query, attention.key, attention.value, attention.mask]
        if not all(is_static(t) for t in tensors if t is not None):
            continue
        with gm.graph.inserting_before(node):
            narrow = _four_dimensional(gm.graph, attention, origins)
            if narrow is None:
                continue
            narrow = _without_repeated_heads(gm.graph, narrow, origins)
            narrow, attending = _without_idle_queries(gm.graph, narrow, origins)
            narrow = _with_smallest_mask(gm.graph, narrow, origins)
            out = emit_sdpa(gm.graph, narrow, like=node)
            if attending is not None:
                out = emit(gm.graph, aten.where.ScalarOther, attending, out, 0.0, like=node)
            out = emit_reshape(gm.graph, out, shape(node))
        substitute(node, out)
    return clean(gm)


def _four_dimensional(graph: fx.Graph, attention: Sdpa, origins: Origins) -> Sdpa | None:
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    *lead, q_len, _ = shape(query)
    if len(lead) != 2:
        if any(shape(n)[:-2] != tuple(lead) for n in (key, value)):
            return None
        if len(lead) == 1:
            heads = feature_run(origins.of(query)[0])
            batch = (lead[0] // heads, heads)
        else:
            batch = (math.prod(lead[:-1]), lead[-1]) if lead else (1, 1)
        query, key, value = (emit_reshape(graph, n, (*batch, *shape(n)[-2:])) for n in (query, key, value))
    else:
        batch = tuple(lead)
    if mask is not None and (len(shape(mask)) != 4 or len(lead) != 2):
        sizes = (*lead, q_len, shape(key)[-2])
        if len(shape(mask)) > len(sizes):
            return None
        mask = emit_aligned(graph, Mask(mask, "ABCDEFGH"[: len(lead)] + "ij", sizes), batch)
    return replace(attention, query=query, key=key, value=value, mask=mask)


def _without_repeated_heads(graph: fx.Graph, attention: Sdpa, origins: Origins) -> Sdpa:
    heads, kv_heads = shape(attention.query)[1], shape(attention.key)[1]
    if attention.enable_gqa or heads != kv_heads or shape(attention.value)[1] != heads:
        return attention
    repeats = math.gcd(heads, *(constant_run(origins.of(n)[1]) for n in (attention.key, attention.value)))
    if repeats == 1:
        return attention
    key, value = (
        emit(graph, aten.slice.Tensor, n, 1, 0, sys.maxsize, repeats, like=n) for n in (attention.key, attention.value)
    )
    return replace(attention, key=key, value=value, enable_gqa=True)


def _without_idle_queries(graph: fx.Graph, attention: Sdpa, origins: Origins) -> tuple[Sdpa, Node | None]:
    """Splits a product of a mask over keys and one over queries; the latter as [batch or 1, heads or 1, queries, 1]."""
    mask = attention.mask
    if mask is None or mask.target not in _CONJUNCTIONS or attention.is_causal:
        return attention, None
    parts = [n for n in mask.args if is_tensor(n) and dtype(n) == torch.bool and len(shape(n)) == 4]
    if len(parts) != 2:
        return attention, None
    for keys, queries in (parts, parts[::-1]):
        if is_constant(origins.of(keys)[2]) and is_constant(origins.of(queries)[3]) and shape(queries)[2] > 1:
            return replace(attention, mask=keys), emit(graph, aten.slice.Tensor, queries, 3, 0, 1, like=queries)
    return attention, None


def _with_smallest_mask(graph: fx.Graph, attention: Sdpa, origins: Origins) -> Sdpa:
    mask = attention.mask
    if mask is None:
        return attention
    known = known_value(mask)
    if known is not None and bool(known == (dtype(mask) == torch.bool)):  # True, or 0.0
        return replace(attention, mask=None)
    for dim in (1, 2):
        if shape(mask)[dim] > 1 and is_constant(origins.of(mask)[dim]):
            mask = emit(graph, aten.slice.Tensor, mask, dim, 0, 1, like=mask)
    return replace(attention, mask=mask)
