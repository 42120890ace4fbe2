"""Whole pipeline calls of diffusers: steps, streams and generations are found; the second call compiles nothing."""

import time

import numpy as np
import pytest
import torch

import chipmunk_compile
from tests import tiny_pipelines

OPTIONS = {"min_tokens": 16, "attention.chunk": 32, "mlp.chunk": 32, "schedule.refresh_every": 4}
EXACT = {**OPTIONS, "attention.sparsity": 0.0, "mlp.sparsity": 0.0}

CALLS = {
    "flux": dict(height=32, width=48, num_inference_steps=10, max_sequence_length=16, guidance_scale=3.5),
    "wan": dict(
        height=64, width=64, num_frames=9, num_inference_steps=10, max_sequence_length=16, guidance_scale=5.0,
        negative_prompt="blurry bad",
    ),
}  # fmt: skip


def generate(pipe, name, prompt="a cat on the moon", **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {**CALLS[name], **changes}
    frames = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **call)
    return frames.images if name == "flux" else frames.frames


@pytest.mark.parametrize("name, streams", [("flux", 1), ("wan", 2)])
def test_a_pipeline_call(name, streams):
    pipe = getattr(tiny_pipelines, f"{name}_pipeline")()
    reference = generate(pipe, name)
    pipe.transformer = torch.compile(pipe.transformer, backend="chipmunk", options=EXACT)
    pictures, seconds, counts = [], [], []
    for prompt in ("a cat on the moon", "a cat on the moon", "a fox and the sea"):
        chipmunk_compile.reset()
        started = time.perf_counter()
        pictures.append(generate(pipe, name, prompt))
        seconds.append(time.perf_counter() - started)
        counts.append(chipmunk_compile.counters())
    assert np.abs(pictures[0] - reference).max() < 1e-4
    assert np.abs(pictures[1] - reference).max() < 1e-4
    assert np.abs(pictures[2] - reference).max() > 5e-4  # another prompt is another picture
    for count in counts:
        assert (count["generations"], count["streams"]) == (1, streams)
        assert count["refresh"] + count["delta"] == 10 * streams and count["dense"] == 0
    assert counts[1]["refresh"] == 4 * streams  # steps 0, 1, 4, 8
    assert counts[1]["compiles"] == counts[2]["compiles"] == 0
    assert seconds[1] < seconds[0]


def test_generations_in_a_row_without_reset():
    pipe = tiny_pipelines.wan_pipeline()
    reference = generate(pipe, "wan", num_inference_steps=7)
    pipe.transformer = torch.compile(pipe.transformer, backend="chipmunk", options=EXACT)
    for number in range(1, 4):
        frames = generate(pipe, "wan", num_inference_steps=7)
        assert np.abs(frames - reference).max() < 1e-3
        assert chipmunk_compile.counters()["generations"] == number
    assert chipmunk_compile.counters()["refresh"] == 3 * 2 * 3  # steps 0, 1 and 4 of both streams


def test_a_generation_broken_off_and_another_begun():
    pipe = tiny_pipelines.flux_pipeline()
    reference = generate(pipe, "flux", "a fox and the sea")
    pipe.transformer = torch.compile(pipe.transformer, backend="chipmunk", options=EXACT)

    class Stop(Exception):
        pass

    def stop(pipe, step, timestep, kwargs):
        if step == 6:
            raise Stop
        return kwargs

    with pytest.raises(Stop):
        generate(pipe, "flux", callback_on_step_end=stop)
    pictures = generate(pipe, "flux", "a fox and the sea")
    assert np.abs(pictures - reference).max() < 1e-3
    assert chipmunk_compile.counters()["generations"] == 2


def test_compiling_a_model_in_place():
    pipe = tiny_pipelines.flux_pipeline()
    reference = generate(pipe, "flux")
    pipe.transformer.compile(backend="chipmunk", options=EXACT)
    assert np.abs(generate(pipe, "flux") - reference).max() < 1e-3
    assert chipmunk_compile.counters()["delta"] > 0
