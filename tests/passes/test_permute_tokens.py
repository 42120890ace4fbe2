"""The token permutation on toy graphs: where it lands, what it leaves alone, and why it declines."""

import math

import pytest
import torch
import torch.nn.functional as F

from chipmunk_compile.passes.keep_gathers import kept_gathers
from chipmunk_compile.passes.permute_tokens import (
    index_inputs,
    permute_tokens,
    plan_permutation,
    run_order,
    site_chunks,
)
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.sites import Declined, MlpSite, Projection
from chipmunk_compile.passes.token_axis import analyse_tokens
from tests.token_graphs import attention_sites, difference, gathers_of, in_double, traced, without

DIM, HEADS = 8, 2
GRID, TOKENS, TEXT = (1, 3, 5), 15, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def X(*shape):
    return torch.randn(shape, dtype=torch.float64)


def self_attention(x, weight, mask=None, causal=False):
    """[batch, tokens, DIM] -> the same; weight [3 * DIM, DIM]."""
    q, k, v = F.linear(x, weight).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x + o.transpose(1, 2).flatten(2)


def plan_of(function, *inputs, grid=GRID, share=math.inf, extra_sites=None, **kwargs):
    gm = traced(function, *inputs)
    sites = attention_sites(gm) + (extra_sites(gm) if extra_sites else [])
    return gm, sites, plan_permutation(gm, sites, grid=grid, share=share, **kwargs)


def permuted(function, *inputs, **kwargs):
    """Plans and permutes; checks exactness and that no gather is superfluous; returns (plan, graph)."""
    gm, _, plan = plan_of(function, *inputs, **kwargs)
    assert not isinstance(plan, Declined), plan
    plain = in_double(gm, *inputs)
    before = [node for node in gm.graph.nodes if node.op == "call_function" and node.users]
    permute_tokens(gm, plan)
    gathers = gathers_of(gm)
    assert {node for node in gm.graph.nodes if node.op == "call_function"} == {*before, *gathers}
    indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 1e-12
    for gather in gathers:
        assert difference(in_double(without(gm, gather), *inputs, *indices), plain) > 1e-6, gather
    return plan, gm


def where(plan) -> list[tuple[str, str]]:
    """(op of the gathered value, "in" or "out"), in the order of the graph."""
    out = []
    for gather in plan.gathers:
        undo = plan.layouts[gather.steps[0][1]].moves[0][2]
        op = gather.value.op if gather.value.op == "placeholder" else gather.value.target.__name__.split(".")[0]
        out.append((op, "out" if undo else "in"))
    return out


# --- what is permuted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_packed_tokens_are_gathered_once_in_and_once_out(batch):
    def model(x, w_in, w1, w2, w_out):
        h = F.linear(x, w_in)
        return F.linear(self_attention(self_attention(h, w1), w2), w_out)

    plan, _ = permuted(model, X(batch, TOKENS, 3), X(DIM, 3), X(3 * DIM, DIM), X(3 * DIM, DIM), X(3, DIM))
    assert where(plan) == [("placeholder", "in"), ("linear", "out")]
    assert plan.bytes == 2 * 2 * batch * TOKENS * 3 * 8 and not plan.walls and len(plan.sites) == 2


def test_what_carries_positions_moves_with_the_tokens():
    def model(x, modulation, table, mask, w_in, w):
        h = F.linear(x, w_in)
        return self_attention((h + table) * modulation, w, mask[:, None, None, :])

    mask = torch.rand(4, TOKENS) > 0.3
    plan, _ = permuted(model, X(4, TOKENS, 2), X(4, TOKENS, 1), X(TOKENS, DIM), mask, X(DIM, 2), X(3 * DIM, DIM))
    assert where(plan).count(("placeholder", "in")) == 4 and len(plan.gathers) == 5


def test_fixed_inputs_are_gathered_for_nothing():
    def model(x, table, w):
        return self_attention(F.linear(x, w[:DIM, :2]) + table, w)

    inputs = X(2, TOKENS, 2), X(TOKENS, DIM), X(3 * DIM, DIM)
    gm = traced(model, *inputs)
    table = [node for node in gm.graph.nodes if node.op == "placeholder"][1]
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf, fixed=[table])
    assert [gather.value for gather in plan.gathers if gather.fixed] == [table]
    assert plan.bytes == sum(gather.bytes for gather in plan.gathers) - 2 * TOKENS * DIM * 8
    permute_tokens(gm, plan)
    assert [node.args[0] for node in kept_gathers(gm)] == [table]


