"""Every spelling of attention becomes one node with the same output; what only looks like attention stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.passes.raise_attention import raise_attention
from tests.raised_attention import (
    BATCH,
    DIM,
    HEADS,
    KV_LEN,
    Q_LEN,
    SCALE,
    Call,
    keep,
    qkv,
    raised,
    randn,
    shape,
    untouched,
)
from tests.record import record

# --- the product of queries and keys ----------------------------------------------------------------------------

PRODUCTS = {
    "matmul": lambda q, k, v: torch.matmul(q, k.transpose(-1, -2)).softmax(-1) @ v,
    "mT": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "permute": lambda q, k, v: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(
        torch.bmm(q.reshape(-1, Q_LEN, DIM), k.reshape(-1, KV_LEN, DIM).transpose(1, 2)).softmax(-1),
        v.reshape(-1, KV_LEN, DIM),
    ).reshape(q.shape),
    "baddbmm without input": lambda q, k, v: torch.bmm(
        torch.baddbmm(
            torch.empty(q[..., 0, 0].numel(), Q_LEN, KV_LEN, dtype=q.dtype),
            q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=1.0,
        ).softmax(-1),
        v.flatten(0, 1),
    ),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum with ellipsis": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(dim=-1), v
    ),
    "einsum, heads last": lambda q, k, v: torch.einsum(
        "bijh,bjhd->bihd",
        torch.einsum("bihd,bjhd->bijh", q.transpose(1, 2), k.transpose(1, 2)).softmax(2),
        v.transpose(1, 2),
    ),
    "keys before queries": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
    "weights transposed": lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
    "regrouped on the way": lambda q, k, v: (q.flatten(0, 1) @ k.flatten(0, 1).mT)
    .view(-1, HEADS, Q_LEN, KV_LEN).softmax(-1).view(-1, Q_LEN, KV_LEN) @ v.flatten(0, 1),
    "five dimensions": lambda q, k, v: (q[:, None] @ k[:, None].mT).softmax(-1) @ v[:, None],
    "three dimensions": lambda q, k, v: (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0],
    "two dimensions": lambda q, k, v: (q.sin()[0, 0] @ k.sin()[0, 0].T).softmax(-1) @ v[0, 0],
    "queries broadcast keys": lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v[:1],
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_products(name, batch):
    (attention,) = raised(PRODUCTS[name], *qkv(batch=batch))
    assert attention.resolved_scale == 1.0 and attention.mask is None
    assert len(shape(attention.query)) == 4 and shape(attention.query)[2:] == (Q_LEN, DIM)
    assert shape(attention.key)[2] == KV_LEN


def test_batch_and_heads_are_recovered():
    for name in ("bmm", "baddbmm without input", "regrouped on the way"):
        (attention,) = raised(PRODUCTS[name], *qkv())
        assert shape(attention.query)[:2] == (BATCH, HEADS), name
    (attention,) = raised(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *(x.flatten(0, 1) for x in qkv()))
    assert shape(attention.query)[:2] == (BATCH * HEADS, 1)  # nothing says how it splits


# --- the scale --------------------------------------------------------------------------------------------------

SCALES = {
    "times, after": lambda q, k: q @ k.mT * SCALE,
    "divided, after": lambda q, k: q @ k.mT / math.sqrt(DIM),
    "divided by a constant tensor": lambda q, k: q @ k.mT / torch.tensor(math.sqrt(DIM), dtype=q.dtype),
    "on the query": lambda q, k: (q * SCALE) @ k.mT,
    "on the key": lambda q, k: q @ (k / math.sqrt(DIM)).mT,
    "on the transposed key": lambda q, k: q @ (k.mT * SCALE),
    "half on each side": lambda q, k: (q * SCALE**0.5) @ (k * SCALE**0.5).mT,
    "in two steps": lambda q, k: 2.0 * ((q * SCALE) @ k.mT) / 2.0,
    "in place": lambda q, k: (q @ k.mT).mul_(SCALE).add_(1.5),
    "alpha": lambda q, k: torch.baddbmm(
        torch.zeros(1, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=SCALE
    ).unflatten(0, (BATCH, HEADS)),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name):
    (attention,) = raised(lambda q, k, v: SCALES[name](q, k).softmax(-1) @ v, *qkv())
    assert attention.scale == pytest.approx(SCALE, rel=1e-12)


def test_learned_temperature_scales_the_query():
    temperature = randn(HEADS, 1, 1)
    (attention,) = raised(lambda q, k, v, t: (q @ k.mT * t.exp()).softmax(-1) @ v, *qkv(), temperature)
    assert attention.scale == 1.0


def test_factor_that_differs_between_keys_is_no_scale():
    untouched(lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v, *qkv(), randn(HEADS, 1, KV_LEN))
    untouched(lambda q, k, v: (q @ k.mT * -1.0).softmax(-1) @ v, *qkv())


# --- the mask ---------------------------------------------------------------------------------------------------


def scores(q, k):
    return q @ k.mT * SCALE


ADDED = {
    "bias": (lambda q, k, m: scores(q, k) + m, (1, HEADS, Q_LEN, KV_LEN)),
    "bias on the left": (lambda q, k, m: m + scores(q, k), (HEADS, Q_LEN, KV_LEN)),
    "bias with alpha": (lambda q, k, m: torch.add(scores(q, k), m, alpha=0.5), (BATCH, 1, Q_LEN, KV_LEN)),
    "bias subtracted": (lambda q, k, m: scores(q, k) - m, (Q_LEN, KV_LEN)),
    "bias before the scale": (lambda q, k, m: (q @ k.mT + m) * SCALE, (BATCH, HEADS, Q_LEN, KV_LEN)),
    "key bias": (lambda q, k, m: scores(q, k) + m, (BATCH, 1, 1, KV_LEN)),
    "baddbmm": (
        lambda q, k, m: torch.baddbmm(
            m.expand(BATCH, HEADS, -1, -1).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=SCALE
        ).unflatten(0, (BATCH, HEADS)),
        (BATCH, 1, 1, KV_LEN),
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_masks(name):
    spell, size = ADDED[name]
    (attention,) = raised(lambda q, k, v, m: spell(q, k, m).softmax(-1) @ v, *qkv(), randn(*size))
    assert attention.scale == pytest.approx(SCALE) and attention.mask.meta["val"].dtype == torch.float64
    expected = (1,) * (4 - len(size)) + size
    assert shape(attention.mask) == expected


FILLED = {
    "masked_fill": lambda s, m: s.masked_fill(~m, float("-inf")),
    "masked_fill in place": lambda s, m: s.masked_fill_(m.logical_not(), -math.inf),
    "masked_fill by a tensor": lambda s, m: s.masked_fill(~m, torch.tensor(-math.inf, dtype=s.dtype)),
    "where": lambda s, m: torch.where(m, s, -math.inf),
    "where, swapped": lambda s, m: torch.where(~m, -math.inf, s),
    "where with a full tensor": lambda s, m: torch.where(m, s, torch.full_like(s, -math.inf)),
}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("size", [(BATCH, 1, 1, KV_LEN), (Q_LEN, KV_LEN), (BATCH, HEADS, Q_LEN, KV_LEN)])
def test_boolean_masks(name, size):
    (attention,) = raised(lambda q, k, v, m: FILLED[name](scores(q, k), m).softmax(-1) @ v, *qkv(), keep(*size))
    assert attention.mask.meta["val"].dtype == torch.bool
    assert shape(attention.mask) == (1,) * (4 - len(size)) + size


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float64).min])
def test_very_negative_fill(low):
    """A finite fill stays finite: a row that is masked throughout is a mean, not 0."""
    mask = keep(BATCH, 1, Q_LEN, KV_LEN)
    (attention,) = raised(lambda q, k, v, m: torch.where(m, scores(q, k), low).softmax(-1) @ v, *qkv(), mask)
    assert attention.mask.meta["val"].dtype == torch.float64
    mask[:, :, 3] = False
    if low == torch.finfo(torch.float64).min:
        raised(lambda q, k, v, m: torch.where(m, scores(q, k), low).softmax(-1) @ v, *qkv(), mask)


def test_moderate_fill_is_no_mask():
    untouched(lambda q, k, v, m: torch.where(m, q @ k.mT, -50.0).softmax(-1) @ v, *qkv(), keep(Q_LEN, KV_LEN))


def test_masks_combine():
    square, row, bias = keep(BATCH, 1, Q_LEN, KV_LEN), keep(BATCH, 1, 1, KV_LEN), randn(1, HEADS, Q_LEN, KV_LEN)
    (attention,) = raised(
        lambda q, k, v, a, b: torch.where(a, scores(q, k), -math.inf).masked_fill(~b, -math.inf).softmax(-1) @ v,
        *qkv(), square, row,
    )  # fmt: skip
    assert attention.mask.meta["val"].dtype == torch.bool and shape(attention.mask) == (BATCH, 1, Q_LEN, KV_LEN)
    (attention,) = raised(
        lambda q, k, v, a, b: ((q @ k.mT).masked_fill(~a, -1e9) * SCALE + b).softmax(-1) @ v, *qkv(), square, bias
    )
    assert attention.mask.meta["val"].dtype == torch.float64


def test_mask_by_multiplication_stays():
    untouched(lambda q, k, v, m: (q @ k.mT * m).softmax(-1) @ v, *qkv(), randn(Q_LEN, KV_LEN))
    untouched(lambda q, k, v, m: ((q @ k.mT).softmax(-1) * m) @ v, *qkv(), randn(Q_LEN, KV_LEN))


# --- softmax ----------------------------------------------------------------------------------------------------


def by_hand(s):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def by_hand_with_max(s):
    e = torch.exp(s - s.max(dim=-1, keepdim=True)[0])
    return e * e.sum(dim=-1, keepdim=True).reciprocal()


SOFTMAXES = {
    "function": lambda s: F.softmax(s, dim=-1),
    "with dtype": lambda s: s.softmax(-1, dtype=torch.float64),
    "special": lambda s: torch.special.softmax(s, -1),
    "by hand": by_hand,
    "by hand with max": by_hand_with_max,
    "plain exponentials": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True),
    "exponentials twice": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "maximum off first": lambda s: (s - s.amax(-1, keepdim=True).detach()).softmax(-1),
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log_softmax": lambda s: s.log_softmax(-1).exp(),
    "dropout at eval": lambda s: F.dropout(s.softmax(-1), 0.3, training=False),
    "dropout of nothing": lambda s: F.dropout(s.softmax(-1), 0.0, training=True),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes(name):
    raised(lambda q, k, v: SOFTMAXES[name](scores(q, k)) @ v, *qkv())


def test_sum_over_the_wrong_dimension():
    """It is a softmax, but not over the keys."""
    raised(lambda q, k, v: ((e := scores(q, k).exp()) / e.sum(-2, keepdim=True)) @ v, *qkv(), count=0)


NOT_ATTENTION = {
    "weights returned": lambda q, k, v: ((w := scores(q, k).softmax(-1)) @ v, w),
    "scores returned": lambda q, k, v: ((s := scores(q, k)).softmax(-1) @ v, s),
    "softmax over queries": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "softmax over heads": lambda q, k, v: scores(q, k).softmax(1) @ v,
    "no softmax": lambda q, k, v: scores(q, k).relu() @ v,
    "sigmoid": lambda q, k, v: scores(q, k).sigmoid() @ v,
    "linear attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "denominator plus epsilon": lambda q, k, v: ((e := scores(q, k).exp()) / (e.sum(-1, keepdim=True) + 1e-6)) @ v,
    "soft cap": lambda q, k, v: (scores(q, k) / 5).tanh().softmax(-1) @ v,
    "weights changed": lambda q, k, v: scores(q, k).softmax(-1).square() @ v,
    "classifier": lambda q, k, v: (q @ k[0, 0].mT).softmax(-1) @ v[0, 0],
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_only_looks_like_attention(name):
    untouched(NOT_ATTENTION[name], *qkv())


def test_active_dropout_stays():
    untouched(lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.3, training=True) @ v, *qkv())


def test_gate_over_a_weight_matrix_stays():
    """softmax(x @ W) @ values has the same algebra, but W is a layer, not keys."""
    untouched(lambda x, w, v: (x @ w).softmax(-1) @ v, randn(Q_LEN, DIM), randn(DIM, KV_LEN), randn(KV_LEN, DIM))


# --- dtypes -----------------------------------------------------------------------------------------------------

WIDENED = {
    "scores": lambda q, k, v: scores(q, k).float().softmax(-1).to(q.dtype) @ v,
    "softmax": lambda q, k, v: F.softmax(scores(q, k), -1, dtype=torch.float32).type_as(q) @ v,
    "query and key": lambda q, k, v: (q.float() * SCALE @ k.float().mT).softmax(-1).to(v.dtype) @ v,
    "all": lambda q, k, v: (scores(q.float(), k.float()).softmax(-1) @ v.float()).to(q.dtype),
}


@pytest.mark.parametrize("name", WIDENED)
def test_widened_softmax(name):
    (attention,) = raised(WIDENED[name], *qkv(torch.bfloat16), tolerance=4e-2)
    assert {n.meta["val"].dtype for n in (attention.query, attention.key, attention.value)} == {torch.bfloat16}


def test_wide_result_stays_wide():
    (attention,) = raised(
        lambda q, k, v: scores(q.float(), k.float()).softmax(-1) @ v.float(), *qkv(torch.bfloat16), tolerance=1e-5
    )
    assert attention.query.meta["val"].dtype == torch.float32


def test_wide_queries_are_not_narrowed():
    q, k, v = qkv(torch.float32)
    untouched(lambda q, k, v: scores(q, k).softmax(-1).to(v.dtype) @ v, q, k, v.bfloat16())


def test_wide_mask_of_narrow_queries():
    mask = torch.where(keep(BATCH, 1, 1, KV_LEN), 0.0, torch.finfo(torch.float32).min)
    (attention,) = raised(
        lambda q, k, v, m: (scores(q, k).float() + m).softmax(-1).to(v.dtype) @ v,
        *qkv(torch.bfloat16),
        mask,
        tolerance=4e-2,
    )
    assert attention.mask.meta["val"].dtype == torch.bfloat16


def test_autocast_inside_the_graph_stays():
    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return scores(q, k).softmax(-1) @ v

    untouched(attend, *qkv(torch.float32))


# --- torch's own modules ----------------------------------------------------------------------------------------


def test_multihead_attention():
    layer, x = nn.MultiheadAttention(32, HEADS, batch_first=True).eval().double(), randn(2, Q_LEN, 32)
    (attention,) = raised(lambda x: layer(x, x, x)[0], x)
    assert shape(attention.query) == (2, HEADS, Q_LEN, 8)
    padding = ~keep(2, Q_LEN)
    (attention,) = raised(lambda x, m: layer(x, x, x, key_padding_mask=m)[0], x, padding)
    assert shape(attention.mask) == (2, 1, 1, Q_LEN)
    untouched(lambda x: layer(x, x, x), x)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_encoder_layer(norm_first, activation):
    layer = nn.TransformerEncoderLayer(32, HEADS, 64, batch_first=True, norm_first=norm_first, activation=activation)
    layer, x = layer.eval().double(), randn(2, Q_LEN, 32)
    (attention,) = raised(layer, x)
    assert shape(attention.query) == (2, HEADS, Q_LEN, 8) and attention.mask is None
    (attention,) = raised(lambda x, m: layer(x, src_key_padding_mask=m), x, ~keep(2, Q_LEN))
    assert shape(attention.mask) == (2, 1, 1, Q_LEN)
    (attention,) = raised(lambda x, m: layer(x, src_mask=m), x, ~keep(Q_LEN, Q_LEN))
    assert shape(attention.mask)[2:] == (Q_LEN, Q_LEN)


def test_raising_twice_changes_nothing_more():
    q, k, v = qkv()
    args = (q, k[:, :2].contiguous(), v[:, :2].contiguous(), keep(BATCH, KV_LEN))

    def attend(q, k, v, m):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return scores(q, k).masked_fill(~m[:, None, None, :], -math.inf).softmax(-1) @ v

    _, (once,) = record(Call(attend), *args, passes=(raise_attention,))
    _, (twice,) = record(Call(attend), *args, passes=(raise_attention, raise_attention))
    assert once.after == twice.after and once.after["scaled_dot_product_attention"] == 1
