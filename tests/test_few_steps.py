"""Step-distilled models: a schedule of a few steps pays still, or the model stays dense and the report says so."""

import logging

import pytest

import chipmunk_compile
from chipmunk_compile import Reason
from chipmunk_compile.config import ScheduleOptions
from chipmunk_compile.schedule import Program, fewest_steps, pays, programs_of
from tests.test_calling import Scheduled
from tests.toy_dit import SMALL, Loop, compile_toy, toy, worst

SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
# As distilled models are called, from 1 to 0.
SCHEDULES = {
    "4 even steps": [1.0, 0.75, 0.5, 0.25],
    "4 shifted steps": [1.0, 0.9, 0.75, 0.5],
    "4 late steps": [0.999, 0.759, 0.499, 0.259],
    "8 even steps": [1 - i / 8 for i in range(8)],
    "8 steps with a gap": [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875],
    "12 shifted steps": [3 * t / (1 + 2 * t) for t in (1 - i / 12 for i in range(12))],
}


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


def letters(steps, **options):
    return "".join(program.value[0] for program in programs_of(steps, ScheduleOptions(**options)))


def test_the_programs_of_a_generation():
    assert letters(4) == "rrdd"
    assert letters(12) == "rrdddrddddrd"
    assert letters(6, compute_every=2) == "rrfdfd"
    assert [pays(steps, ScheduleOptions()) for steps in (1, 2, 3, 4)] == [False, False, True, True]
    assert fewest_steps(ScheduleOptions()) == 3
    assert fewest_steps(ScheduleOptions(warmup=4, refresh_every=5)) == 5
    assert fewest_steps(ScheduleOptions(warmup=5, refresh_every=5)) == 7
    assert fewest_steps(ScheduleOptions(warmup=1, compute_every=3)) == 2
    assert fewest_steps(ScheduleOptions(refresh_every=1)) is None
    assert fewest_steps(ScheduleOptions(refresh_every=1, forecast_at=(9, 11))) == 10
    assert fewest_steps(ScheduleOptions(refresh_at=(2, 3))) == 5


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", SCHEDULES)
def test_few_steps_are_one_generation(name):
    moments = SCHEDULES[name]
    model, _ = compile_toy(toy(), **SPARSE)
    for generation in range(1, 4):
        loop = Scheduled(moments, seed=generation)
        assert worst(loop.run(model), loop.run(toy())) < 0.5
        expected = programs_of(len(moments), ScheduleOptions())
        assert counts("dense", "refresh", "delta", "generations") == (
            0,
            generation * expected.count(Program.REFRESH),
            generation * expected.count(Program.DELTA),
            generation,
        )


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("said", ["options", "generation"])
def test_too_few_steps_said_outright_are_dense(said, caplog):
    options = {"steps": 2, "streams": 2} if said == "options" else {}
    model, _ = compile_toy(toy(), **SPARSE, **options)
    loops = [Loop(steps=2, seed=1), Loop(steps=2, seed=2)]
    with caplog.at_level(logging.INFO, "chipmunk_compile"):
        for _ in range(2):
            with chipmunk_compile.generation(None, **({} if options else {"steps": 2, "streams": 2})):
                for pair in zip(*loops):
                    outputs, expected = [model(*one) for one in pair], [toy()(*one) for one in pair]
                    assert worst(outputs, expected) < 1e-5
    assert counts("dense", "refresh", "delta", "generations", "state_bytes") == (8, 0, 0, 2, 0)
    assert sum(Reason.FEW_STEPS.value in record.getMessage() for record in caplog.records) == 1


@pytest.mark.usefixtures("uncompiled")
def test_too_few_steps_are_learned_and_unlearned():
    model, _ = compile_toy(toy(), **SPARSE)
    ran = []
    for steps in (2, 2, 1, 2, 1, 2, 8, 8):
        before = counts("dense", "refresh", "delta")
        loop = Loop(steps=steps, seed=len(ran))
        assert worst(loop.run(model), loop.run(toy())) < 0.5
        ran.append(tuple(now - then for now, then in zip(counts("dense", "refresh", "delta"), before)))
    # Three generations that no delta was part of; a longer one is refreshed where it goes on.
    assert ran[:6] == [(0, 2, 0), (0, 2, 0), (0, 1, 0), (2, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert ran[6:] == [(2, 2, 4), (0, 3, 5)]


@pytest.mark.usefixtures("uncompiled")
def test_generations_broken_off_leave_no_mark():
    model, _ = compile_toy(toy(), **SPARSE)
    for steps in (8, 1, 2, 8, 2, 8):
        before = counts("dense")
        Loop(steps=steps, seed=steps).run(model)
        assert counts("dense") == before == (0,)


@pytest.mark.parametrize("steps, work", [(2, None), (4, (0.7, 1.0)), (28, (0.4, 0.8))])
def test_the_report_says_what_a_generation_costs(steps, work):
    inputs = next(iter(Loop()))
    report = chipmunk_compile.explain(toy(), *inputs, options={**SMALL, **SPARSE, "steps": steps})
    text = report.to_text()
    if work is None:
        assert report.generation_share(steps) == 1.0
        assert Reason.FEW_STEPS.name in text and "from 3 steps on" in text
    else:
        assert work[0] < report.generation_share(steps) < work[1]
        assert f"{steps} steps {report.generation_share(steps):.0%}" in text and Reason.FEW_STEPS.name not in text
    assert 1.0 < report.refresh_share < 1.5
    assert report.generation_share(steps) <= max(1.0, report.refresh_share)


def test_the_report_shows_several_lengths_where_none_is_given():
    inputs = next(iter(Loop()))
    report = chipmunk_compile.explain(toy(), *inputs, options={**SMALL, **SPARSE})
    shares = [report.generation_share(steps) for steps in (4, 12, 28, 50)]
    assert shares == sorted(shares, reverse=True)
    assert all(f"{n} steps {share:.0%}" in report.to_text() for n, share in zip((4, 12, 28, 50), shares))
    assert "fewer than 3 steps stay dense" in report.to_text()
    never = chipmunk_compile.explain(toy(), *inputs, options={**SMALL, **SPARSE, "schedule.refresh_every": 1})
    assert never.generation_share(50) == 1.0 and Reason.FEW_STEPS.name in never.to_text()