@pytest.mark.parametrize("image_first", [False, True])
def test_joint_sequences_in_either_order(image_first):
    def model(x, text, w1, w2):
        joint = torch.cat([x, text] if image_first else [text, x], 1)
        joint = self_attention(joint, w1)
        image, text = (joint[:, :TOKENS], joint[:, TOKENS:]) if image_first else (joint[:, TEXT:], joint[:, :TEXT])
        joint = self_attention(torch.cat([text, image], 1), w2)  # and then in the other order
        return joint[:, TEXT:]

    plan, gm = permuted(model, X(2, TOKENS, DIM), X(2, TEXT, DIM), X(3 * DIM, DIM), X(3 * DIM, DIM))
    assert [gather.value.name for gather in plan.gathers][0] == "x_1" and len(plan.gathers) == 2
    assert len(plan.sites) == 2


def test_two_images_with_grids_of_their_own():
    def model(x, reference, w, w_out):
        joint = self_attention(torch.cat([x, reference], 1), w)
        image, other = F.linear(joint, w_out).split([15, 12], 1)
        return image.unflatten(1, (3, 5)).flip(2), other.unflatten(1, (2, 2, 3)).flip(3)

    plan, _ = permuted(model, X(2, 15, DIM), X(2, 12, DIM), X(3 * DIM, DIM), X(4, DIM), grid=None)
    assert {run.grids for run in plan.runs} == {((1, 3, 5),), ((2, 2, 3),)}
    assert len(plan.gathers) == 4


def test_two_grids_behind_each_other_on_one_axis():
    def model(x, w):
        return self_attention(x, w)

    gm, _, plan = plan_of(model, X(1, 27, DIM), X(3 * DIM, DIM), grid=[(1, 3, 5), (2, 2, 3)])
    (run,) = plan.runs
    order, lengths = run_order(run, run.grids, chunk=4)
    assert sorted(order[:15].tolist()) == list(range(15)) and sorted(order.tolist()) == list(range(27))
    assert sum(lengths) == 27 and max(lengths) <= 4


def test_patches_in_and_out_name_the_grid():
    def model(latents, patch, bias, w, w_out):
        x = F.conv2d(latents, patch, bias, stride=2).flatten(2).transpose(1, 2)
        x = F.linear(self_attention(x, w), w_out).view(-1, 3, 5, 2, 2)
        return x.permute(0, 1, 3, 2, 4).reshape(-1, 6, 10)

    inputs = X(2, 3, 6, 10), X(DIM, 3, 2, 2), X(DIM), X(3 * DIM, DIM), X(4, DIM)
    plan, _ = permuted(model, *inputs, grid=None)
    assert plan.runs[0].grids == ((1, 3, 5),) and len(plan.gathers) == 2
    assert {wall.node.target for wall in plan.walls} == {
        torch.ops.aten.flatten.using_ints,
        torch.ops.aten.view.default,
    }


def test_a_video_folded_twice_has_one_grid():
    def model(frames, patch, w, w_out):
        batch = 2
        x = F.conv2d(frames.flatten(0, 1), patch, stride=2).flatten(2).transpose(1, 2)  # [B T, h w, C]
        x = x.reshape(batch, -1, DIM)
        return F.linear(self_attention(x, w), w_out).view(batch, 3, 2, 4, 5).flip(2)

    plan, _ = permuted(model, X(2, 3, 3, 4, 8), X(DIM, 3, 2, 2), X(3 * DIM, DIM), X(5, DIM), grid=None)
    assert plan.runs[0].grids == ((3, 2, 4),)


def test_sequence_first_and_unbatched():
    def sequence_first(x, w):  # [S, B, C]
        return self_attention(x.transpose(0, 1), w).transpose(0, 1)

    def unbatched(x, w):  # [N, C]
        q, k, v = F.linear(x, w).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)

    for function, x in ((sequence_first, X(TOKENS, 3, DIM)), (unbatched, X(TOKENS, DIM))):
        plan, _ = permuted(function, x, X(3 * DIM, DIM))
        assert len(plan.gathers) == 2 and plan.gathers[0].value.op == "placeholder"


@pytest.mark.parametrize("batch", [2, 3])
def test_batch_and_tokens_merged_are_copies(batch):
    def model(x, w_in, w, table):
        flat = F.linear(x.flatten(0, 1), w_in)  # [batch * tokens, DIM]
        return self_attention(flat.view(batch, TOKENS, DIM) + table, w)

    plan, _ = permuted(model, X(batch, TOKENS, 2), X(DIM, 2), X(3 * DIM, DIM), X(TOKENS, DIM))
    assert [gather.value.name for gather in plan.gathers] == ["x_1", "table_1", "add_1"]


