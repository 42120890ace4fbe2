"""The meaning of the ops against DESIGN.md's formulas in float64; tables and state."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.kernels import reference
from tests.kernels import formulas


def test_chunks_restart_at_each_segment():
    assert reference.chunk_table([100, 63], 32).tolist() == [0, 32, 64, 96, 100, 132, 163]
    assert reference.chunk_table([64], 64).tolist() == [0, 64]
    assert reference.chunk_table([5], 64).dtype == torch.int32


@pytest.mark.parametrize("segments, chunk", [([10, 0], 4), ([10], 0), ([-1], 4)])
def test_impossible_tables_are_refused(segments, chunk):
    with pytest.raises(ValueError, match="must be positive"):
        reference.chunk_table(segments, chunk)


@pytest.mark.parametrize("samples", [1, 4, 8])
def test_samples_are_one_per_stretch_of_their_chunk(samples):
    starts = reference.chunk_table([100, 63, 1], 32)
    table = reference.sample_table(starts, samples)
    assert table.dtype == torch.int32 and table.shape == (len(starts) - 1, samples)
    for tokens, rows in zip(table.tolist(), formulas.chunks_of(starts)):
        assert all(rows.start <= t < rows.stop for t in tokens) and tokens == sorted(tokens)
        length = rows.stop - rows.start
        if length % samples == 0:
            assert [(t - rows.start) * samples // length for t in tokens] == list(range(samples))


def test_samples_of_a_square_patch_fall_in_many_pixel_columns():
    tokens = reference.sample_table(reference.chunk_table([64], 64), 8)[0]
    assert len(set((tokens % 8).tolist())) >= 6


def test_state_is_laid_out_as_the_ops_read_it():
    o_cache, columns, counts = reference.attention_state(2, 3, 50, 70, 16, 90, 4, torch.bfloat16, "cpu")
    assert o_cache.shape == (2, 3, 50, 16) and o_cache.transpose(1, 2).is_contiguous()
    assert columns.shape == (2, 3, 4, 70) and columns.dtype == torch.int32  # no more columns than there are
    assert counts.shape == (2, 3, 4) and counts.dtype == torch.int32
    act, sampled, out = reference.mlp_state(2, 50, 96, 24, 8, 4, torch.bfloat16, "cpu")
    assert act.shape == (2, 96, 50) and act.stride() == (96 * 64, 64, 1)
    assert sampled.shape == (2, 4, 8, 96) and sampled.dtype == act.dtype == torch.bfloat16
    assert out.shape == (2, 50, 24) and out.dtype == torch.float32


def test_choice_skips_what_is_not_valid():
    scores = torch.tensor([[0.5, 3.0, 2.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    valid = torch.tensor([[True, True, True, False], [False, True, False, False]])
    columns, counts = reference.choose(scores, valid, 2)
    assert columns.tolist() == [[1, 2], [1, 0]] and counts.tolist() == [2, 1]


@pytest.mark.parametrize("kind", ["bool", "inf", "smallest", "-10000"])
def test_every_spelling_of_a_mask_is_one_bias(kind):
    allowed = torch.tensor([True, False, True])
    low = {"inf": -torch.inf, "smallest": torch.finfo(torch.bfloat16).min, "-10000": -1e4}.get(kind)
    mask = allowed if kind == "bool" else torch.where(allowed, 0.0, low).bfloat16()
    expected = torch.tensor([[0.0, reference.MASKED, 0.0]])
    torch.testing.assert_close(reference.key_bias(mask[None, None, None]), expected, atol=0, rtol=0)


def test_a_bias_that_masks_nothing_stays():
    mask = torch.tensor([0.5, -8000.0]).view(1, 1, 1, 2)
    assert reference.key_bias(mask).tolist() == [[0.5, -8000.0]]


def test_attention_is_the_formula_in_float64():
    torch.manual_seed(0)
    batch, heads, tokens, total, dim, kept = 2, 4, 37, 53, 8, 11
    query = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, total, dim, dtype=torch.float64)
    mask = torch.rand(batch, 1, 1, total) > 0.3
    starts = reference.chunk_table([20, 17], 8)
    samples = reference.sample_table(starts, 3)
    state = reference.attention_state(batch, heads, tokens, total, dim, kept, len(starts) - 1, query.dtype, "cpu")
    o = reference.attention_refresh(query, key, value, mask, starts, samples, *state, 0.4, 8)
    o_cache, columns, counts = state
    dense = formulas.dense_attention(query, key, value, mask, 0.4)
    torch.testing.assert_close(o, dense, atol=1e-12, rtol=0)
    scores = formulas.column_scores(query, key, mask, samples, 0.4)
    for b, h, c in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        formulas.assert_best(scores[b, h, c], columns[b, h, c, : counts[b, h, c]], mask[b, 0, 0], kept, 1e-12)
    sparse = formulas.sparse_attention(query, key, value, mask, starts, columns, counts, 0.4)
    torch.testing.assert_close(o_cache, dense - sparse, atol=1e-12, rtol=0)
    query, key, value = query + 0.3, key.flip(2), value * 1.5
    sparse = formulas.sparse_attention(query, key, value, mask, starts, columns, counts, 0.4)
    delta = reference.attention_delta(query, key, value, mask, starts, *state, 0.4, 8)
    torch.testing.assert_close(delta, o_cache + sparse, atol=1e-12, rtol=0)


def test_mlp_is_the_formula_in_float64():
    torch.manual_seed(0)
    batch, tokens, width, hidden, out_width, kept = 2, 37, 12, 40, 9, 13
    region = "mul(gelu(h0), h1)"
    weights = list(torch.randn(2, hidden, width, dtype=torch.float64))
    biases = list(torch.randn(2, hidden, dtype=torch.float64))
    down_t = torch.randn(hidden, out_width, dtype=torch.float64)
    x = torch.randn(batch, tokens, width, dtype=torch.float64)
    starts = reference.chunk_table([20, 17], 8)
    samples = reference.sample_table(starts, 3)
    act, sampled, out_cache = reference.mlp_state(
        batch, tokens, hidden, out_width, 3, len(starts) - 1, torch.float64, "cpu"
    )
    before = formulas.activations(x, weights, biases, region)
    act.copy_(before.transpose(1, 2))
    sampled.copy_(before[:, samples.flatten().long()].view_as(sampled))
    out_cache.copy_(before @ down_t)
    x = x + torch.randn_like(x)
    after, expected = formulas.activations(x, weights, biases, region), before.clone()
    out = reference.mlp_delta(
        x,
        weights,
        biases,
        down_t,
        down_t.norm(dim=1),
        starts,
        samples,
        act,
        sampled,
        out_cache,
        region,
        8,
        kept,
    )
    for b in range(batch):
        for c, rows in enumerate(formulas.chunks_of(starts)):
            tokens_of = samples[c].long()
            score = (after[b, tokens_of] - before[b, tokens_of]).abs().sum(0) * down_t.norm(dim=1)
            best = score.topk(kept).indices
            expected[b, rows, best] = after[b, rows, best]
    torch.testing.assert_close(act.transpose(1, 2), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(sampled, expected[:, samples.flatten().long()].view_as(sampled), atol=1e-12, rtol=0)
    torch.testing.assert_close(out, expected @ down_t, atol=1e-10, rtol=0)
