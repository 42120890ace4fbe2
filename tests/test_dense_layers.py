"""The first layers stay dense: in a whole model by graph order, in blocks compiled one by one by counting calls."""

import torch

import chipmunk_compile
from chipmunk_compile import Reason
from chipmunk_compile.backend import chipmunk
from tests.toy_dit import SMALL, Loop, compile_toy, toy, worst

EXACT = {"attention.sparsity": 0.0, "mlp.sparsity": 0.0, "schedule.refresh_at": ()}


def names(sites):
    return [(site.kind, site.name) for site in sites]


def test_sites_of_the_first_layers_are_declined_in_a_whole_model():
    compiled, (runner,) = run_once(toy(layers=4), dense_layers=1)
    analysis = runner._analysis
    left = [d for d in analysis.declined if d.detail.get("option") == "dense_layers"]
    assert names(left) == [("attention", "blocks.0"), ("mlp", "blocks.0")]
    assert {d.reason for d in left} == {Reason.DISABLED_BY_OPTION}
    assert names(analysis.sites) == [(kind, f"blocks.{i}") for kind in ("attention", "mlp") for i in (1, 2, 3)]


def test_more_dense_layers_than_there_are_leave_the_graph_to_inductor():
    _, made = run_once(toy(layers=2), dense_layers=5)
    assert chipmunk_compile.counters()["dense"] == 1 and chipmunk_compile.counters()["refresh"] == 0


def test_delta_steps_behind_dense_layers_equal_dense_ones():
    compiled, _ = compile_toy(toy(layers=3), dense_layers=1, **EXACT)
    assert worst(Loop().run(compiled), Loop().run(toy(layers=3))) < 1e-5
    counters = chipmunk_compile.counters()
    assert (counters["dense"], counters["refresh"], counters["delta"]) == (0, 2, 4)


def test_blocks_compiled_one_by_one_count_the_layers_before_them():
    model = toy(layers=3)
    for block in model.blocks:
        block.compile(backend=chipmunk, options={**SMALL, **EXACT, "dense_layers": 2})
    with chipmunk_compile.generation(model):
        assert worst(Loop().run(model), Loop().run(toy(layers=3))) < 1e-5
        counters = chipmunk_compile.counters()
    assert (counters["dense"], counters["refresh"], counters["delta"]) == (12, 2, 4)


def run_once(model, **options):
    compiled, runners = compile_toy(model, **options)
    x, t, prompt = next(iter(Loop()))
    with torch.no_grad():
        compiled(x, t, prompt)
    return compiled, runners
