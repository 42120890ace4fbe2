"""Steps that no model computes, and deltas corrected by what they missed at the last refresh."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.config import ForecastOptions, ScheduleOptions
from chipmunk_compile.forecast import History, lagrange
from chipmunk_compile.schedule import program_at
from tests.toy_dit import SMALL, Loop, ToyDiT, compile_toy, toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_lagrange_is_exact_for_polynomials_of_its_degree(degree):
    moments = [1.0, 0.7, 0.55][2 - degree :]
    polynomial = torch.tensor([0.3, -2.0, 5.0][: degree + 1], dtype=torch.float64)

    def value(t):
        return sum(c * t**k for k, c in enumerate(polynomial))

    for moment in (0.4, 0.9, -1.0):
        told = sum(w * value(t) for w, t in zip(lagrange(moments, moment), moments))
        assert abs(told - value(moment)) < 1e-12


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (dict(refresh_every=3), "rrdrddrddrdd"),
        (dict(refresh_every=3, compute_every=2), "rrfdfrfdfdfr"),
        (dict(refresh_every=2, compute_every=3, warmup=1), "rfdffrffdffr"),
        (dict(refresh_every=1, compute_every=4, warmup=1), "rfrfffrfffrf"),
        (dict(refresh_every=1, compute_every=2, warmup=3), "rrrfrfrfrfrf"),
        (dict(refresh_at=(4, 7)), "rrddrddrdddd"),
        (dict(refresh_at=(0, 1)), "rrdddddddddd"),
        (dict(refresh_at=(4, 7), compute_every=2), "rrfdfrfrfdfd"),
        (dict(refresh_at=(1, 4, 5, 10), compute_every=3), "rrffrffrffrf"),
        (dict(refresh_every=3, forecast_at=(4, 5)), "rrdrffddrddr"),
        (dict(refresh_at=(4, 7), forecast_at=(0, 4, 5, 9)), "rrddffrrdfdd"),
        (dict(refresh_at=(7,), warmup=1, forecast_at=(2, 30)), "rdfddddrdddd"),
    ],
)
def test_a_schedule_is_read_off_its_options(schedule, expected):
    programs = (program_at(step, ScheduleOptions(**schedule)) for step in range(12))
    assert "".join(program.value[0] for program in programs) == expected


def test_history_keeps_no_more_than_it_needs_and_uses_its_buffers_again():
    history = History(ForecastOptions(order=1))
    buffers = set()
    for step in range(6):
        output = torch.full((2, 3), float(step), dtype=torch.bfloat16)
        history.record(1.0 - 0.1 * step, [output])
        output.fill_(float("nan"))  # a program writes over its outputs
        buffers |= {id(kept[0]) for kept in history.outputs}
    assert len(history.moments) == 2 and len(buffers) == 2 and history.bytes == 2 * 12
    (told,) = history.forecast(0.3)
    assert told.dtype == torch.bfloat16 and torch.allclose(told.float(), torch.full((2, 3), 7.0))


def test_a_time_that_repeats_counts_once_and_a_leap_is_not_forecast():
    history = History(ForecastOptions(order=1))
    for moment in (1.0, 0.9, 0.9):
        history.record(moment, [torch.full((1,), moment)])
    assert history.moments == [1.0, 0.9]
    assert history.reaches(0.65) and not history.reaches(0.5)
    assert not History(ForecastOptions(order=0)).reaches(1.0)


def test_one_known_step_is_reused_and_the_second_takes_the_place_of_the_first():
    """The first step sees noise alone: a line through it and the one behind it says nothing of what follows."""
    for tolerance in (None, 0.5):
        history = History(ForecastOptions(order=1, repay=True, tolerance=tolerance))
        for step in (0, 1):
            history.record(1.0 - 0.1 * step, [torch.full((2,), 1.0 + step)], 1.0, step)
            assert history.moments == [1.0 - 0.1 * step]
        assert history.forecast(0.7)[0].tolist() == [2.0, 2.0] and history.damping() is None
        history.record(0.6, [torch.full((2,), 5.0)], 1.0, 4)
        assert history.moments == [0.9, 0.6] and history.damping() is None, "reuse teaches nothing of lines"
        assert torch.allclose(history.forecast(0.3)[0], torch.full((2,), 8.0))


def test_whatever_comes_second_takes_the_place_of_the_first():
    history = History(ForecastOptions(order=1))
    for step, moment, known in ((0, 1.0, [1.0]), (0, 1.0, [1.0]), (4, 0.6, [0.6]), (8, 0.2, [0.6, 0.2])):
        history.record(moment, [torch.full((2,), moment)], 1.0, step)  # the first one is evaluated twice
        assert history.moments == known


@pytest.mark.parametrize("reads", [True, False])
def test_a_line_of_which_nothing_came_true_yet_is_followed_as_far_as_it_is_long(reads):
    history = History(ForecastOptions(order=1, repay=True), reads=reads)
    for moment, value in ((0.9, 1.0), (0.8, 2.0)):
        history.record(moment, [torch.full((2,), value)])
    told = [history.forecast(moment)[0][0].item() for moment in (0.75, 0.7, 0.65, 0.5)]
    assert told == pytest.approx([2.5, 3.0, 2.5, 2.0]), "and taken back behind that"
    # What was told is what is repaid: the latents end where they would with the outputs on a line to this one.
    (repaid,) = history.repay(0.4, [torch.full((2,), 6.0)])
    should = [2.0 + 4.0 * (0.8 - moment) / 0.4 for moment in (0.75, 0.7, 0.65, 0.5)]
    lengths = [0.05, 0.05, 0.15, 0.1, 0.1 * 2 / 3]  # the next step as much shorter again
    owed = sum(length * (right - wrong) for length, right, wrong in zip(lengths, should, told))
    assert repaid.tolist() == pytest.approx([6.0 + owed / lengths[-1]] * 2)
    for moment, value in ((0.7, 2.5), (0.6, 2.75)):
        history.record(moment, [torch.full((2,), value)])
    further = 3 * 0.25 * history.damping()[0] if reads else 0.0  # where nothing is read, nothing ever tells
    assert history.forecast(0.3)[0][0].item() == pytest.approx(2.75 + further)


def test_lines_are_damped_by_what_came_true_over_gaps_like_their_own():
    history = History(ForecastOptions(order=1, repay=True))
    for moment, value in ((1.0, 0.0), (0.9, 1.0), (0.8, 1.5)):  # half of what the line foretold
        history.record(moment, [torch.full((2,), value)])
    assert history.damping() == [0.5]
    history.record(0.3, [torch.full((2,), 1.5)])  # nothing of it, over five times as much
    assert history.damping() == [0.5]
    unread = History(ForecastOptions(order=1, repay=True), reads=False)
    for moment, value in ((1.0, 0.0), (0.9, 1.0), (0.8, 1.5)):
        unread.record(moment, [torch.full((2,), value)])
    assert unread.damping() is None, "that would take a wait for the device"


@pytest.mark.parametrize("tolerance", [None, 0.5])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_forecasts_left_out_is_repaid(order, tolerance):
    """Outputs on a line between the computed steps: Euler arrives where it would with all of them computed.

    Before, they were on another one, so that the forecasts are wrong."""

    def output(t):
        return torch.tensor([2.0 * t, 1.0] if t > 0.75 else [3.0 - t, 1.0 + 4 * t], dtype=torch.float64)

    times = [1.0, 0.95, 0.9, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3]
    history = History(ForecastOptions(order=order, repay=True, tolerance=tolerance))
    for moment in times[:5]:
        history.record(moment, [output(moment)])
    latents = torch.zeros(2, dtype=torch.float64)
    for moment, after in zip(times[5:], times[6:]):
        if moment > 0.45:
            (told,) = history.forecast(moment)
            assert order == 2 or worst([told], [output(moment)]) > 1e-3
        else:
            (told,) = history.repay(moment, [output(moment)])
        latents += (after - moment) * told
    expected = sum((b - a) * output(a) for a, b in zip(times[5:], times[6:]))
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-6)
    assert history.repay(0.3, [output(0.3)])[0].equal(output(0.3)), "nothing is owed twice"


def test_an_error_that_grows_evenly_is_corrected_whole():
    history = History(ForecastOptions(residual=1.0))
    truth, drift = torch.randn(4, 5), torch.randn(4, 5)
    history.refreshed = 1.0
    history.learn(0.6, [truth], [truth - 0.4 * drift])
    history.refreshed = 0.6
    for moment in (0.5, 0.3):
        (corrected,) = history.correct(moment, [truth - (0.6 - moment) * drift])
        assert torch.allclose(corrected, truth, atol=1e-6)


class Linear(ToyDiT):
    """Its output is a line in the timestep, so a line through two steps tells every other."""

    def forward(self, x, t, prompt):
        still = super().forward(torch.ones_like(x), torch.ones_like(t), prompt)
        return still * t[:, None, None] + (t * 0).sin()[:, None, None] + (t * 0).cos()[:, None, None]


def acquainted(model, **options):
    """Compiled, after a few steps of another picture: from the first ones the clock learns what is conditioning."""
    torch._dynamo.reset()
    chipmunk_compile.reset()
    compiled, _ = compile_toy(model, **options)
    with torch.no_grad():
        for inputs in list(Loop(seed=9, steps=10))[:3]:
            compiled(*inputs)
    chipmunk_compile.reset()
    return compiled


def linear():
    torch.manual_seed(0)
    return Linear().eval().requires_grad_(False)


def test_a_line_is_forecast_exactly():
    model, loop = linear(), Loop(steps=12)
    compiled = acquainted(model, **EXACT, **{"schedule.compute_every": 3, "schedule.refresh_every": 2})
    outputs, truth = loop.run(compiled), loop.run(model)
    # R R f f R f f d f f R f: the first two forecasts have one output to go by.
    assert worst(outputs[4:], truth[4:]) < 1e-5
    assert all(output.equal(outputs[1]) for output in outputs[2:4])
    assert counts("dense", "refresh", "delta", "forecast") == (0, 4, 1, 7)


@pytest.mark.usefixtures("uncompiled")
def test_without_sparsity_forecasts_stand_alone():
    model, loop = linear(), Loop(steps=12)
    compiled, _ = compile_toy(
        model, **{"attention.sparsity": None, "mlp.sparsity": None, "schedule.compute_every": 2, "forecast.order": 2}
    )
    # The first forecast has one output to go by.
    assert worst(loop.run(compiled)[3:], loop.run(model)[3:]) < 1e-5
    dense, forecast = counts("dense", "forecast")
    assert forecast >= 4 and dense + forecast == 12


@pytest.mark.usefixtures("uncompiled")
def test_each_stream_has_a_history_of_its_own():
    model = toy()
    options = {**SPARSE, "schedule.compute_every": 2, "forecast.residual": 1.0}
    loops = [Loop(seed=1, steps=12), Loop(seed=2, steps=12)]
    alone = [loop.run(acquainted(model, **options)) for loop in loops]
    compiled = acquainted(model, **options)
    outputs = ([], [])
    with torch.no_grad():
        for pair in zip(*loops):
            for mine, inputs in zip(outputs, pair):
                mine.append(compiled(*inputs))
    assert counts("forecast")[0] >= 8
    for mine, expected in zip(outputs, alone):
        assert worst(mine, expected) < 1e-6


@pytest.mark.usefixtures("uncompiled")
def test_a_second_generation_forecasts_nothing_from_the_first():
    model, loop, other = toy(), Loop(seed=1, steps=10), Loop(seed=2, steps=10)
    options = {**SPARSE, "schedule.compute_every": 2}
    expected = other.run(acquainted(model, **options))
    compiled = acquainted(model, **options)
    loop.run(compiled)
    assert worst(other.run(compiled), expected) < 1e-6


@pytest.mark.usefixtures("uncompiled")
def test_the_residual_makes_deltas_better():
    """Latents that drift evenly: what a delta misses grows with its age."""
    model, loop = toy(), Loop(steps=20)
    truth, errors = loop.run(model), {}
    for residual in (0.0, 1.0):
        outputs = loop.run(acquainted(model, **SPARSE, **{"forecast.residual": residual}))
        errors[residual] = sum(worst([a], [b]) for a, b in zip(outputs[6:], truth[6:]))
    # Steps 5, 10 and 15 ran both programs.
    assert counts("refresh", "delta") == (5, 15 + 3)
    assert errors[1.0] < 0.95 * errors[0.0]


class Recording(torch.nn.Module):
    """Writes a buffer at every call: a step that is not computed would be missed."""

    def __init__(self):
        super().__init__()
        self.model = toy()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, prompt):
        self.calls.add_(1)
        return self.model(x, t, prompt)


@pytest.mark.usefixtures("uncompiled")
def test_what_writes_is_computed_at_every_step():
    model, loop = Recording(), Loop(steps=8)
    compiled, _ = compile_toy(model, **{"schedule.compute_every": 2, "forecast.residual": 1.0, **EXACT})
    assert worst(loop.run(compiled), loop.run(toy())) < 1e-5
    assert counts("forecast") == (0,) and model.calls == 8


@pytest.mark.usefixtures("uncompiled")
def test_behind_a_graph_break_a_pattern_holds_for_both_graphs():
    model, loop = toy(broken=True), Loop(steps=12)
    compiled, _ = compile_toy(model, **{"schedule.compute_every": 2, "forecast.residual": 1.0, **EXACT})
    Loop(steps=4, seed=1).run(compiled)
    before = counts("refresh", "delta", "forecast")
    outputs, truth = loop.run(compiled), loop.run(toy())
    after = counts("refresh", "delta", "forecast")
    # R R f d f d f d f R f d, of both graphs; what is forecast lies near.
    assert [b - a for a, b in zip(before, after)] == [2 * 3, 2 * 4, 2 * 5]
    assert worst([outputs[k] for k in (0, 1)], [truth[k] for k in (0, 1)]) < 1e-5
    assert worst(outputs, truth) < 0.2


def test_options_that_cannot_be():
    for name, value in (("forecast.order", 3), ("forecast.residual", -1), ("schedule.compute_every", 0)):
        with pytest.raises(chipmunk_compile.OptionError, match=name):
            chipmunk_compile.Config.from_options({**SMALL, name: value})
