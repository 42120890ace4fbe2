"""Steps are forecast where forecasts have proved good: a tolerance instead of a fixed schedule."""

import math

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History
from chipmunk_compile.judge import MOST, Arriving, Judge
from chipmunk_compile.ranks import Agreement, Ranks
from chipmunk_compile.schedule import Program
from tests.test_forecast import EXACT, SPARSE, acquainted, counts, linear
from tests.toy_dit import SMALL, Loop, ToyDiT, compile_toy, toy, worst

STEPS = 20


def judged(error: float, tolerance: float = 0.01) -> Judge:
    """Steps at 1.0, 0.9 and 0.8 were computed; the forecast of the last would have been wrong by `error`."""
    judge = Judge(tolerance)
    judge.weigh(1.0, None, None, 0.0)
    judge.weigh(0.9, None, None, 1.0)
    judge.weigh(0.8, 0.1, Arriving(torch.tensor([error])), 1.0)
    return judge


def allowed(judge: Judge, moments=(0.7, 0.6, 0.5, 0.4, 0.3), power: float = 2.0) -> int:
    """Forecasts in a row."""
    return next((n for n, m in enumerate(moments) if not takes(judge, m, 0.8 - m, power)), len(moments))


def takes(judge: Judge, moment: float, gap: float, power: float = 2.0) -> bool:
    """Whether a step may be forecast; if so, it is."""
    allowed = judge.allows(moment, gap, power)
    if allowed:
        judge.skip(moment)
    return allowed


def test_a_forecast_that_knows_nothing_is_never_taken():
    """However short the steps are: where noise is added at each, what one would take out would stay in."""
    for error, steps in ((0.9, 4), (1.1, 0)):
        judge = Judge(0.5)
        for step in range(3):
            told = Arriving(torch.tensor([error])) if step == 2 else None
            judge.weigh(1.0 - 0.0001 * step, 0.0001 if step == 2 else None, told, 1.0)
        assert bool(takes(judge, 0.9997, 0.0001)) is bool(steps)


@pytest.mark.parametrize(
    "power, error, expected",
    [
        # Gaps of 1, 2, 3 and 4 tenths of the way; the fifth is longer than anything that was seen could tell.
        (2, 0.0, 4), (2, 0.01 / (1 * 0.1**0.5) / 1.001, 1), (2, 0.01 / (4 * 0.2**0.5) / 1.001, 2),
        (2, 0.01 / (9 * 0.3**0.5) / 1.001, 3), (2, 0.04, 0),
        (1, 0.01 / (2 * 0.2**0.5) / 1.001, 2), (3, 0.01 / (8 * 0.2**0.5) / 1.001, 2),
    ],
)  # fmt: skip
def test_forecasts_go_on_until_their_error_passes_the_tolerance(power, error, expected):
    assert allowed(judged(error), power=power) == expected


def test_times_may_be_of_any_unit():
    error = 0.01 / (4 * 0.2**0.5) / 1.001
    for unit in (1.0, 1000.0):
        judge = Judge(0.01)
        for moment, gap in ((1.0, None), (0.9, None), (0.8, 0.1)):
            judge.weigh(unit * moment, gap and unit * gap, Arriving(torch.tensor([error])), unit)
        assert [takes(judge, unit * m, unit * (0.8 - m)) for m in (0.7, 0.6, 0.5)] == [True, True, False]
    counted = Judge(0.01)
    for step in range(3):
        counted.weigh(step, 1.0, Arriving(torch.tensor([error])), 10)
    assert [takes(counted, step, step - 2) for step in (3, 4, 5)] == [True, True, False]


def test_what_is_not_known_is_not_forecast():
    fresh = Judge(0.5)
    fresh.weigh(1.0, None, None, 1.0)
    assert not fresh.allows(0.9, 0.1, 1.0)
    unknown = judged(0.0)
    unknown.weigh(0.8, 0.1, Arriving(torch.tensor([0.0])), 0.0)
    assert not unknown.allows(0.7, 0.1, 1.0), "how far the time goes"
    assert allowed(judged(math.nan)) == 0 and allowed(judged(math.inf)) == 0
    moments = [0.8 - 0.01 * k for k in range(1, 20)]
    assert allowed(judged(0.0), moments) == MOST


def test_a_time_evaluated_twice_is_not_forecast_from_itself():
    """Heun's second evaluation is of other latents: reusing the first would be an error that nobody measured."""
    judge = judged(0.0)
    assert not judge.allows(0.8, 0.0, 1.0)
    assert takes(judge, 0.7, 0.1) and not judge.allows(0.7, 0.1, 1.0)


class Guided(ToyDiT):
    """forward(x, t, prompt, guidance [B]): a scale that is embedded as the timestep is, as in FLUX."""

    def forward(self, x, t, prompt, guidance):
        return super().forward(x, t, prompt) + 0.0 * (guidance.sin() + guidance.cos()).mean()


