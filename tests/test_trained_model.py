"""The shipped trained transformer: pictures, not random weights."""

import torch

import chipmunk_compile
from examples.tiny_dit import sampling

STEPS = 6


def denoise(model) -> list[torch.Tensor]:
    """The velocities of every step of one short generation of one picture; the latents follow them."""
    velocities = []

    def kept(**inputs):
        result = model(**inputs)
        velocities.append(result[0])
        return result

    conditioning = sampling.prepare([sampling.CAPTIONS[0]], UNCOMPILED)
    sampling.denoise(kept, sampling.starting_noise(1, 0, UNCOMPILED), conditioning, STEPS)
    return velocities


UNCOMPILED = sampling.load_model()


def test_sparsity_zero_equals_inductor():
    options = {"preset": "exact", "schedule.refresh_every": 4}
    outputs = denoise(torch.compile(UNCOMPILED, backend="chipmunk", options=options))
    counts = chipmunk_compile.counters()
    assert (counts["dense"], counts["refresh"], counts["delta"]) == (0, 3, 3)
    references = denoise(torch.compile(UNCOMPILED))
    for mine, theirs in zip(outputs, references, strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
