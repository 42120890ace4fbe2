"""The rules of forecasts that are held against one another."""

import json
import math

import pytest
import torch

from benchmarks.quality import rules
from benchmarks.quality.simulated import MODELS
from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History
from chipmunk_compile.judge import Arriving, Judge


def test_a_line_through_what_lies_near():
    points = [(count, 20.0 + 10.0 * math.log(count)) for count in (6.0, 6.5, 7.0, 8.0)]
    assert rules.near(points, 7.0) == pytest.approx(20.0 + 10.0 * math.log(7.0))
    assert rules.near(points, 14.0) is None and rules.near([], 7.0) is None


def test_costs_agree_over_a_sixteenth_of_the_way_and_part_beyond():
    longer = []
    for kind in (rules.ErrorAlone, Judge, rules.LeftInLatents):
        assert kind(0.5)._cost(0.1, 1 / 16) == pytest.approx(0.025)
        longer.append(kind(0.5)._cost(0.1, 1 / 4))
    assert longer == sorted(longer) and longer[0] < longer[1] < longer[2]


def test_a_line_from_noise_begins_with_the_first_output():
    for kind, told in ((History, 2.0), (rules.FromNoise, 3.0)):
        history = kind(ForecastOptions(repay=True))
        for step in (0, 1):
            history.record(1.0 - 0.1 * step, [torch.full((2,), 1.0 + step)], 1.0, step)
        assert history.forecast(0.8)[0].tolist() == pytest.approx([told, told])


def test_a_first_error_is_believed_of_any_gap_or_of_four():
    for kind, allowed in ((Judge, False), (rules.AnyDistance, True)):
        judge = kind(0.5)
        judge.weigh(1.0, None, None, 1.0)
        judge.weigh(0.9, 0.1, Arriving(torch.tensor([0.0])), 1.0)
        assert judge.allows(0.4, 0.5, 1.0) is allowed


def test_all_rules_run(capsys, tmp_path):
    path = tmp_path / "rows.json"
    short = ["--model", "image", "--steps", "9", "--clips", "2", "--tolerances", "3"]
    rules.main(["--tiny", *short, "--output", str(path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == ["fewer steps", *rules.RULES, *rules.FIXED]
    rows = json.loads(path.read_text())
    assert {row["rule"] for row in rows} == set(names) and all(0 < row["computed"] <= 9 for row in rows)


def test_streams_are_forecast_together_or_each_for_its_own():
    model = MODELS["image"](None, 2, True)
    with torch.no_grad():
        (_, together, _), (_, apart, _) = (
            model.judged(lambda: History(ForecastOptions(repay=True, tolerance=0.1)), 12, how) for how in (True, False)
        )
        psnr, computed, which = model.fixed(lambda: History(ForecastOptions()), range(12), 12)
        fewer = model.fewer(6, 12)
    assert apart <= together < 12 and (together * model.streams).is_integer()
    assert psnr == 120.0 and computed == 12 and which == list(range(12)), "nothing is forecast"
    assert fewer[0] < 120.0 and fewer[1] == 6
