"""The zoo through the backend, graphs run as they are: what is accelerated of every model, and that nothing changes.

The counts are golden (tests/golden/coverage.json, made by `python -m tests.test_zoo`): a pass that finds less, or takes
what it should not, shows here by the model's name. Compiled by Inductor: test_models.py, benchmarks/coverage.py.
"""

from __future__ import annotations

import inspect
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models import transformers
from torch import nn

from tests.zoo import ZOO
from tests.zoo.census import CONSTANT, census
from tests.zoo.coverage import KINDS, NOT_SEEN, Coverage, cover

GOLDEN = pathlib.Path(__file__).parent / "golden" / "coverage.json"
# The rest takes less than four minutes on two cores. These have many graphs, block masks, or many small modules.
SLOW = (
    "BriaFibo2Transformer2DModel",
    "ConsisIDTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "Kandinsky6Transformer3DModel",
    "Lumina2Transformer2DModel",
    "LTX2VideoTransformer3DModel",
    "WanAnimate2Transformer3DModel",
    "HiDreamImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "MochiTransformer3DModel",
    "RFD4ProteinaTransformer",
    "Kandinsky6SRTransformer3DModel",
    "AnyFlowFARTransformer3DModel",
)


def counts(coverage: Coverage) -> dict[str, list[int]]:
    return {kind: [coverage.accelerated[kind], coverage.of[kind]] for kind in KINDS}


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing by more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ZOO])
def test_coverage(name, one_thread):
    coverage = cover(ZOO[name])
    assert counts(coverage) == json.loads(GOLDEN.read_text())[name], coverage.missed
    assert coverage.mistaken == ()
    assert coverage.error < coverage.tolerance
    assert all(missed.reason != NOT_SEEN for missed in coverage.missed)
    if any(coverage.accelerated.values()):
        assert coverage.calls["refresh"] >= 2 and coverage.calls["delta"] >= 2


def test_at_least_95_percent_of_the_main_path():
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == ZOO.keys()
    for kind in KINDS:
        accelerated, of = map(sum, zip(*(model[kind] for model in golden.values())))
        assert accelerated >= 0.95 * of, kind


def test_every_transformer_class_is_in_the_zoo():
    classes = {
        name for name, value in vars(transformers).items() if inspect.isclass(value) and issubclass(value, nn.Module)
    }
    assert len([name for name in classes if issubclass(getattr(transformers, name), ModelMixin)]) >= 75
    assert classes - {name.partition(" (")[0] for name in ZOO} == set()


def test_weights_are_random_and_steps_differ():
    model, inputs = ZOO["FluxTransformer2DModel"].tiny()
    assert all(parameter.abs().max() > 0 for parameter in model.parameters())
    first, second = inputs(0), inputs(1)
    moved = {name for name in first if first[name] is not second[name]}
    assert moved == {"hidden_states", "timestep"}
    assert not torch.equal(first["timestep"], second["timestep"])


# --- the census ---


class Toy(nn.Module):
    """latents x [2, 40, 16], text [2, 50, 16], time [2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.gate = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32)
        self.joined = nn.Linear(48, 16)
        self.conv1, self.conv2 = nn.Conv1d(16, 32, 1), nn.Conv1d(32, 16, 1)

    def forward(self, body, x, text, time):
        return body(self, x, text, time)


def attend(m, x, y, **kwargs):
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (m.q(x), m.k(y), m.v(y)))
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(2)


def spelled_out(m, x, y):
    return (m.q(x) @ m.k(y).mT / 4).softmax(-1) @ m.v(y)


def padding(tokens):
    """True where a query that counts meets a key that counts."""
    valid = torch.arange(tokens) < tokens - 5
    return valid & valid[:, None]


MAIN = {
    "attention sdpa": lambda m, x, text, time: attend(m, x, x),
    "attention softmax": lambda m, x, text, time: spelled_out(m, x, x),
    "attention sdpa of text and image": lambda m, x, text, time: attend(m, *[torch.cat([text, x], 1)] * 2),
    "attention sdpa with a key mask": lambda m, x, text, time: attend(m, x, x, attn_mask=torch.arange(40)[None] < 30),
    "attention sdpa and idle queries": lambda m, x, text, time: attend(m, x, x, attn_mask=padding(40)),
    "mlp two-layer": lambda m, x, text, time: m.down(F.gelu(m.up(x))),
    "mlp two-layer, squared": lambda m, x, text, time: m.down(F.relu(m.up(x)) ** 2),
    "mlp two-layer of convolutions": lambda m, x, text, time: m.conv2(F.silu(m.conv1(x.mT))),
    "mlp gated": lambda m, x, text, time: m.down(F.silu(m.gate(x)) * m.up(x)),
    "mlp gated, one linear": lambda m, x, text, time: F.linear(
        F.silu((h := m.up(x)).chunk(2, -1)[0]) * h.chunk(2, -1)[1], m.q.weight
    ),
    "mlp fused": lambda m, x, text, time: m.joined(torch.cat([x, F.gelu(m.up(x))], -1)),
}
OTHER = {
    "attention cross-attention": lambda m, x, text, time: attend(m, x, x[:, :20]),
    CONSTANT: lambda m, x, text, time: attend(m, x, text),
    "attention causal": lambda m, x, text, time: attend(m, x, x, is_causal=True),
    "attention a mask": lambda m, x, text, time: attend(m, x, x, attn_mask=torch.randn(40, 40)),
    "attention fewer": lambda m, x, text, time: attend(m, x[:, :5], x),
    "mlp conditioning": lambda m, x, text, time: x * m.down(F.silu(m.up(time)))[:, None],
    "mlp conditioning per token": lambda m, x, text, time: x * m.down(F.silu(m.up(time)[:, None].expand(2, 40, 32))),
    "mlp fewer": lambda m, x, text, time: m.down(F.gelu(m.up(x[:, :5]))),
}
NONE = {
    "affine": lambda m, x, text, time: m.down(m.up(x) * 2 + 1),
    "gated attention": lambda m, x, text, time: m.o(x.softmax(1) * m.q(x).sigmoid()),
    "a norm between": lambda m, x, text, time: m.down(F.gelu(F.layer_norm(m.up(x), (32,)))),
    "two inputs": lambda m, x, text, time: m.down(F.silu(m.gate(x)) * m.up(x.flip(1))),
    "a neighbour between": lambda m, x, text, time: m.down(F.gelu(F.avg_pool1d(m.up(x), 3, 1, 1))),
}


def counted(body):
    torch.manual_seed(0)
    inputs = dict(body=body, x=torch.randn(2, 40, 16), text=torch.randn(2, 50, 16), time=torch.randn(2, 16))
    latents, times = dict(x=torch.randn(2, 40, 16)), dict(time=torch.randn(2, 16))
    return census(Toy().eval(), inputs, latents, times, min_tokens=16, batch=2)


@pytest.mark.parametrize("name", MAIN)
def test_census_counts_the_main_path(name):
    (call,) = counted(MAIN[name])
    assert call.left == "" and name.startswith(f"{call.kind} {call.form}")
    assert (call.tokens, call.of) == ((90, 90) if "text" in name else (40, call.of))


@pytest.mark.parametrize("name", OTHER)
def test_census_tells_the_rest_apart(name):
    (call,) = counted(OTHER[name])
    assert call.left and f"{call.kind} {call.left}".startswith(name.removesuffix(" per token")) or call.left == name


@pytest.mark.parametrize("name", NONE)
def test_census_counts_nothing_else(name):
    assert counted(NONE[name]) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(counts(cover(entry)))}" for name, entry in ZOO.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
