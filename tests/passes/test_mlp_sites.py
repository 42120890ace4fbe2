"""Every form of an MLP on tokens is found with what it computes; its twins are not, for the right reason."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.kernels.expression import evaluate
from chipmunk_compile.passes.mlp_sites import find_mlps
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.split_linears import split_linears
from tests.record import Recorded, record
from tests.tiny_models import MODELS

DIM, HIDDEN, OUT = 12, 20, 14


class Toy(nn.Module):
    """x [.., 12] -> body: linears up, gate to 20 neurons, `fused` to both, `down` to 14 features."""

    def __init__(self, body, bias: bool = True, hidden: int = HIDDEN, out: int = OUT):
        super().__init__()
        self.body = body
        self.up = nn.Linear(DIM, hidden, bias=bias)
        self.gate = nn.Linear(DIM, hidden, bias=bias)
        self.fused = nn.Linear(DIM, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)
        self.joined = nn.Linear(DIM + hidden, out, bias=bias)
        self.slope = nn.Parameter(torch.rand(hidden))

    def forward(self, *inputs):
        return self.body(self, *inputs)


def find(model, *args, min_tokens: int = 1, **kwargs):
    """(sites, declined) of a model; every site is checked against the values of the run."""
    _, runs = record(model, *args, passes=(split_linears,), **kwargs)
    sites, declined = [], []
    for run in runs:
        found, refused = find_mlps(run.gm, min_tokens=min_tokens)
        for site in found:
            assert_computes(site, run)
        sites += found
        declined += refused
    return sites, declined


def assert_computes(site, run: Recorded) -> None:
    """down(region(up(x))) in float64, from the site's nodes alone, is what the site's node computed."""
    value = {n: v.double() for n, v in run.values.items() if isinstance(v, torch.Tensor) and not v.is_complex()}
    bias = lambda p: 0.0 if p.bias is None else value[p.bias]
    x = value[site.input].reshape(site.batch, site.tokens, site.in_features)
    hidden = [x @ value[p.weight].mT + bias(p) for p in site.up]
    assert all(h.shape == (site.batch, site.tokens, site.hidden) for h in hidden)
    out = evaluate(site.region, hidden) @ value[site.down.weight].mT + bias(site.down)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[run.values[site.node].dtype]
    torch.testing.assert_close(value[site.node].reshape(out.shape), out, rtol=tolerance, atol=tolerance)


def tokens(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


FORMS = {
    "gelu(h0)": lambda m, x: m.down(F.gelu(m.up(x))),
    "gelu_tanh(h0)": lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")),
    "silu(h0)": lambda m, x: m.down(F.silu(m.up(x))),
    "square(relu(h0))": lambda m, x: m.down(F.relu(m.up(x)) ** 2),
    "mul(h0, sigmoid(mul(h0, 1.702)))": lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(h * 1.702)),
    "mul(silu(h0), h1)": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "mul(h0, gelu(h1))": lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x))),
    "mul(h0, h1)": lambda m, x: m.down(m.up(x) * m.gate(x)),
    "mul(silu(h0), h1) of chunks": lambda m, x: m.down(F.silu((h := m.fused(x).chunk(2, -1))[0]) * h[1]),
    "mul(h0, gelu(h1)) of chunks": lambda m, x: m.down((h := m.fused(x).chunk(2, -1))[0] * F.gelu(h[1])),
    "silu(h0) of a cat": lambda m, x: m.joined(torch.cat([x.cumsum(1), F.silu(m.up(x))], -1)),
    "mul(silu(h0), h1) of chunks of a cat": lambda m, x: m.joined(
        torch.cat([F.silu((h := m.fused(x).chunk(2, -1))[0]) * h[1], x.cumsum(1)], -1)
    ),
    "silu(h0) with dropout": lambda m, x: m.down(F.dropout(F.silu(m.up(x)), 0.5, training=False)),
    "silu(h0) flattened": lambda m, x: m.down(F.silu(m.up(x)).flatten(0, 1)),
    "silu(h0) in double": lambda m, x: m.down(F.silu(m.up(x).double()).float()),
    "silu(h0) copied": lambda m, x: m.down(F.silu(m.up(x.contiguous()).clone())),
    "mul(silu(h0), 0.5)": lambda m, x: m.down(F.silu(m.up(x)) * 0.5),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_found(form, bias):
    (site,), declined = find(Toy(FORMS[form], bias), tokens(3, 7, DIM))
    assert declined == []
    assert site.region == re.sub(r" [a-z ]+$", "", form)
    assert (site.kind, site.batch, site.tokens) == ("mlp", 3, 7)
    assert (site.in_features, site.hidden, site.out_features) == (DIM, HIDDEN, OUT)
    assert len(site.up) == (2 if "h1" in form else 1)
    assert all((p.bias is not None) == bias for p in site.up)


@pytest.mark.parametrize(
    "shape, batch, count", [((1, 7, DIM), 1, 7), ((5, 1, DIM), None, None), ((2, 3, 5, DIM), 6, 5)]
)
def test_where_the_tokens_are(shape, batch, count):
    sites, declined = find(Toy(FORMS["gelu(h0)"]), tokens(*shape))
    if batch is None:
        assert not sites and [d.reason for d in declined] == [Reason.CONDITIONING_MLP]
    else:
        assert [(s.batch, s.tokens) for s in sites] == [(batch, count)] and not declined


@pytest.mark.parametrize("shape, attention, found", [((9, 3), 9, True), ((9, 3), 3, False), ((3, 9), 9, False)])
def test_many_short_sequences_count_together(shape, attention, found):
    """Rows of an MLP do not mix: frames of every pixel, or a batch that stands second, where an attention runs over
    the first dimension."""

    def body(m, x):
        y = attend(x.transpose(0, 1) if attention == x.shape[0] else x)
        return m.down(F.gelu(m.up(y.transpose(0, 1) if attention == x.shape[0] else y)))

    sites, declined = find(Toy(body), tokens(*shape, DIM), min_tokens=shape[0])
    assert [(s.batch, s.tokens) for s in sites] == ([(1, 27)] if found else [(3, 9)] if shape == (3, 9) else [])
    assert [d.reason for d in declined] == ([] if sites else [Reason.TOO_FEW_TOKENS])


def test_weights_in_another_dtype():
    """Weights kept in a dtype of their own (autocast, layerwise casting) are cast where they are used."""

    def body(m, x):
        x = F.linear(x.half(), m.up.weight.half(), m.up.bias.half())
        return F.linear(F.gelu(x), m.down.weight.half(), m.down.bias.half())

    (site,), declined = find(Toy(body), tokens(2, 7, DIM))
    assert declined == [] and {n.meta["val"].dtype for n in (site.up[0].weight, site.down.bias)} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    toy = Toy(FORMS["mul(silu(h0), h1) of chunks"]).to(dtype)
    (site,), declined = find(toy, tokens(2, 7, DIM, dtype=dtype))
    assert declined == [] and site.hidden == HIDDEN


def attend(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.parametrize("batch", [1, 3])
def test_flat_tokens_are_known_by_their_attention(batch):
    """[M, C], where M is batch times the length of an attention or of a segment that is joined for it."""

    def body(m, image, text):
        joined = attend(torch.cat([text, image], dim=1))
        flat = joined.flatten(0, 1)  # [batch * 12, C]
        return m.down(F.gelu(m.up(flat))), m.down(F.silu(m.up(image.flatten(0, 1))))

    sites, declined = find(Toy(body), tokens(batch, 7, DIM), tokens(batch, 5, DIM))
    assert [(s.batch, s.tokens) for s in sites] == [(batch, 12), (batch, 7)] and not declined


def test_flat_rows_of_no_attention_are_conditioning():
    def body(m, x, pooled):
        return attend(x), m.down(F.gelu(m.up(pooled)))

    sites, declined = find(Toy(body), tokens(2, 7, DIM), tokens(3, DIM))
    assert not sites and [d.reason for d in declined] == [Reason.CONDITIONING_MLP]
    assert declined[0].detail == {"input": (3, DIM)}


def test_sequence_first_and_grids_of_tokens():
    def body(m, x):
        flat = x.flatten(0, 1)[None]  # [1, 12, C]
        first = attend(flat).transpose(0, 1)  # [12, 1, C]
        return m.down(F.gelu(m.up(first))), m.down(F.silu(m.up(attend(flat).view(1, 3, 4, DIM))))

    sites, _ = find(Toy(body), tokens(3, 4, DIM))
    assert [(s.batch, s.tokens) for s in sites] == [(1, 12), (1, 12)]


def embed(timestep: torch.Tensor, width: int = DIM) -> torch.Tensor:
    angles = timestep[..., None] * torch.arange(1, width // 2 + 1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


CONDITIONING = {
    "timestep": (lambda m, x, t: (x, m.down(F.silu(m.up(embed(t))))), (2,)),
    "timestep in the tokens' dtype": (
        lambda m, x, t: (x, m.down(F.silu(m.up(embed(t.double()).type_as(x))))),
        (2, 7),
    ),
    "timestep of each token": (lambda m, x, t: (x, m.down(F.silu(m.up(embed(t))))), (2, 7)),
    "flat timestep of each token": (lambda m, x, t: (x, m.down(F.silu(m.up(embed(t.flatten()))))), (2, 7)),
    "position of each token": (
        lambda m, x, ids: (x, m.down(F.silu(m.up(embed(ids, DIM // 2).flatten(2))))),
        (2, 7, 2),
    ),
    "pooled text": (lambda m, x, pooled: (x, m.down(F.silu(m.up(pooled)))), (2, DIM)),
    "pooled text with an axis": (lambda m, x, pooled: (x, m.down(F.silu(m.up(pooled)))), (2, 1, DIM)),
    "mean of tokens": (lambda m, x, other: (x, m.down(F.silu(m.up(other.mean(1))))), (2, 7, DIM)),
    "both, added": (lambda m, x, t: (x, m.down(F.silu(m.up(embed(t)) + m.gate(x.mean(1))))), (2,)),
    "gated": (lambda m, x, t: (x, m.down(F.silu((h := m.fused(embed(t)).chunk(2, -1))[0]) * h[1])), (2,)),
    "joined": (lambda m, x, t: (x, m.joined(torch.cat([embed(t), F.silu(m.up(embed(t)))], -1))), (2,)),
}


@pytest.mark.parametrize("name", CONDITIONING)
def test_conditioning_is_declined(name):
    body, shape = CONDITIONING[name]
    sites, declined = find(Toy(body), tokens(2, 7, DIM), torch.rand(*shape))
    assert not sites and [d.reason for d in declined] == [Reason.CONDITIONING_MLP]


def test_tokens_that_conditioning_modulates_are_tokens():
    """The positive twin: the timestep of each token reaches the MLP, beside tokens."""

    def body(m, x, t):
        return m.down(F.silu(m.up(x * (1 + embed(t)))))

    sites, declined = find(Toy(body), tokens(2, 7, DIM), torch.rand(2, 7))
    assert [(s.batch, s.tokens) for s in sites] == [(2, 7)] and not declined


def test_embedded_tokens_are_tokens_and_an_embedded_class_is_none():
    class Embedded(Toy):
        def __init__(self):
            super().__init__(FORMS["gelu(h0)"])
            self.table = nn.Embedding(9, DIM)

        def forward(self, words):
            return super().forward(self.table(words))

    (site,), _ = find(Embedded(), torch.randint(9, (2, 7)))
    assert (site.batch, site.tokens) == (2, 7)
    sites, declined = find(Embedded(), torch.randint(9, (2,)))
    assert not sites and [d.reason for d in declined] == [Reason.CONDITIONING_MLP]


DECLINED = {
    "unknown activation": (
        lambda m, x: m.down(m.up(x).atan()), Reason.UNSUPPORTED_ACTIVATION, {"ops": ["atan"]},
    ),
    "two unknown activations": (
        lambda m, x: m.down(m.up(x).atan() * m.gate(x).sinh()),
        Reason.UNSUPPORTED_ACTIVATION,
        {"ops": ["atan", "sinh"]},
    ),
    "unknown activation in a cat": (
        lambda m, x: m.joined(torch.cat([x, m.up(x).atan()], -1)),
        Reason.UNSUPPORTED_ACTIVATION,
        {"ops": ["atan"]},
    ),
    "learned slope": (
        lambda m, x: m.down(F.relu(m.up(x)) * m.slope), Reason.UNSUPPORTED_ACTIVATION, {"ops": ["mul"]},
    ),
    "activation read elsewhere": (
        lambda m, x: (m.down(a := F.gelu(m.up(x))), a), Reason.SHARED_HIDDEN, {"read_by": "output"},
    ),
    "fused linear read whole": (
        lambda m, x: (m.down(F.silu((h := m.fused(x)).chunk(2, -1)[0]) * h.chunk(2, -1)[1]), h.sum(-1)),
        Reason.SHARED_HIDDEN,
        {"fused_linear": "fused"},
    ),
    "active dropout": (lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.5)), Reason.DROPOUT, {}),
    "weight that is computed": (
        lambda m, x: m.down(F.gelu(F.linear(x, m.up.weight * 2))),
        Reason.WEIGHT_NOT_INPUT,
        {"computed_by": "aten.mul.Tensor"},
    ),
    "operands of two dtypes": (
        lambda m, x: F.linear(F.gelu(m.up(x)).half(), m.down.weight.half()),
        Reason.MIXED_DTYPE,
        {"dtypes": ["torch.float32", "torch.float16"]},
    ),
    "rounding inside": (
        lambda m, x: m.down(F.gelu(m.up(x)).half().float()),
        Reason.UNSUPPORTED_ACTIVATION,
        {"ops": ["cast to torch.float16"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name):
    body, reason, detail = DECLINED[name]
    sites, declined = find(Toy(body), tokens(2, 7, DIM))
    assert not sites and [(d.kind, d.reason, d.detail) for d in declined] == [("mlp", reason, detail)]


def test_declined_under_autocast():
    def body(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.down(F.gelu(m.up(x)))

    sites, declined = find(Toy(body), tokens(2, 7, DIM))
    assert not sites and [d.reason for d in declined] == [Reason.MIXED_DTYPE]
    assert declined[0].detail == {"autocast": True}


def test_declined_in_double():
    sites, declined = find(Toy(FORMS["gelu(h0)"]).double(), tokens(2, 7, DIM, dtype=torch.float64))
    assert not sites and [d.reason for d in declined] == [Reason.UNSUPPORTED_DTYPE]
    assert declined[0].detail == {"dtype": "torch.float64"}


def test_too_few_tokens():
    model, x = Toy(FORMS["gelu(h0)"]), tokens(2, 7, DIM)
    assert len(find(model, x, min_tokens=7)[0]) == 1
    sites, declined = find(model, x, min_tokens=8)
    assert not sites and [(d.reason, d.detail) for d in declined] == [
        (Reason.TOO_FEW_TOKENS, {"tokens": 7, "min_tokens": 8})
    ]


@pytest.mark.parametrize("hidden, out, is_site", [(6, 9, True), (5, 9, False), (20, 40, True), (20, 41, False)])
def test_a_bottleneck_is_not_profitable(hidden, out, is_site):
    sites, declined = find(Toy(FORMS["gelu(h0)"], hidden=hidden, out=out), tokens(2, 7, DIM))
    assert len(sites) == is_site
    widths = {"hidden": hidden, "in_features": DIM, "out_features": out}
    assert [(d.reason, d.detail) for d in declined] == ([] if is_site else [(Reason.NOT_PROFITABLE, widths)])


def test_of_three_linears_in_a_row_the_first_two_are_a_site():
    def body(m, x):
        return m.up(F.silu(m.back(F.gelu(m.up(x)))))

    toy = Toy(body)
    toy.back = nn.Linear(HIDDEN, DIM)
    (site,), declined = find(toy, tokens(2, 7, DIM))
    assert site.region == "gelu(h0)"
    assert [(d.reason, d.detail) for d in declined] == [(Reason.SHARED_HIDDEN, {"read_by": site.name})]


def test_two_readers_of_one_activation_are_no_sites():
    def body(m, x):
        act = F.gelu(m.up(x))
        return m.down(act), F.linear(act, m.down.weight)

    sites, declined = find(Toy(body), tokens(2, 7, DIM))
    assert not sites and [d.reason for d in declined] == [Reason.SHARED_HIDDEN] * 2


NO_CANDIDATES = {
    "no activation": lambda m, x: m.down(m.up(x) * 2 - m.gate(x) / 3),
    "a norm inside": lambda m, x: m.down(F.layer_norm(m.up(x), (HIDDEN,))),
    "softmax inside": lambda m, x: m.down(m.up(x).softmax(-1)),
    "attention inside": lambda m, x: m.down(attend(m.up(x))),
    "a residual": lambda m, x: m.up(x + F.gelu(m.up(x)) @ m.down.weight.T[:, :DIM]),
    "gates of two inputs": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x + 1)),
    "a gate of each token": lambda m, x: m.down(F.silu(m.up(x)) * m.gate(x).mean(-1, keepdim=True).sigmoid()),
    "transposed rows": lambda m, x: m.down(F.silu(m.up(x)).transpose(0, 1)),
    "regrouped columns": lambda m, x: m.joined(F.silu(m.fused(x)).view(2, 5, 56)[..., : DIM + HIDDEN]),
    "reversed columns": lambda m, x: m.down(F.silu(m.up(x)).flip(-1)),
}


@pytest.mark.parametrize("name", NO_CANDIDATES)
def test_what_is_no_mlp_is_not_mentioned(name):
    assert find(Toy(NO_CANDIDATES[name]), tokens(2, 7, DIM)) == ([], [])


def test_names():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ff = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))

        def forward(self, x, t):
            return x + self.ff(x) * self.ff(embed(t))[:, None]

    blocks = nn.ModuleList([Block(), Block()])
    toy = Toy(lambda m, x, t: m.blocks[1](m.blocks[0](x, t), t))
    toy.blocks = blocks
    sites, declined = find(toy, tokens(2, 7, DIM), torch.rand(2))
    assert [s.name for s in sites] == [d.name for d in declined] == ["blocks.0.ff", "blocks.1.ff"]


# Of diffusers' classes with the layers of tests/tiny_models.py: token MLPs, (conditioning MLPs).
# Two blocks of each kind; each embedder (timestep, guidance, pooled text) is one, each adaptive norm one.
REAL = {
    "flux": (2 * 2 + 2, 3 + 2 * 2 + 2 + 1),
    "flux2": (2 * 2 + 2, 2 + 3 + 1),
    "chroma": (2 * 2 + 2, 1),  # the approximator's one layer
    "sd3": (2 * 2 - 1, 2 + 2 * 2 + 1),  # the last block has no text MLP
    "pixart": (1 + 2, 2),  # the caption's projection
    "wan": (1 + 2, 2),  # the text's projection
    "hunyuan_video": (1 + 2 * 2 + 2, 3 + 2 + 1 + 2 * 2 + 2 + 1),  # the text refiner has embedders of its own
    "qwen_image": (2 * 2 - 1, 1 + 2 * 2 + 1),
    "cogvideox": (2, 1 + 2 * 2 + 1),
    "ltx": (1 + 2, 2),
    "auraflow": (2 * 2 + 2, 1 + 2 * 2 + 2 + 1),
    "lumina2": (2 + 2, 1),  # a refiner each for text and image
    "cosmos": (2, 1),
    "kandinsky5": (1 + 2, 1),  # a text block
    "sana": (1, 2),  # the caption's projection; the blocks' MLPs are convolutions
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    model, kwargs = MODELS[name]()
    sites, declined = find(model, **kwargs)
    expected, conditioning = REAL[name]
    assert len(sites) == expected, [s.name for s in sites]
    assert Counter(d.reason for d in declined) == {Reason.CONDITIONING_MLP: conditioning}


def test_a_real_model_reports_its_short_text():
    """FLUX at 60 image and 7 text tokens: the text MLPs are too short, image and joint ones are sites."""
    model, kwargs = MODELS["flux"](batch=1)
    sites, declined = find(model, min_tokens=32, **kwargs)
    assert [(s.name, s.batch, s.tokens, s.region) for s in sites] == [
        ("transformer_blocks.0.ff.net", 1, 60, "gelu_tanh(h0)"),
        ("transformer_blocks.1.ff.net", 1, 60, "gelu_tanh(h0)"),
        ("single_transformer_blocks.0", 1, 67, "gelu_tanh(h0)"),
        ("single_transformer_blocks.1", 1, 67, "gelu_tanh(h0)"),
    ]
    short = [d for d in declined if d.reason is Reason.TOO_FEW_TOKENS]
    assert [d.name for d in short] == [f"transformer_blocks.{i}.ff_context.net" for i in (0, 1)]
    assert short[0].detail == {"tokens": 7, "min_tokens": 32}
