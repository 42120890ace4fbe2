"""The benchmark of whole models: published sizes, loops put together from steps, kernels told apart in a trace."""

import json
import sys

import pytest
import torch

from benchmarks import models, models_report, models_zoo
from benchmarks.models_timing import part_of, split_trace

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, tokens, billions",
    [
        ("flux-1280x768", 4352, 11.9),
        ("flux-2304x1280", 12032, 11.9),
        ("wan-14b-720p", 75600, 14.3),
        ("wan-1.3b-480p", 32760, 1.42),
        ("hunyuan-720p", 119056, 12.8),
    ],
)
def test_models_have_their_published_size(name, tokens, billions):
    subject = models_zoo.SUBJECTS[name]
    whole = subject.with_layers(sum(subject.layers))
    assert whole.whole and subject.tokens == tokens
    model = models_zoo._construct(whole, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_layers_are_built_in_proportion():
    subject = models_zoo.SUBJECTS["hunyuan-720p"]
    assert subject.with_layers(12).built == (4, 8) and subject.with_layers(1).built == (1, 1)
    assert subject.half.built == (1, 2) and models_report.layers(subject) == "6 of 60"


@pytest.mark.parametrize("name", ["flux-1280x768", "wan-14b-720p", "hunyuan-720p", "hunyuan-720p-masked"])
def test_random_weights_keep_activations_near_unit_size(name):
    subject = models_zoo.tiny(models_zoo.SUBJECTS[name])
    model = models_zoo.build(subject, CPU, torch.float32)
    loop = models_zoo.Loop(subject, CPU, torch.float32)
    assert len(loop.step(0)) == subject.calls
    outputs = [model(**loop.step(k)[0])[0] for k in (0, 10, 11)]
    assert 0.1 < outputs[0].std() < 10
    near, far = ((outputs[i] - outputs[2]).norm() / outputs[2].norm() for i in (1, 0))
    assert 0 < near < 0.3 < far, "a step moves the output a little, ten steps much"


def test_schedules_are_those_of_the_table():
    image, video = models_zoo.IMAGE, models_zoo.VIDEO
    half = models_report.SETTINGS["forecast"]
    assert models_report.steps_of(image) == {"refresh": 6, "delta": 44}
    assert models_report.steps_of(video) == {"refresh": 4, "delta": 46}
    assert models_report.steps_of({**image, **half}) == {"refresh": 6, "delta": 19, "forecast": 25}
    assert models_report.steps_of({**video, **half}) == {"refresh": 4, "delta": 21, "forecast": 25}


def test_a_whole_model_is_put_together_from_two_depths():
    def depth(layers):
        costs = {"dense_ms": 3 + 10 * layers, "refresh_ms": 4 + 12 * layers, "delta_ms": 5 + 2 * layers}
        return {"depth": layers, **costs}

    whole = models_report.whole_model([depth(2), depth(4)], layers=40, dense_layers=2)
    assert whole == {"dense": 403, "refresh": 4 + 20 + 12 * 38, "delta": 5 + 20 + 2 * 38}
    subject = models_zoo.SUBJECTS["wan-14b-720p"]
    loop = models_report.loop(subject.options, subject, [depth(2), depth(4)], depth(4))
    assert loop["loop_speedup"] == pytest.approx(50 * 403 / (4 * whole["refresh"] + 46 * whole["delta"]))
    assert "loop_speedup" not in models_report.loop(subject.options, subject, [depth(4)], depth(4))


def op(name, ts, dur, dims=()):
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "args": {"Input Dims": list(dims)}}


def kernel(name, ts, dur, number):
    launch = {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": ts, "dur": 1}
    run = {"cat": "kernel", "name": name, "ts": ts + 500, "dur": dur}
    return [{"ph": "X", **event, "args": {"correlation": number}} for event in (launch, run)]


def test_kernels_belong_to_the_operator_that_launched_them():
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "benchmark_step", "ts": 0, "dur": 400},
        op("chipmunk::mlp_delta", 100, 100),
        op("aten::addmm", 110, 10, [[96], [40, 24], [24, 96]]),  # chooses neurons
        *kernel("nvjet_small", 115, 7_000, 1),
        *kernel("mlp_hopper", 150, 11_000, 2),
        op("aten::mm", 210, 10, [[40, 24], [24, 96]]),
        *kernel("nvjet_big", 215, 13_000, 3),
        op("aten::mm", 230, 10, [[40, 24], [24, 24]]),
        *kernel("nvjet_square", 235, 17_000, 4),
        *kernel("triton_red_fused_add_mul_7", 250, 19_000, 5),
        *kernel("triton_poi_fused_index_select_1", 50, 23_000, 6),
    ]
    assert split_trace(events, hidden=(96,)) == {
        "attention": 0.0, "mlp": 11 + 13, "matmul": 17, "pointwise": 19, "selection": 7, "permutation": 23,
        "until_first_launch": 0.05,
    }  # fmt: skip


def test_attention_is_told_from_the_choice_of_its_columns():
    refresh = [op("chipmunk::attention_refresh", 0, 9)]
    assert part_of("attention_scores", refresh, ()) == part_of("attention_select", refresh, ()) == "selection"
    assert part_of("attention_delta_hopper", refresh, ()) == "attention"
    assert part_of("cudnn_sm90", [op("aten::_scaled_dot_product_cudnn_attention", 0, 9)], ()) == "attention"


@pytest.mark.slow
def test_the_script_runs_on_a_cpu_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "models.json"
    monkeypatch.setattr(sys, "argv", ["models", "--tiny", "--only", "wan-14b-720p", "--output", str(path)])
    assert models.main() == 0
    table, forecast = json.loads(path.read_text())["rows"]
    assert table["loop_steps"] == {"refresh": 4, "delta": 46} and forecast["forecast_ms"] < forecast["delta_ms"]
    assert table["error"]["at_sparsity_0"] < 1e-5
    written = path.stat().st_mtime_ns
    assert models.main() == 0 and path.stat().st_mtime_ns == written
    speeds, parts = models_report.markdown(json.loads(path.read_text())).split("\n\n")
    assert [line.count("| table |") + line.count("| forecast |") for line in speeds.splitlines()[2:]] == [1, 1]
