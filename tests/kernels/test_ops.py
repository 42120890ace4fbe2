"""The operators as torch sees them: opcheck, fakes, compilation without copies, counted work, errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

from chipmunk_compile.kernels import ops, reference  # noqa: F401  (defines torch.ops.chipmunk)

refresh = torch.ops.chipmunk.attention_refresh.default
delta = torch.ops.chipmunk.attention_delta.default
mlp_delta = torch.ops.chipmunk.mlp_delta.default

SCALE, CHUNK, SAMPLES = 0.25, 32, 4


def attention_args(op, batch=2, heads=4, kv_heads=2, tokens=70, total=90, dim=16, kept=20, masked=True, dtype=None):
    """Arguments of an attention op, after a refresh."""
    dtype = dtype or torch.float32
    query = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, total, kv_heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    mask = torch.rand(batch, 1, 1, total) > 0.2 if masked else None
    starts = reference.chunk_table([tokens], CHUNK)
    samples = reference.sample_table(starts, SAMPLES)
    state = reference.attention_state(batch, heads, tokens, total, dim, kept, len(starts) - 1, dtype, "cpu")
    args = (query, key, value, mask, starts, samples, *state, SCALE, CHUNK)
    refresh(*args)
    return args if op is refresh else (*args[:5], *args[6:])


def mlp_args(batch=2, tokens=70, width=16, hidden=50, out_width=12, kept=20, region="mul(silu(h0), h1)", dtype=None):
    """Arguments of mlp_delta, with caches of some earlier input."""
    dtype = dtype or torch.float32
    weights = [torch.randn(hidden, width).to(dtype) for _ in range(2 if "h1" in region else 1)]
    biases = [torch.randn(hidden).to(dtype) for _ in weights]
    down_t = torch.randn(hidden, out_width).to(dtype)
    starts = reference.chunk_table([tokens], CHUNK)
    samples = reference.sample_table(starts, SAMPLES)
    caches = reference.mlp_state(batch, tokens, hidden, out_width, SAMPLES, len(starts) - 1, dtype, "cpu")
    for cache in caches:
        cache.normal_()
    x = torch.randn(batch, tokens, width).to(dtype)
    down_norm = down_t.float().norm(dim=1)
    return (x, weights, biases, down_t, down_norm, starts, samples, *caches, region, CHUNK, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", [refresh, delta], ids=["refresh", "delta"])
def test_opcheck_attention(op, masked, dtype):
    torch.library.opcheck(op, attention_args(op, masked=masked, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_mlp(dtype):
    torch.library.opcheck(mlp_delta, mlp_args(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_laid_out_as_their_fakes_and_share_no_memory(dtype):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        pass
    for op, args in (
        (refresh, attention_args(refresh, dtype=dtype)),
        (delta, attention_args(delta, dtype=dtype)),
        (mlp_delta, mlp_args(dtype=dtype)),
    ):
        out = op(*args)
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}
        with fake:
            faked = op(*torch.utils._pytree.tree_map_only(torch.Tensor, fake.from_tensor, args))
        assert (faked.shape, faked.stride(), faked.dtype) == (out.shape, out.stride(), out.dtype)
    assert delta(*attention_args(delta)).transpose(1, 2).flatten(2).is_contiguous()  # heads merge for free


def test_sparsity_zero_equals_dense():
    query, key, value, _, *rest = attention_args(delta, masked=False, kv_heads=4, kept=90)
    query, key, value = (torch.randn_like(t) for t in (query, key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    torch.testing.assert_close(delta(query, key, value, None, *rest), dense, atol=1e-5, rtol=1e-5)
    args = mlp_args(kept=50)
    x, (gate, up), (gate_bias, up_bias), down_t, _, starts, samples, act, sampled, out = args[:10]
    hidden = torch.nn.functional.silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    out.copy_(act.transpose(1, 2) @ down_t)  # the caches belong to some other input
    torch.testing.assert_close(mlp_delta(*args), hidden @ down_t, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "activation, region",
    [
        ("gelu", "gelu(h0)"),
        ("gelu-approximate", "gelu_tanh(h0)"),
        ("linear-silu", "silu(h0)"),
        ("geglu", "mul(h0, gelu(h1))"),
        ("swiglu", "mul(h0, silu(h1))"),
    ],
)
def test_mlp_equals_a_feed_forward_of_diffusers(activation, region):
    attention = pytest.importorskip("diffusers.models.attention")
    model = attention.FeedForward(24, mult=3, activation_fn=activation).requires_grad_(False)
    up, down = model.net[0].proj, model.net[2]
    parts = 2 if "h1" in region else 1
    down_t = down.weight.t().contiguous()
    starts = reference.chunk_table([50, 41], CHUNK)
    samples = reference.sample_table(starts, SAMPLES)
    caches = reference.mlp_state(2, 91, len(down_t), 24, SAMPLES, len(starts) - 1, torch.float32, "cpu")
    first, x = torch.randn(2, 2, 91, 24)
    act, sampled, out = caches
    hidden = model.net[1](model.net[0](first))
    act.copy_(hidden.transpose(1, 2))
    sampled.copy_(hidden[:, samples.flatten().long()].view_as(sampled))
    out.copy_(model(first))
    weights, biases = up.weight.chunk(parts), up.bias.chunk(parts)  # row slices of a fused weight
    args = (list(weights), list(biases), down_t, down_t.norm(dim=1), starts, samples, *caches, region, CHUNK)
    torch.testing.assert_close(mlp_delta(first, *args, 7), model(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mlp_delta(x, *args, len(down_t)), model(x), atol=1e-5, rtol=1e-5)


# --- compilation ---


def _compiled(function, *args) -> tuple[torch.Tensor, str]:
    torch._dynamo.reset()
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return out, code


def _op_arguments(code: str, name: str) -> list[str]:
    (call,) = re.findall(rf"torch\.ops\.chipmunk\.{name}\.default\((.*)\)", code)
    return re.findall(r"\barg\d+_1\b|\bbuf\d+\b|\breinterpret_tensor", call)


def test_compiled_programs_hand_state_over_as_it_is():
    """No clone, no copy: each state tensor of the program is an argument of the op, in place."""

    def refresh_program(query, key, value, *rest):
        return refresh(query * 2, key, value, *rest, SCALE, CHUNK).transpose(1, 2).flatten(2) + 1

    def delta_program(query, key, value, *rest):
        return delta(query * 2, key, value, *rest, SCALE, CHUNK).transpose(1, 2).flatten(2) + 1

    for op, program, states in ((refresh, refresh_program, 3), (delta, delta_program, 3)):
        args = attention_args(op)[:-2]
        out, code = _compiled(program, *args)
        handed = _op_arguments(code, op.name().split("::")[1])
        assert [name[:3] for name in handed] == ["buf"] + ["arg"] * (len(args) - 1)  # only query * 2 is computed
        changed = [t.clone() for t in args[-states:]]
        eager = program(*args)
        torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
        for compiled, again in zip(changed, args[-states:]):
            torch.testing.assert_close(compiled, again, atol=1e-5, rtol=1e-5)
        assert "aten.clone" not in code and "copy_(" not in code


def test_compiled_mlp_updates_its_caches_in_place():
    x, weights, biases, down_t, down_norm, starts, samples, *caches, region, chunk, kept = mlp_args()

    def program(x, gate, up, gate_bias, up_bias, *rest):
        return mlp_delta(x * 2, [gate, up], [gate_bias, up_bias], *rest, region, chunk, kept) * 3

    tail = (down_t, down_norm, starts, samples)
    expected_caches = [c.clone() for c in caches]
    expected = program(x, *weights, *biases, *tail, *expected_caches)
    addresses = [c.data_ptr() for c in caches]
    out, code = _compiled(program, x, *weights, *biases, *tail, *caches)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)
    for cache, wanted, address in zip(caches, expected_caches, addresses):
        torch.testing.assert_close(cache, wanted, atol=1e-3, rtol=1e-4)
        assert cache.data_ptr() == address
    assert sum(name.startswith("arg") for name in _op_arguments(code, "mlp_delta")) == 4 + len(tail) + len(caches)
    assert "aten.clone" not in code and "copy_(" not in code


# --- work ---


def _flops(op, args) -> int:
    with FlopCounterMode(display=False) as counter:
        op(*args)
    return counter.get_total_flops()


def test_counted_work_is_the_work_of_the_shapes():
    batch, heads, tokens, total, dim, kept, chunks = 2, 4, 70, 90, 16, 20, 3
    dense = 4 * batch * heads * tokens * total * dim
    assert _flops(delta, attention_args(delta)) == dense * kept // total
    choice = 2 * batch * heads * chunks * SAMPLES * total * dim
    assert _flops(refresh, attention_args(refresh)) == dense + dense * kept // total + choice
    up, down = 2 * 2 * batch * tokens * 16, 2 * batch * tokens * 12
    scores = 2 * 2 * batch * chunks * SAMPLES * 16 * 50
    assert _flops(mlp_delta, mlp_args()) == kept * (up + down) + scores
    assert _flops(mlp_delta, mlp_args(kept=50)) == 50 * (up + down)


# --- errors ---


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (1, lambda t: t[:, :, :, :8], "H a multiple of Hkv"),
        (1, lambda t: t.repeat(1, 3, 1, 1)[:, :3], "H a multiple of Hkv"),
        (2, lambda t: t.double(), "one dtype"),
        (3, lambda t: t[..., :5], "key_mask must be"),
        (4, lambda t: t.long(), "contiguous int32"),
        (6, lambda t: t[:, :, :50], "o_cache must be"),
        (6, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "o_cache must be"),
        (7, lambda t: t[:, :, :2], "columns must be"),
        (8, lambda t: t[:, :1], "counts"),
    ],
)
def test_attention_refuses_what_does_not_fit(position, wrong, message):
    args = list(attention_args(refresh))
    args[position] = wrong(args[position])
    with pytest.raises(ValueError, match=message):
        refresh(*args)


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (1, lambda w: [w[0], w[1][:, :8]], "up_weights must be"),
        (1, lambda w: [], "up_weights must be"),
        (2, lambda b: b[:1], "up_biases must be"),
        (3, lambda t: t.bfloat16(), "dtype of x"),
        (4, lambda t: t.bfloat16(), "down_norm and out_cache"),
        (7, lambda t: t[:, :, :50], "act_cache must be"),
        (8, lambda t: t[:, :2], "sample_cache must be"),
        (9, lambda t: t[:, :, :5], "out_cache must be"),
        (9, lambda t: t.bfloat16(), "down_norm and out_cache"),
        (12, lambda k: 0, "columns at least 1"),
    ],
)
def test_mlp_refuses_what_does_not_fit(position, wrong, message):
    args = list(mlp_args())
    args[position] = wrong(args[position])
    with pytest.raises(ValueError, match=message):
        mlp_delta(*args)
