"""Refresh and delta programs with permuted tokens: state lives in the new order, and nothing else changes."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import chipmunk_compile
from chipmunk_compile.passes.permute_tokens import PermutationPlan, plan_permutation
from chipmunk_compile.passes.token_order import token_order
from tests.positioned_dit import PositionedLoop, position_ids, positioned
from tests.toy_dit import Block, compile_toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")
ODD, SQUARE = (21, 23), (24, 24)
EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}


def run(model, grids, batch=1, inputs_order=slice(None), **options):
    """(outputs, runner) of six steps, three of them deltas."""
    compiled, runners = compile_toy(model, steps=6, **options)
    ids = position_ids(grids)[inputs_order].clone()
    loop = PositionedLoop(batch=batch, tokens=len(ids))
    with torch.no_grad():
        outputs = [compiled(x[:, inputs_order], t, prompt, ids) for x, t, prompt in loop]
    assert chipmunk_compile.counters()["delta"] == 3
    return outputs, runners[0]


def dense(model, grids, batch=1):
    ids = position_ids(grids)
    with torch.no_grad():
        return [model(*inputs, ids) for inputs in PositionedLoop(batch=batch, tokens=len(ids))]


@pytest.mark.parametrize("order", ["patch", "hilbert"])
@pytest.mark.parametrize("text", ["before", "after", "nowhere"])
@pytest.mark.parametrize("batch, grids", [(1, (ODD,)), (3, (ODD,)), (2, (ODD, (16, 25)))], ids=["1", "3", "two images"])
def test_every_column_gives_the_dense_model(batch, grids, text, order):
    model = positioned(grids=grids, text=text)
    outputs, runner = run(model, grids, batch, order=order, **EXACT)
    plan = runner._analysis.permutation
    assert isinstance(plan, PermutationPlan) and len(plan.runs) == len(grids)
    assert {run.grids for run in plan.runs} == {((1, *grid),) for grid in grids}
    assert all(len(served) == 6 for served in plan.served)
    assert worst(outputs, dense(model, grids, batch)) < 1e-5


def test_state_lives_in_the_new_order():
    """With no column computed at all, the cache of an attention is its output."""
    model, none = positioned(text="nowhere"), {"attention.sparsity": 1.0, "mlp.sparsity": 1.0, "schedule.warmup": 6}
    caches = {}
    for kind in ("raster", "patch"):
        compiled, runners = compile_toy(model, steps=7, order=kind, **none)
        with torch.no_grad():
            compiled(*next(iter(PositionedLoop())), position_ids())
        (owner,) = runners[0]._owners._known.values()
        (stream,) = owner.root.counted.live
        (state,) = stream.states.values()
        caches[kind] = state.tensors[0]
    order, _ = token_order((1, *ODD), 32)
    assert caches["patch"].shape == (1, 2, 483, 32)
    torch.testing.assert_close(caches["patch"], caches["raster"][:, :, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(caches["patch"], caches["raster"], atol=1e-2)


@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_steps_are_those_of_a_model_that_was_given_its_tokens_in_that_order(batch):
    """24 x 24 tokens in boxes of 4 x 8 make chunks of 32 throughout, as raster order does."""
    grids, sparse = (SQUARE,), {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
    model = positioned(grids=grids, text="nowhere", free=True)
    permuted, runner = run(model, grids, batch, grid=(1, *SQUARE), **sparse)
    assert isinstance(runner._analysis.permutation, PermutationPlan)
    order, lengths = token_order((1, *SQUARE), 32)
    assert set(lengths) == {32}
    chipmunk_compile.reset()
    torch._dynamo.reset()
    twin = positioned(grids=grids, text="nowhere", free=True)
    twin.table.data = twin.table[order]
    given, _ = run(twin, grids, batch, inputs_order=order, order="raster", **sparse)
    assert worst([output[:, order] for output in permuted], given) < 1e-4
    assert worst(permuted, dense(model, grids, batch)) > 1e-3


@pytest.mark.parametrize("place", ["values", "mlp"])
def test_operands_that_tokens_are_gathered_for_right_before(place, monkeypatch):
    """A sum along the tokens fixes their order; what reads it is inside the permuted region all the same."""

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v if place == "mlp" else (v / 10).cumsum(-2))

    def mlp(self, x):
        return Block.mlp(self, (x / 10).cumsum(-2) if place == "mlp" else x)

    # In a model as small as this one the gathers around a sum cost more than they bring.
    monkeypatch.setattr("chipmunk_compile.plan.plan_permutation", partial(plan_permutation, share=math.inf))
    model = positioned(text="nowhere")
    model.blocks[1].__class__ = type("Summing", (Block,), {"attend": attend, "mlp": mlp})
    outputs, runner = run(model, (ODD,), **EXACT)
    plan = runner._analysis.permutation
    assert isinstance(plan, PermutationPlan) and any("cumsum" in gather.name for gather in plan.gathers), plan
    assert all(len(served) == 6 for served in plan.served)
    assert worst(outputs, dense(model, (ODD,))) < 1e-5
