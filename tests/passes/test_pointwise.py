"""Every pointwise op is read as text that means the same; what mixes elements is not read at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.kernels.expression import evaluate, is_linear, print_cpp, print_triton
from chipmunk_compile.passes.linears import is_hidden, is_map
from chipmunk_compile.passes.pointwise import _RULES, read_region
from tests.capture import capture
from tests.record import count

DIM, HIDDEN = 4, 6


class Outputs(nn.Module):
    """x [2, 3, 4] -> one output for each function, each of two linears of its own, [2, 3, 6]."""

    def __init__(self, functions):
        super().__init__()
        self.functions = list(functions)
        self.linears = nn.ModuleList(nn.Linear(DIM, HIDDEN) for _ in range(2 * len(self.functions)))
        self.slope = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x):
        pairs = zip(self.functions, self.linears[::2], self.linears[1::2])
        return [f(a(x), b(x)) for f, a, b in pairs]


def read(functions: dict):
    """{name: Region or None} of functions of two linears' outputs, all read from one graph."""
    (gm,) = capture(Outputs(functions.values()), torch.randn(2, 3, DIM))
    output = next(iter(reversed(gm.graph.nodes)))
    regions = [read_region(node, is_hidden) for node in output.args[0]]
    return dict(zip(functions, regions, strict=True)), gm


