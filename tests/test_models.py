"""Real diffusers transformers: at sparsity 0 the delta program runs and equals what `torch.compile(model)` gives."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.runner import Runner
from chipmunk_compile.schedule import Program
from tests import tiny_models

STEPS = 6
OPTIONS = {
    "attention.sparsity": 0.0,
    "mlp.sparsity": 0.0,
    "attention.chunk": 32,
    "mlp.chunk": 32,
    "min_tokens": 16,
    "schedule.refresh_every": 4,
}
CLASSES = ("flux", "sd3", "pixart", "wan", "hunyuan_video", "qwen_image", "cogvideox", "ltx", "auraflow")


def loop(kwargs: dict, seed: int = 0):
    """New latents and a new timestep at every step; all else stays the same objects, as in a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        latents = torch.randn(kwargs["hidden_states"].shape, generator=generator)
        yield {**kwargs, "hidden_states": latents, "timestep": kwargs["timestep"] * (1 - step / STEPS)}


def output(result):
    return result[0] if isinstance(result, tuple) else result.sample


@pytest.mark.parametrize("name", CLASSES)
def test_sparsity_zero_equals_inductor(name):
    model, kwargs = getattr(tiny_models, name)()
    runners = []

    def spy(gm, inputs, **options):
        runners.append(chipmunk(gm, inputs, **options))
        return runners[-1]

    with torch.no_grad():
        fast = torch.compile(model, backend=spy, options=OPTIONS)
        outputs = [output(fast(**inputs)) for inputs in loop(kwargs)]
        counts = chipmunk_compile.counters()
        torch._dynamo.reset()
        plain = torch.compile(model)
        references = [output(plain(**inputs)) for inputs in loop(kwargs)]
    assert counts["refresh"] >= 2 and counts["delta"] >= 2, counts
    (runner,) = [r for r in runners if isinstance(r, Runner)]
    targets = [node.target for node in runner.programs.graph(Program.DELTA).graph.nodes]
    assert targets.count(torch.ops.chipmunk.attention_delta.default) >= 2
    assert targets.count(torch.ops.chipmunk.mlp_delta.default) >= 2
    for mine, theirs in zip(outputs, references):
        assert theirs.abs().max() > 1e-2  # not a model whose output is zero by initialisation
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
