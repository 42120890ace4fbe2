"""The ops in plain torch, fast on a CPU: gathered columns, in groups that fit the cache, on reused workspaces.

For every dtype (arithmetic in float32) and where the native kernels cannot be built. One large gather would be
slower than dense: temporaries past about 16 MB cost more in fresh pages than the sparse work saves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import reference
from .expression import evaluate
from .reference import MASKED

GROUP_FLOATS = 1 << 17  # 512 KB: the largest single temporary of a group of chunks, where one chunk is not larger
NEURON_FLOATS = 1 << 21  # 8 MB: gathered rows of an up projection


class Workspace:
    """Buffers by name, alive for one call: each grows to the largest shape asked for and is then reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def gather(self, name: str, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """source[rows] in float32: [len(rows), width]."""
        gathered = self.take(name, len(rows), source.shape[1], dtype=source.dtype)
        torch.index_select(source, 0, rows, out=gathered)
        return gathered if gathered.dtype == torch.float32 else self.widen(name, gathered)

    def widen(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A float32 copy, or the tensor itself if it is float32."""
        return source if source.dtype == torch.float32 else self.take(name, *source.shape).copy_(source)


# --- attention ---


def attention_refresh(
    query, key, value, key_mask, chunk_starts, sample_tokens, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_refresh."""
    o = reference.dense_attention(query, key, value, key_mask, scale)
    bias = reference.key_bias(key_mask)
    workspace = Workspace()
    for b in range(query.shape[0]):
        row = None if bias is None else bias[b % len(bias)]
        for h in range(query.shape[1]):
            keys = key[b, h // (query.shape[1] // key.shape[1])]
            _choose_columns(query[b, h], keys, row, sample_tokens, columns[b, h], counts[b, h], scale, workspace)
    _add_sparse(query, key, value, bias, chunk_starts, columns, counts, scale, o, -1.0, o_cache, workspace)
    return o


def attention_delta(
    query, key, value, key_mask, chunk_starts, o_cache, columns, counts, scale: float, chunk: int
) -> torch.Tensor:
    """As reference.attention_delta."""
    batch, heads, tokens, head_dim = query.shape
    o = query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    bias = reference.key_bias(key_mask)
    _add_sparse(query, key, value, bias, chunk_starts, columns, counts, scale, o_cache, 1.0, o, Workspace())
    return o


def _choose_columns(query, key, bias, sample_tokens, columns, counts, scale: float, workspace: Workspace) -> None:
    """One head's columns [C, K] and counts [C]: query [N, D], key [M, D], bias [M] or None."""
    chunks, samples = sample_tokens.shape
    total, kept = len(key), columns.shape[-1]
    valid = None if bias is None else bias > 0.5 * MASKED
    group = max(1, GROUP_FLOATS // (samples * total))
    keys = workspace.widen("keys", key)
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        queries = workspace.gather("queries", query, sample_tokens[first:last].flatten())
        logits = torch.mm(queries, keys.T, out=workspace.take("logits", len(queries), total)).mul_(scale)
        if bias is not None:
            logits += bias
        mass = torch.softmax(logits, -1, out=workspace.take("weights", *logits.shape))
        scores = torch.sum(mass.view(-1, samples, total), 1, out=workspace.take("scores", last - first, total))
        best, count = reference.choose(scores, valid, kept)
        columns[first:last] = best
        counts[first:last] = count


def _add_sparse(query, key, value, bias, chunk_starts, columns, counts, scale, base, sign, out, workspace) -> None:
    """out = base + sign * softmax over each chunk's columns @ V, group by group of equally long chunks."""
    batch, heads, _, head_dim = query.shape
    total, kept = key.shape[2], columns.shape[-1]
    starts, used = chunk_starts.tolist(), counts.tolist()
    for b in range(batch):
        row = None if bias is None else bias[b % len(bias)]
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            keys, values = key[b, kv], value[b, kv]  # [M, D]
            for first, last, length, everything in _groups(starts, used[b][h], total, kept, head_dim):
                g, tokens = last - first, slice(starts[first], starts[last])
                shape = (g, length, head_dim)
                rows = None if everything else columns[b, h, first:last]
                unused = None  # [g, K], set where some chunk uses fewer than K
                if rows is not None and min(used[b][h][first:last]) < kept:
                    unused = torch.arange(kept) >= counts[b, h, first:last, None]
                    rows = rows.masked_fill(unused, 0)
                weights = _weights(
                    workspace.widen("queries", query[b, h, tokens]).unflatten(0, (g, length)),
                    workspace.widen("keys", keys).expand(g, total, head_dim)
                    if rows is None
                    else workspace.gather("keys", keys, rows.flatten()).view(g, kept, head_dim),
                    _chosen_bias(row, rows, unused),
                    scale,
                    workspace,
                )
                chosen = (
                    workspace.widen("values", values).expand(g, total, head_dim)
                    if rows is None
                    else workspace.gather("values", values, rows.flatten()).view(g, kept, head_dim)
                )
                sparse = torch.bmm(weights, chosen, out=workspace.take("sparse", *shape))
                cached = workspace.widen("base", base[b, h, tokens]).unflatten(0, (g, length))
                out[b, h, tokens] = sparse.mul_(sign).add_(cached).flatten(0, 1)


def _groups(starts, used, total: int, kept: int, head_dim: int) -> Iterator[tuple[int, int, int, bool]]:
    """Runs of chunks (first, last, length, everything) of one length and kind, whose temporaries stay small."""
    first = 0
    while first < len(used):
        length, everything = starts[first + 1] - starts[first], used[first] == total
        width = total if everything else kept
        most = max(1, GROUP_FLOATS // max(1, width * max(length, head_dim)))
        last = first + 1
        while (
            last < min(len(used), first + most)
            and starts[last + 1] - starts[last] == length
            and (used[last] == total) == everything
        ):
            last += 1
        yield first, last, length, everything
        first = last


def _chosen_bias(bias, rows, unused) -> torch.Tensor | None:
    """The bias of the chosen columns: [g, 1, K], or [1, 1, M] for all of them; MASKED past the count."""
    if rows is None:
        return None if bias is None else bias[None, None]
    if bias is None and unused is None:
        return None
    chosen = torch.zeros(rows.shape) if bias is None else bias[rows.long()]
    return (chosen if unused is None else chosen.masked_fill_(unused, MASKED))[:, None]


def _weights(query, key, bias, scale: float, workspace: Workspace) -> torch.Tensor:
    """softmax(scale * query @ key^T + bias): [g, length, K]; zeros where a row has no column left."""
    shape = (*query.shape[:2], key.shape[1])
    logits = torch.bmm(query, key.transpose(1, 2), out=workspace.take("logits", *shape)).mul_(scale)
    if bias is not None:
        logits += bias
    weights = torch.softmax(logits, -1, out=workspace.take("weights", *shape))
    return weights if bias is None else weights.mul_(bias > 0.5 * MASKED)


# --- MLP ---


def mlp_delta(
    x, up_weights, up_biases, down_t, down_norm, chunk_starts, sample_tokens, act_cache, sample_cache, out_cache,
    region: str, chunk: int, columns: int,
) -> torch.Tensor:  # fmt: skip
    """As reference.mlp_delta."""
    hidden, starts = act_cache.shape[1], chunk_starts.tolist()
    places = (sample_tokens - chunk_starts[:-1, None]).long()  # [C, s], within the chunk
    out = x.new_empty(out_cache.shape)
    workspace = Workspace()
    for b in range(len(x)):
        chosen = None
        if columns < hidden:
            chosen = _choose_neurons(
                x[b], up_weights, up_biases, down_norm, sample_tokens, sample_cache[b], region, columns, workspace
            )
        for c, place in enumerate(places):
            tokens = slice(starts[c], starts[c + 1])
            _update_chunk(
                workspace.widen("x", x[b, tokens]), up_weights, up_biases, down_t, None if chosen is None else chosen[c],
                place, act_cache[b, :, tokens], sample_cache[b, c], out_cache[b, tokens], region, workspace,
            )  # fmt: skip
        out[b].copy_(out_cache[b])
    return out


def _choose_neurons(x, up_weights, up_biases, down_norm, sample_tokens, cache, region, columns, workspace):
    """One batch item's neurons, int32 [C, K]: x [N, I], cache [C, s, F]."""
    chunks, samples = sample_tokens.shape
    hidden = cache.shape[-1]
    group = max(1, GROUP_FLOATS // (samples * hidden))
    chosen = torch.empty(chunks, columns, dtype=torch.int32)
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        rows = workspace.gather("sampled", x, sample_tokens[first:last].flatten())
        h = [
            torch.mm(rows, workspace.widen("weight", w).T, out=workspace.take(f"h{j}", len(rows), hidden))
            for j, w in enumerate(up_weights)
        ]
        for part, bias in zip(h, up_biases):
            part += bias
        change = evaluate(region, h).sub_(cache[first:last].flatten(0, 1)).abs_()
        scores = change.view(-1, samples, hidden).sum(1).mul_(down_norm)
        chosen[first:last] = reference.choose(scores, None, columns)[0]
    return chosen


def _update_chunk(x, up_weights, up_biases, down_t, neurons, place, act, sampled, out, region, workspace) -> None:
    """Recomputes one chunk's neurons (None: all) in place: x [L, I], act [F, L], sampled [s, F], out [L, O]."""
    count = len(down_t) if neurons is None else len(neurons)
    block = max(128, NEURON_FLOATS // max(x.shape[1], down_t.shape[1]))
    for start in range(0, count, block):
        rows = slice(start, min(start + block, count))
        if neurons is not None:
            rows = neurons[rows]
        size = len(rows) if neurons is not None else rows.stop - rows.start
        h = []
        for j, weight in enumerate(up_weights):
            up = _rows("up", weight, rows, workspace)
            h.append(torch.mm(up, x.T, out=workspace.take(f"h{j}", size, len(x))))
            if len(up_biases):
                h[j] += up_biases[j][rows, None]
        fresh = evaluate(region, h).to(act.dtype)  # rounded: what the cache keeps is what is subtracted
        change = fresh - _rows("old", act, rows, workspace)
        if neurons is None:
            act[rows] = fresh
            sampled[:, rows] = fresh[:, place].T
        else:
            act.index_copy_(0, rows.long(), fresh)
            sampled.index_copy_(1, rows.long(), fresh[:, place].T)
        out.addmm_(change.float().T, _rows("down", down_t, rows, workspace))


def _rows(name: str, source, rows, workspace: Workspace) -> torch.Tensor:
    """The rows (a slice or an index) of source [F, width] in float32."""
    return workspace.widen(name, source[rows]) if isinstance(rows, slice) else workspace.gather(name, source, rows)
