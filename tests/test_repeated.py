"""Layers that repeat, compiled once each: what Inductor gets, and how the pieces run."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import chipmunk_compile
from chipmunk_compile import programs, repeated
from chipmunk_compile.config import Config
from chipmunk_compile.passes.repeats import find_repeats
from chipmunk_compile.programs import compile_graph
from chipmunk_compile.repeated import Repeated
from tests.test_repeats import SPARSE, Layers, graph_of, kinds
from tests.toy_dit import Loop, compile_toy, toy, worst


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that Inductor gets."""
    from torch._inductor import compile_fx

    graphs, original = [], compile_fx.compile_fx

    def spy(gm, *args, **kwargs):
        graphs.append(gm)
        return original(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    return graphs


def whole(loop, run=Loop.run, **options) -> list[torch.Tensor]:
    """The same steps of programs that are compiled as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "repeated", lambda *_: None)
        outputs = run(loop, compile_toy(toy(layers=6), **options)[0])
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return outputs


def test_each_layer_is_compiled_once(compiled):
    """A refresh and a delta, over steps that carry state on; in pieces: a head, five of six layers, a tail."""
    loop = Loop(steps=7)
    expected = whole(loop, **SPARSE)
    assert len(compiled) == 2
    compiled.clear()
    assert worst(loop.run(compile_toy(toy(layers=6), **SPARSE)[0]), expected) < 1e-5
    assert len(compiled) == 2 * 3
    counted = chipmunk_compile.counters()
    assert counted["compiles"] == 2, "programs, not pieces"
    assert counted["refresh"] and counted["delta"]


def test_a_dense_program_is_compiled_once_a_layer(compiled):
    x = torch.randn(3, 16)
    gm, inputs = graph_of(Layers((32,) * 4 + (48,) + (32,) * 4), x)
    with torch.no_grad():
        expected = gm(*inputs)[0]
        made = compile_graph(gm, inputs, Config())
        for _ in range(2):
            torch.testing.assert_close(made(*inputs)[0], expected)
    assert len(compiled) == len(kinds(gm)) == 5


def test_a_layer_that_gets_another_layout_is_compiled_for_it(compiled):
    """As a value of the head is not laid out like one of a layer, or as some weights are views."""

    class Turned(Layers):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))

    model = Turned((32,) * 8)
    odd = model.out[4]
    odd.weight = nn.Parameter(odd.weight.t().contiguous().t(), requires_grad=False)
    gm, inputs = graph_of(model, torch.randn(16, 3))
    assert kinds(gm) == [1, 7, 1]
    with torch.no_grad():
        made = compile_graph(gm, inputs, Config())
        for _ in range(2):
            torch.testing.assert_close(made(*inputs)[0], gm(*inputs)[0])
    assert len(compiled) == 4


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_inference_mode_and_no_grad_by_turns(first, second):
    gm, inputs = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    expected = gm(*inputs)[0]
    with torch.inference_mode(first), torch.no_grad():
        made = compile_graph(gm, inputs, Config())
        torch.testing.assert_close(made(*inputs)[0], expected)
    assert isinstance(made, Repeated)
    for mode in (second, first):
        with torch.inference_mode(mode), torch.no_grad():
            torch.testing.assert_close(made(*inputs)[0], expected)


@pytest.mark.parametrize("inference", [True, False])
def test_state_of_one_mode_is_of_use_in_the_other(inference):
    def run(loop, model):
        outputs = []
        for step, inputs in enumerate(loop):
            with torch.inference_mode(inference == (step < 4)), torch.no_grad():
                outputs.append(model(*inputs).clone())
        return outputs

    loop = Loop(steps=8)
    expected = whole(loop, run, **SPARSE)
    assert worst(run(loop, compile_toy(toy(layers=6), **SPARSE)[0]), expected) < 1e-5


# --- runs ---------------------------------------------------------------------------------------------------


def counting(found: list):
    """A compiler that leaves graphs as they are."""

    def compile(graph, args):
        found.append(graph)
        return graph

    return compile


def test_threads_share_what_is_compiled():
    gm, inputs = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    graphs, outputs = [], []
    made = repeated.repeated(gm, counting(graphs))
    threads = [threading.Thread(target=lambda: outputs.append(made(*inputs)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs) == len(kinds(gm)) and len(outputs) == 8
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_first_call_that_fails_is_made_again():
    gm, inputs = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    graphs = []

    def compile(graph, args):
        graphs.append(graph)
        if len(graphs) == 2:
            raise MemoryError
        return graph

    made = repeated.repeated(gm, compile)
    with pytest.raises(MemoryError):
        made(*inputs)
    assert torch.equal(made(*inputs)[0], gm(*inputs)[0])
    assert len(graphs) == len(kinds(gm)) + 1


def test_what_is_read_is_freed():
    """The values of a layer go with the next one; the graph goes when all is compiled."""
    gm, inputs = graph_of(Layers((32,) * 8), torch.randn(3, 16))
    expected, made_before, alive = gm(*inputs)[0], [], []

    def compile(graph, args):
        def run(*inputs):
            gc.collect()
            alive.append(sum(value() is not None for value in made_before))
            outputs = graph(*inputs)
            made_before.extend(weakref.ref(value) for value in outputs)
            return outputs

        return run

    made = repeated.repeated(gm, compile)
    left = weakref.ref(gm)
    calls = find_repeats(gm)
    most = max(len(call.made) for call in calls)
    del gm, calls
    for _ in range(2):
        assert torch.equal(made(*inputs)[0], expected)
    assert max(alive) <= most
    gc.collect()
    assert left() is None


def test_inductors_callable_takes_a_list_and_empties_it():
    gm, inputs = graph_of(Layers((32,) * 6), torch.randn(3, 16))
    with torch.no_grad():
        boxed = repeated._boxed(programs._inductor(gm, inputs, {}))
        values = list(inputs)
        boxed(values)
    assert values == []
