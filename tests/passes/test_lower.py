"""Sites -> ops: exact op counts before and after, the state that both programs take, and what must not be touched."""

import pytest
import torch

from chipmunk_compile.passes import PASSES
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.lower import Treatment, lift_state, lower, weights_program
from chipmunk_compile.passes.mlp_sites import find_mlps
from tests.capture import capture
from tests.record import record
from tests.toy_dit import Loop, toy
from tests.weights import write_weights

aten, chipmunk = torch.ops.aten, torch.ops.chipmunk


def prepare(kept=(17, 51), chunks=(32, 32, 4), **kwargs):
    (gm,) = capture(toy(**kwargs), *next(iter(Loop(batch=2))))
    for rewrite in PASSES:
        gm = rewrite(gm)
    sites = find_attention(gm, min_tokens=8)[0] + find_mlps(gm, min_tokens=8)[0]
    return gm, [Treatment(site, kept[site.kind == "mlp"], 4, chunks) for site in sites]


def count(gm, *targets):
    found = [node.target for node in gm.graph.nodes]
    return tuple(found.count(target) for target in targets)


OPS = (
    aten.scaled_dot_product_attention.default,
    aten.gelu.default,
    aten.linear.default,
    aten.copy_.default,
    chipmunk.attention_refresh.default,
    chipmunk.attention_delta.default,
    chipmunk.mlp_delta.default,
)


def test_op_counts():
    gm, treatments = prepare()
    linears = count(gm, aten.linear.default)[0]
    assert count(gm, *OPS) == (2, 2, linears, 0, 0, 0, 0)
    # A refresh writes three caches an MLP: activations, samples, output. W2 transposed and its norms hold still.
    assert count(lower(gm, treatments, "refresh"), *OPS) == (0, 2, linears, 6, 2, 0, 0)
    weights, _ = weights_program(gm, treatments)
    assert count(weights, *OPS, chipmunk.mlp_weights.default) == (0, 0, 0, 0, 0, 0, 0, 2)
    assert count(lower(gm, treatments, "delta"), *OPS) == (0, 0, linears - 4, 0, 0, 2, 2)
    assert count(gm, *OPS) == (2, 2, linears, 0, 0, 0, 0)  # the canonical graph is left as it was


def test_only_treated_sites_change():
    gm, treatments = prepare()
    one = [t for t in treatments if t.site.kind == "attention"][:1]
    assert count(lower(gm, one, "delta"), *OPS[:2], *OPS[4:]) == (1, 2, 0, 1, 0)


def test_with_no_column_kept_the_caches_are_the_output():
    gm, treatments = prepare(kept=(0, 0))
    delta = lower(gm, treatments, "delta")
    assert count(delta, *OPS[:2], *OPS[4:]) == (0, 0, 0, 0, 0)
    assert {t.name.rpartition("_")[0] for t in lift_state(treatments) if t.scope == "stream"} == {
        "o_cache",
        "out_cache",
    }


def test_both_programs_take_the_same_state_behind_the_inputs():
    gm, treatments = prepare()
    inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    names = [t.name for t in lift_state(treatments)]
    for program in ("refresh", "delta"):
        placeholders = [n.name for n in lower(gm, treatments, program).graph.nodes if n.op == "placeholder"]
        assert placeholders == inputs + names


def test_state_bytes_are_those_that_are_allocated():
    for tensor in lift_state(prepare()[1]):
        made = tensor.empty()
        assert (tuple(made.shape), made.stride(), made.dtype) == (tensor.shape, tensor.stride, tensor.dtype)
        assert made.untyped_storage().nbytes() == tensor.bytes


@pytest.mark.parametrize("chunks", [(32, 32, 4), (5, 32, 31), (5, 20, 21, 1, 21), (68,)])
def test_refresh_then_delta_on_the_same_inputs_is_the_dense_output(chunks):
    """Run eagerly, without Inductor: a program alone can be called by a test."""
    gm, treatments = prepare(chunks=chunks)
    inputs = [torch.randn(n.meta["val"].shape) / 3 for n in gm.graph.nodes if n.op == "placeholder"]
    state = [tensor.empty() for tensor in lift_state(treatments)]
    for tensor in state:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    with torch.no_grad():
        write_weights(gm, treatments, inputs, state)
        dense = gm(*inputs)[0]
        refreshed = lower(gm, treatments, "refresh")(*inputs, *state)[0]
        again = lower(gm, treatments, "delta")(*inputs, *state)[0]
    for output in (refreshed, again):
        assert (output - dense).abs().max() < 1e-5 * dense.abs().max()


class SequenceFirst(torch.nn.Module):
    """Attention as nn.MultiheadAttention calls it, and an MLP whose matrices are kept as x @ W wants them."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(16, 2)
        self.w1, self.w2 = (torch.nn.Parameter(torch.randn(size) / 4) for size in ((16, 40), (40, 16)))

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0].transpose(0, 1).contiguous().transpose(0, 1)
        return torch.nn.functional.gelu(x.transpose(0, 1) @ self.w1) @ self.w2


def test_values_may_be_laid_out_otherwise_and_matrices_stand_transposed():
    """The export leaves out copies that SDPA's own strides made superfluous; the ops' strides are others."""
    model, x = SequenceFirst().eval().requires_grad_(False), torch.randn(68, 2, 16)
    (dense, *_), (run,) = record(model, x, passes=PASSES)
    sites = find_attention(run.gm, min_tokens=8)[0] + find_mlps(run.gm, min_tokens=8)[0]
    assert [site.kind for site in sites] == ["attention", "mlp"]
    treatments = [Treatment(site, (68, 40)[site.kind == "mlp"], 4, (32, 36)) for site in sites]
    state = [tensor.empty() for tensor in lift_state(treatments)]
    inputs = [run.values[n] for n in run.gm.graph.nodes if n.op == "placeholder"]
    write_weights(run.gm, treatments, inputs, state)
    for program in ("refresh", "delta"):
        lowered = lower(run.gm, treatments, program)
        with torch.no_grad():
            torch.testing.assert_close(lowered(*inputs, *state)[0], dense, rtol=1e-4, atol=1e-4)
    (delta,) = [n for n in lowered.graph.nodes if n.target is chipmunk.mlp_delta.default]
    assert [w.target for w in delta.args[1]] == [aten.clone.default]  # rows of a matrix that is kept transposed
