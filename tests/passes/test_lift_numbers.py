"""Numbers that change from call to call become tensors where they are values, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.passes.lift_numbers import bind_numbers, lift_numbers, numbers_read

X = torch.randn(3, 4)
VALUES = {
    "full": lambda x, t: torch.full((3,), t, dtype=torch.float32),
    "full of its own dtype": lambda x, t: torch.full([2, 3], t),
    "tensor": lambda x, t: torch.tensor([t], dtype=torch.float64),
    "tensor of its own dtype": lambda x, t: torch.tensor(t),
    "tensor in half": lambda x, t: torch.tensor([[t]], dtype=torch.bfloat16),
    "product": lambda x, t: x * t,
    "sum, the number first": lambda x, t: t + x,
    "quotient in half": lambda x, t: x.bfloat16() / t,
    "of another number": lambda x, t: torch.full((3,), t / 1000 - 2) * x[:, 0],
    "of another whole number": lambda x, t: torch.tensor([t * 7 - 3]),
    "as a float": lambda x, t: torch.full((3,), float(t)),
    "twice": lambda x, t: torch.full((4,), t, dtype=torch.float32).sin() + x * (1 - t),
}
NOT_ALONE = {
    "a size": lambda x, t: x.new_zeros(int(t)),
    "an output": lambda x, t: (x * 2, t + 1),
    "beside whole numbers": lambda x, t: (10 * x).long() * t,
    "beside a tensor of no dimension": lambda x, t: x.sum() * t,
    "a choice": lambda x, t: torch.clamp(x, max=t),
    "half known": lambda x, t: torch.full((3, 4), t) + torch.clamp(x, max=t),
}


def captured(function, kind) -> tuple:
    """(Dynamo's graph, once it takes the number as a variable, the call's arguments for it, what it returned)."""
    graphs = []

    def backend(gm, inputs):
        def call(*args):
            graphs.append((gm, args))
            return gm.forward(*args)

        return call

    compiled = torch.compile(function, backend=backend)
    outputs = [compiled(X, kind(t)) for t in (857, 714, 571)]
    gm, args = graphs[-1]
    return gm, list(args), outputs[-1]


def lifted(gm, args):
    """`lift_numbers`, and the arguments for what it returns."""
    integers = [i for i, value in enumerate(args) if isinstance(value, int)]
    graph, positions = lift_numbers(gm, integers)
    return graph, [torch.tensor(a) if i in positions else a for i, a in enumerate(args)]


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_lifted(name, kind):
    gm, args, expected = captured(VALUES[name], kind)
    before = str(gm.graph)
    graph, args = lifted(gm, args)
    assert graph is not gm and str(gm.graph) == before
    assert all(isinstance(value, torch.Tensor) for value in args)
    assert not any(node.target == "item" for node in graph.graph.nodes)
    (result,) = graph(*args)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    others = [torch.tensor(300, dtype=a.dtype) if a.dim() == 0 else a for a in args]
    assert not torch.equal(graph(*others)[0], result), "the number is read"


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("name", NOT_ALONE)
def test_anything_else_stays_a_number(name, kind):
    gm, args, _ = captured(NOT_ALONE[name], kind)
    assert lift_numbers(gm, [i for i, value in enumerate(args) if isinstance(value, int)]) == (gm, ())


def test_a_graph_without_numbers_is_left_alone():
    graphs = []
    torch.compile(torch.sin, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)(X)
    assert lift_numbers(graphs[0]) == (graphs[0], ())


@pytest.mark.parametrize("name", ["beside a tensor of no dimension", "a choice", "half known"])
def test_what_is_read_from_the_host_can_be_bound(name):
    gm, args, expected = captured(NOT_ALONE[name], float)
    before = str(gm.graph)
    ((position, value),) = [(i, args[i].item()) for i in numbers_read(gm)]
    bound = bind_numbers(gm, {position: value})
    assert str(gm.graph) == before and numbers_read(bound) == ()
    assert len(bound.graph.find_nodes(op="placeholder")) == len(args)
    args[position].fill_(torch.nan)  # is not read any more
    torch.testing.assert_close(bound(*args)[0], expected, rtol=0, atol=0)