READ = {
    "abs": lambda a, b: torch.abs(a),
    "absolute": lambda a, b: torch.absolute(a),
    "erf": lambda a, b: torch.erf(a),
    "special_erf": lambda a, b: torch.special.erf(a),
    "exp": lambda a, b: torch.exp(a),
    "expm1": lambda a, b: torch.expm1(a),
    "log": lambda a, b: torch.log(a.abs() + 1),
    "log1p": lambda a, b: torch.log1p(a.abs()),
    "neg": lambda a, b: -a * b,
    "negative": lambda a, b: torch.negative(a),
    "relu": lambda a, b: F.relu(a),
    "sigmoid": lambda a, b: torch.sigmoid(a),
    "special_expit": lambda a, b: torch.special.expit(a),
    "silu": lambda a, b: F.silu(a),
    "sqrt": lambda a, b: torch.sqrt(a.abs()),
    "rsqrt": lambda a, b: torch.rsqrt(a.abs() + 0.1),
    "reciprocal": lambda a, b: torch.reciprocal(a.abs() + 0.1),
    "square": lambda a, b: torch.square(a),
    "tanh": lambda a, b: torch.tanh(a),
    "add": lambda a, b: torch.add(a, b, alpha=-2) + 1,
    "add a number, alpha": lambda a, b: torch.add(a * a, 3, alpha=2),
    "sub": lambda a, b: torch.sub(a, b, alpha=3) - 0.5,
    "subtract": lambda a, b: torch.subtract(a, b),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=2) + (1 - a),
    "mul": lambda a, b: a * b * 0.25,
    "multiply": lambda a, b: torch.multiply(a, b),
    "div": lambda a, b: a / (1 + b.abs()) / 3,
    "divide": lambda a, b: torch.divide(a, 2.0),
    "true_divide": lambda a, b: torch.true_divide(a, 1 + b * b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.minimum(a, b),
    "max": lambda a, b: torch.max(a, b),
    "min": lambda a, b: torch.min(a, b),
    "clamp": lambda a, b: a.clamp(-1.5, 2),
    "clamp by tensors": lambda a, b: torch.clamp(a, max=b),
    "clip": lambda a, b: torch.clip(a, min=-0.5),
    "clamp_min": lambda a, b: torch.clamp_min(a, 0.5),
    "clamp_max": lambda a, b: torch.clamp_max(a, 0.5),
    "where": lambda a, b: torch.where(a > 0.5, a, b * 2),
    "where numbers": lambda a, b: torch.where(a <= b, 1.0, b),
    "gt": lambda a, b: torch.where(a > b, a, b),
    "ge": lambda a, b: torch.where(a >= 0, a, b),
    "lt": lambda a, b: torch.where(a < b, a, b * 0.5),
    "le": lambda a, b: torch.where(a <= -0.5, a, b),
    "pow": lambda a, b: a**2 + a**3 - 0.1 * a.pow(5),
    "pow below zero": lambda a, b: (1 + a.abs()) ** -3 + (1 + b.abs()) ** -0.5,
    "pow one half": lambda a, b: a.abs() ** 0.5,
    "gelu": lambda a, b: F.gelu(a),
    "gelu tanh": lambda a, b: F.gelu(a, approximate="tanh"),
    "softplus": lambda a, b: F.softplus(a),
    "softplus beta": lambda a, b: F.softplus(a, beta=2.5),
    "log_sigmoid": lambda a, b: F.logsigmoid(a),
    "mish": lambda a, b: F.mish(a),
    "leaky_relu": lambda a, b: F.leaky_relu(a, 0.2),
    "elu": lambda a, b: F.elu(a, alpha=0.7),
    "celu": lambda a, b: F.celu(a, alpha=1.3),
    "selu": lambda a, b: F.selu(a),
    "relu6": lambda a, b: F.relu6(a * 3),
    "hardtanh": lambda a, b: F.hardtanh(a, -0.5, 1.5),
    "hardsigmoid": lambda a, b: F.hardsigmoid(a),
    "hardswish": lambda a, b: F.hardswish(a),
    "threshold": lambda a, b: F.threshold(a, 0.1, -2.0),
    "softsign": lambda a, b: F.softsign(a),
    "tanhshrink": lambda a, b: F.tanhshrink(a),
    "silu in place": lambda a, b: F.silu(a + 0, inplace=True) * b,
    "gelu spelled out": lambda a, b: 0.5 * a * (1 + torch.tanh(0.7978845608 * (a + 0.044715 * a**3))),
    "gated": lambda a, b: F.silu(a) * b,
    "gated, the other way": lambda a, b: a * F.silu(b),
    "constant tensor": lambda a, b: F.silu(a) * torch.tensor(1.5),
    "filled tensor": lambda a, b: F.silu(a) * torch.full_like(a, 0.5),
    "dropout": lambda a, b: F.dropout(F.silu(a), 0.3, training=False),
    "copies": lambda a, b: F.silu(a.clone().detach()).contiguous(),
    "casts": lambda a, b: F.silu(a.double()).float().to(torch.float32),
    "views and back": lambda a, b: (F.silu(a).view(2, -1, 3) * b.reshape(2, -1, 3)).reshape(2, -1, HIDDEN),
    "leading views": lambda a, b: (F.silu(a.flatten(0, 1)) * b.reshape(-1, HIDDEN)).view(2, -1, HIDDEN)[None],
}


@pytest.fixture(scope="module")
def regions():
    return read(READ)[0]


@pytest.mark.parametrize("name", READ)
def test_read(name, regions):
    region = regions[name]
    assert region is not None and region.unsupported == ()
    assert all(map(is_map, region.hidden)) and len(region.hidden) in (1, 2)
    hidden = list(torch.empty(2, 2, 2000, HIDDEN, dtype=torch.float64).uniform_(-9, 9))
    truth = READ[name](*hidden).double()
    # Linears are numbered by the region's reading order, not the function's: the second may come first.
    order = sorted(range(len(region.hidden)), key=lambda i: _position(region.hidden[i]))
    arguments = [hidden[order.index(i)] for i in range(len(order))]
    result = evaluate(region.text, arguments)
    tolerance = 1e-6 if name == "casts" else 1e-8  # softplus has torch's threshold, its casts are real
    torch.testing.assert_close(result.reshape(truth.shape), truth, rtol=tolerance, atol=tolerance)
    for language in (print_cpp, print_triton):
        assert language(region.text, ["a", "b"])


def _position(node) -> int:
    return list(node.graph.nodes).index(node)


def test_every_rule_is_tested():
    called = set(count(read(READ)[1]))
    assert {packet.__name__ for packet in _RULES} <= called


