"""DESIGN.md's formulas in float64, in plain loops over chunks. Shares no code with the ops that it judges."""

from __future__ import annotations

import math

import torch

ACTIVATIONS = {  # region text -> the same in float64
    "gelu(h0)": lambda h: 0.5 * h[0] * (1 + torch.special.erf(h[0] / math.sqrt(2))),
    "gelu_tanh(h0)": lambda h: 0.5 * h[0] * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h[0] + 0.044715 * h[0] ** 3))),
    "silu(h0)": lambda h: h[0] / (1 + torch.exp(-h[0])),
    "square(relu(h0))": lambda h: torch.clamp(h[0], min=0) ** 2,
    "mul(h0, sigmoid(mul(h0, 1.702)))": lambda h: h[0] / (1 + torch.exp(-1.702 * h[0])),
    "tanh(h0)": lambda h: torch.tanh(h[0]),
    "mul(h0, tanh(softplus(h0)))": lambda h: h[0] * torch.tanh(torch.log1p(torch.exp(h[0]))),
    "where(gt(h0, 0), h0, mul(0.1, h0))": lambda h: torch.where(h[0] > 0, h[0], 0.1 * h[0]),
    "mul(gelu(h0), h1)": lambda h: 0.5 * h[0] * (1 + torch.special.erf(h[0] / math.sqrt(2))) * h[1],
    "mul(h0, silu(h1))": lambda h: h[0] * h[1] / (1 + torch.exp(-h[1])),
}


def chunks_of(starts: torch.Tensor) -> list[slice]:
    """The token ranges that a table of chunk starts describes."""
    edges = starts.tolist()
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


def softmax_rows(query, key, allowed, bias, scale: float) -> torch.Tensor:
    """[rows, M] probabilities over allowed columns (bool [M]); zeros where none is."""
    logits = scale * (query.double() @ key.double().T) + bias
    logits[:, ~allowed] = -math.inf
    if not allowed.any():
        return torch.zeros_like(logits)
    weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def mask_of(key_mask, b: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch item's mask as (allowed bool [M], additive float64 [M])."""
    if key_mask is None:
        return torch.ones(total, dtype=torch.bool), torch.zeros(total, dtype=torch.float64)
    row = key_mask[b % len(key_mask), 0, 0]
    if row.dtype == torch.bool:
        return row, torch.zeros(total, dtype=torch.float64)
    return row > -9e3, row.double().clamp(min=-1e9)


def sparse_attention(query, key, value, key_mask, starts, columns, counts, scale: float) -> torch.Tensor:
    """[B, H, N, D]: for each chunk, softmax over its columns alone, times V."""
    batch, heads, tokens, head_dim = query.shape
    total, out = key.shape[2], torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        open_columns, bias = mask_of(key_mask, b, total)
        for h in range(heads):
            kv = h * key.shape[1] // heads
            for c, rows in enumerate(chunks_of(starts)):
                count = int(counts[b, h, c])
                chosen = torch.zeros(total, dtype=torch.bool)
                chosen[columns[b, h, c, :count].long() if count < total else slice(None)] = True
                p = softmax_rows(query[b, h, rows], key[b, kv], chosen & open_columns, bias, scale)
                out[b, h, rows] = p @ value[b, kv].double()
    return out


def dense_attention(query, key, value, key_mask, scale: float) -> torch.Tensor:
    """[B, H, N, D] in float64."""
    whole = torch.tensor([0, query.shape[2]])
    counts = torch.full((*query.shape[:2], 1), key.shape[2])
    return sparse_attention(query, key, value, key_mask, whole, counts[..., None], counts, scale)


def column_scores(query, key, key_mask, sample_tokens, scale: float) -> torch.Tensor:
    """[B, H, C, M]: the sampled tokens' probabilities, summed over each chunk's samples."""
    batch, heads = query.shape[:2]
    total, scores = key.shape[2], []
    for b in range(batch):
        allowed, bias = mask_of(key_mask, b, total)
        for h in range(heads):
            for tokens in sample_tokens.long():
                p = softmax_rows(query[b, h, tokens], key[b, h * key.shape[1] // heads], allowed, bias, scale)
                scores.append(p.sum(0))
    return torch.stack(scores).view(batch, heads, len(sample_tokens), total)


def assert_best(scores: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor, kept: int, slack: float) -> None:
    """`chosen` (indices) are the `kept` best valid entries of a row of scores, up to ties within `slack`."""
    assert chosen.tolist() == sorted(set(chosen.tolist())), "ascending, none twice"
    assert len(chosen) == min(kept, int(valid.sum()))
    inside = torch.zeros(len(scores), dtype=torch.bool)
    inside[chosen.long()] = True
    assert not (inside & ~valid).any(), "a masked column was chosen"
    left = valid & ~inside
    if left.any() and inside.any():
        assert scores[left].max() <= scores[inside].min() + slack


def activations(x, weights, biases, region: str) -> torch.Tensor:
    """[..., F] in float64."""
    biases = biases or [torch.zeros(())] * len(weights)
    return ACTIVATIONS[region]([x.double() @ w.double().T + b.double() for w, b in zip(weights, biases)])