@pytest.mark.usefixtures("uncompiled")
def test_a_guidance_scale_is_no_part_of_the_way():
    """It stays; were it counted, every step would be a smaller share of the way, and the tolerance a looser one."""
    counted = {}
    for scale in (0.0, 3.5, 1000.0):
        torch._dynamo.reset()
        chipmunk_compile.reset()
        torch.manual_seed(0)
        model = Guided().eval().requires_grad_(False)
        compiled, _ = compile_toy(model, **EXACT, **{"forecast.tolerance": 2e-2})
        guidance = torch.full((1,), scale)
        with torch.no_grad():
            for inputs in Loop(steps=STEPS):
                compiled(*inputs, guidance)
        counted[scale] = counts("forecast")
    assert counted[0.0][0] > 3 and set(counted.values()) == {counted[0.0]}


def test_damping_is_how_much_of_a_forecast_came_true():
    """An output that goes up and down by turns: its slope says nothing, a line through it makes things worse."""
    history = History(ForecastOptions(tolerance=0.01))
    for step in range(12):
        history.record(1.0 - 0.05 * step, [torch.tensor([1.0, 2.0]) + 0.1 * (-1) ** step])
    assert history.damping()[0] < 0.01
    (told,) = history.forecast(0.4)
    assert torch.allclose(told, history.outputs[-1][0], atol=1e-2)
    history.filled = False
    assert history.damping() is None and history.judge.computed == 0


def costs(compiled, model, loop) -> list[float]:
    """Of each step that is forecast: its relative error, times the root of the share of the way since the last one that
    was not."""
    found, computed = [], 0
    with torch.no_grad():
        for step, inputs in enumerate(loop):
            before = counts("forecast")
            output, truth = compiled(*inputs), model(*inputs)
            if counts("forecast") == before:
                computed = step
            else:
                error = (output - truth).norm() / truth.norm()
                found.append(error.item() * ((step - computed) / loop.steps) ** 0.5)
    return found


def run(model, loop=None, **options):
    loop = loop or Loop(steps=STEPS)
    return loop.run(acquainted(model, **options)), counts("refresh", "delta", "forecast")


@pytest.mark.usefixtures("uncompiled")
def test_a_line_is_forecast_as_far_as_it_goes():
    model, loop = linear(), Loop(steps=STEPS)
    outputs, (_, _, forecast) = run(model, loop, **EXACT, **{"forecast.tolerance": 1e-4})
    assert worst(outputs, loop.run(model)) < 1e-5
    # Computed: the first two, one that makes a line, one that proves it, one four gaps on, one behind MOST in a row.
    assert forecast == STEPS - 6


@pytest.mark.usefixtures("uncompiled")
def test_the_tolerance_is_kept_and_buys_speed():
    model, loop, forecasts = toy(), Loop(steps=STEPS), []
    for tolerance in (1e-5, 1e-2, 2e-2, 6e-2):
        found = costs(acquainted(model, **EXACT, **{"forecast.tolerance": tolerance}), model, loop)
        assert all(cost <= 2 * tolerance for cost in found), found
        forecasts.append(len(found))
    assert forecasts[0] == 0 and forecasts == sorted(forecasts) and forecasts[-1] > STEPS // 2


@pytest.mark.usefixtures("uncompiled")
def test_refreshes_are_counted_by_the_steps_that_are_computed():
    options = {**SPARSE, "schedule.refresh_every": 3, "forecast.tolerance": 2e-2}
    _, (refresh, delta, forecast) = run(toy(), **options)
    assert refresh + delta + forecast == STEPS and forecast > 3
    # R R d R d d R d d ..
    assert refresh == 2 + (refresh + delta - 1) // 3 - ((refresh + delta - 1) // 3 == 0)


def guided(compiled, loops, streams=lambda step: (0, 1)):
    """Outputs of the calls of each step, and of each step what the calls ran. streams: those that a step calls."""
    outputs, ran = [], []
    with torch.no_grad():
        for step, inputs in enumerate(zip(*loops)):
            before = counts("refresh", "delta", "forecast")
            outputs.append([compiled(*inputs[stream]) for stream in streams(step)])
            after = counts("refresh", "delta", "forecast")
            ran.append(tuple(now - then for now, then in zip(after, before)))
    return outputs, ran


def pair(**how):
    return [Loop(seed=1, **how), Loop(seed=2, **how)]


