"""What autocast casts at run time is written into the graph: same values, and every dtype is what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.passes import PASSES
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.mlp_sites import find_mlps
from chipmunk_compile.passes.nodes import under_autocast
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.resolve_autocast import resolve_autocast
from tests.record import record

TOKENS, DIM = 20, 16


class Block(nn.Module):
    """Attention and MLP; `body` says what of it runs under autocast."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.qkv, self.up, self.down = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def attend(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        return self.body(self, x)


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def whole(m, x):
    with autocast():
        return x + m.mlp(x + m.attend(x))


def nested(m, x):
    with autocast():
        x = x + m.attend(x)
        with autocast(enabled=False):
            x = m.mlp(x.float())
        return m.up(x) + x.exp().cumsum(1).sum(-1, keepdim=True)


def resolved(body, *passes):
    """The one graph behind the pass; its output, and the type of each value, are those of the model's run."""
    torch.manual_seed(0)
    model, x = Block(body).eval().requires_grad_(False), torch.randn(2, TOKENS, DIM)
    (output, *_), (run,) = record(model, x, passes=(resolve_autocast, *passes))
    if not passes:
        assert torch.equal(output, model(x))
        for node, value in run.values.items():
            if isinstance(value, torch.Tensor):
                assert node.meta["val"].dtype == value.dtype, node
    assert not under_autocast(run.gm.graph)
    return run


@pytest.mark.parametrize("body", [whole, nested])
def test_a_region_becomes_casts(body):
    run = resolved(body)
    assert run.before["_enter_autocast"] and not run.after["_enter_autocast"] and not run.after["_exit_autocast"]
    assert run.after["_to_copy"] > run.before["_to_copy"]


def test_what_runs_with_autocast_off_is_not_cast():
    run = resolved(nested)
    linears = [n for n in run.gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [n.meta["val"].dtype for n in linears] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


def test_the_callers_autocast():
    with autocast():
        run = resolved(lambda m, x: x + m.mlp(x + m.attend(x)))
    assert run.before["_to_copy"] == 0 < run.after["_to_copy"]


def test_without_autocast_nothing_changes():
    run = resolved(lambda m, x: x + m.mlp(x + m.attend(x).bfloat16().float()))
    assert run.before == run.after


@pytest.mark.parametrize("ambient", [False, True])
def test_sites_are_found_behind_it(ambient):
    with autocast(enabled=ambient):
        run = resolved((lambda m, x: x + m.mlp(x + m.attend(x))) if ambient else whole, *PASSES[1:])
    (attention,), none = find_attention(run.gm, min_tokens=8)
    (mlp,), _ = find_mlps(run.gm, min_tokens=8)
    assert not none and {n.meta["val"].dtype for n in (attention.node, mlp.node, mlp.input)} == {torch.bfloat16}


def test_operands_that_stay_of_two_types_are_declined():
    """A region that ends between the linears: the casts are there, and the types differ all the same."""

    def body(m, x):
        with autocast():
            h = m.up(x)
        return m.attend(x) + m.down(F.gelu(h.float()))

    run = resolved(body, *PASSES[1:])
    sites, declined = find_mlps(run.gm, min_tokens=8)
    assert not sites and [d.reason for d in declined] == [Reason.MIXED_DTYPE]
