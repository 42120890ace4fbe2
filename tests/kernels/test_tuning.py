"""Tiles: which table answers, and what the committed one may hold."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from chipmunk_compile.kernels import tuner, tuning

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU that is not there, of a capability to be set."""
    monkeypatch.setenv("CHIPMUNK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 3000")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    capability = mock.Mock(return_value=(8, 0))
    monkeypatch.setattr(tuning, "capability", capability)
    tuning.forget()
    yield capability
    tuning.forget()


def test_without_a_gpu_the_defaults_answer():
    tiles = tuning.attention_delta(BF16, 128, 64, CPU)
    assert tiles["BM"] == 64 and tiles["num_warps"] == 4


@pytest.mark.parametrize("chunk, like", [(60, 64), (126, 128), (100, 128), (120, 128), (17, 32), (180, 192)])
def test_chunks_that_a_grid_cuts_short_take_the_tiles_of_whole_ones(chunk, like):
    assert tuning.attention_delta(BF16, 128, chunk, CPU) == tuning.attention_delta(BF16, 128, like, CPU)
    assert tuning.mlp_up(BF16, chunk, 1, CPU) == tuning.mlp_up(BF16, like, 1, CPU)
    assert tuning.mlp_down(BF16, chunk, CPU) == tuning.mlp_down(BF16, like, CPU)
    hopper = [tuning.attention_delta_hopper(128, n, 768, CPU) for n in (chunk, like)]
    assert hopper[0] == hopper[1]
    assert tuning.fits_128(chunk) == tuning.fits_128(like)


def test_an_override_wins_and_ends():
    key = "mlp_down 16-bit chunk 128"
    before = tuning.mlp_down(BF16, 128, CPU)
    with tuning.override({key: {"BM": 7}}):
        assert tuning.mlp_down(BF16, 128, CPU) == {"BM": 7}
        assert tuning.mlp_down(BF16, 64, CPU) != {"BM": 7}
    assert tuning.mlp_down(BF16, 128, CPU) == before


def test_a_known_capability_takes_the_committed_tiles(gpu):
    gpu.return_value = (9, 0)
    with mock.patch.object(tuner, "measure", side_effect=AssertionError):
        tiles = tuning.mlp_up(BF16, 128, 1, GPU)
    assert tiles == json.loads(tuning.COMMITTED.read_text())["9.0"]["mlp_up 16-bit chunk 128 inputs 1"]


def test_an_unknown_one_is_measured_once_and_remembered(gpu, tmp_path):
    measured = {"BM": 16, "num_warps": 2}
    with mock.patch.object(tuner, "measure", side_effect=lambda key, default, device: {key: measured}) as measure:
        assert tuning.mlp_down(BF16, 128, GPU) == measured
        assert tuning.mlp_down(BF16, 128, GPU) == measured
        tuning.forget()  # as in another process
        assert tuning.mlp_down(BF16, 128, GPU) == measured
    assert measure.call_count == 1
    assert list(json.loads((tmp_path / "tuning-some-card-3000.json").read_text()).values()) == [measured]


@pytest.mark.parametrize("how", ["switched off", "capturing", "float32"])
def test_where_a_clock_would_do_harm_the_defaults_answer(gpu, monkeypatch, how):
    dtype = torch.float32 if how == "float32" else BF16
    if how == "switched off":
        monkeypatch.setenv("CHIPMUNK_AUTOTUNE", "0")
    if how == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with mock.patch.object(tuner, "measure", side_effect=AssertionError):
        assert tuning.mlp_down(dtype, 128, GPU) == tuning.mlp_down(dtype, 128, CPU)


def test_the_committed_table_holds_whole_tiles_of_known_classes():
    defaults = dict(tuner.classes(CPU))
    table = json.loads(tuning.COMMITTED.read_text())
    assert table
    for capability, tiles in table.items():
        assert tuple(map(int, capability.split("."))) >= (8, 0)
        for key, choice in tiles.items():
            assert set(choice) == set(defaults[key]), key


def test_changes_are_packed_for_the_tiles_that_read_them():
    """mlp_up writes blocks of BM tokens and mlp_down reads them, each with tiles of its own."""
    table = json.loads(tuning.COMMITTED.read_text())
    for chunk in (32, 60, 64, 126, 128, 192, 250):
        for dtype in (BF16, torch.float32):
            up = tuning.mlp_up(dtype, chunk, 1, CPU)["BM"]
            packed = -(-chunk // up) * up
            assert packed % tuning.mlp_down(dtype, chunk, CPU)["BM"] == 0
    for tiles in table.values():
        for chunk in (64, 128):
            up = tiles[f"mlp_up 16-bit chunk {chunk} inputs 1"]["BM"]
            assert -(-chunk // up) * up % tiles[f"mlp_down 16-bit chunk {chunk}"]["BM"] == 0


@pytest.fixture
def timed(monkeypatch):
    """A tuner that measures nothing: {tiles that differ from the default: milliseconds, or why there are none}."""
    times = {}
    monkeypatch.setattr(tuner, "_attention", lambda words, device: lambda: None)

    def milliseconds(run, expected):
        (key,) = tuning._overrides
        default = dict(tuner.classes(CPU))[key]
        return times.get(frozenset(tuning._overrides[key].items() - default.items()), 9.0)

    monkeypatch.setattr(tuner, "_milliseconds", milliseconds)
    return times


KEY = "attention_delta_hopper head_dim 128 chunk 128 columns few"


def test_the_fastest_right_form_is_chosen(timed):
    default = dict(tuner.classes(CPU))[KEY]
    shorter = {"turns": False, "BN": 64, "K_STAGES": 6, "V_STAGES": 6}
    timed[frozenset(shorter.items())] = "WRONG by 1.0e+00"
    timed[frozenset({("turns", False)})] = 1.0
    assert tuner.measure(KEY, default, CPU) == {KEY: {**default, "turns": False}}
    assert tuner.measure(KEY, default, CPU, without=("turns",)) == {KEY: default}


def test_where_nothing_fits_the_default_stays(timed):
    default = dict(tuner.classes(CPU))[KEY]
    for tiles in tuner.candidates(KEY.split(" "), default):
        timed[frozenset(tiles.items() - default.items())] = "does not fit"
    assert tuner.measure(KEY, default, CPU) == {KEY: default}


def test_measured_tiles_are_committed_a_class_to_a_line(tmp_path, monkeypatch):
    before = tuning.COMMITTED.read_text()
    monkeypatch.setattr(tuning, "COMMITTED", tmp_path / "tuning.json")
    tuning.COMMITTED.write_text(before)
    tuning.commit((9, 0), {})
    assert tuning.COMMITTED.read_text() == before
    tuning.commit((9, 0), {KEY: {"BN": 64, "turns": True}})
    tuning.commit((8, 6), {"mlp_down 16-bit chunk 64": {"BO": 64}})
    table = json.loads(tuning.COMMITTED.read_text())
    assert table["9.0"][KEY] == {"BN": 64, "turns": True} and set(table["9.0"]) == {KEY, *json.loads(before)["9.0"]}
    assert list(table) == ["8.6", "9.0"]
    assert f'  "{KEY}": {{"BN": 64, "turns": true}}' in tuning.COMMITTED.read_text()
