"""Attention whose tokens are those of several ranks: proven from what every rank does alike, or left dense.

Collectives are those of torch's fake process group: two ranks, of which one is here, and nothing is sent.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn

import chipmunk_compile
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.collectives import collectives, groups, is_wait, knows_groups
from chipmunk_compile.passes.exchanges import flatten_exchanges, raise_exchanges
from chipmunk_compile.passes.key_masks import mask_inputs
from chipmunk_compile.passes.permute_tokens import plan_permutation, site_chunks
from chipmunk_compile.passes.raise_fused_attention import FUSED, raise_fused_attention
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.sdpa import SDPA
from chipmunk_compile.passes.token_axis import analyse_tokens
from chipmunk_compile.passes.token_cut import fixed_nodes, owner
from chipmunk_compile.passes.token_links import call_of
from chipmunk_compile.passes.token_order import share_of
from tests.capture import capture

RANKS, BATCH, SHARE, HEADS, DIM = 2, 3, 20, 4, 8  # SHARE: tokens of one rank
WIDTH = HEADS * DIM
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True)
def two_ranks():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def exchange(x, group=None, splits=None):
    out = funcol.all_to_all_single(x.flatten(), splits, splits, group or dist.group.WORLD)
    return funcol.wait_tensor(out).view(x.shape)


def to_heads(x, group=None, splits=None):
    """[B, S / W, H, D] -> [B, H / W, S, D]"""
    x = x.unflatten(2, (RANKS, -1)).permute(2, 1, 0, 3, 4).contiguous()  # [W, S / W, B, H / W, D]
    return exchange(x, group, splits).flatten(0, 1).permute(1, 2, 0, 3)


def to_tokens(x, group=None):
    """[B, H / W, S, D] -> [B, S / W, H, D]"""
    x = x.unflatten(2, (RANKS, -1)).permute(2, 1, 0, 3, 4).contiguous()  # [W, H / W, B, S / W, D]
    return exchange(x, group).flatten(0, 1).permute(1, 2, 0, 3)


class Attend(nn.Module):
    """`body(self, *inputs)` with projections into [batch, tokens, heads, head_dim]."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        for name in ("q", "k", "v", "q2", "k2", "v2"):
            setattr(self, name, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Unflatten(-1, (HEADS, DIM))))
        self.requires_grad_(False)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def tokens(length: int = SHARE) -> torch.Tensor:
    return torch.randn(BATCH, length, WIDTH)


def captured(body, *inputs) -> torch.fx.GraphModule:
    (gm,) = capture(Attend(body), *inputs)
    return raise_fused_attention(gm)


def find(body, *inputs):
    sites, declined = find_attention(captured(body, *inputs), min_tokens=8)
    return sites, [d.reason for d in declined]


def refused(body, *inputs) -> Reason:
    sites, reasons = find(body, *inputs)
    assert not sites and len(reasons) == 1
    return reasons[0]


def ulysses(m, x):
    return to_tokens(F.scaled_dot_product_attention(*(to_heads(p(x)) for p in (m.q, m.k, m.v))))


