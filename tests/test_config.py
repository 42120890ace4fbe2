"""Options are strict: what does not exist or cannot be is an error that says what to write instead."""

import pytest

from chipmunk_compile.config import PRESETS, Config, OptionError


def test_defaults_are_the_balanced_preset():
    config = Config.from_options()
    assert config.preset == "balanced"
    assert (config.attention.sparsity, config.mlp.sparsity) == (0.835, 0.7)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert Config.from_options({"preset": preset}).preset == preset


def test_options_are_laid_over_the_preset_whatever_their_order():
    config = Config.from_options({"attention.sparsity": 0.5, "preset": "fast"})
    assert config.attention.sparsity == 0.5
    assert config.schedule.refresh_every == PRESETS["fast"]["schedule.refresh_every"]


@pytest.mark.parametrize(
    "name, hint",
    [
        ("attention.sparsety", "attention.sparsity"),
        ("refresh_every", "schedule.refresh_every"),
        ("min_token", "min_tokens"),
        ("max_autotune", "inductor"),
    ],
)
def test_an_unknown_option_offers_the_nearest(name, hint):
    with pytest.raises(OptionError, match=hint):
        Config.from_options({name: 1})


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention.sparsity", 1.5),
        ("attention.sparsity", "0.5"),
        ("attention.sparsity", True),
        ("mlp.sparsity", -0.1),
        ("attention.chunk", 65),
        ("mlp.chunk", 0),
        ("schedule.refresh_every", 0),
        ("schedule.warmup", 1.5),
        ("schedule.refresh_at", 10),
        ("schedule.refresh_at", (0, 1.5)),
        ("schedule.refresh_at", (10, 0)),
        ("schedule.refresh_at", (0, True)),
        ("schedule.refresh_at", (-1, 10)),
        ("dense_layers", -1),
        ("dense_layers", 2.0),
        ("min_tokens", -1),
        ("steps", 0),
        ("streams", 0),
        ("grid", (3, 4)),
        ("grid", (0, 4, 4)),
        ("order", "spiral"),
        ("order", None),
        ("mode", "fastest"),
        ("inductor", {"no_such_option": 1}),
        ("inductor", True),
        ("preset", "best"),
    ],
)
def test_an_impossible_value_is_an_error(name, value):
    with pytest.raises(OptionError, match=name if name != "inductor" else "Inductor|inductor"):
        Config.from_options({name: value})


def test_streams_need_steps():
    with pytest.raises(OptionError, match="steps"):
        Config.from_options({"streams": 2})


def test_mode_and_inductor_options_reach_inductor():
    config = Config.from_options({"mode": "max-autotune-no-cudagraphs", "inductor": {"epilogue_fusion": False}})
    assert config.inductor_options()["max_autotune"] is True
    assert config.inductor_options()["epilogue_fusion"] is False


def test_refreshes_are_listed_as_steps():
    assert Config.from_options({"schedule.refresh_at": [0, 1, 10, 40]}).schedule.refresh_at == (0, 1, 10, 40)
    assert Config.from_options({"schedule.refresh_at": None}).schedule.refresh_at is None


@pytest.mark.parametrize(
    "value, count",
    [(None, None), (0, 0), (12345, 12345), ("60GB", 60 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6)],
)
def test_a_memory_budget_is_bytes_or_a_text_with_a_unit(value, count):
    assert Config.from_options({"memory_budget": value}).memory_budget == count


@pytest.mark.parametrize("value", [True, -1, 1.5, "60", "60 gigs", "GB", "-1GB", "1e3GB", ["60GB"]])
def test_another_memory_budget_is_an_error_that_says_how_to_write_it(value):
    with pytest.raises(OptionError, match=r'memory_budget=.*"60GB"'):
        Config.from_options({"memory_budget": value})


@pytest.mark.parametrize(
    "options, replays",
    [
        ({}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"inductor": {"triton.cudagraphs": True}}, True),
        ({"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False}}, False),
    ],
)
def test_cuda_graphs_are_known_from_inductor_s_options(options, replays):
    assert Config.from_options(options).replays_cuda_graphs is replays
