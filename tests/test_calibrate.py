"""calibrate(): what it claims holds when run again from its file; what cannot be met or calibrated is said."""

import dataclasses
import json
import sys
import time

import numpy
import pytest
import torch

import chipmunk_compile
from chipmunk_compile import CalibrationError, OptionError, load_calibration
from chipmunk_compile.calibrating import EXACT, ladder
from chipmunk_compile.calibration import Trial
from chipmunk_compile.config import Config
from chipmunk_compile.pictures import EQUAL, pictures_of, psnr
from chipmunk_compile.progress import progress_bar
from tests import tiny_pipelines
from tests.test_pipelines import CALLS
from tests.toy_dit import CHANNELS, SMALL, TEXT, TOKENS, toy

STEPS = 16
FORECASTS = {"attention.sparsity": None, "mlp.sparsity": None, "forecast.order": 1}
SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.5}


def euler(model, steps: int = STEPS, prompts: int = 1) -> torch.Tensor:
    """Two pictures [2, TOKENS, CHANNELS], from the same noise at every call; `prompts` calls of the model a step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, CHANNELS, generator=generator)
    texts = torch.randn(prompts, 2, TEXT, CHANNELS, generator=generator).unbind()
    for k in range(steps):
        time = torch.full((2,), 1 - k / steps)
        x = x + sum(model(x, time, text) for text in texts) / (steps * prompts)
    return x


def every(n: int, **more) -> dict:
    return {**FORECASTS, "schedule.compute_every": n, **more}


def model_of(layers: int = 3):
    return toy(dim=64, layers=layers)


def calibrate(model, target, run=euler, **more):
    return chipmunk_compile.calibrate(model, run, target, options=SMALL, progress=False, **more)


def own_psnr(made: torch.Tensor, dense: torch.Tensor) -> list[float]:
    """Of each picture, peak: the range of all dense ones."""
    peak = (dense.max() - dense.min()).double()
    return [10 * torch.log10(peak**2 / (a - b).double().square().mean()).item() for a, b in zip(made, dense)]


def test_the_claim_holds_when_run_again_from_the_file(uncompiled, tmp_path):
    model = model_of()
    with torch.no_grad():
        dense = euler(model)
    by_hand = {}
    for n in (2, 3, 5):
        compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **every(n)})
        with torch.no_grad():
            by_hand[n] = min(value for _ in range(2) for value in own_psnr(euler(compiled), dense))
        torch._dynamo.reset()
    assert by_hand[2] > by_hand[3] > by_hand[5]
    target = (by_hand[3] + by_hand[5]) / 2
    found = calibrate(model, target, settings=[every(2), every(5), every(3)], repeats=3)
    tried = {trial.setting["schedule.compute_every"]: trial for trial in found.trials}
    assert tried[5].speedup is None and tried[3].speedup is not None
    chosen = found.chosen.setting["schedule.compute_every"]
    assert found.met and found.chosen.speedup == max(t.speedup for t in found.trials if t.speedup) and chosen in (2, 3)
    assert found.chosen.psnr == pytest.approx(by_hand[chosen], abs=0.1)
    assert found.options == {**SMALL, **every(chosen)}
    path = found.save(tmp_path / "new" / "calibration.json")
    again = load_calibration(path)
    assert again == found
    for options in (again.options, {"calibration": str(path)}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="chipmunk", options=options)
        with torch.no_grad():
            first, later = (own_psnr(euler(compiled), dense) for _ in range(2))
        assert min(*first, *later) == pytest.approx(found.chosen.psnr, abs=0.1)
        assert min(*first, *later) >= target


def test_the_worst_picture_of_the_worse_run_counts_and_the_mean_is_told(uncompiled):
    model = model_of()
    trial = calibrate(model, 1.0, settings=[every(2)]).trials[0]
    compiled = torch.compile(model, backend="chipmunk", options={**SMALL, **every(2)})
    with torch.no_grad():
        dense = euler(model)
        runs = [own_psnr(euler(compiled), dense) for _ in range(2)]
    assert runs[0] == runs[1]  # the first generation is as any later one
    each = [min(pair) for pair in zip(*runs)]
    assert max(each) - min(each) > 0.01
    assert (trial.psnr, trial.mean_psnr) == (pytest.approx(min(each), abs=0.1), pytest.approx(sum(each) / 2, abs=0.1))


def test_nothing_is_tried_that_could_not_be_faster(uncompiled):
    hardly = {**SPARSE, "schedule.refresh_every": 2}
    found = calibrate(model_of(), 1.0, settings=[hardly, every(50)])
    assert [trial.setting for trial in found.trials] == [every(50)]
    assert found.chosen.at_most == pytest.approx(16 / 2)  # R R, and forecasts
    assert found.chosen.speedup > 1.1  # the most that the other could give is 1.08


def test_settings_that_miss_are_not_timed(uncompiled):
    found = calibrate(model_of(), 118.0, settings=[every(4)])
    assert not found.met and found.chosen is None
    missed, exact = found.trials
    assert missed.speedup is None and missed.psnr < 118
    assert exact.setting == EXACT and found.options == {**SMALL, **EXACT}
    assert exact.psnr > missed.psnr + 20
    assert "not met: no setting meets it; the best gave" in str(found)
    assert Config.from_options(found.options).attention.sparsity == 0.0


def test_a_target_above_rounding_is_said_to_be(uncompiled):
    found = calibrate(model_of(1), 35.0, settings=[every(4)], run=lambda model: euler(model, 4))
    exact = dataclasses.replace(found.trials[0], setting=EXACT, psnr=30.0, speedup=None)
    assert "rounding alone misses" in str(dataclasses.replace(found, met=False, trials=(exact,)))


def test_what_is_predicted_is_what_explain_predicts(uncompiled):
    model = model_of()
    setting = {**SPARSE, "schedule.refresh_every": 4}
    found = calibrate(model, 1.0, settings=[setting], run=lambda m: euler(m, 10, prompts=2))
    (trial, *_) = found.trials
    assert (found.steps, found.streams) == (10, 2)
    inputs = torch.randn(2, TOKENS, CHANNELS), torch.ones(2), torch.randn(2, TEXT, CHANNELS)
    report = chipmunk_compile.explain(model, *inputs, options={**SMALL, **setting})
    assert trial.work == pytest.approx(report.generation_share(10)) and trial.work < 1
    assert trial.state_bytes == 2 * report.state_bytes
    assert trial.calls == {"refresh": 8, "delta": 12}  # R R d d R d d d R d, of two streams


def test_settings_share_what_they_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr("chipmunk_compile.programs.compile_graph", lambda g, args, config: compiled.append(g) or g)
    settings = [{**SPARSE, "schedule.refresh_every": n, **more} for n in (4, 6)
                for more in ({}, {"schedule.compute_every": 2}, {"forecast.residual": 1.0})]  # fmt: skip
    found = calibrate(model_of(), 118.0, settings=[*settings, every(2), every(3)])
    assert len(found.trials) == 9  # the exact one too
    assert len(compiled) == 1 + 2 + 2  # dense; refresh and delta of the sparse ones; those of "exact"


def test_of_forecasts_with_a_tolerance_the_least_work_is_predicted(uncompiled):
    setting = {"attention.sparsity": None, "mlp.sparsity": None, "forecast.tolerance": 0.02, "forecast.repay": True}
    found = calibrate(model_of(), 118.0, settings=[setting], run=lambda model: euler(model, 30))
    trial = found.trials[0]
    assert trial.setting == setting and trial.at_most == pytest.approx(30 / (2 + 2))  # R R, and every eleventh
    assert 4 <= trial.calls["dense"] < 30 and trial.calls["dense"] + trial.calls["forecast"] == 30
    assert Config.from_options(found.options).forecast.tolerance is None


def test_exact_forecasts_nothing_whatever_the_options(uncompiled):
    options = {**SMALL, "schedule.compute_every": 3, "forecast.residual": 1.0}
    found = chipmunk_compile.calibrate(model_of(1), euler, 118.0, options=options, settings=[every(4)], progress=False)
    exact = found.trials[-1]
    assert exact.psnr > 100 and "forecast" not in exact.calls
    assert Config.from_options(found.options).schedule.compute_every == 1 and not found.met


def test_residual_costs_a_delta_a_refresh(uncompiled):
    both = [{**SPARSE, "schedule.refresh_every": 4, "forecast.residual": share} for share in (0.0, 1.0)]
    plain, corrected = sorted(calibrate(model_of(), 118.0, settings=both).trials[:2], key=lambda t: t.work)
    assert corrected.setting["forecast.residual"] == 1.0 and corrected.state_bytes > plain.state_bytes
    refreshes = 2 + 3  # of 16 steps: 0, 1, and 4, 8, 12; the last three learn
    assert plain.calls == {"refresh": refreshes, "delta": 11}
    assert corrected.calls == {"refresh": refreshes, "delta": 11 + 3}


def test_a_pipeline_with_guidance_by_two_calls(uncompiled):
    pipe = tiny_pipelines.wan_pipeline()
    model = pipe.transformer

    def run(transformer):
        pipe.transformer = transformer
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", generator=generator, output_type="latent", **{**CALLS["wan"], "num_inference_steps": 8})

    pipe.set_progress_bar_config(disable=True)
    sparse = {**SPARSE, "schedule.refresh_every": 4, "schedule.compute_every": 2}
    options = {**SMALL, "min_tokens": 16}
    found = chipmunk_compile.calibrate(model, run, 110.0, options=options, settings=[sparse], progress=False)
    assert (found.steps, found.streams, found.model) == (8, 2, "WanTransformer3DModel")
    # R R f d f d f R, of two streams
    assert found.trials[0].calls == {"refresh": 6, "delta": 4, "forecast": 6}
    assert found.trials[0].psnr < 110
    assert found.trials[-1].psnr > found.trials[0].psnr + 10  # every column computed


def test_where_nothing_is_sparse_only_forecasts_are_tried(uncompiled):
    found = chipmunk_compile.calibrate(model_of(), euler, 118.0, options={"min_tokens": 5000}, progress=False)
    tried = [trial.setting for trial in found.trials if trial.setting != EXACT]
    assert tried and all(setting["attention.sparsity"] is None for setting in tried)
    assert len(tried) == sum(s["attention.sparsity"] is s["mlp.sparsity"] is None for s in ladder())


def test_every_setting_of_the_ladder_is_one():
    configs = [Config.from_options(setting) for setting in ladder()]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda model: torch.zeros(2, 3, 4), "did not call the ToyDiT"),
        (lambda model: euler(model._orig_mod), "did not call the ToyDiT"),
        (lambda model: euler(model) + torch.randn(1), "two dense runs differ"),
        (lambda model: euler(model) and None, "Boolean"),
        (lambda model: [euler(model).shape][:0], "list"),
        (lambda model: {"made": euler(model)}, "returned dict"),
    ],
    ids=["no call", "another", "no seed", "raises", "nothing", "dict"],
)
def test_runs_that_cannot_be_calibrated(run, message, uncompiled):
    with pytest.raises((CalibrationError, RuntimeError), match=message):
        calibrate(model_of(1), 30.0, run=run)


def test_what_never_reaches_the_backend_is_refused():
    whole, block = model_of(1), model_of(1)
    whole.compile(backend="eager")
    block.blocks[0].compile(backend="eager")
    for model in (whole, block):
        with pytest.raises(CalibrationError, match="compiled in place"):
            calibrate(model, 30.0)
    with pytest.raises(CalibrationError, match="did not call"), torch.compiler.set_stance("force_eager"):
        calibrate(model_of(1), 30.0)


def test_a_speed_that_cannot_be_is_timed_again(uncompiled):
    """Every second dense run is slow, as on a machine that is busy now and then."""
    calls = []

    def run(model):
        calls.append(None)
        if len(calls) == 4:  # dense, dense, the setting, and the dense run that is timed
            time.sleep(3.0)
        return euler(model)

    (trial,) = calibrate(model_of(), 1.0, settings=[every(2)], run=run).trials
    assert len(calls) >= 3 + 2 * 2 and trial.speedup < 4


@pytest.mark.parametrize("wrong", [{"target_psnr": 0}, {"target_psnr": "35"}, {"repeats": 0}, {"peak": -1.0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        chipmunk_compile.calibrate(toy(), euler, **{"target_psnr": 35, **wrong})


def test_bad_options_are_refused_before_anything_runs():
    for more in ({"settings": [{"refresh": 3}]}, {"options": {"atention.chunk": 64}}):
        with pytest.raises(OptionError):
            chipmunk_compile.calibrate(toy(), lambda model: 1 / 0, **more)


def a_calibration() -> chipmunk_compile.Calibration:
    trial = Trial({**every(2)}, 40.0, 41.0, 0.5, 1.8, 1000, {"refresh": 3})
    return chipmunk_compile.Calibration(
        every(2),
        35.0,
        True,
        "Toy",
        16,
        1,
        "cpu",
        "2.13",
        1.0,
        0.5,
        120.0,
        (trial, dataclasses.replace(trial, speedup=None)),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "no calibration"),
        ({"extra": 1}, "extra"),
        ({"met": 1}, "met=1"),
        ({"steps": True}, "steps=True"),
        ({"trials": [{"psnr": 3}]}, "trial with wrong or missing"),
        ({"trials": 3}, "trials must be"),
        ({"options": {"attention.sparsity": 3}}, "share from 0"),
        ({"options": {"speed": 3}}, "unknown option"),
    ],
)
def test_a_file_is_read_strictly(change, message, tmp_path):
    path = a_calibration().save(tmp_path / "c.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_calibration(path)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(CalibrationError, match="no JSON"):
        load_calibration(tmp_path / "c.json")
    for path in (tmp_path / "missing.json", tmp_path / "c.json", 3):
        with pytest.raises(OptionError, match=r"Calibration\.save"):
            Config.from_options({"calibration": path})


def test_saving_is_all_or_nothing(tmp_path):
    path = a_calibration().save(tmp_path / "c.json")
    before = path.read_text()
    with pytest.raises(ValueError, match="nan|JSON"):
        dataclasses.replace(a_calibration(), peak=float("nan")).save(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_options_are_laid_over_a_calibration(tmp_path):
    path = a_calibration().save(tmp_path / "c.json")
    config = Config.from_options({"calibration": path, "forecast.order": 2})
    assert (config.schedule.compute_every, config.forecast.order, config.mlp.sparsity) == (2, 2, None)


def test_a_target_is_no_option():
    with pytest.raises(OptionError, match=r"calibrate\(model, run"):
        Config.from_options({"target_psnr": 35})


def test_pictures_of_what_generations_return():
    latents = torch.arange(48.0).view(2, 2, 3, 4)
    assert [p.shape for p in pictures_of(latents)] == [(2, 3, 4)] * 2
    pixels = (latents.permute(0, 2, 3, 1).repeat(1, 1, 1, 2)[..., :3]).numpy().astype("uint8")  # [2, 3, 4, 3]
    output = type("Output", (), {"images": list(pixels)})()
    for form in (pixels, list(pixels), output, tuple(map(numpy.array, pixels))):
        found = pictures_of(form)
        assert len(found) == 2 and all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(found, pixels))
    image = pytest.importorskip("PIL.Image")
    frames = [image.fromarray(p) for p in pixels]
    assert torch.equal(torch.stack(pictures_of(frames)), torch.from_numpy(pixels))
    (clip,) = pictures_of(type("Output", (), {"frames": [frames]})())
    assert torch.equal(clip, torch.from_numpy(pixels))
    made = pictures_of(latents)
    latents += 1
    assert made[0][0, 0, 0] == 0  # a copy: a compiled model may write where its output lay


def test_psnr_of_known_errors():
    dense = [torch.zeros(4, 4), torch.ones(4, 4)]
    assert psnr(dense, dense, 1.0) == [EQUAL, EQUAL]
    assert psnr([dense[0] + 0.1, dense[1] - 0.02], dense, 2.0) == pytest.approx([26.0206, 40.0], abs=1e-3)
    assert psnr([dense[0] / 0, dense[1]], dense, 1.0) == [-EQUAL, EQUAL]
    with pytest.raises(CalibrationError, match="other shapes"):
        psnr(dense, dense[:1], 1.0)


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress_bar(3, "calibrating", True) as bar:
        bar.at("dense")
        bar.advance()
        bar.at("next")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["calibrating 0/3", "calibrating 1/3"]
    assert lines[1].endswith("next")
