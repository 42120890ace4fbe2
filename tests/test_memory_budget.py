"""The option memory_budget, in whole generations: what lies in host memory gives the same pictures, bit for bit."""

import logging

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import Reason, evidence, host_memory
from chipmunk_compile.kernels import transfer
from tests.passes.test_offload import Late
from tests.test_regional import compile_blocks
from tests.toy_dit import CHANNELS, SMALL, Loop, compile_toy, toy, worst

SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}
ATTENTION = {"attention.sparsity": 0.6, "mlp.sparsity": None}
LAYERS = 5
# Of five layers: attention takes 51,200 bytes a stream, all sites 361,000, and 85,000 are derived from weights.
ALL, SOME = 10**9, 300_000


def run(model, *loops, stop=None):
    """(outputs of the loops' calls, made by turns and broken off after `stop` steps; the most bytes ever held)."""
    outputs, most = [], 0
    with torch.no_grad():
        for number, step in enumerate(zip(*loops)):
            if number == stop:
                break
            for inputs in step:
                outputs.append(model(*inputs).clone())
                most = max(most, counted("state_bytes"))
    return outputs, most


def counted(name):
    return chipmunk_compile.counters()[name]


def same(mine, expected):
    return len(mine) == len(expected) > 0 and all(torch.equal(a, b) for a, b in zip(mine, expected))


def without_budget(*loops, options=SPARSE, **more):
    """What a model gives whose state all lies on the device."""
    outputs, _ = run(compile_toy(toy(layers=LAYERS), **options, **more)[0], *loops)
    assert counted("delta") > 0 and counted("host_state_bytes") == 0
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return outputs


def compiled(budget, options=SPARSE, **more):
    return compile_toy(toy(layers=LAYERS), memory_budget=budget, **options, **more)


def _fail_at_the(call):
    fetch, calls = type(transfer._plain).fetch, []

    def failing(self, caches, home):
        calls.append(home)
        if len(calls) == call:
            raise RuntimeError("half way")
        fetch(self, caches, home)

    return failing


@pytest.fixture(params=["at once", "late"])
def copies(request, monkeypatch):
    if request.param == "late":
        monkeypatch.setattr(transfer, "_plain", Late())


