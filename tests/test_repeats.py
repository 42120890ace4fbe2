"""Layers that repeat are found, compiled once, and called where they stand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile import repeated
from chipmunk_compile.config import Config
from chipmunk_compile.passes.cuts import Uncuttable, find_cuts, ops_of
from chipmunk_compile.passes.repeats import find_repeats
from chipmunk_compile.plan import analyse, make_plan
from chipmunk_compile.programs import Programs
from chipmunk_compile.repeated import Repeated
from chipmunk_compile.schedule import Program
from tests.tiny_models import MODELS
from tests.toy_dit import SMALL

SPARSE = {"schedule.refresh_every": 5, "attention.sparsity": 0.6, "mlp.sparsity": 0.6}
STEPS = [Program.DENSE, Program.REFRESH, Program.DELTA, Program.DELTA, Program.REFRESH, Program.DELTA]


def dynamo_graphs(model, *args, **kwargs) -> list[tuple]:
    graphs = []

    def backend(gm, inputs, **_):
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    return graphs


def programs_of(gm, inputs) -> Programs:
    config = Config.from_options({**SMALL, **SPARSE})
    analysis = analyse(gm, inputs, config)
    return Programs(gm, make_plan(analysis, analysis.grids(inputs), config), config)


def kinds(gm) -> list[int]:
    """How often each piece stands in a graph, in the order of their first calls."""
    return list(Counter(call.kind for call in find_repeats(gm)).values())


def in_pieces(gm) -> Repeated:
    """The pieces run as they are."""
    found = repeated.repeated(gm, lambda graph, args: graph)
    assert found is not None
    return found


def state_of(made: Programs) -> list[torch.Tensor]:
    return [*made.plan.orders, *(t.empty() if t.value is not None else t.empty().zero_() for t in made.state)]


def run_steps(made: Programs, inputs, compiler) -> list[torch.Tensor]:
    """All outputs of a few steps, and the state they leave."""
    compiled = {program: compiler(made.graph(program)) for program in set(STEPS)}
    state, outputs = state_of(made), []
    for step, program in enumerate(STEPS):
        generator = torch.Generator().manual_seed(step)
        args = [
            value + 0.01 * step * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and not isinstance(value, nn.Parameter)
            else value
            for value in inputs
        ]
        with torch.no_grad():
            made_now = compiled[program](*args, *(state if program is not Program.DENSE else ()))
        outputs += [value.clone() for value in made_now if isinstance(value, torch.Tensor)]
    return [*outputs, *state]


# --- finding ------------------------------------------------------------------------------------------------

DEEP = {
    "flux": {"layers": 5, "single": 6},
    "wan": {"layers": 5},
    "sd3": {"layers": 6},  # the first layer differs
    "pixart": {"layers": 5},
    "cogvideox": {"layers": 5},
}
FOUND = {
    "flux": [1, 4, 1, 5, 1],
    "wan": [1, 4, 1],
    "sd3": [1, 4, 1],
    "pixart": [1, 4, 1],
    "cogvideox": [1, 4, 1],
}


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "pixart", "cogvideox"])
def test_layers_of_real_models_are_found_and_run_as_they_stand(name):
    model, kwargs = MODELS[name](**DEEP[name])
    ((gm, inputs),) = dynamo_graphs(model, **kwargs)
    made = programs_of(gm, inputs)
    for program in set(STEPS):
        assert kinds(made.graph(program)) == FOUND[name]
    whole, pieces = (run_steps(made, inputs, compiler) for compiler in (lambda graph: graph, in_pieces))
    assert len(whole) == len(pieces) and all(map(torch.equal, whole, pieces)), "outputs and state, to the last bit"


def test_a_cut_stands_where_nothing_is_kept_in_a_kernel():
    """Not between a layer's last sum and the next one's norm, which are one kernel."""
    model, kwargs = MODELS["flux"](**DEEP["flux"])
    ((gm, inputs),) = dynamo_graphs(model, **kwargs)
    made = programs_of(gm, inputs)
    for program in set(STEPS):
        graph = made.graph(program)
        calls, cuts = find_repeats(graph), find_cuts(graph)
        place, counts = {node: at for at, node in enumerate(ops_of(graph))}, Counter(call.kind for call in calls)
        layers = [(place[call.ops[0]], place[call.ops[-1]]) for call in calls if counts[call.kind] > 1]
        activation = 2 * 60 * 32 * 4
        for first, last in layers:
            assert cuts.lost[first] + activation < max(cuts.lost[first : last + 1])


class Layers(nn.Module):
    """x -> x + W2 act(W1 norm(x)), again and again; `width`: of each layer inside."""

    def __init__(self, widths=(32,) * 5, dtypes=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.ModuleList(nn.Linear(16, width) for width in widths)
        self.out = nn.ModuleList(nn.Linear(width, 16) for width in widths)
        self.requires_grad_(False)

    def forward(self, x):
        for number in range(len(self.into)):
            x = self.layer(number, x)
        return x

    def layer(self, number, x):
        y = F.layer_norm(x, (16,)) * 1.5 + 0.25
        y = F.gelu(self.into[number](y)) * 0.5
        y = self.out[number](y).tanh() * 2 - 1
        return x + y * y.sigmoid() - y.mean()


def graph_of(model, *args):
    ((gm, inputs),) = dynamo_graphs(model, *args)
    return gm, inputs


def test_a_layer_of_another_width_is_no_repeat():
    x = torch.randn(3, 16)
    gm, _ = graph_of(Layers((32,) * 4 + (48,) + (32,) * 4), x)
    assert kinds(gm) == [1, 3, 1, 3, 1]
    assert kinds(graph_of(Layers((32,) * 9), x)[0]) == [1, 7, 1]
    assert kinds(graph_of(Layers((32, 32, 48) * 4), x)[0]) == [1, 3, 1], "three layers in turn"
    assert kinds(graph_of(Layers((32, 48, 64, 80)), x)[0]) == []
    assert kinds(graph_of(Layers((32,) * 2), x)[0]) == []


def test_constants_tell_layers_apart():
    class Scaled(Layers):
        def layer(self, number, x):
            return super().layer(number, x * (1 if number % 2 else 1.0)) * (0.0 if number == 3 else -0.0)

    class Alternating(Layers):
        def layer(self, number, x):
            return super().layer(number, x + (True if number == 5 else 1))

    x = torch.randn(3, 16)
    for model in (Scaled((32,) * 9), Alternating((32,) * 9)):
        gm, inputs = graph_of(model, x)
        found = repeated.repeated(gm, lambda graph, args: graph)
        expected = gm(*inputs)
        if found is not None:
            assert torch.equal(found(*inputs)[0], expected[0])
            assert torch.equal(found(*inputs)[0].signbit(), expected[0].signbit())


def test_what_layers_read_from_outside_is_each_ones_own():
    """A value of the head, outputs of layers far before, and one value that is two inputs in one layer alone."""

    class Skips(Layers):
        def forward(self, x):
            shared, before = x.sin() @ torch.ones(16, 16), [x]
            for number in range(len(self.into)):
                other = before[-1] if number == 4 else before[number // 2]
                before.append(self.layer(number, before[-1]) + other * shared)
            return before[-1], before[3]

    gm, inputs = graph_of(Skips((32,) * 12), torch.randn(3, 16))
    assert max(kinds(gm)) >= 3
    pieces = in_pieces(gm)
    for _ in range(2):
        assert all(map(torch.equal, pieces(*inputs), gm(*inputs)))


# --- what may not be cut ------------------------------------------------------------------------------------


def test_what_is_written_to_in_a_layer_stays_in_it():
    class Filled(Layers):
        def layer(self, number, x):
            y = torch.empty_like(x)
            y[..., 0::2], y[..., 1::2] = x[..., 1::2] * 2, x[..., 0::2]
            y.mul_(1.25)
            return super().layer(number, y)

    gm, inputs = graph_of(Filled((32,) * 6), torch.randn(3, 16))
    assert max(kinds(gm)) >= 4
    assert torch.equal(in_pieces(gm)(*inputs)[0], gm(*inputs)[0])


def test_a_tensor_that_every_layer_writes_to_is_cut_nowhere():
    class Gathered(Layers):
        def forward(self, x):
            total = torch.zeros_like(x)
            for number in range(len(self.into)):
                x = self.layer(number, x)
                total += x
            return total

    gm, _ = graph_of(Gathered((32,) * 6), torch.randn(3, 16))
    assert find_repeats(gm) == []


class Counting(Layers):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def layer(self, number, x):
        self.calls.add_(1)
        return super().layer(number, x) + self.calls


class Relu(Layers):
    def forward(self, x):
        return F.relu(super().forward(x), True) + F.relu(x, True)


@pytest.mark.parametrize("model", [Counting((32,) * 6), Relu((32,) * 6)], ids=["a buffer", "an input"])
def test_a_graph_that_writes_to_its_inputs_is_compiled_whole(model):
    gm, _ = graph_of(model, torch.randn(3, 16))
    with pytest.raises(Uncuttable, match="writes to"):
        find_repeats(gm)
    assert repeated.repeated(gm, lambda graph, args: graph) is None


def test_ops_that_are_not_known_are_compiled_whole():
    gm, _ = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    ops_of(gm)[-1].target = lambda *args: None
    with pytest.raises(Uncuttable, match="unknown"):
        find_repeats(gm)