def test_ulysses_is_self_attention_over_the_tokens_of_all_ranks():
    (site,), reasons = find(ulysses, tokens())
    assert (site.q_len, site.kv_len, site.heads) == (RANKS * SHARE, RANKS * SHARE, HEADS // RANKS) and not reasons


def test_tokens_come_back_to_their_rank():
    """The second attention reads a sum of what went around and what stayed: the same tokens."""

    def body(m, x):
        x = x + ulysses(m, x).flatten(2)
        return F.scaled_dot_product_attention(*(to_heads(p(x)) for p in (m.q2, m.k2, m.v2)))

    sites, reasons = find(body, tokens())
    assert len(sites) == 2 and not reasons


def test_what_came_back_and_what_stayed_are_the_same_tokens():
    def body(m, x):
        came = ulysses(m, x).flatten(2)
        q, k, v = to_heads(m.q2(came)), to_heads(m.k2(x)), to_heads(m.v2(x))
        return F.scaled_dot_product_attention(q, k, v)

    sites, reasons = find(body, tokens())
    # Queries hold what attention made of the tokens, keys the tokens themselves, at the same places.
    assert len(sites) == 2 and not reasons


def test_text_before_the_image_of_each_rank():
    def body(m, x, text):
        joined = [torch.cat([p(text), p2(x)], 1) for p, p2 in ((m.q, m.q2), (m.k, m.k2), (m.v, m.v2))]
        return F.scaled_dot_product_attention(*map(to_heads, joined))

    (site,), _ = find(body, tokens(), tokens(7))
    assert site.q_len == RANKS * (SHARE + 7)


def test_tokens_in_another_order_are_not_proven():
    def body(m, x):
        return F.scaled_dot_product_attention(to_heads(m.q(x)), to_heads(m.k(x.roll(1, 1))), to_heads(m.v(x)))

    assert refused(body, tokens()) is Reason.UNPROVEN_SELF_ATTENTION


def test_another_group_brings_tokens_of_other_ranks():
    def body(m, x):
        other = groups_made[0]
        return F.scaled_dot_product_attention(to_heads(m.q(x)), to_heads(m.k(x), other), to_heads(m.v(x), other))

    groups_made = [dist.new_group([0, 1])]
    assert refused(body, tokens()) is Reason.UNPROVEN_SELF_ATTENTION


def test_shares_of_unequal_size_are_not_proven():
    size = BATCH * SHARE * WIDTH

    def body(m, x):
        splits = [size // 2 - 8, size // 2 + 8]
        return F.scaled_dot_product_attention(*(to_heads(p(x), splits=splits) for p in (m.q, m.k, m.v)))

    assert refused(body, tokens()) is Reason.UNPROVEN_SELF_ATTENTION


def test_tokens_sent_to_other_ranks_are_no_longer_this_rank_s():
    """[B, S, H, D] cut into halves of the tokens: what is here after the exchange are not the tokens sent."""

    def body(m, x):
        sent = exchange(m.q(x).unflatten(1, (RANKS, -1)).transpose(0, 1).contiguous()).transpose(0, 1).flatten(1, 2)
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (sent, m.k(x), m.v(x))))

    assert refused(body, tokens()) is Reason.UNPROVEN_SELF_ATTENTION


def test_another_sequence_is_cross_attention_on_every_rank():
    def body(m, x, text):
        return F.scaled_dot_product_attention(to_heads(m.q(x)), to_heads(m.k(text)), to_heads(m.v(text)))

    assert refused(body, tokens(), tokens(SHARE)) is Reason.CROSS_ATTENTION


def gathered(x):
    return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), 1, dist.group.WORLD))


def test_keys_gathered_from_all_ranks():
    def body(m, x):
        return F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (m.q(x), gathered(m.k(x)), gathered(m.v(x))))
        )

    assert refused(body, tokens()) is Reason.KEYS_OF_RANKS


# --- tokens in another order -------------------------------------------------------------------------------------


def test_exchanges_move_all_axes_but_the_first():
    """The claim of the token rule, with all ranks in one process: permuted alike before, permuted alike after."""
    gm = raise_exchanges(captured(lambda m, x: to_heads(m.q(x)), tokens()))
    (node,) = (node for node in gm.graph.nodes if "all_to_all_single" in str(node.target))
    call = call_of(node)
    assert [[(span.slot, span.dim) for span in link.spans] for link in call.links] == [
        [(0, dim), (-1, dim)] for dim in range(1, 5)
    ]
    parts = torch.randn(RANKS, *node.meta["val"].shape)  # of each rank

    def exchanged(parts):
        return parts.transpose(0, 1)

    for link in call.links:
        dim = link.spans[0].dim + 1
        order = torch.randperm(parts.shape[dim])
        torch.testing.assert_close(
            exchanged(parts.index_select(dim, order)), exchanged(parts).index_select(dim, order), rtol=0, atol=0
        )


def test_exchanges_are_raised_and_flattened_again():
    gm = captured(ulysses, tokens())
    before = [node.args[1:] for node in collectives(gm) if "all_to_all" in node.name]
    raised = raise_exchanges(gm)
    assert all(len(node.meta["val"].shape) == 5 for node in collectives(raised))
    flatten_exchanges(raised)
    raised.graph.lint()
    assert [node.args[1:] for node in collectives(raised) if "all_to_all" in node.name] == before != []


def test_what_is_exchanged_in_one_shape_and_read_in_another_is_left():
    def body(m, x):
        flat = funcol.all_to_all_single(m.q(x).flatten(), None, None, dist.group.WORLD)
        return funcol.wait_tensor(flat).view(RANKS, -1)

    gm = captured(body, tokens())
    before = [node.name for node in gm.graph.nodes]
    assert [node.name for node in raise_exchanges(gm).graph.nodes] == before


