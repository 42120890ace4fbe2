"""A model in pieces (blocks compiled one by one, graph breaks): which of its graphs are forecast, and when."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.config import PRESETS, Config, ScheduleOptions
from chipmunk_compile.plan import analyse
from chipmunk_compile.schedule import programs_of
from tests.test_presets import STEPS, alike, compiled, preset, ran
from tests.toy_dit import Loop, ToyDiT, toy, worst


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
    assert alike(in_pieces(model, loop, preset(name)), truth) < 4 * PRESETS[name]["forecast.tolerance"]
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
    assert alike(outputs, loop.run(toy(layers=3, broken=True))) < 4 * PRESETS[name]["forecast.tolerance"]


class Apart(ToyDiT):
    """Three graphs: one embeds the time, two hold the blocks. again: those receive the timestep, too."""

    def __init__(self, again: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.again = again

    def embed(self, t):
        angles = 1000 * t[:, None] * torch.exp(-torch.arange(self.dim // 2) * 0.3)
        return self.time(torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, x, t, prompt):
        c = self.embed(t)
        torch._dynamo.graph_break()
        h = self.blocks[0](torch.cat([self.text(prompt), self.into(x)], 1), self.embed(t) + c if self.again else c)
        torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            h = block(h, self.embed(t) if self.again else c)
        return self.final(h[:, prompt.shape[1] :])


def apart(kind: type[Apart] = Apart, **kwargs) -> tuple[Apart, list[torch.Tensor], Loop]:
    torch.manual_seed(0)
    model, loop = kind(layers=3, **kwargs).eval().requires_grad_(False), Loop(steps=STEPS)
    return model, loop.run(model), loop


def test_what_embeds_the_time_for_other_graphs_is_always_run(uncompiled):
    """It is no forward by itself, and keeps nothing from being forecast."""
    model, truth, loop = apart()
    assert alike(loop.run(compiled(model, preset("fast"))), truth) < 4 * PRESETS["fast"]["forecast.tolerance"]
    programs = ran()
    assert set(programs) == {"dense", "forecast"} and sum(programs.values()) == 3 * STEPS
    assert programs["forecast"] > STEPS // 2 and programs["forecast"] % 2 == 0, "both graphs of blocks"


def test_graphs_that_each_receive_the_timestep_are_never_forecast_apart(uncompiled):
    """Nothing tells that one's forward is a part of the other's: both run deltas."""
    model, truth, loop = apart(again=True)
    outputs = loop.run(compiled(model, preset("fast")))
    assert "forecast" not in ran() and ran()["delta"] > 0 and worst(outputs, truth) < 0.5
    report = chipmunk_compile.explain(model, *next(iter(loop)), options=preset("fast"))
    assert not report.runs_whole and "one that receives the timestep" in report.to_text()


def test_what_embeds_the_time_is_no_model_though_nothing_else_has_a_site(uncompiled):
    """All attention is among too few tokens to be any."""
    model, truth, loop = apart()
    outputs = loop.run(compiled(model, {"preset": "fast"}))
    assert set(ran()) == {"dense"} and worst(outputs, truth) < 1e-5


class SkipsAcross(Apart):
    """Tokens from ahead of the blocks skip a graph break. They come from no attention; their order is the grid's."""

    def forward(self, x, t, prompt):
        c = self.embed(t)
        h = torch.nn.functional.gelu(torch.cat([self.text(prompt), self.into(x)], 1))
        skip = h * 2.0
        h = self.blocks[0](h, c)
        torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            h = block(h + skip, c)
        return self.final(h[:, prompt.shape[1] :])


def test_tokens_that_skip_a_break_are_computed_in_their_own_order(uncompiled):
    model, truth, loop = apart(SkipsAcross)
    outputs = loop.run(compiled(model, preset("fast", grid=(1, 7, 9))))
    assert ran()["forecast"] > 0 and ran()["forecast"] % 2 == 0
    assert alike(outputs, truth) < 4 * PRESETS["fast"]["forecast.tolerance"]


@pytest.mark.parametrize("kind", ["skips", "quantised"])
def test_what_comes_from_no_layer_is_computed_by_itself(kind):
    """Of the first graph, outputs that a forecast step still needs: in the caller's order of tokens, and through
    linears as the caller has them."""
    if kind == "quantised":
        quantization = pytest.importorskip("torchao.quantization")
        model = toy(layers=2, broken=True)
        quantization.quantize_(model.time, quantization.Int8WeightOnlyConfig())
    else:
        model, _, _ = apart(SkipsAcross)
    compared = []

    def compare(gm, inputs):
        analysis = analyse(gm, inputs, Config.from_options({"preset": "fast", "min_tokens": 8, "grid": (1, 7, 9)}))
        if analysis.still is not None:
            expected = [output for output, moves in zip(gm(*inputs), analysis.moving) if not moves]
            compared.extend(worst([a], [b]) for a, b in zip(analysis.still(*inputs), expected, strict=True))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=compare)(*next(iter(Loop())))
    assert compared and max(compared) < 1e-5


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
        block.compile(backend=chipmunk, options=preset("balanced"))
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
