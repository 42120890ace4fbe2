"""The token permutation at the width and resolution that people run: cuts against a golden file."""

import json
import pathlib

import pytest

from benchmarks.permutation import survey

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "token_cuts.json"
QUICK = ("wan", "cogvideox")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in json.loads(GOLDEN.read_text())],
)
def test_the_cut_is_where_it_was(name):
    found = json.loads(json.dumps(survey(name)))
    expected = json.loads(GOLDEN.read_text())[name]
    assert {key: found[key] for key in expected} == expected
