"""Random inputs for the printed kernels, on any device, and how far each result is from its meaning in float64.

On a CPU the kernels run in Triton's interpreter (tests/kernels/interpreted.py), on a GPU compiled (tests/gpu).
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from chipmunk_compile.kernels import cuda, cuda_permute, reference
from chipmunk_compile.kernels.expression import evaluate

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}


@contextlib.contextmanager
def poisoned():
    """Everything that torch.empty and new_empty give is NaN, or a huge integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN never passes a comparison with it."""
    norm = expected.double().norm()
    return ((actual.double() - expected.double()).norm() / norm.clamp_min(1e-12)).item()


def attention(
    device="cpu", dtype=torch.float32, batch=1, heads=2, kv_heads=None, segments=(100,), kv_len=None, head_dim=32,
    chunk=32, kept=20, samples=4, mask=None, layout="heads last", peaked=False, attended=(),
) -> dict[str, float]:  # fmt: skip
    """A refresh, then deltas on new inputs: relative errors, and the part of the best columns' mass that is missed.

    layout: "heads last", as diffusers has it, "heads first", or "fused" (one projection). peaked: logits so large that
    weights relative to the first columns overflow. mask: "bool" or "additive", at random; "padding" closes keys outside
    `attended` alone, "padding and more" one inside too, of the last batch item. Deltas run with the refresh's counts,
    with random ones from 0 on, and with a chunk that sees every key.
    """
    tokens, total, scale = sum(segments), kv_len or sum(segments), head_dim**-0.5

    def tensor(count: int, length: int) -> torch.Tensor:
        shape = (batch, length, count, (3 if layout == "fused" else 1) * head_dim)
        values = torch.randn(shape, device=device).to(dtype)[..., -head_dim:]
        return values.transpose(1, 2).contiguous() if layout == "heads first" else values.transpose(1, 2)

    def inputs() -> list[torch.Tensor]:
        query = tensor(heads, tokens) * (60.0 if peaked else 1.0)
        return [query, *(tensor(kv_heads or heads, total) for _ in range(2))]

    key_mask = None
    if mask:
        open_keys = torch.rand(batch, 1, 1, total, device=device) > 0.3
        additive = torch.where(open_keys, torch.randn(open_keys.shape, device=device), -torch.inf).to(dtype)
        if mask.startswith("padding"):
            open_keys[..., slice(*attended)] = True
            open_keys[-1, ..., attended[0]] = mask == "padding"
        key_mask = additive if mask == "additive" else open_keys
    wide_mask = key_mask if key_mask is None or key_mask.dtype == torch.bool else key_mask.double()
    starts = reference.chunk_table(segments, chunk)
    sampled = reference.sample_table(starts, samples).to(device)
    starts = starts.to(device)
    query, key, value = inputs()
    with poisoned():
        state = reference.attention_state(batch, heads, tokens, total, head_dim, kept, len(starts) - 1, dtype, device)
        o = cuda.attention_refresh(query, key, value, key_mask, starts, sampled, *state, scale, chunk, attended)
    o_cache, columns, counts = state

    def sparse(q, k, v, counts) -> torch.Tensor:
        bias = reference.key_bias(key_mask, torch.float64)
        return reference._sparse_attention(q.double(), k.double(), v.double(), bias, starts, columns, counts, scale)

    wide = [t.double() for t in (query, key, value)]
    dense = reference.dense_attention(*wide, wide_mask, scale)
    errors = {"o": distance(o, dense)}
    # o_cache is the difference of two numbers, nearly equal where nearly everything is kept: judged against the larger.
    kept_alone = sparse(*wide[:3], counts)
    off = (o_cache.double() - (o.double() - kept_alone)).norm()
    errors["o_cache"] = (off / torch.maximum(dense.norm(), kept_alone.norm())).item()
    errors |= _choice(wide, key_mask, sampled, columns, counts, scale, kept)
    fresh = inputs()
    fewer = (counts * torch.rand(counts.shape, device=device)).int()
    text = fewer.clone()
    text[:, :, -1] = total  # a chunk that sees every key, whatever its list holds
    for name, some in (("delta", counts), ("fewer", fewer), ("text", text)):
        with poisoned():
            o = cuda.attention_delta(*fresh, key_mask, starts, o_cache, columns, some, scale, chunk)
        assert o.transpose(1, 2).is_contiguous() and o.dtype == dtype
        errors[name] = distance(o, o_cache.double() + sparse(*fresh, some))
    return errors


def _choice(wide, key_mask, sampled, columns, counts, scale: float, kept: int) -> dict[str, float]:
    """How many lists are out of order or of the wrong length, and what part of the best mass the others lack."""
    query, key = wide[:2]
    batch, heads, chunks, total = *counts.shape, key.shape[2]
    bias = reference.key_bias(key_mask, torch.float64)
    valid = torch.ones(batch, total, dtype=torch.bool, device=key.device) if bias is None else bias > -1e20
    wrong, lacking = 0, 0.0
    for h in range(heads):
        k = key[:, h // (heads // key.shape[1])]
        logits = query[:, h].index_select(1, sampled.flatten()) @ k.transpose(1, 2) * scale
        if bias is not None:
            logits = logits + bias[:, None]
        mass = reference.masked_softmax(logits, valid[:, None]).unflatten(1, sampled.shape).sum(2)  # [B, C, M]
        for b in range(batch):
            for c in range(chunks):
                count, row = int(counts[b, h, c]), mass[b, c]
                chosen = columns[b, h, c, :count].long()
                in_order = bool((chosen.diff() > 0).all()) and bool(valid[b, chosen].all())
                rest = columns[b, h, c, count:]
                wrong += not (in_order and count == min(kept, int(valid[b].sum())) and not rest.any())
                best = row.masked_fill(~valid[b], 0).topk(count).values.sum()
                lacking = max(lacking, float(1 - row[chosen].sum() / best.clamp_min(1e-30)) if count else 0.0)
    # A column taken lies within one level, 13%, of the best left out; over a list that averages out.
    return {"wrong lists": float(wrong), "mass lacking" if kept >= 8 else "mass lacking of few": lacking}


def mlp(
    device="cpu", dtype=torch.float32, batch=1, segments=(100,), width=64, hidden=160, out_features=48, chunk=32,
    kept=50, samples=4, region="gelu_tanh(h0)", bias=True,
) -> dict[str, float]:  # fmt: skip
    """Two delta steps: relative errors of caches and output, and the part of the best change that is missed."""
    tokens, inputs = sum(segments), 2 if "h1" in region else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    weights = [(normal(hidden, width) * width**-0.5).to(dtype) for _ in range(inputs)]
    biases = [normal(hidden).to(dtype) for _ in range(inputs)] if bias else []
    down_t = (normal(hidden, out_features) * hidden**-0.5).to(dtype)
    down_norm = down_t.float().norm(dim=1)
    starts = reference.chunk_table(segments, chunk)
    sampled = reference.sample_table(starts, samples).to(device)
    chunk_of = reference._chunk_of_token(starts, tokens).to(device)
    starts = starts.to(device)
    x = normal(batch, tokens, width).to(dtype)

    def activations(x) -> torch.Tensor:
        padded = biases or [None] * inputs
        return evaluate(
            region,
            [F.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in zip(weights, padded)],
        )

    with poisoned():
        size = (batch, tokens, hidden, out_features, samples, len(starts) - 1)
        act, sample, out_cache = reference.mlp_state(*size, dtype, device)
    before = activations(x).to(dtype)
    act.copy_(before.transpose(1, 2))
    sample.copy_(before.index_select(1, sampled.flatten()).view_as(sample))
    out_cache.copy_(before.double() @ down_t.double())
    errors: dict[str, float] = {}
    for step in range(2):
        x = (x.float() + 0.4 * normal(*x.shape)).to(dtype)
        old, old_out = act.clone().transpose(1, 2).double(), out_cache.clone().double()
        old_sample = sample.clone()
        with poisoned():
            out = cuda.mlp_delta(
                x, weights, biases, down_t, down_norm, starts, sampled, act, sample, out_cache, region, chunk, kept
            )
        new, fresh = act.transpose(1, 2).double(), activations(x)
        # A neuron was recomputed for a chunk if any of its activations there moved.
        moved = torch.zeros(batch, len(starts) - 1, hidden, device=device)
        moved.index_add_(1, chunk_of, (new != old).float())
        moved = moved > 0
        by_token = moved.index_select(1, chunk_of)
        errors[f"act {step}"] = distance(new, torch.where(by_token, fresh, old))
        errors[f"out_cache {step}"] = distance(out_cache, old_out + (new - old) @ down_t.double())
        errors[f"out {step}"] = distance(out, out_cache)
        wanted = torch.where(
            moved[:, :, None], fresh.index_select(1, sampled.flatten()).view_as(sample), old_sample.double()
        )
        errors[f"sample {step}"] = distance(sample, wanted)
        errors[f"too many {step}"] = float((moved.sum(-1) > kept).sum())
        score = (fresh.index_select(1, sampled.flatten()).view_as(sample) - old_sample.double()).abs().sum(
            2
        ) * down_norm
        best = score.topk(min(kept, hidden), -1).values.sum(-1)
        errors[f"change lacking {step}"] = (1 - (score * moved).sum(-1) / best).max().item()
    return errors


def weights(device="cpu", dtype=torch.float32, features=64, hidden=64, beside=0, turned=False) -> dict[str, float]:
    """A weight turned over, and its columns' norms. beside: columns of the matrix that it is the last part of."""
    weight = torch.randn(features, beside + hidden, device=device).to(dtype)[:, beside:]
    weight = weight.t().contiguous().t() if turned else weight
    with poisoned():
        down_t = torch.empty(hidden, features, dtype=dtype, device=device)
        down_norm = torch.empty(hidden, device=device)
        cuda.mlp_weights(weight, down_t, down_norm)
    return {
        "different": float(not down_t.equal(weight.t())),
        "norm": distance(down_norm, weight.double().norm(dim=0)),
    }


