"""Text padding: deltas need no mask while it stays, since columns are open keys; refreshes say where it is open."""

import pytest
import torch
import torch.nn.functional as F

import chipmunk_compile
from chipmunk_compile.kernels import reference
from chipmunk_compile.schedule import Program
from tests import tiny_models
from tests.toy_dit import TEXT, TOKENS, Block, Loop, ToyDiT, compile_toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")
EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
REFRESH, DELTA = torch.ops.chipmunk.attention_refresh.default, torch.ops.chipmunk.attention_delta.default


class Padded(ToyDiT):
    """forward(x, t, prompt, words [B, TEXT] bool): text that does not count is attended by nobody."""

    def forward(self, x, t, prompt, words):
        mask = torch.cat([words, torch.ones(*x.shape[:2], dtype=torch.bool)], 1)[:, None, None]
        for block in self.blocks:
            block.mask = mask
        return super().forward(x, t, prompt)


def attend(block, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask)


def padded(**kwargs):
    torch.manual_seed(0)
    model = Padded(**kwargs).eval().requires_grad_(False)
    for block in model.blocks:
        block.__class__ = type("PaddedBlock", (Block,), {"attend": attend})
    return model


def generate(model, words_of, steps=8, batch=2):
    """Outputs; words_of(step) is the mask handed in."""
    with torch.no_grad():
        return [model(*inputs, words_of(step)) for step, inputs in enumerate(Loop(steps=steps, batch=batch))]


WORDS = torch.tensor([[True] * 3 + [False] * 2, [True] * 4 + [False]])


def graphs(runner):
    """The attention ops' arguments of each program that was made."""
    return {
        key: [node.args for node in graph.graph.nodes if node.target in (REFRESH, DELTA)]
        for key, graph in runner.programs._compiled.items()
    }


def test_while_the_mask_stays_deltas_go_without():
    model, words = padded(), WORDS.clone()
    compiled, runners = compile_toy(model, **EXACT)
    assert worst(generate(compiled, lambda step: words), generate(model, lambda step: words)) < 1e-5
    found = graphs(runners[0])
    assert found.keys() == {(Program.REFRESH, False), (Program.DELTA, True)}
    assert all(args[3] is None for args in found[Program.DELTA, True])
    # Text is before the image: behind it every key is open.
    assert all(args[3] is not None and args[-1] == [TEXT, TEXT + TOKENS] for args in found[Program.REFRESH, False])


def test_a_mask_made_anew_at_every_step_is_handed_on():
    """Nothing is read to find out that it holds the same: deltas look at it. Results are the same."""
    outputs, words = [], WORDS.clone()
    for words_of in (lambda step: words, lambda step: words.clone()):
        torch._dynamo.reset()
        chipmunk_compile.reset()
        compiled, runners = compile_toy(padded(), **SPARSE, steps=8)
        outputs.append(generate(compiled, words_of))
    assert worst(outputs[1], outputs[0]) < 1e-6
    assert graphs(runners[0]).keys() == {(Program.REFRESH, False), (Program.DELTA, False)}


@pytest.mark.parametrize("how", ["another object", "written in place"])
@pytest.mark.parametrize("counted", [False, True])
def test_a_mask_that_changes_within_a_generation(how, counted):
    """More keys are closed from step 3 on: nothing of them is left in what follows, whatever the schedule."""

    def call(model):
        words, closed = WORDS.clone(), WORDS & (torch.arange(TEXT) < 2)

        def words_of(step):
            if step == 3 and how == "written in place":
                words.copy_(closed)
            return closed if step >= 3 and how == "another object" else words

        return generate(model, words_of, steps=6)

    model = padded()
    compiled, _ = compile_toy(model, **EXACT, **({"steps": 6} if counted else {}))
    outputs, expected = call(compiled), call(model)
    assert worst(outputs, expected) < 1e-5
    assert worst(outputs[3:4], generate(model, lambda step: WORDS, steps=6)[3:4]) > 1e-4, "the mask matters"


def test_a_model_of_diffusers():
    """HunyuanVideo counts its words in the graph; image first."""
    (model, kwargs), (eager, _) = (tiny_models.hunyuan_video(layers=1, single=1) for _ in range(2))
    compiled, runners = compile_toy(model, **EXACT)
    with torch.no_grad():
        for step in range(6):
            moving = {"hidden_states": kwargs["hidden_states"] * (1 - step / 12), "return_dict": False}
            inputs = {**kwargs, **moving, "timestep": kwargs["timestep"] * (1 - step / 6)}
            assert worst([compiled(**inputs)[0]], [eager(**inputs)[0]]) < 1e-5
    found = graphs(runners[0])
    assert all(args[3] is None for args in found[Program.DELTA, True])
    assert all(args[-1] == [0, 72] for args in found[Program.REFRESH, False])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_attention_in_two_parts_is_attention(dtype, tolerance):
    """What a GPU does at a refresh: keys that are open and keys that may be closed, merged by their log-sum-exp."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 40, 16, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 9) > 0.5
    mask[0] = False  # a prompt of no words
    logits = query @ key.mT / 4
    logits[..., 31:] = logits[..., 31:].masked_fill(~mask, -torch.inf)
    expected = logits.softmax(-1) @ value
    parts = []
    for some in (slice(0, 31), slice(31, 40)):
        lse = logits[..., some].logsumexp(-1)
        weights = (logits[..., some] - lse[..., None]).exp().nan_to_num(0.0)
        parts.append(((weights @ value[:, :, some]).to(dtype), lse.to(reference.wide(dtype))))
    (o, lse), other = parts
    reference.merge(o, lse, *other)
    torch.testing.assert_close(o.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-6, rtol=1e-6)
