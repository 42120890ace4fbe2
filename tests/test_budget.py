"""What fits a memory budget, from bytes, work and a link: sizes of whole models, without one."""

import pytest
import torch
from torch import fx

from chipmunk_compile import Reason
from chipmunk_compile.budget import LINKS, Held, Link, fit, footprint, place, spread
from chipmunk_compile.config import Config
from chipmunk_compile.passes.lower import Treatment, site_caches
from chipmunk_compile.passes.offload import DEPTH
from chipmunk_compile.passes.sites import AttentionSite, MlpSite, Projection

aten = torch.ops.aten
GB = 10**9
PCIE = LINKS["cuda"]


def model(layers, tokens, heads, kept, hidden=0, chunk=128):
    """(canonical graph, treatments) of attentions, and MLPs where `hidden` says so, in bfloat16, head dimension 128."""
    graph, treatments, width = fx.Graph(), [], heads * 128
    lengths = tuple([chunk] * (tokens // chunk) + [tokens % chunk] * (tokens % chunk > 0))

    def node(made, *shape):
        made.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return made

    x = node(graph.placeholder("x"), 1, heads, tokens, 128)
    up, down = node(graph.placeholder("up"), hidden, width), node(graph.placeholder("down"), width, hidden)
    flat = node(graph.placeholder("flat"), 1, tokens, width)
    mlps = []
    for layer in range(layers):
        sdpa = node(graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x)), 1, heads, tokens, 128)
        site = AttentionSite(sdpa, f"attn{layer}", x, x, x, None, 1.0, 1, heads, heads, tokens, tokens, 128)
        treatments.append(Treatment(site, kept, 8, lengths))
        if hidden:
            inner = node(graph.call_function(aten.linear.default, (flat, up)), 1, tokens, hidden)
            outer = node(graph.call_function(aten.linear.default, (inner, down)), 1, tokens, width)
            projections = (Projection(up, None),), Projection(down, None)
            site = MlpSite(outer, f"mlp{layer}", flat, *projections, "gelu(h0)", 1, tokens, width, hidden, width)
            mlps.append(Treatment(site, hidden * 3 // 10, 8, lengths))
    graph.output((x,))
    return fx.GraphModule(torch.nn.Module(), graph), (*treatments, *mlps)


def hunyuan():
    return model(layers=58, tokens=119056, heads=24, kept=8384)


def flux():
    return model(layers=57, tokens=4352, heads=24, kept=768, hidden=12288, chunk=64)


def fitted(what, link=PCIE, **options):
    canonical, treatments = what
    return fit(treatments, canonical, Config.from_options(options), link)


def device_bytes(found, canonical):
    size = footprint(found.treatments, found.movable, canonical)
    hosted = sum(size.movable[n] for n in found.hosted)
    return size.shared + size.stream - hosted + (size.ring if found.hosted else 0)


def test_spread_is_even_and_begins_late():
    for of in range(1, 60):
        for count in range(1, of + 1):
            chosen = spread(count, of)
            assert len(chosen) == count and chosen == sorted(set(chosen)) and chosen[-1] == of - 1
            gaps = [b - a for a, b in zip([-1, *chosen], chosen)]
            assert max(gaps) - min(gaps) <= 1


def test_without_a_budget_nothing_moves():
    found = fitted(hunyuan())
    assert (len(found.treatments), found.movable, found.hosted, found.declined) == (58, (), frozenset(), ())


@pytest.mark.parametrize("budget", [8, 20, 46, 80])
def test_a_video_model_keeps_all_its_sites_under_any_budget(budget):
    canonical, treatments = hunyuan()
    found = fitted((canonical, treatments), memory_budget=f"{budget}GB")
    assert len(found.treatments) == 58 and not found.declined
    held = device_bytes(found, canonical)
    size = footprint(treatments, found.movable, canonical)
    assert size.stream > 80 * GB
    # One site fewer in host memory would be too much, with the room that a second stream needs.
    assert held <= budget * GB < held + size.slot + size.ring
    chosen = sorted(found.hosted)
    gaps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert max(gaps) - min(gaps) <= 1


def test_what_fits_stays_on_the_device():
    canonical, treatments = hunyuan()
    found = fitted((canonical, treatments), memory_budget="200GB")
    assert found.hosted == frozenset() and len(found.movable) == 58
    assert device_bytes(found, canonical) > 80 * GB


def test_two_streams_share_a_budget():
    canonical, treatments = hunyuan()
    one = fitted((canonical, treatments), memory_budget="60GB", steps=50, streams=1)
    two = fitted((canonical, treatments), memory_budget="60GB", steps=50, streams=2)
    assert 0 < len(one.hosted) < len(two.hosted) < 58
    size = footprint(treatments, two.movable, canonical)
    each = size.stream - sum(size.movable[n] for n in two.hosted)
    assert 2 * each + size.ring + size.shared <= 60 * GB < 2 * (each + size.slot) + size.ring + size.shared


def test_a_stream_more_than_expected_finds_room_in_host_memory():
    canonical, treatments = hunyuan()
    found = fitted((canonical, treatments), memory_budget="60GB")
    size = footprint(treatments, found.movable, canonical)
    first = size.stream - sum(size.movable[n] for n in found.hosted)
    second = place(size, 60 * GB, None, Held(size.shared + size.ring, 0, first), 0, 0)
    assert second is not None and len(second) >= 57
    third = place(size, 60 * GB, None, Held(size.shared + size.ring, 0, 60 * GB), 0, 0)
    assert third is None


def test_state_that_costs_more_to_copy_than_it_saves_is_given_up():
    """FLUX: an MLP's caches take longer to come and go than the neurons that they spare."""
    canonical, treatments = flux()
    found = fitted((canonical, treatments), memory_budget="6GB")
    assert not found.hosted and device_bytes(found, canonical) <= 6 * GB
    assert found.declined and {d.reason for d in found.declined} == {Reason.OVER_BUDGET}
    assert {d.kind for d in found.declined} == {"mlp"}, "they save less for their bytes"
    assert all(d.detail["memory_budget"] == 6 * GB and d.detail["bytes"] > 10**8 for d in found.declined)
    assert len(found.treatments) + len(found.declined) == 114


def test_over_a_link_that_costs_nothing_mlps_move_too():
    canonical, treatments = flux()
    found = fitted((canonical, treatments), Link(), memory_budget="6GB")
    kinds = [found.treatments[n].site.kind for n in found.hosted]
    assert kinds.count("attention") == 57 and 0 < kinds.count("mlp") < 57 and not found.declined


def test_programs_that_are_cuda_graphs_keep_their_state_on_the_device():
    canonical, treatments = hunyuan()
    found = fitted((canonical, treatments), memory_budget="20GB", mode="reduce-overhead")
    assert found.movable == () and device_bytes(found, canonical) <= 20 * GB
    assert found.declined and {d.reason for d in found.declined} == {Reason.NO_OFFLOAD}
    one = sum(t.bytes for t in site_caches(0, treatments[0]))
    assert len(found.treatments) == 20 * GB // one


def test_no_budget_at_all_leaves_everything_dense():
    found = fitted(flux(), memory_budget=0)
    assert found.treatments == () and len(found.declined) == 114


def test_the_ring_is_what_a_prefetch_needs():
    canonical, treatments = hunyuan()
    size = footprint(treatments, tuple(range(58)), canonical)
    assert size.ring == DEPTH * size.slot
    assert size.slot == pytest.approx(24 * 119056 * 128 * 2 + 24 * 931 * 8384 * 4, rel=1e-3)
