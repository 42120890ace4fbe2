"""Fused linears come apart where an MLP needs it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from chipmunk_compile.passes.split_linears import split_linears
from tests.record import record, tensors
from tests.tiny_models import MODELS

DIM, HIDDEN = 12, 20


class Toy(nn.Module):
    """x [B, N, 12] -> body, with linears `up` to a width and `down` back to 12 features."""

    def __init__(self, body, up: int, down: int, bias: bool = True):
        super().__init__()
        self.body = body
        self.up = nn.Linear(DIM, up, bias=bias)
        self.down = nn.Linear(down, DIM, bias=bias)
        self.double()

    def forward(self, x):
        return self.body(self, x)


def attend(q, k, v):
    heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def check(toy: nn.Module, x: torch.Tensor, change: dict[str, int]):
    """Equal output to 1e-12, and exactly this change in the number of ops."""
    outputs, (run,) = record(toy, x, passes=(split_linears,))
    for result, truth in zip(outputs, tensors(toy(x)), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
    after = run.after
    found = {op: after[op] - run.before[op] for op in after | run.before if after[op] != run.before[op]}
    assert found == change
    return run


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_cat_in_front_of_a_linear():
    def body(m, x):
        return m.down(torch.cat([attend(x, x, x), F.gelu(m.up(x))], dim=-1))

    toy = Toy(body, HIDDEN, DIM + HIDDEN)
    run = check(toy, inputs(3, 7, DIM), {"linear": 1, "slice": 2, "add": 1, "cat": -1})
    bias = [n for n in run.gm.graph.nodes if n.target is torch.ops.aten.linear.default and len(n.args) == 3]
    assert len(bias) == 2  # up, and the first part of down alone


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2, 1), (0, 1, 2)])
def test_parts_without_an_mlp_stay_joined(order, bias):
    def body(m, x):
        parts = [attend(x, x, x), x.cumsum(1), F.silu(m.up(x))]
        return m.down(torch.cat([parts[i] for i in order], dim=2))

    apart = order == (0, 2, 1)
    change = {"linear": 2, "slice": 3, "add": 2, "cat": -1} if apart else {"linear": 1, "slice": 2, "add": 1}
    check(Toy(body, HIDDEN, 2 * DIM + HIDDEN, bias), inputs(1, 5, DIM), change)


CHUNKS = {
    "chunk": lambda h: h.chunk(2, dim=-1),
    "split": lambda h: h.split(HIDDEN, dim=h.ndim - 1),
    "split_with_sizes": lambda h: h.split([HIDDEN, HIDDEN], dim=-1),
    "slice": lambda h: (h[..., :HIDDEN], h[..., HIDDEN:]),
    "narrow": lambda h: (h.narrow(-1, 0, HIDDEN), h.narrow(-1, HIDDEN, HIDDEN)),
    "unflatten": lambda h: h.unflatten(-1, (2, HIDDEN)).unbind(-2),
    "select": lambda h: [h.view(*h.shape[:-1], 2, HIDDEN)[..., i, :] for i in (0, 1)],
    "tensor_split": lambda h: h.tensor_split(2, dim=-1),
    "dropout": lambda h: F.dropout(h, 0.1, training=False).contiguous().chunk(2, dim=-1),
}


@pytest.mark.parametrize("shape", [(1, 7, DIM), (3, 4, DIM), (2, 3, 5, DIM)])
@pytest.mark.parametrize("form", CHUNKS)
def test_a_gated_linear(form, shape):
    def body(m, x):
        gate, up = CHUNKS[form](m.up(x))
        return m.down(F.silu(gate) * up)

    toy, x = Toy(body, 2 * HIDDEN, HIDDEN), inputs(*shape)
    outputs, (run,) = record(toy, x, passes=(split_linears,))
    torch.testing.assert_close(outputs[0], toy(x), rtol=1e-12, atol=1e-12)
    assert run.after == {"linear": 3, "slice": 4, "silu": 1, "mul": 1}


def test_one_linear_for_attention_and_a_gated_mlp():
    """As in FLUX.2: QKV stays one linear and its readers read that."""

    def body(m, x):
        qkv, mlp = m.up(x).split([3 * DIM, 2 * HIDDEN], dim=-1)
        gate, up = mlp.chunk(2, dim=-1)
        return m.down(torch.cat([attend(*qkv.chunk(3, dim=-1)), F.silu(gate) * up], dim=-1))

    toy = Toy(body, 3 * DIM + 2 * HIDDEN, DIM + HIDDEN)
    run = check(toy, inputs(3, 7, DIM), {
        "linear": 3, "slice": 8, "add": 1, "cat": -1, "split_with_sizes": -1, "split": -1, "getitem": -4,
    })  # fmt: skip
    assert run.after["split"] == 1  # q, k, v


def test_other_columns_are_served_by_one_linear():
    """The gate lies between columns that others read, in pieces that overlap each other."""

    def body(m, x):
        h = m.up(x)
        out = m.down(F.silu(h[..., 8 : 8 + HIDDEN]))
        return out, h[..., :5] + 1, h[..., 3:8] * 2, h[..., 8 + HIDDEN :]

    toy = Toy(body, 8 + HIDDEN + 3, HIDDEN)
    # Three linears of two slices each for one; the windows of the first columns stay slices; two slices go.
    check(toy, inputs(1, 7, DIM), {"linear": 2, "slice": 4})


def test_weights_are_views_of_inputs_and_a_change_is_seen():
    def body(m, x):
        gate, up = m.up(x).chunk(2, dim=-1)
        return m.down(torch.cat([x, F.silu(gate) * up], dim=-1))

    toy, x = Toy(body, 2 * HIDDEN, DIM + HIDDEN), inputs(2, 7, DIM)
    _, (run,) = record(toy, x, passes=(split_linears,))
    memory = {p.untyped_storage().data_ptr() for p in toy.parameters()}
    for node in run.gm.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            for weight in node.args[1:]:
                assert weight.op == "placeholder" or weight.args[0].op == "placeholder"
                assert run.values[weight].untyped_storage().data_ptr() in memory
    real = [run.values[n] for n in run.gm.graph.nodes if n.op == "placeholder"]
    toy.up.weight.data.mul_(1.5)
    toy.down.bias.data.add_(1)
    torch.testing.assert_close(run.gm(*real)[0], toy(x), rtol=1e-12, atol=1e-12)


def test_bfloat16():
    def body(m, x):
        gate, up = m.up(x).chunk(2, dim=-1)
        return m.down(torch.cat([x, F.silu(gate) * up], dim=-1))

    toy, x = Toy(body, 2 * HIDDEN, DIM + HIDDEN), inputs(2, 7, DIM)
    truth = toy(x)
    outputs, (run,) = record(toy.bfloat16(), x.bfloat16(), passes=(split_linears,))
    assert run.after["linear"] == 4 and outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0].double(), truth, rtol=0.02, atol=0.02)


def _joined(value):
    """A body whose down linear reads x beside a value of `up`'s."""
    return lambda m, x: m.down(torch.cat([x, value(m, x)], dim=-1))


