"""Self-attention is told from cross-attention by where the tokens come from; every refusal says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.raise_attention import raise_attention
from chipmunk_compile.passes.reasons import Reason
from tests.capture import capture

BATCH, TOKENS, TEXT, HEADS, DIM = 3, 33, 7, 2, 16
WIDTH = HEADS * DIM


class Attend(nn.Module):
    """`body(self, *inputs)` with projections q, k, v, o and q2, k2, v2 of a second stream."""

    def __init__(self, body, width=WIDTH):
        super().__init__()
        self.body = body
        for name in ("q", "k", "v", "o", "q2", "k2", "v2"):
            setattr(self, name, nn.Linear(width, width))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def find(body, *inputs, min_tokens=16, width=WIDTH, dtype=None, train=False):
    model = Attend(body, width)
    model = (model if dtype is None else model.to(dtype)).train(train).requires_grad_(False)
    (gm,) = capture(model, *inputs)
    return find_attention(raise_attention(gm), min_tokens=min_tokens)


def site(body, *inputs, **kwargs):
    sites, declined = find(body, *inputs, **kwargs)
    assert len(sites) == 1 and not declined, declined
    return sites[0]


def refused(body, *inputs, **kwargs):
    sites, declined = find(body, *inputs, **kwargs)
    assert not sites and len(declined) == 1
    assert declined[0].kind == "attention" and declined[0].detail
    return declined[0].reason


def x(tokens=TOKENS, batch=BATCH, width=WIDTH):
    return torch.randn(batch, tokens, width)


def attend(m, q, k, v, **kwargs):
    return F.scaled_dot_product_attention(m.heads(q), m.heads(k), m.heads(v), **kwargs).transpose(1, 2).flatten(2)


def plain(m, x, **kwargs):
    return m.o(attend(m, m.q(x), m.k(x), m.v(x), **kwargs))


# --- what a site is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, BATCH])
def test_fields(batch):
    found = site(plain, x(batch=batch))
    assert (found.batch, found.heads, found.kv_heads) == (batch, HEADS, HEADS)
    assert (found.q_len, found.kv_len, found.head_dim) == (TOKENS, TOKENS, DIM)
    assert found.kind == "attention" and found.name == "" and found.key_mask is None and found.scale == DIM**-0.5
    assert found.node.args[:3] == (found.query, found.key, found.value)
    assert site(lambda m, x: plain(m, x, scale=0.3), x()).scale == 0.3
    assert site(lambda m, x: m.o((m.q(x) @ m.k(x).mT * 0.2).softmax(-1) @ m.v(x)), x()).scale == pytest.approx(0.2)


def test_grouped_heads():
    def body(m, x):
        k, v = (m.heads(y)[:, :1].repeat_interleave(HEADS, 1) for y in (m.k(x), m.v(x)))
        return F.scaled_dot_product_attention(m.heads(m.q(x)), k, v)

    assert site(body, x()).kv_heads == 1


# --- self-attention ---------------------------------------------------------------------------------------------


def rope(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def rope_in_place(x, cos, sin):
    out, (a, b) = torch.empty_like(x), x.unflatten(-1, (-1, 2)).unbind(-1)
    out[..., 0::2] = a * cos[..., 0::2] - b * sin[..., 1::2]
    out[..., 1::2] = a * sin[..., 1::2] + b * cos[..., 0::2]
    return out


def rope_complex(x, cos, sin):
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(cos[..., ::2].exp(), sin[..., ::2])
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("turn", [rope, rope_in_place, rope_complex])
@pytest.mark.parametrize("shared", [True, False])
def test_position_tables_are_no_sequence(turn, shared):
    """Also when queries and keys have tables of their own."""

    def body(m, x, cos, sin, other):
        q, k = turn(m.q(x), cos, sin), turn(m.k(x), cos, sin if shared else other)
        return attend(m, q, k, m.v(x))

    tables = (torch.randn(TOKENS, WIDTH) for _ in range(3))
    assert site(body, x(), *tables).q_len == TOKENS


@pytest.mark.parametrize("turned", [DIM, DIM // 2])
def test_partial_rope_and_learned_norms_per_head(turned):
    """What passes through may be empty; halves of a head that learned scales tell apart are channels, not tokens."""

    def body(m, x, cos, sin, scale_q, scale_k):
        def turn(x, scale):
            x = x.unflatten(-1, (HEADS, DIM)) * scale
            rest, x = x[..., turned:], x[..., :turned]
            a, b = x.unflatten(-1, (2, -1)).unbind(-2)
            turned_x = x * cos[:, None, :turned] + torch.cat([-b, a], -1) * sin[:, None, :turned]
            return torch.cat([turned_x, rest], -1).flatten(2)

        return attend(m, turn(m.q(x), scale_q), turn(m.k(x), scale_k), m.v(x))

    inputs = (*(torch.randn(TOKENS, DIM) for _ in range(2)), *(torch.randn(DIM) for _ in range(2)))
    assert site(body, x(), *inputs).q_len == TOKENS


def test_a_part_of_a_sequence_taken_apart_by_a_view_is_no_channel():
    """Even and odd tokens of one half of the sequence: queries and keys are not the same tokens."""

    def body(m, x):
        even, odd = x[:, :32].unflatten(1, (16, 2)).unbind(2)
        return attend(m, m.q(even), m.k(odd), m.v(odd))

    assert refused(body, x()) in (Reason.CROSS_ATTENTION, Reason.UNPROVEN_SELF_ATTENTION)


def test_positions_from_arange():
    def body(m, x):
        def table():
            return torch.outer(torch.arange(TOKENS, dtype=x.dtype), 0.1 ** torch.arange(WIDTH)).cos()

        return attend(m, m.q(x) * table(), m.k(x) * table(), m.v(x))

    site(body, x())


def test_norms_and_modulations_of_one_stream():
    def body(m, x, time):
        scale, shift = m.o(time).unsqueeze(1).chunk(2, dim=-1)
        scale, shift = scale.repeat(1, 1, 2), shift.repeat(1, 1, 2)
        normed = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        x = x + plain(m, normed)
        q, k = F.rms_norm(m.q2(F.layer_norm(x, (WIDTH,))), (WIDTH,)), F.rms_norm(m.k2(x * 2), (WIDTH,))
        return attend(m, q, k, m.v2(x.relu()))

    sites, declined = find(body, x(), torch.randn(BATCH, WIDTH))
    assert len(sites) == 2 and not declined


def test_keys_may_have_more_tokens():
    """Joint attention, queries of one stream only, queries from a part of the sequence."""

    def joint(m, x, text):
        q, k, v = (torch.cat([a(text), b(x)], 1) for a, b in ((m.q2, m.q), (m.k2, m.k), (m.v2, m.v)))
        return attend(m, q, k, v).split([TEXT, TOKENS], 1)

    def image_queries(m, x, text):
        k, v = (torch.cat([b(x), a(text)], 1) for a, b in ((m.k2, m.k), (m.v2, m.v)))
        return attend(m, m.q(x), k, v)

    def last_tokens(m, x, text):
        both = torch.cat([text, x], 1)
        return attend(m, m.q(both[:, TEXT:]), m.k(both), m.v(both))

    found = site(joint, x(), x(TEXT))
    assert found.q_len == found.kv_len == TOKENS + TEXT
    for body in (image_queries, last_tokens):
        found = site(body, x(), x(TEXT))
        assert (found.q_len, found.kv_len) == (TOKENS, TOKENS + TEXT)


def test_patches_from_one_convolution():
    def body(m, image):
        tokens = F.conv2d(image, torch.ones(WIDTH, 4, 2, 2), stride=2)
        q, k, v = (layer(tokens.movedim(1, -1)).flatten(1, 2) for layer in (m.q, m.k, m.v))
        return attend(m, q, k, v)

    assert site(body, torch.randn(1, 4, 10, 14)).q_len == 35


def test_windows_and_frames():
    """A batch that takes in space or time: attention over the axis that is left is self-attention too."""

    def windows(m, x):  # [batch, 8, 12, width] in windows of 4 x 4, partitioned after the projection
        def split(y):
            y = y.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3)  # [batch, 2, 3, 4, 4, width]
            return y.flatten(0, 2).flatten(1, 2)

        return attend(m, *(split(layer(x.unflatten(1, (8, 12)))) for layer in (m.q, m.k, m.v)))

    found = site(windows, x(96))
    assert (found.batch, found.q_len) == (BATCH * 6, 16)

    def over_time(m, x):  # [batch, 20 frames, 6 places, width]
        y = x.unflatten(1, (20, 6)).transpose(1, 2).flatten(0, 1)
        return plain(m, y)

    found = site(over_time, x(120))
    assert (found.batch, found.q_len) == (BATCH * 6, 20)


def test_flat_batch_and_back():
    """[batch, text | image] -> one axis -> back: the segments are still the same tokens."""

    def body(m, x, text):
        both = torch.cat([text, x], 1)
        q = m.q(both.flatten(0, 1)).unflatten(0, (BATCH, TEXT + TOKENS))
        return attend(m, q, m.k(both), m.v(both))

    site(body, x(), x(TEXT))


# --- cross-attention --------------------------------------------------------------------------------------------


def test_cross_attention():
    def body(m, x, text):
        return attend(m, m.q(x), m.k(text), m.v(text))

    assert refused(body, x(), x(TEXT)) is Reason.CROSS_ATTENTION
    assert refused(body, x(), x(TOKENS)) is Reason.CROSS_ATTENTION  # as long as the queries' sequence
    assert refused(body, x(), x(2 * TOKENS)) is Reason.CROSS_ATTENTION


def test_cross_attention_with_a_shared_position_table():
    def body(m, x, other, table):
        return attend(m, m.q(x) * table, m.k(other) * table, m.v(other))

    assert refused(body, x(), x(), torch.randn(TOKENS, WIDTH)) is Reason.CROSS_ATTENTION


def test_keys_of_another_part_of_the_sequence():
    def body(m, x):
        return attend(m, m.q(x[:, :TOKENS]), m.k(x[:, TOKENS:]), m.v(x[:, TOKENS:]))

    assert refused(body, x(2 * TOKENS)) is Reason.UNPROVEN_SELF_ATTENTION


def test_overlapping_parts_are_counted():
    def body(m, x):
        return attend(m, m.q(x[:, :30]), m.k(x[:, 10:]), m.v(x[:, 10:]))

    sites, (declined,) = find(body, x(40))
    assert not sites and declined.reason is Reason.UNPROVEN_SELF_ATTENTION
    assert declined.detail == {"q_len": 30, "kv_len": 30, "shared_tokens": 20}


def test_keys_in_another_order_still_hold_the_queries_only_if_proven():
    assert refused(lambda m, x: attend(m, m.q(x), m.k(x.roll(1, 1)), m.v(x)), x()) is Reason.UNPROVEN_SELF_ATTENTION
    site(lambda m, x: plain(m, x.roll(3, 1)), x())
    site(lambda m, x: attend(m, *(f(x).roll(3, 1) for f in (m.q, m.k, m.v))), x())


def test_stream_that_took_in_the_other():
    """hidden + encoder is more than encoder, though both have its tokens."""

    def body(m, x, other):
        x = m.o(x) + m.o(other)
        return attend(m, m.q(x), m.k(m.o(other)), m.v(other))

    assert refused(body, x(), x()) is Reason.UNPROVEN_SELF_ATTENTION


def test_keys_of_another_frame():
    """The token axes agree, the batch axes (frames) do not."""

    def body(m, x):  # [frames, tokens, width]: every frame looks at the first
        first = x[:1].expand(BATCH, -1, -1)
        return attend(m, m.q(x), m.k(first), m.v(first))

    assert refused(body, x()) is Reason.UNPROVEN_SELF_ATTENTION

    def neighbours(take):
        return lambda m, x: attend(m, m.q(take(x, 1)), m.k(take(x, 0)), m.v(take(x, 0)))

    for take in (
        lambda x, i: x[:, i],
        lambda x, i: x[:, i : i + 1].flatten(1, 2),
        lambda x, i: x.unbind(1)[i],
    ):
        frames = torch.randn(BATCH, 5, TOKENS, WIDTH)
        assert refused(neighbours(take), frames) is Reason.UNPROVEN_SELF_ATTENTION
        site(lambda m, x: plain(m, take(x, 1)), frames)  # noqa: B023
        site(lambda m, x: attend(m, take(m.q(x), 1), take(m.k(x), 1), take(m.v(x), 1)), frames)  # noqa: B023
    assert refused(neighbours(lambda x, i: x[i : i + 1]), x()) is Reason.UNPROVEN_SELF_ATTENTION


def test_packed_projections():
    """Queries and keys are different channels of one linear, not different tokens."""

    def selected(m, x):
        q, k, v = F.linear(x, m.o.weight.repeat(3, 1)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    def chunked(m, x):
        q, k, v = F.linear(x, m.o.weight.repeat(3, 1)).chunk(3, -1)
        return attend(m, q, k, v)

    for body in (selected, chunked):
        assert site(body, x()).q_len == TOKENS


def test_opaque_operation_on_one_side():
    def body(m, x):
        return attend(m, m.q(x), m.k(x).sort(dim=1)[0], m.v(x))

    assert refused(body, x()) is Reason.UNPROVEN_SELF_ATTENTION
    site(lambda m, x: plain(m, x.sort(dim=1)[0]), x())


# --- masks ------------------------------------------------------------------------------------------------------


def keep(*shape):
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("batch", [1, BATCH])
def test_key_masks(batch):
    def masked(m, x, mask):
        return plain(m, x, attn_mask=mask)

    for mask in (keep(batch, 1, 1, TOKENS), torch.randn(batch, 1, 1, TOKENS), keep(1, 1, 1, TOKENS), keep(1, TOKENS)):
        found = site(masked, x(batch=batch), mask)
        assert found.key_mask.meta["val"].shape[1:] == (1, 1, TOKENS) and found.key_mask.meta["val"].dtype == mask.dtype
    rows = lambda m, x, mask: plain(m, x, attn_mask=mask[:, None, None].expand(-1, HEADS, TOKENS, -1))
    assert site(rows, x(batch=batch), keep(batch, TOKENS)).key_mask.meta["val"].shape == (batch, 1, 1, TOKENS)
    ones = lambda m, x: plain(m, x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool))
    assert site(ones, x(batch=batch)).key_mask is None


@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (BATCH, 1, TOKENS, TOKENS), (BATCH, HEADS, 1, TOKENS)])
@pytest.mark.parametrize("make", [keep, torch.randn])
def test_masks_that_differ_between_queries_or_heads(shape, make):
    assert refused(lambda m, x, mask: plain(m, x, attn_mask=mask), x(), make(*shape)) is Reason.UNSUPPORTED_MASK


def test_causal():
    assert refused(lambda m, x: plain(m, x, is_causal=True), x()) is Reason.CAUSAL
    tril = lambda m, x: plain(m, x, attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
    assert refused(tril, x()) is Reason.UNSUPPORTED_MASK


# --- other reasons ----------------------------------------------------------------------------------------------


def test_min_tokens():
    assert refused(plain, x(), min_tokens=TOKENS + 1) is Reason.TOO_FEW_TOKENS
    site(plain, x(), min_tokens=TOKENS)
    _, (declined,) = find(plain, x(), min_tokens=1000)
    assert declined.detail == {"q_len": TOKENS, "kv_len": TOKENS, "min_tokens": 1000}


def test_dropout():
    assert refused(lambda m, x: plain(m, x, dropout_p=0.1), x(), train=True) is Reason.DROPOUT
    spelled = lambda m, x: F.dropout((m.q(x) @ m.k(x).mT).softmax(-1), 0.1, m.training) @ m.v(x)
    assert refused(spelled, x(), train=True) is Reason.DROPOUT
    site(spelled, x())


def test_dtypes():
    for dtype in (torch.bfloat16, torch.float16):
        site(plain, x().to(dtype), dtype=dtype)
    assert refused(plain, x().double(), dtype=torch.float64) is Reason.UNSUPPORTED_DTYPE

    def under_autocast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(m, x)

    assert refused(under_autocast, x()) is Reason.MIXED_DTYPE


@pytest.mark.parametrize("width", [2 * 4, 2 * 288])
def test_head_dim(width):
    assert refused(plain, x(width=width), width=width) is Reason.UNSUPPORTED_SHAPE


def test_values_of_another_width():
    def body(m, x):
        return F.scaled_dot_product_attention(m.heads(m.q(x)), m.heads(m.k(x)), m.heads(m.v(x))[..., :8])

    assert refused(body, x()) is Reason.UNSUPPORTED_SHAPE


def test_attention_that_is_not_raised_is_reported():
    def weights_returned(m, x):
        weights = (m.q(x) @ m.k(x).mT).softmax(-1)
        return weights @ m.v(x), weights

    def linear(m, x):
        return m.q(x).relu() @ (m.k(x).relu().mT @ m.v(x))

    assert refused(weights_returned, x()) is Reason.ATTENTION_FORM
    assert refused(linear, x()) is Reason.NOT_SOFTMAX_ATTENTION
    assert find(lambda m, x: m.o(m.q(x).softmax(-1)), x()) == ([], [])
