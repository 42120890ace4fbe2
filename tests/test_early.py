"""A step that runs while its timestep is being read: what a GPU allows, forced on a CPU."""

from __future__ import annotations

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import evidence, telemetry
from chipmunk_compile.programs import Programs
from chipmunk_compile.runner import Runner
from tests.toy_dit import Loop, compile_toy, toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}


@pytest.fixture
def early(monkeypatch):
    monkeypatch.setattr(evidence, "ASYNCHRONOUS", {"cpu"})


def run(model, *loops) -> list[list[torch.Tensor]]:
    """[loop][step], the loops' calls made by turns."""
    with torch.no_grad():
        outputs = [[model(*inputs) for inputs in step] for step in zip(*loops)]
    return [list(column) for column in zip(*outputs)]


def alone(*loops, after=(), **options) -> list[list[torch.Tensor]]:
    """The same calls on a model that ran nothing but `after`, each read before it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "ASYNCHRONOUS", set())
        torch._dynamo.reset()
        chipmunk_compile.reset()
        model = compile_toy(toy(), **{**SPARSE, **options})[0]
        run(model, after)
        outputs = run(model, *loops)
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return outputs


def same(mine, expected) -> bool:
    return all(worst(a, b) == 0 for a, b in zip(mine, expected, strict=True))


def counts(*names: str) -> tuple[int, ...]:
    return tuple(chipmunk_compile.counters()[name] for name in names)


def test_a_step_is_on_its_way_before_its_time_is_known(early, monkeypatch):
    loop, order = Loop(steps=8), []
    expected = alone(loop)
    run_program, read_beside = Programs.run, evidence._read_beside
    monkeypatch.setattr(Programs, "run", lambda *args: order.append("runs") or run_program(*args))

    def read(numbers, meanwhile):
        found = read_beside(numbers, meanwhile)
        order.append("is read")
        return found

    monkeypatch.setattr(evidence, "_read_beside", read)
    assert same(run(compile_toy(toy(), **SPARSE)[0], loop), expected)
    # The first two steps teach what is conditioning, and which way the time goes.
    assert order == ["is read", "runs"] * 2 + ["runs", "is read"] * 6
    assert counts("refresh", "delta", "misjudged") == (3, 5, 0)


def test_calls_by_turns_are_told_apart(early):
    loops = [Loop(seed=1, steps=8), Loop(seed=2, steps=8)]
    expected = alone(*loops)
    assert same(run(compile_toy(toy(), **SPARSE)[0], *loops), expected)
    assert counts("streams", "misjudged") == (2, 0)


@pytest.mark.parametrize("broken_off", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("noise", ["the same noise", "another"])
def test_a_generation_begun_again_is_no_next_step(early, broken_off, noise):
    first, second = Loop(seed=1, steps=8), Loop(seed=1, steps=8)
    second.prompt = first.prompt
    if noise == "another":
        second.noise = torch.randn_like(first.noise)
    expected = alone(second)
    model = compile_toy(toy(), **SPARSE)[0]
    run(model, list(first)[:broken_off])
    before = counts("refresh", "delta")
    assert same(run(model, second), expected)
    after = counts("refresh", "delta")
    assert [b - a for a, b in zip(before, after)] == [3, 5], "a step run for nothing is counted apart"
    assert counts("misjudged") == (int(broken_off > 1),)


def test_steps_between_forecasts_are_early_too(early, monkeypatch):
    """Forecasts are not: they need the time."""
    loop, forecasts = Loop(steps=12), {"schedule.compute_every": 2, "schedule.refresh_every": 2}

    def twice():
        model = compile_toy(toy(), **SPARSE, **forecasts)[0]
        return [run(model, loop)[0], run(model, loop)[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "ASYNCHRONOUS", set())
        expected = twice()
    torch._dynamo.reset()
    chipmunk_compile.reset()
    begun, run_early = [], Runner._run_early
    monkeypatch.setattr(Runner, "_run_early", lambda *args: begun.append([*run_early(*args)]) or begun[-1])
    assert same(twice(), expected)
    assert [len(early) for early in begun].count(1) == 5 + 5, "every second step, behind two"
    assert counts("misjudged") == (0,)


def test_after_one_generation_its_length_is_known(early):
    loop, model = Loop(steps=8), compile_toy(toy(), **SPARSE)[0]
    for _ in range(4):
        run(model, loop)
    assert counts("generations", "misjudged") == (4, 1)


def test_an_owner_misjudged_too_often_waits(early):
    loop, model = Loop(steps=12), compile_toy(toy(), **SPARSE)[0]
    for length in range(4, 12):  # each longer than the one before, so that the end comes unforeseen
        run(model, list(loop)[:length])
    assert counts("misjudged") == (4,)


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = toy()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, prompt):
        self.calls.add_(1)
        return self.model(x, t, prompt)


def test_what_writes_more_than_its_state_runs_once(early):
    model = Counting()
    compiled, loop = compile_toy(model, **SPARSE)[0], Loop(steps=6)
    run(compiled, loop), run(compiled, loop)
    assert model.calls.item() == 12
    assert counts("misjudged") == (0,)


def test_a_step_that_fails_early_leaves_nothing_to_build_on(early, monkeypatch):
    loop, again = Loop(steps=8), Loop(steps=8, seed=3)
    expected = alone(again)
    model = compile_toy(toy(), **SPARSE)[0]
    run(model, list(loop)[:4])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Programs, "run", lambda *_: (_ for _ in ()).throw(MemoryError()))
        run(model, list(loop)[4:])
    assert same(run(model, again), expected)


WHOLE = {"forecast.refresh_every": 1, "attention.sparsity": None, "mlp.sparsity": None}


def order_of_calls(monkeypatch) -> list[str]:
    """Filled while models run: when the dense program is launched, and when the host has read what it waits for."""
    order, read_beside, count = [], evidence._read_beside, telemetry.count

    def read(numbers, meanwhile):
        found = read_beside(numbers, meanwhile)
        order.append("is read")
        return found

    monkeypatch.setattr(evidence, "_read_beside", read)
    monkeypatch.setattr(telemetry, "count", lambda name, *n: order.append(name) or count(name, *n))
    return order


def test_a_whole_step_is_on_its_way_too(early, monkeypatch):
    loop, options = Loop(steps=11), {**WHOLE, "schedule.compute_every": 3}
    expected = alone(loop, after=Loop(seed=1), **options)
    model = compile_toy(toy(), **options)[0]
    run(model, Loop(seed=1))
    order = order_of_calls(monkeypatch)
    assert same(run(model, loop), expected)
    ran = [name for name in order if name in ("dense", "forecast", "is read")]
    forecast, behind = ["is read", "forecast"], ["dense", "is read"]
    assert ran == ["is read", "dense"] * 2 + (forecast * 2 + behind) * 3


@pytest.mark.parametrize("loops", [1, 2])
def test_what_a_judge_would_compute_is_on_its_way(early, monkeypatch, loops):
    """The streams of a step: the second one's program is known for sure, the first one's at the time that is likely."""
    loops = [Loop(seed=seed, steps=20) for seed in range(loops)]
    options = {**WHOLE, "forecast.tolerance": 6e-2}
    expected = alone(*loops, **options)
    model = compile_toy(toy(), **options)[0]
    order = order_of_calls(monkeypatch)
    before = dict(chipmunk_compile.counters())
    assert same(run(model, *loops), expected)
    assert chipmunk_compile.counters()["forecast"] > before["forecast"] + 10
    ran = [name for name in order if name in ("dense", "forecast", "is read")]
    calls = [tuple(ran[i : i + 2]) for i in range(0, len(ran), 2)]
    assert set(calls[2 * len(loops) :]) == {("is read", "forecast"), ("dense", "is read")}


@pytest.mark.parametrize("broken_off", [3, 4, 5, 7])
def test_a_whole_step_run_early_for_nothing_is_right_all_the_same(early, broken_off):
    first, second = Loop(seed=1, steps=12), Loop(seed=1, steps=12)
    second.prompt, second.noise = first.prompt, torch.randn_like(first.noise)
    options = {**WHOLE, "schedule.compute_every": 3}
    expected = alone(second, after=list(first)[:broken_off], **options)
    model = compile_toy(toy(), **options)[0]
    run(model, list(first)[:broken_off])
    assert same(run(model, second), expected)
