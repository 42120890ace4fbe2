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
    assert alike(outputs, loop.run(model)) < 30 * PRESETS[name]["forecast.tolerance"]
    assert chipmunk_compile.counters()["state_bytes"] < 100_000, "two outputs, and no state of deltas"


def test_a_computed_step_is_the_dense_model_bit_for_bit(uncompiled):
    model, loop = toy(), Loop(steps=4)
    outputs = loop.run(compiled(model, preset("quality", **{"forecast.repay": False})))
    assert ran() == {"dense": 4}
    assert all(a.equal(b) for a, b in zip(outputs, loop.run(model)))


def test_bolder_presets_compute_less(uncompiled):
    work = []
    for name in ("quality", "balanced", "fast"):
        Loop(steps=50).run(compiled(toy(), preset(name)))
        work.append(sum(ran().get(program, 0) for program in ("dense", "refresh")))
    assert work == sorted(work, reverse=True) and work[0] > work[-1]


def in_pieces(model, loop, options) -> list[torch.Tensor]:
    for block in model.blocks:
        block.compile(backend=chipmunk, options=options)
    with chipmunk_compile.generation(model), torch.no_grad():
        return [model(*inputs) for inputs in loop]


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_a_model_in_pieces_is_forecast_as_a_whole_one_is(name, uncompiled):
    """Hidden states tell less of the output than the output does, so a little less is forecast by them."""
    model, loop = toy(layers=3), Loop(steps=STEPS)
    truth = loop.run(model)
    loop.run(compiled(model, preset(name)))
    whole = ran()
    chipmunk_compile.reset()
    assert alike(in_pieces(model, loop, preset(name)), truth) < 30 * PRESETS[name]["forecast.tolerance"]
    pieces = {program: count / 3 for program, count in ran().items()}
    assert set(pieces) == {"dense", "forecast"} and sum(pieces.values()) == STEPS, "all pieces in the same steps"
    assert whole["forecast"] - STEPS // 4 <= pieces["forecast"] <= whole["forecast"] + 1


def test_a_model_in_pieces_runs_deltas_where_that_is_asked_for(uncompiled):
    model, loop = toy(layers=3), Loop(steps=12)
    truth = loop.run(model)
    outputs = in_pieces(model, loop, preset("balanced", **{"schedule.refresh_every": 5}))
    expected = [program.value for program in programs_of(12, ScheduleOptions(refresh_every=5))]
    assert ran() == {"refresh": 3 * expected.count("refresh"), "delta": 3 * expected.count("delta")}
    assert worst(outputs, truth) < 0.5


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_behind_a_graph_break_steps_are_forecast_too(name, uncompiled):
    """The first graph hands on the embedded time, which turns too fast for any forecast: that is computed."""
    model, loop = toy(layers=3, broken=True), Loop(steps=STEPS)
    outputs = loop.run(compiled(model, preset(name)))
    programs = ran()
    assert (
        set(programs) == {"dense", "forecast"} and programs["forecast"] % 2 == 0 and programs["forecast"] > STEPS // 2
    )
    assert alike(outputs, loop.run(toy(layers=3, broken=True))) < 30 * PRESETS[name]["forecast.tolerance"]