@pytest.mark.usefixtures("uncompiled")
def test_streams_of_a_step_are_forecast_together():
    """Errors of two outputs forecast alike cancel in the difference that guidance multiplies."""
    compiled = acquainted(toy(), **EXACT, **{"forecast.tolerance": 2e-2})
    for _ in range(2):
        _, ran = guided(compiled, pair(steps=STEPS))
        assert all(forecast in (0, 2) for _, _, forecast in ran)
        assert sum(forecast for _, _, forecast in ran) > STEPS // 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("whole", [False, True])
def test_what_other_ranks_decide_holds_for_all_streams(monkeypatch, whole):
    """Another rank computes one stream of each step: this one computes both, though it would forecast them."""
    wished, most = [], Program.DENSE if whole else Program.REFRESH

    class Overruling(Ranks):
        def agree(self, program, beside=False, order=0):
            wished.append(program)
            first = len(wished) % 2 == 1
            return Agreement(most if first else program, False)

    monkeypatch.setattr("chipmunk_compile.runner.ranks_of", lambda gm: Overruling())
    between = {"forecast.refresh_every": 1} if whole else {}
    compiled = acquainted(toy(), **EXACT, **{"forecast.tolerance": 2e-2}, **between)
    wished.clear()
    _, ran = guided(compiled, pair(steps=STEPS))
    assert Program.FORECAST in wished[::2], "the first stream of a step might have been"
    assert all(forecast == 0 for _, _, forecast in ran)


@pytest.mark.usefixtures("uncompiled")
def test_a_stream_hard_to_forecast_holds_the_other_up():
    """A stream whose output jumps about is computed, and so is the one beside it, which alone would be a line."""

    class Jumpy(ToyDiT):
        def forward(self, x, t, prompt):
            still = super().forward(torch.ones_like(x), torch.ones_like(t), torch.ones_like(prompt))
            embedded = (t * 1000).sin() + (t * 1000).cos()
            return still * t[:, None, None] + prompt.mean() * (embedded * 1e5).sin()[:, None, None]

    torch.manual_seed(0)
    model = Jumpy().eval().requires_grad_(False)
    loops = pair(steps=STEPS)
    loops[0].prompt.zero_()
    loops[1].prompt.fill_(1.0)
    options = {**EXACT, "forecast.tolerance": 1e-3}
    compiled = acquainted(model, **options)
    loops[0].run(compiled)
    assert counts("forecast")[0] > STEPS // 2, "alone"
    chipmunk_compile.reset()
    _, ran = guided(compiled, loops)
    assert sum(forecast for _, _, forecast in ran) == 0


@pytest.mark.usefixtures("uncompiled")
def test_a_stream_that_is_called_no_more_holds_nobody_up():
    """Guidance over a part of the steps: the unconditional calls end, or begin later."""
    compiled = acquainted(toy(), **EXACT, **{"forecast.tolerance": 2e-2})
    for streams in (lambda step: (0, 1) if step < 8 else (0,), lambda step: (0, 1) if step >= 8 else (0,)):
        _, ran = guided(compiled, pair(steps=STEPS), streams)
        alone = [sum(programs) == 1 for programs in ran]
        assert sum(f for (_, _, f), one in zip(ran, alone) if one) >= 2, "of 12, or of 8"
        assert all(f in (0, 2) for (_, _, f), one in list(zip(ran, alone))[11:] if not one)


@pytest.mark.usefixtures("uncompiled")
def test_generations_are_judged_anew():
    options = {**SPARSE, "forecast.tolerance": 2e-2}
    loop = Loop(seed=1, steps=STEPS)
    alone = run(toy(), loop, **options)[0]
    compiled = acquainted(toy(), **options)
    guided(compiled, pair(steps=STEPS))
    assert worst(loop.run(compiled), alone) < 1e-6


@pytest.mark.usefixtures("uncompiled")
def test_without_sparsity_and_with_counted_steps():
    options = {"attention.sparsity": None, "mlp.sparsity": None, "forecast.tolerance": 1e-4, "steps": STEPS}
    model, loop = linear(), Loop(steps=STEPS)
    compiled, _ = compile_toy(model, **options)
    assert worst(loop.run(compiled), loop.run(model)) < 1e-5
    dense, forecast = counts("dense", "forecast")
    assert dense + forecast == STEPS and forecast > STEPS // 2


def test_options_that_cannot_be():
    for value in (0, 1, -0.1, True, "much"):
        with pytest.raises(chipmunk_compile.OptionError, match="forecast.tolerance"):
            chipmunk_compile.Config.from_options({**SMALL, "forecast.tolerance": value})
    with pytest.raises(chipmunk_compile.OptionError, match="compute_every"):
        chipmunk_compile.Config.from_options({"forecast.tolerance": 0.01, "schedule.compute_every": 2})
    with pytest.raises(chipmunk_compile.OptionError, match="schedule.forecast_at both"):
        chipmunk_compile.Config.from_options({"schedule.forecast_at": [3], "schedule.compute_every": 2})
