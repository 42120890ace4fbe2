"""The token permutation on real diffusers transformers: placed, exact, and nowhere superfluous."""

import math

import pytest
import torch
from tests.tiny_models import MODELS
from tests.token_graphs import CheckingLinks, attention_sites, captured, difference, gathers_of, in_double, without

from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from chipmunk_compile.passes.sites import Declined

GRIDS = {
    "flux": (),  # ids say it at run time
    "flux2": (),
    "sd3": ((1, 6, 10),),
    "pixart": ((1, 8, 8),),
    "wan": ((3, 4, 6),),
    "wan_i2v": ((3, 4, 6),),
    "wan_vace": ((3, 4, 6),),
    "hunyuan_video": ((3, 4, 6),),
    "qwen_image": ((1, 6, 10),),
    "cogvideox": ((3, 4, 6),),
    "ltx": ((3, 4, 6),),
    "auraflow": ((1, 6, 10),),
    "lumina2": ((1, 6, 10),),
    "chroma": (),
    "z_image": ((1, 8, 12),),
    "kandinsky5": ((3, 4, 6),),
    "cosmos": ((3, 4, 6),),
    "cogview4": ((1, 6, 10),),
    "dit": ((1, 8, 8),),
    "latte": ((1, 8, 8),),
    "allegro": ((3, 4, 6),),
}

SEEN: set = set()  # signatures whose links were checked, over all models

# Gathers that the proof asks for though the numbers do not: a key mask that is true for every image token.
VACUOUS = {"hunyuan_video": 1}


def planned(name, **sizes):
    """(graph, inputs, plan) of the graph that holds the attention."""
    model, kwargs = MODELS[name](layers=1, **sizes)
    for gm, inputs in captured(model, kwargs):
        sites = attention_sites(gm)
        if any(site.q_len >= 60 for site in sites):
            return gm, inputs, sites, plan_permutation(gm, sites, share=math.inf)
    raise AssertionError("no attention over the image")


@pytest.mark.parametrize("name", GRIDS)
def test_permuted_equals_plain_and_every_gather_is_needed(name):
    gm, inputs, sites, plan = planned(name)
    assert not isinstance(plan, Declined), plan
    assert [run.grids for run in plan.runs] == [GRIDS[name]]
    image = [site for site in sites if site.q_len >= 60]
    assert plan.sites.issuperset(site.node for site in image)

    plain = in_double(gm, *inputs)
    CheckingLinks(gm, SEEN).run(*inputs)
    before = len(gm.graph.nodes)
    permute_tokens(gm, plan)
    gathers = gathers_of(gm)
    assert len(gathers) == sum(len(gather.steps) for gather in plan.gathers)
    assert len(gm.graph.nodes) == before + len(gathers) + len(plan.layouts)

    indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 5e-15
    vacuous = [g for g in gathers if difference(in_double(without(gm, g), *inputs, *indices), plain) < 1e-6]
    assert len(vacuous) == VACUOUS.get(name, 0), vacuous