@pytest.mark.usefixtures("uncompiled", "copies")
class TestGenerations:
    @pytest.mark.parametrize("budget, moves", [(ALL, False), (450_000, True), (SOME, True)])
    def test_one_stream(self, budget, moves):
        loop = Loop(steps=8)
        expected = without_budget(loop)
        outputs, most = run(compiled(budget)[0], loop)
        assert same(outputs, expected)
        assert (counted("host_state_bytes") > 0) is moves and counted("dense") == 0
        assert most <= budget

    @pytest.mark.parametrize("budget, said", [(450_000, {}), (600_000, {}), (450_000, {"steps": 8, "streams": 2})])
    def test_two_streams(self, budget, said):
        loops = [Loop(seed=1, steps=8), Loop(seed=2, steps=8)]
        expected = without_budget(*loops, **said)
        outputs, most = run(compiled(budget, **said)[0], *loops)
        assert same(outputs, expected)
        assert counted("streams") == 2 and counted("dense") == 0
        assert most <= budget

    @pytest.mark.parametrize("broken_off", [1, 3, 5])
    def test_a_generation_broken_off(self, broken_off):
        first, second = Loop(seed=1, steps=8), Loop(seed=2, steps=8)
        expected = without_budget(second)
        model = compiled(SOME)[0]
        run(model, first, stop=broken_off)
        assert same(run(model, second)[0], expected)

    def test_a_step_that_fails_half_way(self, monkeypatch):
        loop, model = Loop(steps=8), compiled(SOME)[0]
        expected = without_budget(loop)
        run(model, loop, stop=3)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(type(transfer._plain), "fetch", _fail_at_the(4))
            with pytest.raises(RuntimeError, match="half way"):
                model(*list(loop)[3])
        assert same(run(model, loop)[0], expected), "the next generation"

    def test_release_gives_the_device_its_memory_back_and_keeps_the_host_s(self):
        loop, (model, _) = Loop(steps=8), compiled(SOME, steps=8)
        expected = without_budget(loop, steps=8)
        held = 0
        for _ in range(3):
            outputs, most = run(model, loop)
            assert same(outputs, expected) and 0 < most <= SOME
            assert (counted("state_bytes"), counted("host_state_bytes")) == (0, 0)
            assert host_memory.waiting_bytes() == (held or host_memory.waiting_bytes()) > 0
            held = host_memory.waiting_bytes()
        chipmunk_compile.reset()
        assert host_memory.waiting_bytes() == 0

    def test_another_resolution(self):
        def loop(tokens):
            made = Loop(steps=8)
            made.latents, made.noise = torch.randn(2, 1, tokens, CHANNELS, generator=torch.manual_seed(tokens))
            return made

        sizes, loops = (63, 80, 63), []
        expected = [without_budget(loop(size)) for size in sizes]
        model = torch.compile(
            toy(layers=LAYERS), backend="chipmunk", dynamic=True, options={**SMALL, **SPARSE, "memory_budget": SOME}
        )
        for size, reference in zip(sizes, expected):
            loops.append(loop(size))  # the prompts before it live on: nothing says that their streams are over
            outputs, most = run(model, loops[-1])
            assert worst(outputs, reference) < 1e-6 and most <= SOME
            assert counted("dense") == 0 and counted("host_state_bytes") > 0

    def test_steps_run_early(self, monkeypatch):
        monkeypatch.setattr(evidence, "ASYNCHRONOUS", {"cpu"})
        loop = Loop(steps=8)
        expected = without_budget(loop)
        assert same(run(compiled(SOME)[0], loop)[0], expected)

    def test_the_delta_beside_a_refresh(self):
        """A residual correction runs both programs in one step."""
        loop, options = Loop(steps=12), {**SPARSE, "forecast.residual": 1.0}
        expected = without_budget(loop, options=options)
        assert same(run(compiled(SOME, options)[0], loop)[0], expected)

    def test_inference_mode_and_no_grad_by_turns(self):
        loop = Loop(steps=8)
        expected = without_budget(loop)
        model = compiled(SOME, steps=8)[0]
        with torch.inference_mode():
            run(model, loop)
        assert same(run(model, loop)[0], expected)

    @pytest.mark.parametrize("budget", [ALL, 60_000])
    def test_blocks_compiled_one_by_one(self, budget):
        loops = [Loop(seed=1), Loop(seed=2)]
        results = []
        for limit in (None, budget):
            model = toy(layers=LAYERS)
            compile_blocks(model, **ATTENTION, memory_budget=limit)
            with chipmunk_compile.generation(model):
                results.append(run(model, *loops)[0])
                assert limit is None or counted("state_bytes") <= limit
                assert (counted("host_state_bytes") > 0) is (limit == 60_000)
        assert same(*results) and counted("dense") == 0


@pytest.mark.usefixtures("uncompiled")
def test_a_block_s_state_comes_while_the_block_before_it_computes(monkeypatch):
    events = []

    class Recording(transfer.Plain):
        def fetch(self, caches, home):
            events.append("f")
            super().fetch(caches, home)

        def arrive(self, caches):
            events.append("a")

    monkeypatch.setattr(transfer, "_plain", Recording())
    model, loop = toy(layers=LAYERS), Loop()
    compile_blocks(model, **ATTENTION, memory_budget=21_000)  # a ring, and nothing beside it
    forwards = []
    with chipmunk_compile.generation(model), torch.no_grad():
        for inputs in loop:
            events.clear()
            model(*inputs)
            forwards.append("".join(events))
    refresh, delta = "a" * LAYERS, "ff" + "af" * (LAYERS - 2) + "aa"
    assert forwards == [refresh, refresh, delta, delta, delta, refresh]


