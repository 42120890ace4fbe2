"""Models in other precisions, and wrapped as people wrap them: right, and sparse or dense with a reason."""

import copy
import logging

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import Reason
from tests import tiny_models
from tests.toy_dit import SMALL, Loop, compile_toy, toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
STEPS = 6


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def loop(kwargs):
    generator = torch.Generator().manual_seed(0)
    like = kwargs["hidden_states"]
    latents, noise = torch.randn(2, *like.shape, generator=generator).to(like.dtype)
    for step in range(STEPS):
        share = 1 - step / STEPS
        yield {
            **kwargs,
            "hidden_states": share * noise + (1 - share) * latents,
            "timestep": kwargs["timestep"] * share,
            "return_dict": False,
        }


def errors(model, reference, kwargs):
    with torch.no_grad():
        return [worst([model(**step)[0]], [reference(**step)[0]]) for step in loop(kwargs)]


def cast(kwargs, dtype):
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype, tolerance):
    """As far from float32 as the uncompiled model in that precision is, or nearly."""
    model, kwargs = tiny_models.flux()
    exact = copy.deepcopy(model)
    model.to(dtype)
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    with torch.no_grad():
        for step in loop(kwargs):
            truth = exact(**step)[0]
            mine, plain = (m(**cast(step, dtype))[0].float() for m in (compiled, model))
            assert worst([mine], [truth]) < max(1.5 * worst([plain], [truth]), tolerance)
    assert counts("dense", "refresh", "delta") == (0, 3, 3)


def test_autocast_around_the_call_is_part_of_the_graph():
    model, steps = toy(), Loop()
    compiled, _ = compile_toy(model, **EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, references = steps.run(compiled), steps.run(model)
    assert outputs[0].dtype == references[0].dtype == torch.bfloat16
    assert worst(outputs, references) < 2e-2
    assert counts("dense", "refresh", "delta") == (0, 3, 3)
    # Without it, it is another graph.
    assert worst(steps.run(compiled), steps.run(model)) < 1e-5


def test_autocast_inside_the_model_is_left_dense():
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = toy()

        def forward(self, *inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(*inputs)

    model, steps = Inside().eval(), Loop()
    compiled, _ = compile_toy(model, **EXACT)
    assert worst(steps.run(compiled), steps.run(model)) < 2e-2


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode(inference):
    model, steps = toy(), Loop()
    compiled, _ = compile_toy(model, **EXACT)
    with torch.inference_mode(inference):
        outputs = [compiled(*inputs) for inputs in steps]
    assert worst(outputs, steps.run(model)) < 1e-5
    assert counts("dense", "refresh", "delta") == (0, 3, 3)


def test_fused_projections():
    model, kwargs = tiny_models.flux()
    reference = copy.deepcopy(model)
    model.fuse_qkv_projections()
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    assert max(errors(compiled, reference, kwargs)) < 1e-4
    assert counts("dense", "refresh", "delta") == (0, 3, 3)
    attention = chipmunk_compile.explain(model, **next(loop(kwargs)), options=SMALL).sites
    assert all(site.accelerated for site in attention if site.kind == "attention")


def test_layers_cast_from_float8():
    (model, kwargs), (reference, _) = tiny_models.flux(), tiny_models.flux()
    for each in (model, reference):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    assert max(errors(compiled, reference, kwargs)) < 1e-4


def test_parameters_that_are_new_at_every_call_stay_dense(caplog):
    """Sequential offload moves each parameter in as a new object."""
    model, steps = toy(), Loop(steps=10)
    truth = steps.run(model)
    compiled, _ = compile_toy(model, **EXACT)
    outputs = []
    with torch.no_grad(), caplog.at_level(logging.WARNING, "chipmunk_compile"):
        for inputs in steps:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(parameter.data.clone(), requires_grad=False))
            outputs.append(compiled(*inputs))
    assert worst(outputs, truth) < 1e-5
    assert counts("delta") == (0,) and counts("dense")[0] >= 6
    assert [record.getMessage() for record in caplog.records if Reason.NO_LASTING_OWNER.value in record.getMessage()]


def test_a_model_that_moves_between_generations():
    """Model offload: the parameters stay the same objects, their memory is another."""
    model, steps = toy(), Loop()
    compiled, _ = compile_toy(model, **EXACT)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        assert worst(steps.run(compiled), steps.run(model)) < 1e-5
    assert counts("dense", "refresh", "delta", "generations") == (0, 9, 9, 3)
