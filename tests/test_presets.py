"""What a preset runs: forecasts and whole steps where a model's steps can be forecast, sparse deltas where not."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.config import PRESETS, Config, ScheduleOptions
from chipmunk_compile.schedule import Program, programs_of
from tests.test_forecast import Linear
from tests.toy_dit import Loop, ToyDiT, toy, worst

STEPS = 20
WHOLE = [name for name, options in PRESETS.items() if options.get("forecast.refresh_every") == 1]
PROGRAMS = ("dense", "refresh", "delta", "forecast")


def preset(name, **options):
    return {"preset": name, "min_tokens": 8, **options}


def compiled(model, options):
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return torch.compile(model, backend=chipmunk, options=options)


def acquainted(model, options):
    """Compiled, after a few steps of another picture: from the first ones the clock learns what is conditioning."""
    fast = compiled(model, options)
    with torch.no_grad():
        for inputs in list(Loop(seed=9, steps=10))[:3]:
            fast(*inputs)
    chipmunk_compile.reset()
    return fast


def ran() -> dict[str, int]:
    counted = chipmunk_compile.counters()
    return {name: counted[name] for name in PROGRAMS if counted[name]}


def alike(outputs, truth) -> float:
    """The relative error of all steps together."""
    return (sum((a - b).norm() for a, b in zip(outputs, truth)) / sum(b.norm() for b in truth)).item()


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_runs_forecasts_and_dense_steps(name, uncompiled):
    model, loop = toy(), Loop(steps=STEPS)
    outputs = loop.run(compiled(model, preset(name)))
    programs = ran()
    assert set(programs) == {"dense", "forecast"} and sum(programs.values()) == STEPS
    assert programs["forecast"] >= 3
    truth = loop.run(model)
    if "forecast.tolerance" in PRESETS[name]:
        assert alike(outputs, truth) < 3 * PRESETS[name]["forecast.tolerance"]
    # What a sampler adds up to is nearer than with as many steps, each of them so much longer.
    computed = programs["dense"]
    fewer = [truth[k * STEPS // computed] for k in range(computed)]
    assert alike([sum(outputs) / STEPS], [sum(truth) / STEPS]) < alike([sum(fewer) / computed], [sum(truth) / STEPS])
    assert chipmunk_compile.counters()["state_bytes"] < 100_000, "two outputs, and no state of deltas"


@pytest.mark.parametrize("name, computed", [("draft", [0, 4, 11, 18, 25]), ("sketch", [0, 4, 12, 20])])
def test_over_long_gaps_the_last_computed_output_is_reused_as_it_is(name, computed, uncompiled):
    """As it was computed, that is, without what it repaid."""
    model, loop = toy(), Loop(steps=26)
    outputs = loop.run(acquainted(model, preset(name)))
    truth = loop.run(model)
    for step in sorted(set(range(26)) - set(computed)):
        last = max(at for at in computed if at < step)
        assert outputs[step].equal(truth[last]), step


def test_a_computed_step_is_the_dense_model_bit_for_bit(uncompiled):
    model, loop = toy(), Loop(steps=4)
    outputs = loop.run(compiled(model, preset("quality", **{"forecast.repay": False})))
    assert ran() == {"dense": 4}
    assert all(a.equal(b) for a, b in zip(outputs, loop.run(model)))


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_a_time_that_counts_up_is_forecast_as_well(unit, uncompiled):
    """As Lumina's and Z-Image's pipelines have it: from 0 to 1."""

    class Upward(ToyDiT):
        def forward(self, x, t, prompt):
            return super().forward(x, 1.0 - t / unit, prompt)

    torch.manual_seed(0)
    model, loop = Upward().eval().requires_grad_(False), Loop(steps=STEPS)
    calls = [(x, (1.0 - t) * unit, prompt) for x, t, prompt in loop]
    fast, counted = compiled(model, preset("balanced")), []
    with torch.no_grad():
        outputs = [fast(*inputs) for inputs in calls]
        counted.append(ran())
        assert alike(outputs, [model(*inputs) for inputs in calls]) < 0.12
    loop.run(compiled(toy(), preset("balanced")))
    assert counted[0] == ran() and ran()["forecast"] > STEPS // 3


def test_bolder_presets_compute_less(uncompiled):
    work = []
    for name in ("quality", "balanced", "fast"):
        Loop(steps=50).run(compiled(toy(), preset(name)))
        work.append(sum(ran().get(program, 0) for program in ("dense", "refresh")))
    assert work == sorted(work, reverse=True) and work[0] > work[-1]


@pytest.mark.parametrize(
    "own",
    [
        {"attention.sparsity": 0.5}, {"mlp.chunk": 32}, {"schedule.refresh_every": 3}, {"schedule.refresh_at": (4,)},
        {"forecast.residual": 1.0},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_who_says_how_deltas_are_to_be_gets_deltas(own, uncompiled):
    Loop(steps=12).run(compiled(toy(), preset("balanced", **own)))
    assert set(ran()) == {"refresh", "delta"}


def test_a_tolerance_of_one_s_own_keeps_the_rest_of_the_preset():
    config = Config.from_options({"forecast.tolerance": 0.002, "schedule.warmup": 3, "dense_layers": 1})
    assert config.forecast.tolerance == 0.002 and config.forecast.repay and config.forecast.refresh_every == 1
    fixed = Config.from_options({"schedule.compute_every": 2})
    assert fixed.forecast.tolerance is None and fixed.forecast.refresh_every is None


def test_what_is_said_outright_takes_the_place_of_a_preset_s_pattern():
    judged = Config.from_options({"preset": "draft", "forecast.tolerance": 0.1})
    assert judged.schedule.compute_every == 1 and judged.forecast.repay and judged.forecast.warmup is None
    assert judged.forecast.order == 1
    deltas = Config.from_options({"preset": "draft", "attention.sparsity": 0.9})
    assert not deltas.forecasts and deltas.schedule.refresh_every == 12


def test_a_draft_computes_its_second_step_after_half_a_gap(uncompiled):
    model, loop = toy(), Loop(steps=26)
    loop.run(acquainted(model, preset("draft")))
    assert ran() == {"dense": 5, "forecast": 21}, "at 0, 4, 11, 18 and 25"
    report = chipmunk_compile.explain(toy(), *next(iter(loop)), options=preset("draft"))
    assert "a generation's first step is always computed" in str(report)


@pytest.mark.parametrize("given", [{}, {"steps": 4}], ids=["read", "counted"])
def test_what_saw_nothing_but_noise_does_not_make_a_short_generation_by_itself(given, uncompiled):
    Loop(steps=4).run(acquainted(toy(), {**preset("draft"), **given}))
    assert ran()["dense"] >= 2


def test_a_model_that_must_run_at_every_step_is_refreshed_as_if_nothing_was_to_be_forecast(uncompiled):
    class Writing(ToyDiT):
        def forward(self, x, t, prompt):
            self.calls.add_(1)
            return super().forward(x, t, prompt)

    torch.manual_seed(0)
    model = Writing().eval().requires_grad_(False)
    model.register_buffer("calls", torch.zeros(()))
    Loop(steps=STEPS).run(compiled(model, preset("draft")))
    # R R d .. R d ..: every twelfth step.
    assert ran() == {"refresh": 3, "delta": STEPS - 3}


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_generation_of_few_steps_is_all_computed(steps, uncompiled):
    model, loop = toy(), Loop(steps=steps)
    outputs = loop.run(compiled(model, preset("balanced")))
    assert ran() == {"dense": steps} and worst(outputs, loop.run(model)) == 0.0


def test_deltas_between_forecasts_have_a_cadence_of_their_own(uncompiled):
    options = preset("balanced", **{"forecast.refresh_every": 3})
    Loop(steps=STEPS).run(acquainted(toy(), options))
    programs = ran()
    computed = programs["refresh"] + programs["delta"]
    assert set(programs) == {"refresh", "delta", "forecast"} and computed + programs["forecast"] == STEPS
    expected = programs_of(computed, ScheduleOptions(refresh_every=3))
    assert programs["refresh"] == expected.count(Program.REFRESH), "R R d R d d R .., of the computed ones"


def test_a_fixed_pattern_may_run_whole_steps_too(uncompiled):
    options = preset("balanced", **{"schedule.compute_every": 3, "forecast.refresh_every": 1})
    model, loop = Linear().eval().requires_grad_(False), Loop(steps=11)
    outputs = loop.run(acquainted(model, options))
    assert ran() == {"dense": 5, "forecast": 6}
    # One output is known to go by in the first gap, behind it a line.
    assert worst(outputs[4:], loop.run(model)[4:]) < 1e-5


def test_streams_are_kept_apart_and_generations_begin_anew(uncompiled):
    """Two streams, the second generation broken off: the third is as the first, and each stream near to dense."""
    loops, model = [Loop(seed=1, steps=STEPS), Loop(seed=2, steps=STEPS)], toy()
    fast, made = compiled(model, preset("balanced")), []
    for generation in range(3):
        outputs = []
        with torch.no_grad():
            for number, calls in enumerate(zip(*loops)):
                if generation == 1 and number == 7:
                    break
                outputs.append([fast(*inputs) for inputs in calls])
        made.append(outputs)
    assert all(a.equal(b) for one, other in zip(made[0], made[2]) for a, b in zip(one, other))
    for loop, stream in zip(loops, zip(*made[2])):
        assert alike(stream, loop.run(model)) < 0.12


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("refresh_every", [1, 2])
def test_the_first_generation_is_as_any_later_one(refresh_every, streams, uncompiled):
    """The same noise gives the same picture, though at first the clock has to learn what conditioning is."""
    loops = [Loop(seed=seed, steps=STEPS) for seed in range(streams)]
    options = preset("balanced", **{"forecast.refresh_every": refresh_every})
    fast, made, counted = compiled(toy(), options), [], []
    for _ in range(3):
        chipmunk_compile.reset()
        with torch.no_grad():
            made.append([fast(*inputs) for calls in zip(*loops) for inputs in calls])
        counted.append(ran())
    assert counted[0] == counted[1] == counted[2] and counted[0]["forecast"] > STEPS // 3
    assert all(a.equal(b) for other in made[1:] for a, b in zip(made[0], other))


def test_disabled_is_dense_and_the_next_step_builds_on_nothing_old(uncompiled):
    model, loop = toy(), Loop(steps=STEPS)
    fast = compiled(model, preset("balanced"))
    with torch.no_grad():
        for number, inputs in enumerate(loop):
            if 8 <= number < 12:
                with chipmunk_compile.disabled():
                    assert fast(*inputs).equal(model(*inputs))
            else:
                fast(*inputs)
            if number == 12:  # two more are computed before a line is known
                counted = ran()["dense"]
    assert counted >= 5 and ran()["forecast"] > 0


def test_explain_says_that_nothing_is_sparse_then():
    report = chipmunk_compile.explain(toy(), *next(iter(Loop())), options=preset("balanced"))
    text = report.to_text()
    assert report.runs_whole and "prove good to a tolerance of 0.02; the others run whole" in text
    assert "first 2 steps are always computed" in text
    assert "2 of 2 could run sparse" in text and "a delta step does" not in text and "\n  order" not in text
    sparse = chipmunk_compile.explain(toy(), *next(iter(Loop())), options=preset("balanced", **{"mlp.sparsity": 0.5}))
    assert not sparse.runs_whole and "2 of 2 accelerated" in sparse.to_text()
    broken = chipmunk_compile.explain(toy(broken=True), *next(iter(Loop())), options=preset("balanced"))
    assert broken.runs_whole and "forecast   piece by piece, as many steps" in broken.to_text()


def test_every_program_is_compiled_by_inductor():
    model, loop = toy(), Loop(steps=STEPS)
    outputs = loop.run(compiled(model, preset("balanced")))
    assert chipmunk_compile.counters()["compiles"] == 1, "the dense program, and no other"
    assert set(ran()) == {"dense", "forecast"} and alike(outputs, loop.run(model)) < 0.12