def test_attention_spelled_out_with_a_full_mask():
    def model(x, bias, w, w2):
        h = self_attention(x, w)
        scores = torch.einsum("bnc,bmc->bnm", F.linear(h, w2), h) + bias
        return self_attention(h + scores.softmax(-1) @ h, w)

    plan, _ = permuted(model, X(4, TOKENS, DIM), X(TOKENS, TOKENS), X(3 * DIM, DIM), X(DIM, DIM))
    (bias,) = [gather for gather in plan.gathers if gather.value.meta["val"].dim() == 2]
    assert [dim for dim, _ in bias.steps] == [0, 1]


def test_constants_may_stand_before_the_inputs():
    def model(table, x, w_in, w):
        return self_attention(F.linear(x, w_in) + table, w)

    inputs = X(TOKENS, DIM), X(2, TOKENS, 2), X(DIM, 2), X(3 * DIM, DIM)
    gm = traced(model, *inputs)
    plain = in_double(gm, *inputs)
    first = next(iter(gm.graph.nodes))
    gm.register_buffer("table", inputs[0])
    with gm.graph.inserting_before(first):
        constant = gm.graph.get_attr("table")
    constant.meta.update(first.meta)
    first.replace_all_uses_with(constant)
    gm.graph.erase_node(first)
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    assert constant in [gather.value for gather in plan.gathers if gather.fixed]
    permute_tokens(gm, plan)
    indices = index_inputs(plan, [torch.randperm(TOKENS)])
    assert difference(in_double(gm, *inputs[1:], *indices), plain) < 1e-12


def test_inputs_may_stand_behind_ops():
    """Index inputs come last, and what is gathered may be read before the last of the others."""

    def model(x, w_in, w, late):
        return self_attention(F.linear(x, w_in) + late, w)

    inputs = X(2, TOKENS, 2), X(DIM, 2), X(3 * DIM, DIM), X(TOKENS, DIM)
    gm = traced(model, *inputs)
    plain = in_double(gm, *inputs)
    nodes = {node.name: node for node in gm.graph.nodes}
    nodes["linear"].append(nodes["late_1"])
    assert [node.op for node in gm.graph.nodes][3:5] == ["call_function", "placeholder"]
    plan = plan_permutation(gm, attention_sites(gm), grid=GRID, share=math.inf)
    permute_tokens(gm, plan)
    indices = index_inputs(plan, [torch.randperm(TOKENS)])
    assert len(gathers_of(gm)) == 3 and difference(in_double(gm, *inputs, *indices), plain) < 1e-12


# --- walls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wall",
    [
        lambda x: x.cumsum(1),
        lambda x: x.flip(1),
        lambda x: F.pad(x[:, 1:] + x[:, :-1], (0, 0, 0, 1)),
        lambda x: F.conv1d(
            x.transpose(1, 2), torch.ones(DIM, 1, 3, dtype=torch.float64), padding=1, groups=DIM
        ).transpose(1, 2),
        lambda x: x.unflatten(1, (3, 5)).mean(1, keepdim=True).expand(-1, 3, -1, -1).flatten(1, 2),
    ],
    ids=["cumsum", "flip", "shift", "conv", "window"],
)
def test_a_wall_between_sites_is_walked_around(wall):
    def model(x, w1, w2):
        h = wall(self_attention(x, w1))
        return self_attention(h, w2)

    plan, _ = permuted(model, X(2, TOKENS, DIM), X(3 * DIM, DIM), X(3 * DIM, DIM))
    assert len(plan.sites) == 2 and len(plan.gathers) == 4 and plan.walls
    assert all(wall.node.target.__name__ in wall.name for wall in plan.walls)


def test_chunked_feed_forward_sees_part_of_the_axis():
    def model(x, w, w_ff):
        h = self_attention(x, w)
        return torch.cat([F.linear(half, w_ff).relu() for half in h.chunk(2, 1)], 1)

    plan, _ = permuted(model, X(2, TOKENS, DIM), X(3 * DIM, DIM), X(DIM, DIM))
    assert len(plan.gathers) == 2 and plan.walls[0].node.target is torch.ops.aten.chunk.default


def test_walls_that_cost_more_than_order_is_worth():
    def model(x, w1, w2):
        return self_attention(self_attention(x, w1).cumsum(1), w2)

    inputs = X(2, TOKENS, DIM), X(3 * DIM, DIM), X(3 * DIM, DIM)
    _, sites, plan = plan_of(model, *inputs, share=1e-3)
    assert plan.reason is Reason.WALLED_IN
    assert plan.detail["bytes"] == 4 * 2 * 2 * TOKENS * DIM * 8
    assert plan.detail["walls"][0].startswith("cumsum")


def test_causal_attention_is_a_wall_itself():
    _, sites, plan = plan_of(lambda x, w: self_attention(x, w, causal=True), X(2, TOKENS, DIM), X(3 * DIM, DIM))
    assert plan.reason is Reason.WALLED_IN