def test_all_tokens_are_the_shares_of_all_ranks_in_one_order():
    """[text, image | text, image]: the image's permutation is that of each share, and ends at no exchange."""
    text = 7

    def body(m, x, t):
        q, k, v = (torch.cat([p(t), p2(x)], 1) for p, p2 in ((m.q, m.q2), (m.k, m.k2), (m.v, m.v2)))
        out = to_tokens(F.scaled_dot_product_attention(*map(to_heads, (q, k, v))))
        return out[:, text:].flatten(2)

    gm = raise_exchanges(captured(body, tokens(), tokens(text)))
    (site,), _ = find_attention(gm, min_tokens=8)
    axes = analyse_tokens(gm)
    assert [piece.length for piece in axes.rope(site.query, -2)] == [text, SHARE] * RANKS
    plan = plan_permutation(gm, [site], axes=axes, grid=(1, 4, 5), share=math.inf)
    assert plan.sites == {site.node} and not plan.walls
    assert sorted((plan.direction(g), tuple(g.value.meta["val"].shape)) for g in plan.gathers) == [
        ("in", (BATCH, SHARE, WIDTH)), ("out", (BATCH, SHARE, WIDTH))
    ]  # fmt: skip
    lengths = (8, 12)
    assert site_chunks(axes, site, 8, plan, [lengths]) == (text, *lengths) * RANKS


def test_nothing_is_read_between_a_collective_and_the_wait_for_it():
    """A mask that is gathered, one share behind the other, is put in the tokens' order when it has come."""

    def body(m, x, mask):
        keys = funcol.wait_tensor(funcol.all_gather_tensor(mask, 0, dist.group.WORLD))[None, None, None]
        return to_tokens(F.scaled_dot_product_attention(*(to_heads(p(x)) for p in (m.q, m.k, m.v)), keys))

    gm = raise_exchanges(captured(body, tokens(), torch.randn(SHARE)))
    sites, _ = find_attention(gm, min_tokens=8)
    plan = plan_permutation(gm, sites, grid=(1, 4, 5), share=math.inf)
    for gather in plan.gathers:
        assert not any(is_wait(user) for user in gather.users)
        assert is_wait(gather.value) or gather.value is owner(gather.value)
    (mask,) = (g for g in plan.gathers if "all_gather" in str(owner(g.value).target))
    ((_, layout),) = mask.steps
    assert plan.layouts[layout].moves == ((0, 0, False), (SHARE, 0, False)), "both shares are put in one order"


def test_ranks_and_their_shares_are_no_rows_and_columns():
    """Views of [ranks, share] fold the tokens as a picture's rows and columns would."""
    gm = raise_exchanges(captured(ulysses, tokens()))
    sites, _ = find_attention(gm, min_tokens=8)
    assert plan_permutation(gm, sites, share=math.inf).reason is Reason.NO_GRID


@pytest.mark.parametrize(
    "grid, ranks, share",
    [
        ((4, 6, 8), 2, (2, 6, 8)), ((4, 6, 8), 8, (1, 3, 8)), ((1, 6, 8), 3, (1, 2, 8)), ((1, 6, 8), 1, (1, 6, 8)),
        ((3, 6, 8), 2, None), ((1, 5, 8), 2, None), ((2, 6, 8), 8, None), ((1, 6, 8), 12, None),
    ],
)  # fmt: skip
def test_the_share_of_a_rank_is_a_box_or_nothing(grid, ranks, share):
    assert share_of(grid, ranks) == share
    if share is not None:
        frames, rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        for part in torch.stack([frames, rows, columns], -1).view(ranks, -1, 3):
            spans = [len(part[:, axis].unique()) for axis in range(3)]
            assert tuple(spans) == share and len(part) == math.prod(share)


# --- what stays the same from call to call -----------------------------------------------------------------------


def test_a_mask_of_other_ranks_is_never_taken_to_stay():
    """Whether theirs changed does not show in this rank's inputs, and a delta without the mask would send nothing."""

    def body(m, x, mask, exchanged):
        keys = (
            funcol.wait_tensor(funcol.all_gather_tensor(mask.int(), 1, dist.group.WORLD)).bool() if exchanged else mask
        )
        return F.scaled_dot_product_attention(*(to_heads(p(x)) for p in (m.q, m.k, m.v)), keys[:, None, None])

    for length, exchanged, inputs in ((SHARE, True, 0), (RANKS * SHARE, False, 1)):
        gm = captured(lambda m, x, mask, e=exchanged: body(m, x, mask, e), tokens(), torch.ones(BATCH, length).bool())
        sites, reasons = find_attention(gm, min_tokens=8)
        assert len(sites) == 1 and not reasons
        assert len(mask_inputs(gm, sites)) == inputs