def permute(device="cpu", dtype=torch.float32, batch=2, tokens=53, moved=53) -> dict[str, float]:
    """Several tensors gathered along the token axis: how many differ from index_select."""
    order = torch.randperm(tokens, device=device)[:moved]
    fused = torch.randn(batch, tokens, 7, device=device).to(dtype)
    tensors = [
        torch.randn(batch, tokens, 24, device=device).to(dtype),
        fused[..., 2:5],
        torch.randint(9, (batch, tokens), device=device),
        torch.randn(batch, 2, tokens, 3, device=device).to(dtype).transpose(1, 2),
        torch.rand(batch, tokens, 5, device=device) > 0.5,
    ]
    with poisoned():
        results = cuda_permute.gather_tokens(tensors, order)
    return {"different": float(sum(not r.equal(t.index_select(1, order)) for r, t in zip(results, tensors)))}


def check(errors: dict[str, float], dtype: torch.dtype) -> None:
    """Asserts what a case returned."""
    for name, error in errors.items():
        if "lacking" in name:
            assert error < (0.13 if "few" in name else 0.02), (name, errors)
        elif name.split(" ")[0] in ("wrong", "too", "different"):
            assert error == 0, (name, errors)
        else:
            assert error < TOLERANCE[dtype], (name, errors)
