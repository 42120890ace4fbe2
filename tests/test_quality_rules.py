"""The rules of forecasts that are held against one another."""

import math

import pytest
import torch

from benchmarks.quality import rules
from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History


def test_between_two_tolerances():
    points = [(4.0, 20.0), (1.0, 40.0), (2.0, 30.0)]
    assert rules.at(points, 2.0) == 30.0 and rules.at(points, math.sqrt(2)) == pytest.approx(35.0)
    assert rules.at(points, 5.0) is None and rules.at([], 2.0) is None


def test_a_fading_trend_is_found_from_one_gap_and_holds_at_another():
    assert all(rules._faded(rules._inverse(share)) == pytest.approx(share) for share in (0.05, 0.5, 1.0, 1.2))
    rate, slope = 3.0, -2.0
    history = rules.RULES["fading with the gap"](0.5)

    def output(moment: float) -> list[torch.Tensor]:
        """Ahead of 0.9 a line; behind it the slope fades."""
        gone = 0.9 - moment
        return [torch.full((4,), 1.0 + slope * (-math.expm1(-rate * gone) / rate if gone > 0 else gone))]

    for moment in (1.0, 0.9):
        history.record(moment, output(moment), 1.0)
    history.told = None
    told = history._compare(0.8, output(0.8))
    history.told, history.judge._gap = rules.Arriving(told), 0.1
    assert history.forecast(0.6)[0].allclose(output(0.6)[0], atol=1e-4)


def test_reuse_tells_what_the_first_line_may_miss():
    early, later = rules.RULES["from the third step on"](0.5), History(ForecastOptions(tolerance=0.5))
    for history in (early, later):
        for moment in (1.0, 0.9):
            history.record(moment, [torch.full((4,), moment)], 1.0)
    assert early.reaches(0.8) and not later.reaches(0.8)


def test_all_rules_run(capsys):
    rules.main(["--tiny", "--steps", "12", "--clips", "2", "--tolerance", "0.004", "0.03", "0.2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(rules.RULES)
    assert any(cell.strip().replace(".", "").isdigit() for cell in lines[2].split("|")[2:])
