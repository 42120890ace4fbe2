"""What is handed to a model beside latents (residuals, embeddings, times per token, numbers): sparse, and right."""

import copy

import pytest
import torch

import chipmunk_compile
from tests.tiny_conditions import WITH_CONDITIONS, flux_controlnet, flux_with_residuals
from tests.tiny_parts import Random
from tests.toy_dit import SMALL, Loop, ToyDiT, compile_toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
STEPS = 6
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def steps(kwargs, steps=STEPS):
    """A generation: latents move from noise, times fall, residuals are others at each step."""
    random = Random(seed=3)
    latents, noise = (random(*kwargs["hidden_states"].shape) for _ in range(2))
    for step in range(steps):
        share = 1 - step / steps
        moving = {"hidden_states": share * noise + (1 - share) * latents, "timestep": share * kwargs["timestep"]}
        residuals = {name: [(0.5 + share) * r for r in kwargs[name]] for name in RESIDUALS if name in kwargs}
        yield {**kwargs, **moving, **residuals, "return_dict": False}


def errors(model, inputs, **options):
    """Of each step of a generation, to the model as it is; outputs may be lists."""
    reference = copy.deepcopy(model)
    compiled, runners = compile_toy(model, **{**EXACT, **options})
    found = []
    with torch.no_grad():
        for one in inputs:
            mine, plain = (m(**one)[0] for m in (compiled, reference))
            found.append(worst(*([x] if isinstance(x, torch.Tensor) else x for x in (mine, plain))))
    return found, runners


@pytest.mark.parametrize("name", WITH_CONDITIONS)
def test_conditions_beside_latents(name):
    model, kwargs = WITH_CONDITIONS[name](layers=2 if name == "sd3_with_residuals" else 1)
    found, (runner,) = errors(model, steps(kwargs))
    assert max(found) < 1e-5
    assert counts("dense", "refresh", "delta", "streams") == (0, 3, 3, 1)
    assert {treatment.site.kind for treatment in runner.programs.plan.treatments} == {"attention", "mlp"}


def test_a_controlnet_is_a_transformer_too():
    model, kwargs = flux_controlnet()
    found, (runner,) = errors(model, steps(kwargs))
    assert max(found) < 1e-5
    assert counts("dense", "refresh", "delta") == (0, 3, 3)
    assert len(runner.programs.plan.treatments) == 4


@pytest.mark.parametrize("how", ["left out", "zero"])
def test_a_controlnet_that_ends_half_way(how):
    """Residuals left out are another graph, which begins with a refresh; where they are zero all at once, nothing is
    built on the step before."""
    model, kwargs = flux_with_residuals(layers=1, single=1)

    def inputs():  # one by one, so that no tensor outlives its step
        for step, one in enumerate(steps(kwargs, 8)):
            ended = {name: None if how == "left out" else [0 * r for r in one[name]] for name in RESIDUALS[:2]}
            yield one | (ended if step >= 4 else {})

    found, runners = errors(model, inputs(), **{"attention.sparsity": 0.6, "mlp.sparsity": 0.6})
    assert [step for step, error in enumerate(found) if error < 1e-5] == [0, 1, 4, 5]
    assert len(runners) == (2 if how == "left out" else 1) and max(found) < 0.5


def test_a_strength_that_changes_with_every_step():
    """A Python float: Dynamo makes a variable of it at the second step."""
    model, kwargs = flux_controlnet()
    inputs = [{**one, "conditioning_scale": 1.0 - 0.1 * number} for number, one in enumerate(steps(kwargs, 8))]
    found, runners = errors(model, inputs)
    assert max(found) < 1e-5 and len(runners) == 2
    assert counts("dense") == (0,) and counts("delta")[0] >= 4


class TakesNumber(ToyDiT):
    """The timestep is a Python number in 0..1000, made a tensor in one of the ways people do it."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, t, prompt):
        times = {
            "full": lambda: torch.full((len(x),), t, dtype=torch.float32),
            "tensor": lambda: torch.tensor([t], dtype=torch.float32).expand(len(x)),
            "product": lambda: torch.ones(len(x)) * t,
        }
        return super().forward(x, times[self.how]() / 1000, prompt)


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("how", ["full", "tensor", "product"])
def test_a_timestep_that_is_a_number(how, kind):
    torch.manual_seed(0)
    model = TakesNumber(how).eval().requires_grad_(False)
    compiled, runners = compile_toy(model, **EXACT)
    with torch.no_grad():
        for _ in range(2):
            for x, t, prompt in Loop(steps=8):
                inputs = x, kind(1000 * t.item()), prompt
                assert worst([compiled(*inputs)], [model(*inputs)]) < 1e-5
    # The first call of all is of a constant; from the second on, the number is an input, and tells the time.
    assert counts("dense", "refresh", "delta", "generations") == (1, 6, 9, 2)
    assert len(runners) == 2


def test_a_number_that_changes_is_no_size():
    """Beside a timestep that is a tensor, with new sizes too: one program for each size, not for each number."""

    class Counts(ToyDiT):
        def forward(self, x, t, prompt, number):
            return super().forward(x * (1 + number / 100), t, prompt)

    torch.manual_seed(0)
    model = Counts().eval().requires_grad_(False)
    compiled = torch.compile(model, backend="chipmunk", dynamic=True, options={**SMALL, **EXACT})
    with torch.no_grad():
        for batch in (1, 2):
            for number, inputs in enumerate(Loop(steps=8, batch=batch), start=2):
                assert worst([compiled(*inputs, number)], [model(*inputs, number)]) < 1e-5
    assert counts("dense", "refresh", "delta") == (0, 6, 10)
