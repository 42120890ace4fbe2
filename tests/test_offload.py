"""Weights that live elsewhere between uses: sparse where whole blocks come and go, dense where single layers do."""

import pytest
import torch

import chipmunk_compile
from tests import tiny_models
from tests.toy_dit import SMALL, Loop, toy, worst

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("diffusers.hooks")
pytestmark = pytest.mark.usefixtures("uncompiled")

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
CPU = torch.device("cpu")


def in_groups(model, **how):
    hooks.apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **how)


BY_BLOCK = {
    "whole model": lambda model, path: accelerate.cpu_offload_with_hook(model, CPU),
    "blocks": lambda model, path: in_groups(model, offload_type="block_level", num_blocks_per_group=1),
    "blocks on disk": lambda model, path: in_groups(
        model, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(path)
    ),
}
BY_LAYER = {
    "layers": lambda model, path: in_groups(model, offload_type="leaf_level"),
    "sequential": lambda model, path: accelerate.cpu_offload(model, CPU),
}


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


@pytest.mark.parametrize(
    "how, compiled",
    [
        ("whole model", "before"),
        ("whole model", "by block"),
        ("blocks", "before"),
        ("blocks", "after"),
        ("blocks", "by block"),
        ("blocks on disk", "after"),
        ("blocks on disk", "by block"),
    ],
)
def test_whole_blocks_that_come_and_go_are_sparse(how, compiled, tmp_path):
    model, steps = toy(), Loop(steps=8)
    options = {**SMALL, **EXACT}
    if compiled == "before":
        fast = torch.compile(model, backend="chipmunk", options=options)
    BY_BLOCK[how](model, tmp_path)
    if compiled == "after":
        fast = torch.compile(model, backend="chipmunk", options=options)
    if compiled == "by block":
        fast = model
        for block in model.blocks:
            block.compile(backend="chipmunk", options=options)
    expected = steps.run(toy())
    for generation in (1, 2):
        # Between hooks the toy's sin and cos are a graph without parameters: nothing else tells the step.
        with chipmunk_compile.generation(model, steps=8):
            assert worst(steps.run(fast), expected) < 1e-5
        assert counts("delta")[0] >= 4 * generation


def test_a_model_of_diffusers_in_groups_finds_its_clock():
    """Its timestep embedder has weights, and stands in one graph with the prompt's."""
    (model, kwargs), (eager, _) = tiny_models.wan(layers=1), tiny_models.wan(layers=1)
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    fast = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    prompts = [kwargs["encoder_hidden_states"], torch.randn_like(kwargs["encoder_hidden_states"])]
    with torch.no_grad():
        for step in range(6):
            latents = (1 - step / 12) * kwargs["hidden_states"]
            for prompt in prompts:
                inputs = {**kwargs, "hidden_states": latents, "timestep": kwargs["timestep"] * (1 - step / 6)}
                outputs = [m(**{**inputs, "encoder_hidden_states": prompt})[0] for m in (fast, eager)]
                assert worst(outputs[:1], outputs[1:]) < 1e-5
    assert counts("refresh", "delta", "streams") == (6, 6, 2)


@pytest.mark.parametrize("how", BY_LAYER)
def test_layers_that_come_and_go_are_dense_and_the_report_says_why(how, tmp_path):
    model, steps = toy(layers=1), Loop(steps=5)
    BY_LAYER[how](model, tmp_path)
    expected = steps.run(toy(layers=1))
    report = chipmunk_compile.explain(model, *next(iter(steps)), options=SMALL)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    assert worst(steps.run(fast), expected) < 1e-5
    assert counts("refresh", "delta") == (0, 0)
    assert report.capture.wrapped >= 8
    assert any("whole blocks" in line for line in report.capture.lines())


def test_hooks_that_cost_nothing_are_not_mentioned():
    model, inputs = toy(layers=1), next(iter(Loop()))
    assert chipmunk_compile.explain(model, *inputs, options=SMALL).capture.lines() == []
    for how in ("whole model", "blocks"):
        model = toy(layers=1)
        BY_BLOCK[how](model, None)
        assert chipmunk_compile.explain(model, *inputs, options=SMALL).capture.wrapped == 0
