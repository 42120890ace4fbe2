"""The token permutation on real diffusers transformers: placed, exact, and nowhere superfluous."""

import math

import pytest
import torch

from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.sites import Declined
from tests.tiny_models import MODELS
from tests.token_graphs import (
    CheckingLinks,
    attention_sites,
    captured,
    difference,
    gathers_of,
    in_double,
    without,
)

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
# Other batches, odd grids, padding, several layers.
VARIANTS = [
    ("flux", dict(batch=3, height=5, width=13, layers=2, single=2), ()),
    ("sd3", dict(batch=1, layers=2), ((1, 6, 10),)),
    ("pixart", dict(batch=1, layers=2), ((1, 8, 8),)),
    ("wan", dict(batch=3, layers=2), ((3, 4, 6),)),
    ("hunyuan_video", dict(batch=3, frames=1, height=8, width=9), ((1, 8, 9),)),
    ("cogvideox", dict(batch=1), ((3, 4, 6),)),
    ("cogvideox", dict(batch=3, frames=2, height=5, width=7), ((2, 5, 7),)),
    ("ltx", dict(batch=1, frames=1, height=8, width=9), ((1, 8, 9),)),
    ("lumina2", dict(batch=1), ((1, 6, 10),)),
    ("z_image", dict(batch=1, height=7, width=9, text=20), ((1, 7, 9),)),  # padded to 64 + 32 tokens
    ("z_image", dict(batch=2, height=7, width=9, text=20), ((1, 7, 9),)),
    ("kandinsky5", dict(frames=1, height=8, width=9), ((1, 8, 9),)),
    ("cosmos", dict(batch=2), ((3, 4, 6),)),
    ("latte", dict(batch=2), ((1, 8, 8),)),  # temporal attention mixes the batch with the tokens
    ("allegro", dict(batch=2), ((3, 4, 6),)),
]

# Gathers that the proof asks for though the numbers do not: a key mask that is true for every image token.
VACUOUS = {"hunyuan_video": 1}
SEEN: set = set()  # signatures whose links were checked, over all models


@pytest.mark.parametrize("name", GRIDS)
def test_permuted_equals_plain_and_every_gather_is_needed(name):
    check(name, dict(layers=1), GRIDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes, grids", VARIANTS)
def test_other_batches_and_grids(name, sizes, grids):
    check(name, sizes, grids)


def check(name, sizes, grids):
    gm, inputs, sites = image_graph(name, sizes)
    plan = plan_permutation(gm, sites, share=math.inf)
    assert not isinstance(plan, Declined), plan
    assert [run.grids for run in plan.runs] == [grids]
    image = {site.node for site in sites if site.q_len >= 60}
    assert plan.sites == image

    plain, single = in_double(gm, *inputs), in_single(gm, *inputs)
    CheckingLinks(gm, SEEN).run(*inputs)
    before = len(gm.graph.nodes)
    permute_tokens(gm, plan)
    gathers = gathers_of(gm)
    assert len(gathers) == sum(len(gather.steps) for gather in plan.gathers)
    assert len(gm.graph.nodes) == before + len(gathers) + len(plan.layouts)

    indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 5e-15
    assert difference(in_single(gm, *inputs, *indices), single) < 1e-5
    vacuous = [g for g in gathers if difference(in_double(without(gm, g), *inputs, *indices), plain) < 1e-6]
    assert len(vacuous) == VACUOUS.get(name, 0), vacuous


def in_single(gm, *inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(gm(*inputs))


def image_graph(name, sizes):
    """(graph, inputs, attention sites) of the one graph that holds attention over the image."""
    for gm, inputs in captured(*MODELS[name](**sizes)):
        sites = attention_sites(gm)
        if any(site.q_len >= 60 for site in sites):
            return gm, inputs, sites
    raise AssertionError("no attention over the image")


@pytest.mark.parametrize("name", ["sana", "mochi"])
def test_models_without_self_attention_in_a_graph_are_left_alone(name):
    """Sana's self-attention is linear; Mochi selects text tokens by value, and so breaks the graph at its attention."""
    for gm, inputs in captured(*MODELS[name](layers=1)):
        assert plan_permutation(gm, attention_sites(gm), share=math.inf).reason is Reason.NO_SITES
        CheckingLinks(gm, SEEN).run(*inputs)