@pytest.mark.usefixtures("uncompiled")
def test_a_stream_too_many_stays_dense_and_the_log_says_why(caplog):
    loops = [Loop(seed=seed, steps=8) for seed in range(4)]
    options = {**SPARSE, "mode": "reduce-overhead"}  # nothing may move
    with caplog.at_level(logging.WARNING, logger="chipmunk_compile"):
        outputs, most = run(compiled(SOME, options)[0], *loops)
    assert most <= SOME and counted("dense") > 0 and counted("delta") > 0
    assert [record.args for record in caplog.records if Reason.OVER_BUDGET.value in str(record.args)]
    references, _ = run(toy(layers=LAYERS), *loops)
    dense = [worst([a], [b]) < 1e-5 for a, b in zip(outputs, references)]
    assert dense.count(True) >= counted("dense")


@pytest.mark.usefixtures("uncompiled")
def test_host_memory_that_is_not_there_is_not_taken(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000.0)
    outputs, most = run(compiled(SOME)[0], Loop(steps=8))
    assert most == 0 and counted("dense") == 8
    assert worst(outputs, run(toy(layers=LAYERS), Loop(steps=8))[0]) < 1e-5


@pytest.mark.parametrize("budget, declined", [(ALL, 0), (SOME, 0), (200_000, 1)])
def test_the_report_says_what_will_lie_where(budget, declined):
    options = {**SMALL, **SPARSE, "memory_budget": budget}
    report = chipmunk_compile.explain(toy(layers=LAYERS), *next(iter(Loop())), options=options)
    over = [site for site in report.sites if site.reason is Reason.OVER_BUDGET]
    assert len(over) == declined and sum(site.accelerated for site in report.sites) == 10 - declined
    assert report.device_bytes <= budget
    assert report.host_bytes == sum(site.host_bytes for site in report.sites)
    assert (report.host_bytes > 0) is (budget != ALL) and (report.ring_bytes > 0) is (budget != ALL)
    assert report.state_bytes == pytest.approx(report.device_bytes + report.host_bytes - report.ring_bytes)
    taken = [site for site in report.sites if site.accelerated]
    assert report.layer_bytes == pytest.approx(sum(site.state_bytes for site in taken) / LAYERS)
    assert ("in host memory" in report.to_text()) is (budget != ALL)
    if declined:
        assert "raise options['memory_budget']" in report.to_text()


@pytest.mark.usefixtures("uncompiled")
def test_the_report_foretells_what_a_generation_holds():
    report = chipmunk_compile.explain(
        toy(layers=LAYERS), *next(iter(Loop())), options={**SMALL, **SPARSE, "memory_budget": SOME}
    )
    torch._dynamo.reset()
    loop = Loop(steps=8)
    run(compiled(SOME)[0], loop)
    tables = report.state_bytes - sum(site.state_bytes for site in report.sites)
    assert counted("state_bytes") == pytest.approx(report.device_bytes - tables, rel=0.01)
    sites = sum(site.host_bytes > 0 for site in report.sites)
    assert 0 <= counted("host_state_bytes") - report.host_bytes <= 3 * sites * transfer.PAGE


@pytest.mark.slow
@pytest.mark.parametrize("options", [ATTENTION, SPARSE], ids=["attention", "all"])
def test_by_inductor(options):
    loops = [Loop(seed=1, steps=8), Loop(seed=2, steps=8)]
    budget = 80_000 if options is ATTENTION else 500_000
    expected = without_budget(*loops, options=options)
    outputs, most = run(compiled(budget, options)[0], *loops)
    assert same(outputs, expected)
    assert counted("host_state_bytes") > 0 and most <= budget
    assert counted("compiles") == 2, "one program serves streams on the device and in host memory"
