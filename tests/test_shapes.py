"""Symbolic sizes: each of the first few is run sparse at its own, by state of its own; the others are dense."""

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import shapes
from tests.toy_dit import CHANNELS, SMALL, TEXT, Loop, toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {**SMALL, "attention.sparsity": 0.6, "mlp.sparsity": 0.6}


def loop(tokens, text=TEXT, batch=1):
    made = Loop(steps=8, batch=batch)
    generator = torch.Generator().manual_seed(tokens)
    made.latents, made.noise = torch.randn(2, batch, tokens, CHANNELS, generator=generator)
    made.prompt = torch.randn(batch, text, CHANNELS, generator=generator)
    return made


def counts(*names):
    counters = chipmunk_compile.counters()
    return tuple(counters[name] for name in names)


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_resolution_is_run_sparse_too(dynamic):
    sizes = [(63, TEXT, 1), (80, TEXT, 1), (63, TEXT, 1)]
    if dynamic:
        sizes += [(80, TEXT + 2, 1), (80, TEXT, 2)]
    model = torch.compile(toy(), backend="chipmunk", dynamic=dynamic, options=OPTIONS)
    outputs = [loop(*size).run(model) for size in sizes]
    assert counts("dense", "refresh", "delta") == (0, 3 * len(sizes), 5 * len(sizes))
    for size, mine in zip(sizes, outputs):
        torch._dynamo.reset()
        alone = loop(*size).run(torch.compile(toy(), backend="chipmunk", dynamic=False, options=OPTIONS))
        assert worst(mine, alone) < 1e-6, size


def test_guidance_whose_texts_differ_in_length_is_two_sizes():
    model, dense = torch.compile(toy(), backend="chipmunk", options=OPTIONS), toy()
    pair = loop(63), loop(63, TEXT + 4)
    with torch.no_grad():
        for both in zip(*pair):
            for inputs in both:
                assert worst([model(*inputs)], [dense(*inputs)]) < 0.5
    dense, delta = counts("dense", "delta")
    assert dense == 0 and delta >= 9  # one refresh more where the first text moved to the graph of both


def test_sizes_without_end_stay_dense(caplog):
    model, dense = torch.compile(toy(), backend="chipmunk", dynamic=True, options=OPTIONS), toy()
    for number in range(shapes.MOST_SIZES + 2):
        one = loop(63, TEXT + number)
        error = worst(one.run(model), one.run(dense))
        assert error < (0.5 if number < shapes.MOST_SIZES else 1e-5)
    assert counts("dense", "delta") == (16, 5 * shapes.MOST_SIZES)
