"""A trained model, end to end on a GPU: its pictures, its kernels, and replayed CUDA graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._inductor import compile_fx, cudagraph_trees, output_code

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from chipmunk_compile.kernels.launch import runs_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
STEPS = 12
# Of bfloat16 against bfloat16, each compiled its own way; sparse steps with the preset's sparsity on top.
LEAST_PSNR = {"exact": 32.0, "balanced": 24.0}
DELTAS = {"schedule.refresh_every": 5}  # and no forecasts


@pytest.fixture(scope="module")
def tiny_dit():
    """(model, conditioning, noise) of examples/tiny_dit, in bfloat16."""
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples")
        from tiny_dit import sampling

        model = sampling.load_model(device="cuda", dtype=torch.bfloat16)
        conditioning = sampling.prepare(list(sampling.CAPTIONS[:2]), model)
        yield sampling, model, conditioning, sampling.starting_noise(2, 0, model)


@pytest.fixture(scope="module")
def dense(tiny_dit):
    sampling, model, conditioning, noise = tiny_dit
    tokens = sampling.denoise(torch.compile(model), noise, conditioning, STEPS)
    torch._dynamo.reset()
    return tokens


def peak_signal_to_noise(tiny_dit, tokens, reference) -> float:
    """In dB, of pictures in 0..1, the mean over the batch."""
    pictures = [tiny_dit[0].unpack(t.float()).clamp(-1, 1) / 2 for t in (tokens, reference)]
    error = (pictures[0] - pictures[1]).square().mean((1, 2, 3))
    return (-10 * error.clamp_min(1e-12).log10()).mean().item()


def denoise(tiny_dit, fast) -> torch.Tensor:
    sampling, _, conditioning, noise = tiny_dit
    tokens = sampling.denoise(fast, noise, conditioning, STEPS)
    torch.cuda.synchronize()
    return tokens


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_pictures_are_those_of_the_dense_model(tiny_dit, dense, preset):
    fast = torch.compile(tiny_dit[1], backend=chipmunk, options={"preset": preset, **DELTAS})
    tokens = denoise(tiny_dit, fast)
    assert chipmunk_compile.counters()["delta"] >= STEPS // 2
    assert tokens.isfinite().all()
    assert peak_signal_to_noise(tiny_dit, tokens, dense) > LEAST_PSNR[preset]


def profiled(run) -> tuple[Counter, Counter]:
    """How often each thing on the host was called, and each kernel on the GPU run."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    host, gpu = Counter(), Counter()
    for event in profile.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        (gpu if on_gpu else host)[event.name] += 1
    return host, gpu


def ran(before: dict[str, int], *programs: str) -> int:
    """Calls of these programs since `before`, those run early for nothing among them."""
    after = chipmunk_compile.counters()
    return sum(after[name] - before[name] for name in programs)


def test_the_printed_kernels_are_what_runs(tiny_dit):
    fast = torch.compile(tiny_dit[1], backend=chipmunk, options=DELTAS)
    denoise(tiny_dit, fast), denoise(tiny_dit, fast)
    before = chipmunk_compile.counters()
    host, gpu = profiled(lambda: denoise(tiny_dit, fast))
    refreshes, deltas = ran(before, "refresh"), ran(before, "delta")
    assert refreshes + deltas == STEPS and ran(before, "misjudged") == 0
    config = tiny_dit[1].config
    layers = config.num_layers + config.num_single_layers
    assert host["chipmunk::attention_delta"] == layers * deltas > 0
    assert host["chipmunk::attention_refresh"] == layers * refreshes > 0
    mlp = ("mlp_hopper",) if runs_hopper(torch.empty(1, device="cuda")) else ("mlp_up", "mlp_down")
    kernels = Counter({"attention_delta": 0, **dict.fromkeys(mlp, 0)})
    for name, times in gpu.items():
        for kernel in kernels:
            kernels[kernel] += times * name.startswith(kernel)
    # A refresh takes the delta's kernel too.
    assert kernels["attention_delta"] == layers * STEPS
    assert all(kernels[kernel] == host["chipmunk::mlp_delta"] > 0 for kernel in mlp)


def test_programs_are_replayed_as_cuda_graphs(tiny_dit, dense, monkeypatch):
    skipped: list[str] = []
    for module in (compile_fx, cudagraph_trees, output_code):
        monkeypatch.setattr(module, "log_cudagraph_skip_and_bump_counter", skipped.append)
    fast = torch.compile(tiny_dit[1], backend=chipmunk, options={**DELTAS, "mode": "reduce-overhead"})
    for _ in range(3):  # warm-up, recording, replay
        tokens = denoise(tiny_dit, fast)
    assert not skipped
    assert peak_signal_to_noise(tiny_dit, tokens, dense) > LEAST_PSNR["balanced"]
    before = chipmunk_compile.counters()
    host, gpu = profiled(lambda: denoise(tiny_dit, fast))
    launched = sum(times for name, times in host.items() if "GraphLaunch" in name)
    assert launched >= ran(before, "delta", "refresh") == STEPS
    assert host["chipmunk::attention_delta"] == host["chipmunk::mlp_delta"] == 0  # nothing but replays
    assert any(name.startswith("attention_delta") for name in gpu)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_preset_forecasts_and_runs_the_dense_model(tiny_dit, dense, mode):
    fast = torch.compile(tiny_dit[1], backend=chipmunk, options={"preset": "quality", "mode": mode})
    for _ in range(3):
        before = chipmunk_compile.counters()
        tokens = denoise(tiny_dit, fast)
        assert ran(before, "dense", "forecast") == STEPS and ran(before, "forecast") >= 2
        assert peak_signal_to_noise(tiny_dit, tokens, dense) > LEAST_PSNR["exact"] - 2