def test_an_mlp_is_never_cut_in_two():
    def model(x, w, up, down):
        return F.linear(F.linear(self_attention(x, w), up).relu(), down)

    def mlp(gm):
        nodes = list(gm.graph.nodes)
        first, last = [node for node in nodes if node.target is torch.ops.aten.linear.default][-2:]
        weights = Projection(first.args[1], None), Projection(last.args[1], None)
        return [MlpSite(last, "mlp", first.args[0], weights[:1], weights[1], "relu(h0)", 2, TOKENS, DIM, 1, DIM)]

    inputs = X(2, TOKENS, DIM), X(3 * DIM, DIM), X(1, DIM), X(DIM, 1)
    plan, _ = permuted(model, *inputs)
    assert where(plan)[-1] == ("relu", "out")  # the hidden layer is the narrowest place
    plan, _ = permuted(model, *inputs, extra_sites=mlp)
    assert where(plan)[-1] == ("linear", "out") and len(plan.sites) == 2


# --- grids --------------------------------------------------------------------------------------------------


def test_declines_without_attention_or_grid():
    inputs = X(2, TOKENS, DIM), X(3 * DIM, DIM)
    assert plan_of(lambda x, w: F.linear(x, w), *inputs)[2].reason is Reason.NO_SITES
    assert plan_of(lambda x, w: self_attention(x, w), *inputs, grid=None)[2].reason is Reason.NO_GRID
    declined = plan_of(lambda x, w: self_attention(x, w), *inputs, grid=(1, 4, 4))[2]
    assert declined.reason is Reason.GRID_MISMATCH and declined.detail["tokens"] == [TOKENS]


def test_declines_views_that_contradict_each_other():
    def model(x, w):
        h = self_attention(x, w)
        return h.unflatten(1, (3, 4)).flip(1), h.unflatten(1, (2, 6)).flip(1)

    plan = plan_of(model, X(2, 12, DIM), X(3 * DIM, DIM), grid=None)[2]
    assert plan.reason is Reason.AMBIGUOUS_GRID and set(plan.detail["grids"]) == {(1, 3, 4), (1, 2, 6)}


def test_ids_are_the_inputs_that_become_angles():
    def model(x, text, ids, text_ids, w):
        angles = torch.cat([text_ids, ids]).sum(-1)
        joint = self_attention(torch.cat([text, x], 1) * angles.cos()[:, None], w)
        return joint[:, TEXT:]

    inputs = X(2, TOKENS, DIM), X(2, TEXT, DIM), X(TOKENS, 3), X(TEXT, 3), X(3 * DIM, DIM)
    plan, gm = permuted(model, *inputs, grid=None)
    (run,) = plan.runs
    assert run.grids == () and run.ids.name == "ids_1" and run.ids_start == 0 and run.length == TOKENS


# --- chunks -------------------------------------------------------------------------------------------------


def test_chunks_restart_at_segments_and_follow_the_order():
    def model(x, text, w):
        return self_attention(torch.cat([text, x], 1), w)[:, 70:]

    gm = traced(model, X(2, 60, DIM), X(2, 70, DIM), X(3 * DIM, DIM))
    (site,) = attention_sites(gm)
    axes = analyse_tokens(gm)
    assert [(s.start, s.length) for s in axes.segments(site.query, -2)] == [(0, 70), (70, 60)]
    assert site_chunks(axes, site, 32) == (32, 32, 6, 32, 28)
    plan = plan_permutation(gm, [site], axes=axes, grid=(1, 6, 10), share=math.inf)
    lengths = [run_order(run, run.grids, chunk=16)[1] for run in plan.runs]
    assert site_chunks(axes, site, 16, plan, lengths) == (16, 16, 16, 16, 6, 15, 15, 15, 15)


def test_chunks_of_an_mlp_that_sees_the_batch_flattened():
    def model(x, w, up):
        h = self_attention(x, w)
        return F.linear(h.flatten(0, 1), up)

    gm = traced(model, X(3, TOKENS, DIM), X(3 * DIM, DIM), X(DIM, DIM))
    last = [node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default][-1]
    weight = Projection(last.args[1], None)
    site = MlpSite(last, "mlp", last.args[0], (weight,), weight, "h0", 3, TOKENS, DIM, DIM, DIM)
    axes = analyse_tokens(gm)
    plan = plan_permutation(gm, [*attention_sites(gm), site], axes=axes, grid=GRID, share=math.inf)
    lengths = [run_order(run, run.grids, chunk=4)[1] for run in plan.runs]
    assert site_chunks(axes, site, 4, plan, lengths) == lengths[0]
    assert site_chunks(axes, site, 4) == (4, 4, 4, 3)
