"""What diffusers demands of torch.compile in its own tests of models, with our backend: one graph, no recompiles.

A model is captured whole (fullgraph) and once: not again at a second call, at later steps, or, with dynamic sizes, at
other resolutions. Blocks compiled one by one are captured as often as with torch's own backends.
"""

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache

import chipmunk_compile
from tests import tiny_models
from tests.toy_dit import SMALL, worst

OPTIONS = {**SMALL, "attention.sparsity": 0.0, "mlp.sparsity": 0.0}
MODELS = ("flux", "wan", "hunyuan_video", "qwen_image", "sd3", "ltx")
# Graphs for each repeated block class: text runs through blocks of its own, or is as it came at the first.
GRAPHS_OF_BLOCKS = {"flux": 2, "wan": 1, "hunyuan_video": 2, "qwen_image": 1, "ltx": 1}
# Repeated classes that hold no attention over the image, of each forward: patch embedding and text refiner.
DENSE_BLOCKS = {"hunyuan_video": 2}
IMAGES, VIDEOS = ((6, 10), (8, 9)), ((4, 6), (6, 7))
STEPS = 5


@pytest.fixture
def uninduced(uncompiled, monkeypatch):
    """Graphs that stay dense run as they are, too."""

    def as_it_is(gm, inputs, config):
        def dense(*args):
            chipmunk_compile.telemetry.count("dense")
            return gm.forward(*args)

        return dense

    monkeypatch.setattr("chipmunk_compile.backend.inductor_program", as_it_is)


def tiny(name, blocks=1, **sizes):
    """(model, kwargs) with so many blocks of each kind."""
    kinds = ("layers", "single") if name in ("flux", "hunyuan_video") else ("layers",)
    return getattr(tiny_models, name)(**dict.fromkeys(kinds, blocks), **sizes)


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def check(model, name, calls=None, **sizes):
    """A generation whose first step is called twice; every output is that of the model as it is."""
    eager, kwargs = tiny(name, **sizes)
    moments = calls or (0, *range(STEPS))
    with torch.no_grad():
        for step in moments:
            moving = {"hidden_states": (1 - step / 12) * kwargs["hidden_states"], "return_dict": False}
            inputs = {**kwargs, **moving, "timestep": (1 - step / STEPS) * kwargs["timestep"]}
            assert worst([model(**inputs)[0]], [eager(**inputs)[0]]) < 1e-5


@pytest.mark.usefixtures("uninduced")
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_and_no_recompiles(name):
    model = torch.compile(tiny(name)[0], fullgraph=True, backend="chipmunk", options=OPTIONS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(model, name)
    dense, delta = counts("dense", "delta")
    assert dense == 0 and delta >= 2


@pytest.mark.usefixtures("uninduced")
@pytest.mark.parametrize("name", GRAPHS_OF_BLOCKS)
def test_repeated_blocks_are_captured_once(name):
    model, _ = tiny(name, blocks=2)
    model.compile_repeated_blocks(fullgraph=True, backend="chipmunk", options=OPTIONS)
    # Past the limit, fullgraph makes it an error.
    limit = torch._dynamo.config.patch(recompile_limit=GRAPHS_OF_BLOCKS[name])
    with limit, chipmunk_compile.generation(model):
        check(model, name, blocks=2)
    dense, delta = counts("dense", "delta")
    assert dense == DENSE_BLOCKS.get(name, 0) * (STEPS + 1) and delta >= 2 * 2


@pytest.mark.usefixtures("uninduced")
@pytest.mark.parametrize("name", MODELS)
def test_other_resolutions_recompile_nothing(name):
    resolutions = IMAGES if name in ("flux", "qwen_image", "sd3") else VIDEOS
    model = torch.compile(tiny(name)[0], fullgraph=True, dynamic=True, backend="chipmunk", options=OPTIONS)
    # Sizes that are equal by chance are not taken to be one size.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for number, (height, width) in enumerate(resolutions):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                check(model, name, calls=(0, 1, 2), height=height, width=width)
    assert counts("dense", "refresh", "delta") == (0, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_by_inductor(name):
    check_by_inductor(name)
    for way in (check_blocks_by_inductor, check_resolutions_by_inductor):
        torch._dynamo.reset()
        chipmunk_compile.reset()
        way(name)


def check_by_inductor(name):
    model = torch.compile(tiny(name)[0], fullgraph=True, backend="chipmunk", options=OPTIONS)
    with fresh_inductor_cache(), torch._dynamo.config.patch(error_on_recompile=True):
        check(model, name)
    assert counts("dense", "compiles") == (0, 2) and counts("delta")[0] >= 2


def check_blocks_by_inductor(name):
    if name not in GRAPHS_OF_BLOCKS:
        return
    model, _ = tiny(name, blocks=2)
    model.compile_repeated_blocks(fullgraph=True, backend="chipmunk", options=OPTIONS)
    limit = torch._dynamo.config.patch(recompile_limit=GRAPHS_OF_BLOCKS[name])
    with fresh_inductor_cache(), limit, chipmunk_compile.generation(model):
        check(model, name, blocks=2)
    assert counts("delta")[0] >= 2 * 2


def check_resolutions_by_inductor(name):
    resolutions = IMAGES if name in ("flux", "qwen_image", "sd3") else VIDEOS
    model = torch.compile(tiny(name)[0], fullgraph=True, dynamic=True, backend="chipmunk", options=OPTIONS)
    with fresh_inductor_cache(), torch.fx.experimental._config.patch(use_duck_shape=False):
        for number, (height, width) in enumerate(resolutions):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                check(model, name, calls=(0, 1, 2), height=height, width=width)
    assert counts("dense", "refresh", "delta") == (0, 4, 2)
