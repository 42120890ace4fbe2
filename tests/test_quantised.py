"""Linears quantised by torchao: attention is accelerated as ever, MLPs stay dense with their reason, never wrong."""

import copy
import logging

import pytest
import torch
from torch import nn

import chipmunk_compile
from chipmunk_compile import Reason
from tests import tiny_models
from tests.toy_dit import SMALL, Loop, compile_toy, toy, worst

quantization = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
KINDS = {
    # (what quantises, the weight's type, tolerance: activations are rounded to 8 bits, and not always the same way)
    "int8 weights": (quantization.Int8WeightOnlyConfig, "Int8Tensor", 1e-5),
    "float8 weights": (quantization.Float8WeightOnlyConfig, "Float8Tensor", 1e-5),
    "int8 weights and activations": (quantization.Int8DynamicActivationInt8WeightConfig, "Int8Tensor", 3e-2),
}


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def quantised_toy(kind="int8 weights", which=lambda module, name: isinstance(module, nn.Linear), layers=2):
    """(the toy, its blocks quantised, a copy to compare with)."""
    model = toy(layers=layers)
    quantization.quantize_(model.blocks, KINDS[kind][0](), which)
    return model, copy.deepcopy(model)


def declined_mlps(model, inputs):
    sites = chipmunk_compile.explain(model, *inputs, options=SMALL).sites
    declined = [site for site in sites if site.kind == "mlp" and site.reason is not Reason.CONDITIONING_MLP]
    return [(site.reason, dict(site.detail)) for site in declined]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_accelerated_and_mlps_are_not(kind):
    _, weight, tolerance = KINDS[kind]
    (model, reference), steps = quantised_toy(kind), Loop()
    compiled, runners = compile_toy(model, **EXACT)
    assert worst(steps.run(compiled), steps.run(reference)) < tolerance
    assert counts("dense", "refresh", "delta") == (0, 3, 3)
    assert [treatment.site.kind for treatment in runners[0].programs.plan.treatments] == ["attention"] * 2
    assert declined_mlps(model, next(iter(steps))) == [(Reason.WEIGHT_NOT_INPUT, {"quantised": weight})] * 2


@pytest.mark.parametrize("kind", ["int8 weights", "float8 weights"])
def test_compiled_by_inductor(kind):
    (model, reference), steps = quantised_toy(kind, layers=1), Loop(steps=4)
    compiled, _ = compile_toy(model, **EXACT)
    outputs = steps.run(compiled)
    assert worst(outputs, steps.run(reference)) < 1e-5
    assert worst(outputs, steps.run(toy(layers=1))) > 1e-3, "quantised weights round"
    assert counts("dense", "refresh", "delta") == (0, 2, 2)


@pytest.mark.usefixtures("uncompiled")
def test_attention_alone_quantised():
    model, reference = quantised_toy(which=lambda module, name: name.endswith(("qkv", "out")))
    steps = Loop()
    compiled, runners = compile_toy(model, **EXACT)
    assert worst(steps.run(compiled), steps.run(reference)) < 1e-5
    kinds = sorted(treatment.site.kind for treatment in runners[0].programs.plan.treatments)
    assert kinds == ["attention", "attention", "mlp", "mlp"]


@pytest.mark.usefixtures("uncompiled")
def test_a_model_of_diffusers():
    """Linears that are fused, with attention and with one another, are left whole."""
    model, kwargs = tiny_models.flux(layers=1, single=1)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **EXACT})
    with torch.no_grad():
        for step in range(4):
            moving = {"timestep": kwargs["timestep"] * (1 - step / 4), "return_dict": False}
            inputs = {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 - step / 8), **moving}
            assert worst([compiled(**inputs)[0]], [reference(**inputs)[0]]) < 1e-5
    assert counts("dense", "refresh", "delta") == (0, 2, 2)


class Dequantised(nn.Linear):
    def forward(self, x):
        return x @ self.weight.dequantize().mT + self.bias


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", ["used otherwise", "under autocast"])
def test_what_cannot_be_read_stays_dense(how, caplog):
    (model, reference), steps = quantised_toy(layers=1), Loop()
    if how == "used otherwise":
        for each in (model, reference):
            each.blocks[0].up.__class__ = Dequantised
    compiled, _ = compile_toy(model, **EXACT)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "under autocast")
    with autocast, caplog.at_level(logging.INFO, "chipmunk_compile"):
        outputs, expected = steps.run(compiled), steps.run(reference)
    assert worst(outputs, expected) < (2e-2 if how == "under autocast" else 1e-5)
    assert counts("dense", "delta") == (6, 0)
    assert Reason.NO_CANONICAL_FORM.value in caplog.text and "Int8Tensor" in caplog.text
