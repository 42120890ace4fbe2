"""Attention that is one node already: four dimensions, no repeated heads, the smallest mask that says the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.raised_attention import BATCH, DIM, HEADS, KV_LEN, Q_LEN, keep, qkv, raised, randn, shape


def sdpa(q, k, v, mask=None, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, mask, **kwargs)


def repeat_interleave(x):
    return x.repeat_interleave(2, dim=1)


def expand(x):
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, HEADS, KV_LEN, DIM)


def repeat_before_transpose(x):
    return x.transpose(1, 2).unsqueeze(3).repeat(1, 1, 1, 2, 1).flatten(2, 3).transpose(1, 2)


@pytest.mark.parametrize("spell", [repeat_interleave, expand, repeat_before_transpose])
def test_grouped_heads(spell):
    q, k, v = qkv()
    k, v = k[:, :2].contiguous(), v[:, :2].contiguous()
    (attention,) = raised(lambda q, k, v: sdpa(q, spell(k) * 2.0, spell(v)), q, k, v)
    assert attention.enable_gqa and shape(attention.key)[1] == shape(attention.value)[1] == 2
    (attention,) = raised(lambda q, k, v: (q @ spell(k).mT).softmax(-1) @ spell(v), q, k, v)
    assert attention.enable_gqa and shape(attention.key)[1] == 2


def test_one_head_for_all():
    q, k, v = qkv()
    (attention,) = raised(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k[:, :1].contiguous(), v[:, :1].contiguous())
    assert attention.enable_gqa and shape(attention.key)[1] == 1


def test_heads_in_another_order_are_not_grouped():
    q, k, v = qkv()
    k, v = k[:, :2].contiguous(), v[:, :2].contiguous()
    (attention,) = raised(lambda q, k, v: sdpa(q, torch.cat([k, k], 1), v.repeat(1, 2, 1, 1)), q, k, v)
    assert not attention.enable_gqa and shape(attention.key)[1] == HEADS
    # Repeated keys with a factor of their own for each head are not repeated keys.
    (attention,) = raised(
        lambda q, k, v, w: sdpa(q, repeat_interleave(k) * w, repeat_interleave(v)), q, k, v, randn(HEADS, 1, 1)
    )
    assert not attention.enable_gqa
    (attention,) = raised(lambda q, k, v: sdpa(q, repeat_interleave(k), v), q, k, qkv()[2])
    assert not attention.enable_gqa


ROWS = {
    "expand": lambda m: m[:, None, None, :].expand(-1, HEADS, Q_LEN, -1),
    "repeat": lambda m: m.view(BATCH, 1, 1, KV_LEN).repeat(1, 1, Q_LEN, 1),
    "repeated for bmm": lambda m: m[:, None].repeat_interleave(HEADS, dim=0).view(BATCH, HEADS, 1, KV_LEN),
    "outer with ones": lambda m: m[:, None, None, :] & torch.ones(BATCH, 1, Q_LEN, 1, dtype=torch.bool),
    "added": lambda m: ((~m).double() * -1e9)[:, None, None, :] + torch.zeros(Q_LEN, KV_LEN, dtype=torch.float64),
}


@pytest.mark.parametrize("name", ROWS)
def test_mask_that_is_one_row(name):
    (attention,) = raised(lambda q, k, v, m: sdpa(q, k, v, ROWS[name](m)), *qkv(), keep(BATCH, KV_LEN))
    assert shape(attention.mask) == (BATCH, 1, 1, KV_LEN)


def test_mask_that_is_no_row_keeps_its_size():
    for size in ((BATCH, 1, Q_LEN, KV_LEN), (BATCH, HEADS, 1, KV_LEN), (Q_LEN, KV_LEN)):
        (attention,) = raised(sdpa, *qkv(), keep(*size))
        assert shape(attention.mask) == (1,) * (4 - len(size)) + size


MASKS_OF_NOTHING = {
    "ones": lambda: torch.ones(Q_LEN, KV_LEN, dtype=torch.bool),
    "ones, expanded": lambda: torch.ones(BATCH, KV_LEN)[:, None, None, :].bool().expand(-1, -1, Q_LEN, -1),
    "zeros": lambda: torch.zeros(BATCH, 1, 1, KV_LEN, dtype=torch.float64),
    "one minus ones": lambda: (1 - torch.ones(Q_LEN, KV_LEN, dtype=torch.float64)) * -1e4,
}


@pytest.mark.parametrize("name", MASKS_OF_NOTHING)
def test_mask_of_nothing_goes(name):
    (attention,) = raised(lambda q, k, v: sdpa(q, k, v, MASKS_OF_NOTHING[name]()), *qkv())
    assert attention.mask is None


def test_mask_of_something_stays():
    (attention,) = raised(lambda q, k, v: sdpa(q, k, v, torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()), *qkv())
    assert shape(attention.mask) == (1, 1, Q_LEN, KV_LEN)
    (attention,) = raised(lambda q, k, v: sdpa(q, k, v, torch.full((1, KV_LEN), 2.0, dtype=q.dtype)), *qkv())
    assert attention.mask is not None


def test_padding_on_both_sides():
    """Key mask and query mask multiplied: the key mask stays, idle queries give 0 as they did."""
    mask = keep(BATCH, Q_LEN)
    q, _, _ = qkv()
    (attention,) = raised(lambda q, m: sdpa(q, q, q, m[:, None, None, :] * m[:, None, :, None]), q, mask)
    assert shape(attention.mask) == (BATCH, 1, 1, Q_LEN)
    (attention,) = raised(lambda q, m: sdpa(q, q, q, m[:, None, None, :] | m[:, None, :, None]), q, mask)
    assert shape(attention.mask) == (BATCH, 1, Q_LEN, Q_LEN)


@pytest.mark.parametrize("select", [lambda x: x[0, 0], lambda x: x[:, 0], lambda x: x[:, None]])
def test_other_ranks_become_four(select):
    (attention,) = raised(sdpa, *map(select, qkv()), select(keep(BATCH, 1, Q_LEN, KV_LEN)))
    assert len(shape(attention.query)) == len(shape(attention.mask)) == 4


def test_heads_folded_into_the_batch_are_recovered():
    projection = torch.nn.Linear(DIM, HEADS * DIM, dtype=torch.float64).requires_grad_(False)

    def body(x):
        q = projection(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2).flatten(0, 1)
        return sdpa(q, q, q)

    (attention,) = raised(body, randn(BATCH, Q_LEN, DIM))
    assert shape(attention.query) == (BATCH, HEADS, Q_LEN, DIM)


def test_arguments_are_kept():
    q, _, _ = qkv()
    (attention,) = raised(lambda q: sdpa(q, q, q, is_causal=True, scale=0.3), q)
    assert attention.is_causal and attention.scale == 0.3
    q, k, v = qkv()
    k, v = k[:, :2].contiguous(), v[:, :2].contiguous()
    (attention,) = raised(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, v)
    assert attention.enable_gqa and shape(attention.key)[1] == 2
