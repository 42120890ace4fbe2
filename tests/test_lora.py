"""LoRA by peft on a compiled model: beside the weights, swapped, scaled, fused and unfused, swapped in place."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import Reason
from tests import tiny_models
from tests.tiny_parts import Random
from tests.toy_dit import SMALL, compile_toy, worst

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("uncompiled"), pytest.mark.filterwarnings("ignore:Already found a `peft_config`")]

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v"]
TARGETS = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]
STEPS, RANK = 5, 3


def tiny_wan():
    return tiny_models.wan(layers=1)


def with_adapters(targets=TARGETS):
    """(model, kwargs) with the adapters "one", which is active, and "two", of random weights."""
    model, kwargs = tiny_wan()
    random = Random(seed=2)
    for name in ("one", "two"):
        model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), name)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * random(*parameter.shape))
    model.set_adapters("one")
    return model.eval().requires_grad_(False), kwargs


def loop(kwargs, seed=0):
    random = Random(seed)
    latents, noise = (random(*kwargs["hidden_states"].shape) for _ in range(2))
    for step in range(STEPS):
        share = 1 - step / STEPS
        moving = {"hidden_states": share * noise + (1 - share) * latents, "timestep": kwargs["timestep"] * share}
        yield {**kwargs, **moving, "return_dict": False}


def generate(model, kwargs, **changes):
    """The outputs of one generation. changes: step_N=a function called before step N."""
    outputs = []
    with torch.no_grad():
        for number, inputs in enumerate(loop(kwargs)):
            changes.get(f"step_{number}", lambda: None)()
            outputs.append(model(**inputs)[0])
    return outputs


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def mlps(model, kwargs):
    """What becomes of the image tokens' MLPs."""
    sites = chipmunk_compile.explain(model, **next(loop(kwargs)), options=SMALL).sites
    left_alone = (Reason.CONDITIONING_MLP, Reason.TOO_FEW_TOKENS)
    return [site.reason for site in sites if site.kind == "mlp" and site.reason not in left_alone]


CHANGES = {
    "as loaded": lambda model: None,
    "swapped": lambda model: model.set_adapters("two"),
    "at half the strength": lambda model: model.set_adapters("two", weights=[0.5]),
    "at another strength": lambda model: model.set_adapters("two", weights=[0.7]),
    "two at a time": lambda model: model.set_adapters(["one", "two"], weights=[0.5, 0.3]),
    "switched off": lambda model: model.disable_lora(),
    "switched on": lambda model: model.enable_lora(),
    "fused": lambda model: model.fuse_lora(adapter_names=["one"]),
    "unfused": lambda model: model.unfuse_lora(),
    "one taken off": lambda model: model.delete_adapters("one"),
}


def test_every_change_between_generations():
    """One compiled model lives through all of them; each generation is refreshed and sparse, and right."""
    (model, kwargs), (eager, _) = with_adapters(), with_adapters()
    (fast, _), before = compile_toy(model, **EXACT), None
    for number, (name, change) in enumerate(CHANGES.items(), 1):
        for each in (model, eager):
            change(each)
        outputs, expected = generate(fast, kwargs), generate(eager, kwargs)
        assert worst(outputs, expected) < 1e-5, name
        assert counts("dense", "refresh", "delta") == (0, 2 * number, 3 * number), name
        if name not in ("as loaded", "unfused"):
            assert worst(outputs, before) > 1e-3, f"{name} changes nothing: a vacuous test"
        before = outputs


def test_weights_fused_in_place_leave_no_stale_state():
    """At a sparsity that keeps too little, what was cached from the weights before would show."""
    model, kwargs = with_adapters()
    fast = compile_toy(model, **SPARSE)[0]
    generate(fast, kwargs)
    outputs = []
    for change in ("fused", "unfused", "fused"):
        CHANGES[change](model)
        outputs.append(generate(fast, kwargs))
    torch._dynamo.reset()
    model, _ = with_adapters()
    CHANGES["fused"](model)
    alone = generate(compile_toy(model, **SPARSE)[0], kwargs)
    assert worst(alone, generate(model, kwargs)) > 1e-2, "sparse enough to tell"
    assert worst(outputs[0], alone) < 1e-6
    assert worst(outputs[2], alone) < 1e-4  # unfusing rounds the weights


@pytest.mark.parametrize("change", ["swapped", "at half the strength", "two at a time", "fused"])
def test_a_change_within_a_generation_is_refreshed(change):
    (model, kwargs), (eager, _) = with_adapters(), with_adapters()
    fast = compile_toy(model, **SPARSE)[0]
    outputs = generate(fast, kwargs, step_3=lambda: CHANGES[change](model))
    expected = generate(eager, kwargs, step_3=lambda: CHANGES[change](eager))
    errors = [worst([a], [b]) for a, b in zip(outputs, expected)]
    assert max(*errors[:2], errors[3]) < 1e-5 and errors[2] > 1e-3


def test_an_adapter_swapped_in_place():
    """diffusers' hotswap: the compiled graph stays, the weights in it become those of another adapter."""
    model, kwargs = with_adapters()
    weights = {name: peft.utils.get_peft_model_state_dict(model, adapter_name=name) for name in ("one", "two")}

    def load(model, name, **how):
        model.load_lora_adapter(weights[name], adapter_name="style", prefix=None, **how)
        return model.eval().requires_grad_(False)

    model, _ = tiny_wan()
    model.enable_lora_hotswap(target_rank=RANK + 1)
    fast, graphs = compile_toy(load(model, "one"), **EXACT)
    for name in ("one", "two", "one"):
        load(model, name, hotswap=True)
        assert worst(generate(fast, kwargs), generate(load(tiny_wan()[0], name), kwargs)) < 1e-5
    assert counts("dense", "refresh", "delta") == (0, 6, 9)
    assert len(graphs) == 1


def test_the_mlp_is_accelerated_while_the_adapter_is_fused():
    model, kwargs = with_adapters()
    reasons = []
    for change in ("as loaded", "fused", "unfused"):
        CHANGES[change](model)
        reasons += mlps(model, kwargs)
    assert reasons == [Reason.UNFUSED_ADAPTER, None, Reason.UNFUSED_ADAPTER]


def test_an_adapter_on_attention_alone_costs_nothing():
    model, kwargs = with_adapters(ATTENTION)
    assert mlps(model, kwargs) == [None]
    sites = chipmunk_compile.explain(model, **next(loop(kwargs)), options=SMALL).sites
    assert any(site.accelerated for site in sites if site.kind == "attention")
