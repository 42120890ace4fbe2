"""Every spelling of a linear map becomes aten.linear, with equal outputs; what only looks like one is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.passes.mlp_sites import find_mlps
from chipmunk_compile.passes.raise_linears import raise_linears
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.split_linears import split_linears
from tests.record import record

DIM, HIDDEN, TOKENS = 12, 20, 7


class Toy(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.w1, self.w2 = nn.Parameter(torch.randn(DIM, HIDDEN)), nn.Parameter(torch.randn(HIDDEN, DIM))
        self.b1, self.b2 = nn.Parameter(torch.randn(HIDDEN)), nn.Parameter(torch.randn(DIM))
        self.bare = nn.Linear(DIM, HIDDEN, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(DIM, HIDDEN, 1), nn.Conv1d(HIDDEN, DIM, 1, bias=False)
        self.plane1, self.plane2 = nn.Conv2d(DIM, 2 * HIDDEN, 1), nn.Conv2d(HIDDEN, DIM, 1)
        self.wide, self.depthwise = nn.Conv1d(HIDDEN, DIM, 3, padding=1), nn.Conv1d(HIDDEN, HIDDEN, 1, groups=HIDDEN)
        self.strided = nn.Conv1d(HIDDEN, DIM, 1, stride=2)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def raised(body, *inputs):
    """The one graph of a body behind the pass, whose output is that of the body."""
    model = Toy(body).eval().requires_grad_(False)
    (output, *_), (run,) = record(model, *inputs, passes=(raise_linears,))
    torch.testing.assert_close(output, model(*inputs), rtol=1e-5, atol=1e-5)
    return run


def glu(m, x):
    gate, value = m.plane1(x).chunk(2, dim=1)
    return m.plane2(F.silu(gate) * value)


x, columns = torch.randn(2, TOKENS, DIM), torch.randn(2, DIM, TOKENS)
MLPS = {  # and how many of the two linears have a bias
    "matmul, bias added": (lambda m, x: F.gelu(x @ m.w1 + m.b1) @ m.w2 + m.b2, x, 2),
    "addmm on flat tokens": (
        lambda m, x: torch.addmm(m.b2, F.relu(torch.addmm(m.b1, x.flatten(0, 1), m.w1)), m.w2).view(x.shape),
        x,
        2,
    ),
    "a linear and its bias apart": (lambda m, x: F.silu(m.bare(x) + m.b1) @ m.w2, x, 1),
    "convolutions": (lambda m, x: m.conv2(F.gelu(m.conv1(x))), columns, 1),
    "gated convolutions of a picture": (glu, torch.randn(2, DIM, 3, 5), 2),
}


@pytest.mark.parametrize("form", MLPS)
def test_an_mlp_becomes_two_linears(form):
    body, inputs, biases = MLPS[form]
    run = raised(body, inputs)
    linears = [n for n in run.gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert (len(linears), sum(len(n.args) == 3 for n in linears)) == (2, biases)
    assert not any(run.after[op] for op in ("matmul", "mm", "addmm", "conv1d", "conv2d"))
    (found,) = [candidate for kind in find_mlps(split_linears(run.gm), min_tokens=1) for candidate in kind]
    # Flat rows of no attention count as conditioning.
    assert getattr(found, "reason", None) == (Reason.CONDITIONING_MLP if "flat" in form else None)


LEFT = {
    "a product of activations": lambda m, x: x @ x.mT,
    "a matrix made in the graph": lambda m, x: x @ (m.w1 * 2).softmax(0),
    "a matrix for each sample": lambda m, x, w: torch.bmm(x, w),
    "time by frequencies": lambda m, x: (x[..., :1] @ m.w1[:1]).cos(),
    "addmm with a matrix added": lambda m, x: torch.addmm(x[0, :, :1].expand(-1, HIDDEN), x[0], m.w1),
    "scaled addmm": lambda m, x: torch.addmm(m.b1, x[0], m.w1, beta=0.5),
    "one convolution": lambda m, x: F.gelu(m.conv1(x.mT)),
    "neighbours mix": lambda m, x: m.wide(F.gelu(m.conv1(x.mT))),
    "channels apart": lambda m, x: m.depthwise(F.gelu(m.conv1(x.mT))),
    "some positions dropped": lambda m, x: m.strided(F.gelu(m.conv1(x.mT))),
    "something else flows in": lambda m, x: m.conv2(F.gelu(m.conv1(x.mT)) * x.mT.sum(1, keepdim=True)),
    "nothing between": lambda m, x: m.conv2(m.conv1(x.mT)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    inputs = (x, torch.randn(2, DIM, HIDDEN)) if "sample" in name else (x,)
    run = raised(LEFT[name], *inputs)
    assert run.after["linear"] == 0
    kept = ("matmul", "bmm", "addmm", "conv1d")
    assert {op: run.before[op] for op in kept} == {op: run.after[op] for op in kept}


def test_a_bias_is_taken_in_only_where_it_is_one():
    def body(m, x):
        shared = m.bare(x)
        return (shared + m.b1) * shared, m.bare(x) + x.sum(-1, keepdim=True), m.bare(x) + m.b1.exp()

    run = raised(lambda m, x: body(m, x)[0], x)
    assert run.after["add"] == run.before["add"] == 1  # the linear has another reader
    for i in (1, 2):
        assert raised(lambda m, x, i=i: body(m, x)[i], x).after["add"] >= 1


def test_left_alone_under_autocast():
    def body(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ m.w1

    model = Toy(body).eval().requires_grad_(False)
    _, (run,) = record(model, x, passes=(raise_linears,))
    assert run.after["linear"] == 0