def test_what_other_ranks_send_does_not_hold_still():
    gm = captured(lambda m, x: (gathered(x).cos(), x.sin()), tokens())
    (x,) = (node for node in gm.graph.nodes if node.op == "placeholder" and node.users)
    still = {str(node.target) for node in fixed_nodes(gm, {x}) if node.op == "call_function"}
    assert "aten.sin.default" in still and "aten.cos.default" not in still


# --- kernels called by their names -------------------------------------------------------------------------------


def test_a_kernel_by_its_name_is_the_same_attention():
    x = tokens()
    gm = captured(lambda m, x: flash(*(p(x).transpose(1, 2) for p in (m.q, m.k, m.v)), scale=0.25)[0], x)
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(SDPA) == 1 and not set(FUSED) & set(targets)
    (site,), _ = find_attention(gm, min_tokens=8)
    assert site.scale == 0.25


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_a_kernel_by_its_name_computes_the_same(causal, masked):
    inputs = [torch.randn(2, 3, 17, DIM) for _ in range(3)] + [torch.randn(2, 1, 1, 17)] * masked

    def body(q, k, v, mask=None):
        return flash(q, k, v, 0.0, causal, attn_mask=mask)[0]

    (gm,) = capture(Call(body), *inputs)
    raised = raise_fused_attention(gm)
    assert [node.target for node in raised.graph.nodes if "attention" in str(node.target)] == [SDPA]
    torch.testing.assert_close(raised(*inputs)[0], body(*inputs))


def test_parts_joined_by_their_log_sum_exp_are_left():
    def body(m, x):
        out, lse = flash(*(p(x).transpose(1, 2) for p in (m.q, m.k, m.v)))
        return out * lse[..., None].sigmoid()

    assert refused(body, tokens()) is Reason.PARTIAL_ATTENTION


# --- which ranks must agree --------------------------------------------------------------------------------------


class Call(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs):
        return self.body(*inputs)


def dynamo_graph(body, *inputs) -> torch.fx.GraphModule:
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(Call(body), backend=backend, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    return graphs[0]


def test_the_groups_of_a_graph_in_their_order():
    other = dist.new_group([0, 1])

    def body(x):
        return exchange(exchange(exchange(x, other), dist.group.WORLD), other)

    gm = dynamo_graph(body, torch.randn(RANKS, 4))
    assert groups(gm) == (other.group_name, dist.group.WORLD.group_name)
    assert sum("all_to_all_single" in str(node.target) for node in collectives(gm)) == 3


def test_collectives_within_a_checkpoint_count():
    def body(x):
        return torch.utils.checkpoint.checkpoint(lambda y: exchange(y).sin(), x, use_reentrant=False)

    assert groups(dynamo_graph(body, torch.randn(RANKS, 4))) == (dist.group.WORLD.group_name,)


def test_the_report_says_how_many_ranks_run_a_graph():
    report = chipmunk_compile.explain(Attend(ulysses), tokens(), options={"min_tokens": 8})
    assert [graph.ranks for graph in report.graphs] == [RANKS]
    assert f"ranks      {RANKS} exchange tokens" in report.to_text()
    assert report.permutation.reason is Reason.SPREAD_TOKENS
    assert chipmunk_compile.explain(nn.Linear(4, 4), torch.randn(3, 4)).graphs[0].ranks == 1


def test_a_grid_is_an_error_on_one_rank_alone():
    """The option of a script that ran on one GPU is no error on two, where it cannot be used."""
    options = {"min_tokens": 8, "grid": (1, 3, 5)}
    assert (
        chipmunk_compile.explain(Attend(ulysses), tokens(), options=options).permutation.reason is Reason.SPREAD_TOKENS
    )

    def alone(m, x):
        return F.scaled_dot_product_attention(*(p(x).transpose(1, 2) for p in (m.q, m.k, m.v)))

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="OptionError: grid"):
        chipmunk_compile.explain(Attend(alone), tokens(), options=options)


def test_a_collective_over_a_group_without_a_name_is_told():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    exchange = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
    waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (exchange,))
    gm = torch.fx.GraphModule({}, graph)
    assert knows_groups(gm) and groups(gm) == ("0",)
    with graph.inserting_after(waited):
        graph.call_function(torch.ops.c10d.barrier.default, (x, None))
    assert not knows_groups(gm)


def test_a_graph_of_one_process_has_none():
    assert groups(dynamo_graph(lambda x: x.sin(), torch.randn(4))) == ()
