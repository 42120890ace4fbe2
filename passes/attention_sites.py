"""Which attention can become sparse: self-attention over a token axis, told by dataflow (see origins)."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx import Node

from .collectives import comes_from_ranks
from .naming import module_path
from .nodes import aten, dtype, is_static, shape, under_autocast
from .origin_labels import Origins
from .origins import Axis, Entry, Label, Segment, has_identity, size_of
from .other_attention import find_other_attention
from .reasons import Reason
from .sdpa import SDPA, Sdpa, read_sdpa
from .sites import AttentionSite, Declined

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


def find_attention(gm: fx.GraphModule, *, min_tokens: int) -> tuple[list[AttentionSite], list[Declined]]:
    """The attention sites of a raised graph, in graph order, and the attention that is none, each with its reason.

    A site is self-attention: every sequence that the queries' tokens come from, the keys come from too, at the same
    positions; they may have more (text, reference tokens). Its mask, if any, is one row for all queries and heads.
    Fewer than `min_tokens` queries are not worth it. The graph is only read.
    """
    sites, declined = [], []
    origins = Origins()
    unreliable = under_autocast(gm.graph)
    for node in gm.graph.nodes:
        if node.target is not SDPA:
            continue
        attention = read_sdpa(node)
        refusal = _refusal(node, attention, origins, min_tokens, node in unreliable)
        if refusal is None:
            sites.append(_site(node, attention))
        else:
            declined.append(Declined("attention", module_path(node), *refusal))
    return sites, declined + find_other_attention(gm, origins)


def _site(node: Node, attention: Sdpa) -> AttentionSite:
    batch, heads, q_len, head_dim = shape(attention.query)
    _, kv_heads, kv_len, _ = shape(attention.key)
    return AttentionSite(
        node=node,
        name=module_path(node),
        query=attention.query,
        key=attention.key,
        value=attention.value,
        key_mask=attention.mask,
        scale=attention.resolved_scale,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
    )


def _refusal(
    node: Node, attention: Sdpa, origins: Origins, min_tokens: int, autocast: bool
) -> tuple[Reason, dict[str, object]] | None:
    """Why this attention is no site, the plainest reason first."""
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    tensors = [n for n in (query, key, value, mask) if n is not None]
    if not all(map(is_static, tensors)) or any(len(shape(n)) != 4 for n in tensors):
        return Reason.UNSUPPORTED_SHAPE, {name: shape(n) for name, n in zip(("query", "key", "value", "mask"), tensors)}
    batch, heads, q_len, head_dim = shape(query)
    kv_batch, kv_heads, kv_len, _ = shape(key)
    lengths = {"q_len": q_len, "kv_len": kv_len}

    foreign = _foreign_tokens(origins.of(query), origins.of(key))
    if foreign is not None:
        gathered = comes_from_ranks(key) and not comes_from_ranks(query)
        return Reason.KEYS_OF_RANKS if gathered else foreign[0], {**lengths, **foreign[1]}
    if q_len < min_tokens:
        return Reason.TOO_FEW_TOKENS, {**lengths, "min_tokens": min_tokens}
    if attention.is_causal:
        return Reason.CAUSAL, lengths
    if mask is not None and shape(mask) not in ((batch, 1, 1, kv_len), (1, 1, 1, kv_len)):
        return Reason.UNSUPPORTED_MASK, {**lengths, "mask": shape(mask)}
    if attention.dropout_p:
        return Reason.DROPOUT, {"dropout_p": attention.dropout_p}
    dtypes = {"query": str(dtype(query)), "key": str(dtype(key)), "value": str(dtype(value)), "autocast": autocast}
    if autocast or len({dtype(n) for n in (query, key, value, node)}) > 1:
        return Reason.MIXED_DTYPE, dtypes
    if dtype(query) not in DTYPES:
        return Reason.UNSUPPORTED_DTYPE, {"dtype": str(dtype(query))}
    if mask is not None and dtype(mask) not in (torch.bool, *DTYPES):
        return Reason.UNSUPPORTED_DTYPE, {"mask": str(dtype(mask))}
    grouped = heads % kv_heads == 0 and shape(value)[:3] == shape(key)[:3]
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or shape(value)[-1] != head_dim or kv_batch != batch or not grouped:
        return Reason.UNSUPPORTED_SHAPE, {"query": shape(query), "key": shape(key), "value": shape(value)}
    return None


# --- are queries and keys the same tokens? ----------------------------------------------------------------------


def _foreign_tokens(query: tuple[Label, ...], key: tuple[Label, ...]) -> tuple[Reason, dict[str, object]] | None:
    """None for self-attention; else the reason, and how many query tokens were found among the keys."""
    tokens, keys = query[2], key[2]
    if size_of(keys) < size_of(tokens):
        return Reason.CROSS_ATTENTION, {}
    shared = _shared(tokens, keys)
    if shared == size_of(tokens):
        if _same_batch(query[0], key[0]):
            return None
        return Reason.UNPROVEN_SELF_ATTENTION, {"shared_tokens": shared, "batch": size_of(query[0])}
    if shared or _inputs(tokens) & _inputs(keys):
        return Reason.UNPROVEN_SELF_ATTENTION, {"shared_tokens": shared}
    return Reason.CROSS_ATTENTION, {"shared_tokens": 0}


def _same_batch(query: Label, key: Label) -> bool:
    if query == key or _shared(query, key) == size_of(query):
        return True
    return size_of(query) == 1 and not (_evidence(query[0]) and _evidence(key[0]))


def _evidence(segment: Segment) -> list[Entry]:
    """The sequences that a segment's tokens come from: activations where there are any, not tables added to them."""
    known = [entry for entry in segment.entries if has_identity(entry)]
    return [entry for entry in known if entry.projected] or known


def _shared(label: Label, among: Label) -> int:
    """How many positions of `label` stand in `among`, with every sequence that they come from."""
    return sum(_shared_segment(segment, among) for segment in label)


def _shared_segment(segment: Segment, among: Label) -> int:
    evidence = _evidence(segment)
    if not evidence:
        return 0
    found: set[range] = set()
    for other in among:
        shifts = [{e.start - o.start for o in other.entries if o.track == e.track} for e in evidence]
        for shift in set.intersection(*shifts):  # position p is the other segment's position p + shift
            found.add(range(max(0, -shift), min(segment.size, other.size - shift)))
    covered = end = 0
    for interval in sorted(found, key=lambda r: r.start):
        covered += max(0, interval.stop - max(end, interval.start))
        end = max(end, interval.stop)
    return covered


# The operand that carries the sequence; the others are weights.
_DATA = {
    aten.linear.default: 0,
    aten.layer_norm.default: 0,
    aten.rms_norm.default: 0,
    aten.group_norm.default: 0,
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.embedding.default: 1,
}


def _inputs(label: Label) -> set[Node]:
    """The graph inputs that a label's sequences are computed from, weights left out."""
    stack = [n for segment in label for entry in _evidence(segment) for n in _roots(entry.track)]
    seen = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [node.args[_DATA[node.target]]] if node.target in _DATA else node.all_input_nodes
    return {n for n in seen if n.op != "call_function"}


def _roots(key: object) -> list[Node]:
    """The nodes named anywhere inside a track."""
    if isinstance(key, Node):
        return [key]
    if isinstance(key, Axis):
        return _roots(key.key)
    return [n for part in key for n in _roots(part)] if isinstance(key, (tuple, frozenset)) else []
