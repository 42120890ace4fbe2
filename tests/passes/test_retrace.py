"""Tracing one node of each kind gives the graph that tracing them all gives, or says why it cannot."""

import pytest
import torch

from chipmunk_compile.passes.canonical import _whole, clean, export
from chipmunk_compile.passes.retrace import Unlike, retrace
from tests import tiny_models
from tests.toy_dit import Loop, toy

ops = torch.ops.aten


def dynamo_graphs(model, *args, **kwargs):
    """Runs `model`; what a backend gets of it, as (graph, inputs)."""
    captured = []

    def backend(gm, inputs, **_):
        captured.append((gm, inputs, retraced(gm, inputs), structure(clean(_whole(gm, inputs)))))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=kwargs.pop("dynamic", None))(*args, **kwargs)
    torch._dynamo.reset()
    return captured


def retraced(gm, inputs):
    """(the structure of the retraced graph or why there is none, how many ops were traced)"""
    traced = []

    def counting(loose, fakes):
        traced.append(sum(node.op.startswith("call") for node in loose.graph.nodes))
        return export(loose, fakes)

    try:
        made = structure(clean(retrace(gm, inputs, counting)))
    except Unlike as why:
        made = str(why)
    return made, sum(traced)


def structure(gm) -> list[tuple]:
    """Every node by what it computes from the inputs, its module and its layout; sorted, for order is free."""
    known = {}
    for node in gm.graph.nodes:
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        layouts = [(v.shape, v.stride(), v.dtype, v.device) for v in values if isinstance(v, torch.Tensor)]
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack and node.op == "call_function" else ""
        target = len(known) if node.op == "placeholder" else str(node.target)
        known[node] = hash((node.op, target, repr(arguments), repr(layouts), path))
    return sorted(known.values())


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan_video", "qwen_image", "cogvideox", "ltx", "lumina2"])
def test_real_models_are_the_same_graph(name):
    """Of these Wan, HunyuanVideo, CogVideoX, LTX and Lumina write rotary embeddings or masks in place."""
    model, kwargs = tiny_models.MODELS[name]()
    for _, _, (made, _), whole in dynamo_graphs(model, **kwargs):
        assert made == whole


def test_what_is_traced_does_not_grow_with_depth():
    (inputs,) = Loop(steps=1)
    counted = []
    for layers in (2, 8):
        ((gm, _, (_, traced), _),) = dynamo_graphs(toy(layers=layers), *inputs)
        counted.append((traced, sum(node.op.startswith("call") for node in gm.graph.nodes)))
    (few, small), (many, large) = counted
    assert few == many < small < large / 2.5


class Written(torch.nn.Module):
    """A row is written; what reads the tensor before, sees what was there before."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x):
        out = []
        for _ in range(3):
            x = self.linear(x)
            rows = x.unflatten(0, (2, 2))
            sums = x.sum(0)
            rows[:, 0] = rows[:, 1] * 2
            x += sums
            out.append(x.relu())
        return torch.stack(out)


def test_a_tensor_that_is_written_to_is_taken_as_one():
    model, x = Written().eval(), torch.randn(4, 6)
    ((gm, inputs, (made, traced), whole),) = dynamo_graphs(model, x)
    assert made == whole
    assert traced < sum(node.op.startswith("call") for node in gm.graph.nodes), "the three rounds are alike"
    with torch.no_grad():
        torch.testing.assert_close(retrace(gm, inputs, export)(*inputs)[0], model(x), rtol=0, atol=0)


def test_numbers_that_are_equal_but_of_other_types_are_not_alike():
    class Numbers(torch.nn.Module):
        def forward(self, x):
            return x * 1, x * 1.0, x * True, x.sum(0, False), x.sum(0, True)

    ((_, _, (made, _), whole),) = dynamo_graphs(Numbers(), torch.arange(6).view(2, 3))
    assert made == whole


def test_strides_tell_kinds_apart():
    class Strided(torch.nn.Module):
        def forward(self, x):
            return x.reshape(6), x.t().reshape(6), x.t().contiguous(), x.contiguous()

    ((_, _, (made, _), whole),) = dynamo_graphs(Strided(), torch.randn(2, 3))
    assert made == whole


class Autocast(torch.nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x


class Constant(torch.nn.Module):
    def forward(self, x):
        return torch.add(x, x, alpha=torch.tensor(2.0))  # a value that only the whole graph knows


REFUSED = {
    "writes to an input": (lambda x: x.add_(1), {}, "writes to an input"),
    "by an op whose name does not tell": (lambda x: torch.add(x, 1, out=x), {}, "writes to its input"),
    "changes the interpreter's state": (Autocast(), {}, "something else than tensors"),
    "asks for a value": (Constant(), {}, "the export failed"),
    "symbolic": (lambda x: x + 1, {"dynamic": True}, "not what Dynamo saw"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_traced_as_a_whole_says_why(case):
    function, options, why = REFUSED[case]
    module = function if isinstance(function, torch.nn.Module) else Calling(function)
    graphs = dynamo_graphs(module, torch.randn(3, 3), **options)
    assert graphs and all(why in made for _, _, (made, _), _ in graphs), [g[2][0] for g in graphs]


class Calling(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_ambient_autocast_is_traced_as_a_whole():
    with torch.autocast("cpu", torch.bfloat16):
        ((_, _, (made, _), _),) = dynamo_graphs(Calling(lambda x: x @ x), torch.randn(3, 3))
    assert made == "autocast is on"
