"""The ops in plain torch, fast on a CPU: gathered columns, in groups that fit the cache, in reused memory.

For every dtype (arithmetic in float32), and where the native kernels cannot be built. One large gather would
be slower than dense: temporaries past about 16 MB cost more in fresh pages than the sparse work saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from . import reference
from .expression import evaluate
from .reference import MASKED

GROUP_FLOATS = 1 << 17  # 512 KB: the largest temporary of a group of chunks, unless one chunk is larger
NEURON_FLOATS = 1 << 21  # 8 MB: gathered rows of an up projection


class Workspace:
    """Buffers by name, alive for one call: each grows to the largest shape asked for and is then reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def widen(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A float32 copy; a float32 tensor itself."""
        return source if source.dtype == torch.float32 else self.take(name, *source.shape).copy_(source)

    def gather(self, name: str, source: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """source[rows] in float32: [len(rows), width]."""
        if isinstance(rows, slice):
            return self.widen(name, source[rows])
        gathered = self.take(name, len(rows), source.shape[1], dtype=source.dtype)
        return self.widen(name, torch.index_select(source, 0, rows, out=gathered))


# --- attention, one head at a time ---


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts,
    scale: float, chunk: int, attended=(),
) -> torch.Tensor:  # fmt: skip
    """As reference.attention_refresh."""
    o = reference.dense_attention(query, key, value, key_mask, scale)
    bias, starts, workspace = reference.key_bias(key_mask), chunk_starts.tolist(), Workspace()
    for b, h, kv in _heads(query, key):
        row = None if bias is None else bias[b % len(bias)]
        q, k, chosen = query[b, h], key[b, kv], columns[b, h]
        _choose_columns(q, k, row, sample_tokens, chosen, counts[b, h], scale, workspace)
        for tokens, sparse in _sparse_rows(q, k, value[b, kv], row, starts, chosen, counts[b, h], scale, workspace):
            o_cache[b, h, tokens] = torch.sub(o[b, h, tokens], sparse)
    return o


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta."""
    batch, heads, length, head_dim = query.shape
    o = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    bias, starts, workspace = reference.key_bias(key_mask), chunk_starts.tolist(), Workspace()
    for b, h, kv in _heads(query, key):
        row = None if bias is None else bias[b % len(bias)]
        for tokens, sparse in _sparse_rows(
            query[b, h], key[b, kv], value[b, kv], row, starts, columns[b, h], counts[b, h], scale, workspace
        ):
            o[b, h, tokens] = torch.add(o_cache[b, h, tokens], sparse)
    return o


def _heads(query, key) -> Iterator[tuple[int, int, int]]:
    """Every (batch item, query head, the key head that it reads)."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    return ((b, h, h // group) for b in range(batch) for h in range(heads))


def _choose_columns(query, key, bias, sample_tokens, columns, counts, scale: float, workspace: Workspace) -> None:
    """Fills columns [C, K] and counts [C] of one head: query [N, D], key [M, D], bias [M] or None."""
    chunks, samples = sample_tokens.shape
    total, kept = len(key), columns.shape[-1]
    valid = None if bias is None else bias > 0.5 * MASKED
    keys = workspace.widen("keys", key)
    group = max(1, GROUP_FLOATS // (samples * total))
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        queries = workspace.gather("queries", query, sample_tokens[first:last].flatten())
        logits = torch.mm(queries, keys.T, out=workspace.take("logits", len(queries), total)).mul_(scale)
        if bias is not None:
            logits += bias
        mass = torch.softmax(logits, -1, out=workspace.take("weights", *logits.shape))
        scores = torch.sum(mass.view(-1, samples, total), 1, out=workspace.take("scores", last - first, total))
        columns[first:last], counts[first:last] = reference.choose(scores, valid, kept)


def _sparse_rows(
    query, key, value, bias, starts: list[int], columns, counts, scale: float, workspace: Workspace
) -> Iterator[tuple[slice, torch.Tensor]]:
    """One head's softmax over each chunk's columns @ V, group by group: (tokens, float32 [tokens, D]).

    query [N, D]; key, value [M, D]; bias [M] or None; columns [C, K]; counts [C]. Results share memory.
    """
    total, head_dim, kept = len(key), key.shape[1], columns.shape[-1]
    used = counts.tolist()
    for first, last, length, everything in _groups(starts, used, total, kept, head_dim):
        tokens, group = slice(starts[first], starts[last]), last - first
        if everything:
            keys, values = workspace.widen("keys", key), workspace.widen("values", value)
            keys, values = (t.expand(group, total, head_dim) for t in (keys, values))
            added = None if bias is None else bias[None, None]
        else:
            rows, unused = columns[first:last], None
            if min(used[first:last]) < kept:
                unused = torch.arange(kept) >= counts[first:last, None]
                rows = rows.masked_fill(unused, 0)
            keys, values = (workspace.gather(*t, rows.flatten()) for t in (("keys", key), ("values", value)))
            keys, values = (t.view(group, kept, head_dim) for t in (keys, values))
            added = _chosen_bias(bias, rows, unused)
        queries = workspace.widen("queries", query[tokens]).unflatten(0, (group, length))
        weights = _weights(queries, keys, added, scale, workspace)
        sparse = torch.bmm(weights, values, out=workspace.take("sparse", group, length, head_dim))
        yield tokens, sparse.flatten(0, 1)


def _groups(starts, used, total: int, kept: int, head_dim: int) -> Iterator[tuple[int, int, int, bool]]:
    """Runs (first, last, length, everything) of chunks of one length and kind, with small temporaries."""
    kinds = [(stop - start, count == total) for start, stop, count in zip(starts, starts[1:], used)]
    first = 0
    while first < len(kinds):
        length, everything = kinds[first]
        width = total if everything else kept
        most = max(1, GROUP_FLOATS // (width * max(length, head_dim)))
        last = first + 1
        while last < min(len(kinds), first + most) and kinds[last] == kinds[first]:
            last += 1
        yield first, last, length, everything
        first = last


def _chosen_bias(bias, rows, unused) -> torch.Tensor | None:
    """The bias of the chosen columns, [group, 1, K]: MASKED past a chunk's count. None if all zero."""
    if bias is None and unused is None:
        return None
    chosen = torch.zeros(rows.shape) if bias is None else bias[rows.long()]
    return (chosen if unused is None else chosen.masked_fill_(unused, MASKED))[:, None]


def _weights(query, key, bias, scale: float, workspace: Workspace) -> torch.Tensor:
    """softmax(scale * query @ key^T + bias), [group, length, K]; zeros in a row that has no column left."""
    shape = (*query.shape[:2], key.shape[1])
    logits = torch.bmm(query, key.transpose(1, 2), out=workspace.take("logits", *shape)).mul_(scale)
    if bias is not None:
        logits += bias
    weights = torch.softmax(logits, -1, out=workspace.take("weights", *shape))
    return weights if bias is None else weights.mul_(bias > 0.5 * MASKED)


# --- MLP, one chunk at a time ---


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens,
    act_cache, sample_cache, out_cache, region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta."""
    starts, workspace = chunk_starts.tolist(), Workspace()
    places = (sample_tokens - chunk_starts[:-1, None]).long()  # [C, s], within the chunk
    out = x.new_empty(out_cache.shape)
    ups = (up_weights, up_biases, region)
    for b in range(len(x)):
        chosen = [None] * len(places)
        if columns < len(down_t):
            scores = _neuron_scores(x[b], ups, sample_tokens, sample_cache[b], workspace).mul_(down_norm)
            chosen, _ = reference.choose(scores, None, columns)
        for c, place in enumerate(places):
            tokens = slice(starts[c], starts[c + 1])
            caches = (act_cache[b, :, tokens], sample_cache[b, c], out_cache[b, tokens])
            _update_chunk(workspace.widen("x", x[b, tokens]), ups, down_t, chosen[c], place, *caches, workspace)
        out[b].copy_(out_cache[b])
    return out


def _neuron_scores(x, ups, sample_tokens, cache, workspace: Workspace) -> torch.Tensor:
    """How much the sampled tokens' activations changed, float32 [C, F]: x [N, I], cache [C, s, F]."""
    (weights, biases, region), (chunks, samples, hidden) = ups, cache.shape
    scores = torch.empty(chunks, hidden)
    group = max(1, GROUP_FLOATS // (samples * hidden))
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        rows = workspace.gather("sampled", x, sample_tokens[first:last].flatten())
        h = []
        for j, weight in enumerate(weights):
            wide, out = workspace.widen("weight", weight), workspace.take(f"h{j}", len(rows), hidden)
            h.append(
                torch.addmm(biases[j].float(), rows, wide.T, out=out) if biases else torch.mm(rows, wide.T, out=out)
            )
        change = (evaluate(region, h) - cache[first:last].flatten(0, 1)).abs_()
        torch.sum(change.view(-1, samples, hidden), 1, out=scores[first:last])
    return scores


def _update_chunk(x, ups, down_t, neurons, place, act, sampled, out, workspace: Workspace) -> None:
    """Recomputes a chunk's neurons (None: all) in place: x [L, I], act [F, L], sampled [s, F], out [L, O]."""
    weights, biases, region = ups
    count = len(down_t) if neurons is None else len(neurons)
    block = max(128, NEURON_FLOATS // max(x.shape[1], down_t.shape[1]))
    for start in range(0, count, block):
        rows = slice(start, min(start + block, count))
        size = rows.stop - start
        if neurons is not None:
            rows = neurons[rows]
        h = []
        for j, weight in enumerate(weights):
            up = workspace.gather("up", weight, rows)
            buffer = workspace.take(f"h{j}", size, len(x))
            if biases:
                h.append(torch.addmm(biases[j][rows, None].float(), up, x.T, out=buffer))
            else:
                h.append(torch.mm(up, x.T, out=buffer))
        fresh = evaluate(region, h).to(act.dtype)  # rounded: what the cache keeps is what is subtracted
        change = fresh.float() - workspace.gather("old", act, rows)
        if neurons is None:
            act[rows], sampled[:, rows] = fresh, fresh[:, place].T
        else:
            act.index_copy_(0, rows.long(), fresh)
            sampled.index_copy_(1, rows.long(), fresh[:, place].T)
        out.addmm_(change.T, workspace.gather("down", down_t, rows))
