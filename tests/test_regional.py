"""Blocks compiled one by one: state goes by the block, and the step comes from outside, or they stay dense."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.runner import Runner
from tests import tiny_models
from tests.toy_dit import SMALL, Loop, toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}


def compile_blocks(model, **options) -> list:
    """Compiles each block by itself; the runners made when they are called."""
    runners = []

    def spy(gm, inputs, **kwargs):
        runners.append(chipmunk(gm, inputs, **kwargs))
        return runners[-1]

    for block in model.blocks:
        block.compile(backend=spy, options={**SMALL, **options})
    return runners


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def guided(model, loops, steps=None):
    """One call per loop and step: guidance by several calls. `steps`: broken off after so many."""
    outputs = []
    with torch.no_grad():
        for number, inputs in enumerate(zip(*loops)):
            if number == steps:
                break
            outputs += [model(*one) for one in inputs]
    return outputs


def reference(loops):
    return guided(toy(layers=3), loops)


def test_without_a_clock_blocks_stay_dense():
    model = toy(layers=3)
    runners = compile_blocks(model, **EXACT)
    assert worst(guided(model, [Loop()]), reference([Loop()])) < 1e-5
    assert counts("dense", "refresh", "delta") == (18, 0, 0)
    assert len(runners) == 1 and isinstance(runners[0], Runner), "one graph serves all blocks"


def test_generation_reads_the_time_from_the_model_s_own_inputs():
    model = toy(layers=3)
    compile_blocks(model, **EXACT)
    loops = [Loop(seed=1), Loop(seed=2)]
    for generations in (1, 2):
        with chipmunk_compile.generation(model):
            assert worst(guided(model, loops), reference(loops)) < 1e-5
        # Of two streams each: the first two steps are refreshes, and the sixth.
        assert counts("dense", "refresh", "delta", "generations", "streams", "state_bytes") == (
            0, 18 * generations, 18 * generations, generations, 2 * generations, 0
        )  # fmt: skip
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_generation_with_counts_reads_nothing(monkeypatch):
    def read(*_):
        raise AssertionError("read from the device")

    monkeypatch.setattr("chipmunk_compile.evidence.read_evidence", read)
    monkeypatch.setattr("chipmunk_compile.generations.read_evidence", read)
    model, loops = toy(layers=3), [Loop(seed=1), Loop(seed=2)]
    compile_blocks(model, **EXACT)
    with chipmunk_compile.generation(model, steps=6, streams=2):
        assert worst(guided(model, loops), reference(loops)) < 1e-5
    assert counts("dense", "refresh", "delta", "streams", "state_bytes") == (0, 18, 18, 2, 0)


@pytest.mark.parametrize("broken_off", [1, 4])
@pytest.mark.parametrize("again", ["same prompt and noise", "same prompt", "another prompt"])
def test_counting_alone_notices_a_generation_that_was_broken_off(broken_off, again):
    """At a sparsity that keeps too little, state of the generation before would show: outputs must be the same as
    those of a model that never ran before."""
    first = [Loop(seed=1), Loop(seed=2)]
    second = [Loop(seed=1), Loop(seed=2)]
    for loop in second:
        if again != "same prompt and noise":
            loop.noise = torch.randn_like(loop.noise)
        if again == "another prompt":
            loop.prompt = torch.randn_like(loop.prompt)
    outputs = []
    for before in (None, broken_off):
        model = toy(layers=3)
        compile_blocks(model, steps=6, streams=2, **SPARSE)
        if before is not None:
            guided(model, first, before)
        outputs.append(guided(model, second))
    assert worst(outputs[0], reference(second)) > 1e-4, "sparse enough to tell"
    # After one step the count is known to be off one step late; until then every call is a refresh.
    certain = 4 if broken_off == 1 and again != "same prompt and noise" else None
    assert worst(outputs[0][:certain], outputs[1][:certain]) < 1e-6
    assert worst(outputs[1][:4], reference(second)[:4]) < 1e-5


@pytest.mark.usefixtures("uncompiled")
def test_a_model_given_without_its_wrapper_keeps_the_clock_of_its_graph():
    """generation(model) where torch.compile(model) is what is called: nothing to hook."""
    model, loop = toy(), Loop(steps=8)
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    for generations in (1, 2):
        with chipmunk_compile.generation(model):
            assert worst(guided(compiled, [loop]), guided(toy(), [loop])) < 1e-5
        assert counts("dense", "generations", "state_bytes") == (0, generations, 0)
    assert counts("delta")[0] >= 8
    with chipmunk_compile.generation(model, steps=8):
        guided(compiled, [loop])
    assert counts("dense")[0] == 0 and not model._forward_pre_hooks


def test_the_whole_model_around_a_wrapper_keeps_its_own_clock():
    """An outer module that is not compiled is asked for only by blocks."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.models = torch.nn.ModuleList([toy(1), toy(2)])
            for model in self.models:
                model.compile(backend="chipmunk", options={**SMALL, **EXACT})

        def forward(self, *inputs):
            return sum(model(*inputs) for model in self.models)

    wrapper, loop = Wrapper(), Loop()
    outputs = loop.run(wrapper)
    assert worst(outputs, loop.run(lambda *inputs: toy(1)(*inputs) + toy(2)(*inputs))) < 1e-5
    assert counts("dense", "refresh", "delta", "generations") == (0, 6, 6, 2)


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
@pytest.mark.parametrize("how", ["generation", "options"])
def test_repeated_blocks_of_diffusers(name, how):
    """Two calls a step with prompts of their own; broken off at step 7, and started again."""
    model, kwargs = getattr(tiny_models, name)()
    eager, _ = getattr(tiny_models, name)()
    prompts = [kwargs["encoder_hidden_states"], torch.randn_like(kwargs["encoder_hidden_states"])]
    options = {**SMALL, **EXACT} | ({"steps": 10, "streams": 2} if how == "options" else {})

    def run(steps):
        latents = torch.randn_like(kwargs["hidden_states"])
        worst_error = 0.0
        for step in range(steps):
            latents = 0.95 * latents + 0.1 * torch.randn_like(latents)
            moving = {"hidden_states": latents, "timestep": kwargs["timestep"] * (1 - step / 10)}
            for prompt in prompts:
                inputs = {**kwargs, **moving, "encoder_hidden_states": prompt}
                result, expected = (m(**inputs, return_dict=False)[0] for m in (model, eager))
                worst_error = max(worst_error, worst([result], [expected]))
        return worst_error

    model.compile_repeated_blocks(backend="chipmunk", options=options)
    with torch.no_grad():
        for steps in (7, 10):
            if how == "generation":
                with chipmunk_compile.generation(model):
                    error = run(steps)
            else:
                error = run(steps)
            assert error < 1e-4
    blocks = len(model.transformer_blocks if name == "qwen_image" else model.blocks)
    dense, refresh, delta, streams = counts("dense", "refresh", "delta", "streams")
    assert dense == 0 and refresh + delta == 2 * 17 * blocks
    assert delta >= 2 * (4 + 6) * blocks and streams >= 2