def _gated(value):
    """A body whose down linear reads a gated value of both chunks of `up`'s."""
    return lambda m, x: m.down(value(*m.up(x).chunk(2, dim=-1)))


NEGATIVE_TWINS = {
    "nothing pointwise before the cat": (_joined(lambda m, x: F.layer_norm(m.up(x), (HIDDEN,))), HIDDEN, 32),
    "no activation": (_joined(lambda m, x: 2 * m.up(x) + 1), HIDDEN, 32),
    "unknown activation": (_joined(lambda m, x: m.up(x).atan()), HIDDEN, 32),
    "cat of tokens": (lambda m, x: m.down(torch.cat([F.gelu(m.up(x)), m.up(x)], dim=1)), HIDDEN, HIDDEN),
    "the same part twice": (lambda m, x: m.down(torch.cat([F.gelu(m.up(x))] * 2, dim=-1)), HIDDEN, 40),
    "a weight that is computed": (
        lambda m, x: F.linear(torch.cat([x, F.gelu(m.up(x))], -1), m.down.weight * 2), HIDDEN, 32,
    ),
    "ungated chunks": (_gated(lambda a, b: F.silu(a).cumsum(1) * b), 40, HIDDEN),
    "chunks that attend": (_gated(lambda a, b: attend(a, b, b)), 40, HIDDEN),
    "interleaved chunks": (
        lambda m, x: m.down(F.silu(m.up(x)[..., ::2]) * m.up(x)[..., 1::2]), 40, HIDDEN,
    ),
    "pieces that overlap": (
        lambda m, x: m.down(F.silu((h := m.up(x))[..., :HIDDEN]) * h[..., 1 : HIDDEN + 1]), 40, HIDDEN,
    ),
    "pieces of rows": (lambda m, x: m.down(F.silu((h := m.up(x))[:, :3]) * h[:, 3:6]), HIDDEN, HIDDEN),
    "pieces of two inputs": (
        lambda m, x: m.down(F.silu(m.up(x)[..., :HIDDEN]) * m.up(x + 1)[..., HIDDEN:]), 40, HIDDEN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEGATIVE_TWINS)
def test_left_whole(name):
    body, up, down = NEGATIVE_TWINS[name]
    check(Toy(body, up, down), inputs(2, 7, DIM), {})


def test_dropout_that_is_off_leaves_nothing_behind():
    def body(m, x):
        joined = torch.cat([x, F.dropout(F.gelu(m.up(x)), 0.1, training=False)], dim=-1)
        return m.down(F.dropout(joined, 0.1, training=False))

    toy = Toy(body, HIDDEN, DIM + HIDDEN)
    check(toy, inputs(2, 7, DIM), {"linear": 1, "slice": 2, "add": 1, "cat": -1, "dropout": -1})


def test_left_whole_where_the_activation_is_read_elsewhere():
    def body(m, x):
        act = F.gelu(m.up(x))
        return m.down(torch.cat([x, act], dim=-1)), act

    check(Toy(body, HIDDEN, DIM + HIDDEN), inputs(2, 7, DIM), {})


def test_left_whole_where_the_fused_linear_is_read_whole():
    def body(m, x):
        h = m.up(x)
        gate, up = h.chunk(2, dim=-1)
        return m.down(torch.cat([x, F.silu(gate) * up], dim=-1)), h.sum(-1)

    check(Toy(body, 2 * HIDDEN, DIM + HIDDEN), inputs(2, 7, DIM), {})


@pytest.mark.parametrize("shape", [(3, DIM), (3, 1, DIM)])
def test_left_whole_without_tokens(shape):
    """The same forms on conditioning, which has no token axis."""

    def body(m, x):
        gate, up = m.up(x).chunk(2, dim=-1)
        return m.down(torch.cat([x, F.silu(gate) * up], dim=-1))

    check(Toy(body, 2 * HIDDEN, DIM + HIDDEN), inputs(*shape), {})


def test_left_whole_under_autocast():
    def body(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            gate, up = m.up(x).chunk(2, dim=-1)
            return m.down(torch.cat([x, F.silu(gate) * up], dim=-1))

    toy = Toy(body, 2 * HIDDEN, DIM + HIDDEN).float()
    _, (run,) = record(toy, torch.randn(2, 7, DIM), passes=(split_linears,))
    assert run.before == run.after and run.after["linear"] == 2


# Change in linears and in cats: one each for a single block; FLUX.2 has one linear for gate and up besides.
REAL = {
    "flux": (2, -2),
    "hunyuan_video": (2, -2),
    "flux2": (4 + 2 * 3, -2),
    "sd3": (0, 0),
}


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    model, kwargs = MODELS[name]()
    model = model.double()
    kwargs = tree_map(_double, kwargs)
    with torch.no_grad():
        truth = tensors(model(**kwargs))
    outputs, (run,) = record(model, **kwargs, passes=(split_linears,))
    for a, b in zip(outputs, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    after = run.after
    assert (after["linear"] - run.before["linear"], after["cat"] - run.before["cat"]) == REAL[name]
    assert all("val" in node.meta for node in run.gm.graph.nodes if node.op != "output")