class EmbedsApart(ToyDiT):
    """A graph of its own embeds the time; others hold the blocks."""

    def forward(self, x, t, prompt):
        angles = 1000 * t[:, None] * torch.exp(-torch.arange(self.dim // 2) * 0.3)
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        torch._dynamo.graph_break()
        h = self.blocks[0](torch.cat([self.text(prompt), self.into(x)], 1), c)
        torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            h = block(h, c)
        return self.final(h[:, prompt.shape[1] :])


def test_what_embeds_the_time_for_other_graphs_is_always_run(uncompiled):
    """It is no forward by itself, and keeps nothing from being forecast."""
    torch.manual_seed(0)
    model, loop = EmbedsApart(layers=3).eval().requires_grad_(False), Loop(steps=STEPS)
    truth = loop.run(model)
    assert alike(loop.run(compiled(model, preset("fast"))), truth) < 30 * PRESETS["fast"]["forecast.tolerance"]
    programs = ran()
    assert set(programs) == {"dense", "forecast"} and programs["forecast"] > STEPS
    assert programs["forecast"] % 2 == 0, "both graphs of blocks"
    assert sum(programs.values()) == 3 * STEPS


class SkipsAcross(ToyDiT):
    """Tokens from ahead of the blocks skip a graph break. They come from no attention; their order is the grid's."""

    def forward(self, x, t, prompt):
        angles = 1000 * t[:, None] * torch.exp(-torch.arange(self.dim // 2) * 0.3)
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = torch.nn.functional.gelu(torch.cat([self.text(prompt), self.into(x)], 1))
        skip = h * 2.0
        h = self.blocks[0](h, c)
        torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            h = block(h + skip, c)
        return self.final(h[:, prompt.shape[1] :])


def test_tokens_that_skip_a_break_are_computed_in_their_own_order(uncompiled):
    torch.manual_seed(0)
    model, loop = SkipsAcross(layers=3).eval().requires_grad_(False), Loop(steps=STEPS)
    truth = loop.run(model)
    outputs = loop.run(compiled(model, preset("fast", grid=(1, 7, 9))))
    assert ran()["forecast"] > 0 and ran()["forecast"] % 2 == 0
    assert alike(outputs, truth) < 30 * PRESETS["fast"]["forecast.tolerance"]


def test_a_piece_that_writes_keeps_the_others_computed(uncompiled):
    """A step may not go without what a graph writes: deltas run then."""

    class Counting(torch.nn.Linear):
        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    model, loop = toy(layers=3, broken=True), Loop(steps=12)
    truth = loop.run(model)
    counting = Counting(model.final.in_features, model.final.out_features)
    counting.load_state_dict(model.final.state_dict())
    counting.register_buffer("calls", torch.zeros(()))
    model.final = counting.requires_grad_(False)
    outputs = loop.run(compiled(model, preset("balanced")))
    programs = ran()
    assert "forecast" not in programs and programs["delta"] > programs["refresh"] and counting.calls == 12
    assert worst(outputs, truth) < 0.5


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
    assert worst(outputs, loop.run(model)) < 1e-5


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
    assert report.runs_whole and "0.40% of error in the latents; the others run whole" in text
    assert "first 3 steps are always computed" in text
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


def test_pieces_that_guide_one_another_are_forecast_together(uncompiled):
    """Two calls a step: all pieces of both are forecast in the same steps, generation after generation."""
    model, loops = toy(layers=3), [Loop(seed=seed, steps=STEPS) for seed in (1, 2)]
    for block in model.blocks:
        block.compile(backend=chipmunk, options=preset("fast"))
    for _ in range(2):
        seen = []
        with chipmunk_compile.generation(model), torch.no_grad():
            for step in zip(*loops):
                before = chipmunk_compile.counters()["forecast"]
                for inputs in step:
                    model(*inputs)
                seen.append(chipmunk_compile.counters()["forecast"] - before)
        assert set(seen) == {0, 6} and seen.count(6) > STEPS // 4, seen


def test_a_piece_that_is_new_is_computed_and_the_others_wait_for_it(uncompiled):
    """A layer skipped until then: it has nothing to be forecast from, and joins."""
    model, loop = toy(layers=3), Loop(steps=STEPS)
    blocks = list(model.blocks)
    for block in blocks:
        block.compile(backend=chipmunk, options=preset("fast"))
    counted = []
    with chipmunk_compile.generation(model), torch.no_grad():
        for number, inputs in enumerate(loop):
            model.blocks = torch.nn.ModuleList(blocks if number >= 9 else [blocks[0], blocks[2]])
            before = ran()
            out = model(*inputs)
            truth = toy_like(model)(*inputs)
            counted.append({name: count - before.get(name, 0) for name, count in ran().items()})
            assert alike([out], [truth]) < 0.3
    assert counted[8].get("forecast") in (0, 2) and any(c.get("forecast") == 3 for c in counted[10:])
    assert all(c.get("dense", 0) > 0 for c in counted[9:10])


def toy_like(model):
    """The same model, not compiled."""
    plain = toy(layers=len(model.blocks))
    plain.load_state_dict(model.state_dict())
    return plain


def test_what_pieces_remember_stays_within_the_memory_budget(uncompiled, caplog):
    model, loop = toy(layers=3), Loop(steps=STEPS)
    one = 4 * (63 + 5) * 32  # bytes of a block's output
    truth = loop.run(model)
    for budget, expected in ((7 * one, {"dense", "forecast"}), (3 * one, None)):
        torch._dynamo.reset()
        chipmunk_compile.reset()
        model = toy(layers=3)
        outputs = in_pieces(model, loop, preset("fast", memory_budget=budget))
        assert alike(outputs, truth) < 0.6
        if expected is not None:
            assert set(ran()) == expected
        else:
            assert "forecast" not in ran() and "no step is forecast" in caplog.text
        assert chipmunk_compile.counters()["state_bytes"] <= budget