UNSUPPORTED = {
    "atan": (lambda a, b: a.atan(), ("atan",)),
    "inside": (lambda a, b: F.silu(a.sinh()) * b, ("sinh",)),
    "two": (lambda a, b: a.atan() * b.sinh() + a.atan(), ("atan", "sinh")),
    "power": (lambda a, b: a.abs() ** 1.5, ("pow",)),
    "power of two tensors": (lambda a, b: a.abs() ** b, ("pow",)),
    "power of a number": (lambda a, b: 2.0**a, ("pow",)),
    "floor division": (lambda a, b: torch.div(a, 2.0, rounding_mode="floor"), ("div",)),
    "arithmetic with a comparison": (lambda a, b: a * (b > 0), ("mul",)),
    "logic": (lambda a, b: torch.where(torch.logical_and(a > 0, b > 0), a, b), ("logical_and",)),
    "an infinite bound": (lambda a, b: a.clamp(min=-float("inf")), ("clamp",)),
    "a number beyond float32": (lambda a, b: a * 1e300, ("mul",)),
    "active dropout": (lambda a, b: F.dropout(F.silu(a), 0.3, training=True), ("dropout",)),
    "rounding": (lambda a, b: F.silu(a).bfloat16().float(), ("cast to torch.bfloat16",)),
}


def test_unsupported():
    regions, _ = read({name: function for name, (function, _) in UNSUPPORTED.items()})
    found = {name: region and (region.text, region.unsupported) for name, region in regions.items()}
    assert found == {name: ("", ops) for name, (_, ops) in UNSUPPORTED.items()}


NOT_POINTWISE = {
    "sum": lambda a, b: a * b.sum(-1, keepdim=True),
    "cumsum": lambda a, b: a.cumsum(-1),
    "softmax": lambda a, b: a.softmax(-1),
    "maximum of a row": lambda a, b: a.amax(-1, keepdim=True) + b,
    "max with a dimension": lambda a, b: b - a.max(-1, keepdim=True).values,
    "flip": lambda a, b: a.flip(-1) * b,
    "transposed": lambda a, b: a.transpose(0, 1),
    "other columns": lambda a, b: F.silu(a).view(2, 6, 3),
    "broadcast": lambda a, b: a * b[:, :1],
    "every pair of tokens": lambda a, b: a.unsqueeze(1) * b.unsqueeze(2),
    "mask": lambda a, b: torch.where(torch.ones(3, HIDDEN).tril().bool(), a, b),
    "norm": lambda a, b: F.layer_norm(a, (HIDDEN,)),
    "random": lambda a, b: a * torch.rand_like(a),
    "to integers": lambda a, b: a.int().float(),
    "no hidden value": lambda a, b: torch.zeros(2, 3, HIDDEN),
}


def test_not_pointwise():
    regions, _ = read(NOT_POINTWISE)
    assert regions == dict.fromkeys(NOT_POINTWISE)


def test_a_region_ends_at_its_linears_and_holds_what_lies_between():
    functions = {
        "gated": lambda a, b: F.dropout(F.silu(a) * b, 0.1, training=False),
        "linear": lambda a, b: a,
    }
    regions, gm = read(functions)
    gated, linear = regions.values()
    assert gated.text == "mul(silu(h0), h1)" and not is_linear(gated.text)
    names = [n.target._overloadpacket.__name__ for n in gm.graph.nodes if n in gated.inside]
    assert names == ["silu", "mul", "dropout"]
    assert linear.text == "h0" and linear.inside == frozenset() and is_linear(linear.text)


def test_a_graph_that_doubles_is_no_region():
    def doubled(a, b):
        for _ in range(20):
            a = a * a
        return a

    assert read({"doubled": doubled})[0] == {"doubled": None}


def test_a_long_chain_is_no_region():
    def chain(a, b):
        for _ in range(60):
            a = a.tanh()
        return a

    assert read({"chain": chain})[0] == {"chain": None}
