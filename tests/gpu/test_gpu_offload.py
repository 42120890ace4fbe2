"""State in host memory on a GPU: the same numbers as with all of it on the device, at nearly the same speed.

pytest -s tests/gpu/test_gpu_offload.py        prints what a delta step takes with and without
"""

from __future__ import annotations

import statistics

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import budget, host_memory
from chipmunk_compile.kernels import transfer
from tests.toy_dit import CHANNELS, TEXT, ToyDiT, compile_toy, worst

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LAYERS, HEADS, DIM = 6, 24, 3072
SHORT, LONG = 8192, 32768  # tokens
ATTENTION = {"attention.sparsity": 0.93, "attention.chunk": 128, "mlp.sparsity": None}
ALL = {**ATTENTION, "mlp.sparsity": 0.7, "mlp.chunk": 128}
STEPS = 8
MOST_SLOWER = 1.05
ENOUGH = "100GB"
ROUNDING = 0.02  # of the largest output: bfloat16, once a layer


@pytest.fixture(scope="module")
def model():
    """Layers as wide as those of the large video models."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = ToyDiT(dim=DIM, heads=HEADS, layers=LAYERS)
    return made.to(torch.bfloat16).eval().requires_grad_(False)


class Loop:
    """Latents that drift and a time that falls, in bfloat16 on the GPU."""

    def __init__(self, tokens: int, seed: int = 0, steps: int = STEPS) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        self.prompt = torch.randn(1, TEXT, CHANNELS, **shape)
        self.noise, self.latents = (torch.randn(1, tokens - TEXT, CHANNELS, **shape) for _ in range(2))
        self.steps = steps

    def __iter__(self):
        for i in range(self.steps):
            share = i / self.steps
            time = torch.full((1,), 1 - share, device="cuda", dtype=torch.bfloat16)
            yield torch.lerp(self.noise, self.latents, share), time, self.prompt


def run(fast, *loops, streams=None) -> list[torch.Tensor]:
    """The loops' calls by turns; `streams`: each loop's calls on a CUDA stream of its own."""
    outputs, steps = [], list(zip(*loops))  # inputs must outlive what other streams still do with them
    with torch.no_grad():
        for step in steps:
            for number, inputs in enumerate(step):
                stream = streams[number] if streams else torch.cuda.current_stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    outputs.append(fast(*inputs).clone())
    torch.cuda.synchronize()
    return outputs


def compiled(model, **options):
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return compile_toy(model, **options)[0]


def state_bytes(model, loop, options) -> int:
    return chipmunk_compile.explain(model, *next(iter(loop)), options=options).state_bytes


def limit(model, loop, options, share: float) -> int:
    """A budget of so much of one stream's state."""
    return int(share * state_bytes(model, loop, options))


def check(model, loops, options, memory_budget, **how) -> None:
    """Bit for bit what the same programs make of state that stays on the device, and but for rounding what programs
    make that know of no budget: those are compiled by themselves."""
    expected = run(compiled(model, **options), *loops)
    roomy = compiled(model, **options, memory_budget=ENOUGH)
    stays, again = run(roomy, *loops), run(roomy, *loops)
    assert chipmunk_compile.counters()["host_state_bytes"] == 0
    assert all(torch.equal(s, a) for s, a in zip(stays, again))
    rounding = worst([s.float() for s in stays], [e.float() for e in expected])
    assert rounding < ROUNDING
    fast = compiled(model, **options, memory_budget=memory_budget)
    for _ in range(2):  # the second generation in host memory that the first one locked
        mine = run(fast, *loops, **how)
        counted = chipmunk_compile.counters()
        assert counted["host_state_bytes"] > 0 and counted["state_bytes"] <= memory_budget and counted["dense"] == 0
        assert all(torch.equal(m, s) for m, s in zip(mine, stays))
    print(f"\nrounding {rounding:.1e}; {counted['state_bytes'] / 1e6:.0f} MB on the device, "
          f"{counted['host_state_bytes'] / 1e6:.0f} MB in host memory")  # fmt: skip


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_attention_in_host_memory(model, share):
    loop = Loop(SHORT)
    check(model, [loop], ATTENTION, limit(model, loop, ATTENTION, share))


def test_mlps_in_host_memory(model, monkeypatch):
    """Their caches come and go at every step: too slow to be chosen over PCIe, so the link is said to cost nothing."""
    monkeypatch.setitem(budget.LINKS, "cuda", budget.Link())
    loop = Loop(SHORT)
    check(model, [loop], ALL, limit(model, loop, ALL, 0.75))


def test_two_streams_of_guidance(model):
    loops = [Loop(SHORT, seed=1), Loop(SHORT, seed=2)]
    check(model, loops, ATTENTION, limit(model, loops[0], ATTENTION, 1.0))


def test_calls_on_two_cuda_streams_share_the_ring(model):
    loops = [Loop(SHORT, seed=1), Loop(SHORT, seed=2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    check(model, loops, ATTENTION, limit(model, loops[0], ATTENTION, 1.0), streams=streams)


def test_memory_that_cannot_be_locked_is_copied_all_the_same(model, monkeypatch):
    monkeypatch.setattr(transfer, "pin", lambda home, device: None)
    loop = Loop(SHORT)
    check(model, [loop], ATTENTION, limit(model, loop, ATTENTION, 0.6))


def test_a_registration_that_fails_leaves_no_error_behind(caplog):
    """A page that is locked already is refused; the next kernel must not raise that."""
    transfer._say_unpinned.cache_clear()
    page = torch.empty(3 * transfer.PAGE, dtype=torch.uint8)
    home = page[-page.data_ptr() % transfer.PAGE :][: transfer.PAGE]
    device, address = torch.device("cuda"), home.data_ptr()
    transfer.pin(home, device)
    assert transfer._tried[address]
    del transfer._tried[address]
    transfer.pin(home, device)
    assert not transfer._tried[address] and "could not be locked" in caplog.text
    assert torch.ones(4, device="cuda").sum().item() == 4
    transfer._tried[address] = True
    transfer.unpin(address)
    transfer.pin(home, device)  # it was unlocked, then
    assert transfer._tried[address]
    transfer.unpin(address)


def test_release_frees_the_device_and_reset_the_host(model):
    loop = Loop(SHORT)
    fast = compiled(model, **ATTENTION, memory_budget=limit(model, loop, ATTENTION, 0.6), steps=STEPS)
    run(fast, loop)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run(fast, loop)
    assert chipmunk_compile.counters()["state_bytes"] == 0
    assert abs(torch.cuda.memory_allocated() - before) < 1 << 20
    assert host_memory.waiting_bytes() > 0 and all(transfer._tried.values())
    chipmunk_compile.reset()
    assert host_memory.waiting_bytes() == 0 and not transfer._tried


def delta_ms(fast, loop) -> float:
    """Milliseconds between CUDA events, the median over the delta steps of two generations, after one."""
    times = []
    with torch.no_grad():
        for generation in range(3):
            for inputs in loop:
                before = chipmunk_compile.counters()["delta"]
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                fast(*inputs)
                end.record()
                torch.cuda.synchronize()
                if generation and chipmunk_compile.counters()["delta"] > before:
                    times.append(start.elapsed_time(end))
    return statistics.median(times)


def test_a_delta_step_loses_little(model):
    loop, options = Loop(LONG), {**ATTENTION, "schedule.refresh_every": 50}
    memory_budget = limit(model, loop, options, 0.6)
    plain = delta_ms(compiled(model, **options), loop)
    fast = compiled(model, **options, memory_budget=memory_budget)
    moved = delta_ms(fast, loop)
    host = chipmunk_compile.counters()["host_state_bytes"]
    print(f"\na delta step of {LAYERS} layers, {LONG} tokens: {plain:.2f} ms; with {host / 1e9:.2f} GB in host memory "
          f"{moved:.2f} ms ({moved / plain - 1:+.1%}), moved at {host / moved / 1e6:.1f} GB/s")  # fmt: skip
    assert moved < MOST_SLOWER * plain


def test_copies_run_beside_kernels(model):
    loop, options = Loop(LONG), {**ATTENTION, "schedule.refresh_every": 50}
    fast = compiled(model, **options, memory_budget=limit(model, loop, options, 0.6))
    run(fast, loop)
    inputs = list(loop)
    with torch.no_grad(), torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for step in inputs[:4]:
            fast(*step)
        torch.cuda.synchronize()
    spans = {True: [], False: []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            copies = "Memcpy HtoD" in event.name
            if copies or "Memcpy" not in event.name:
                spans[copies].append((event.time_range.start, event.time_range.end))
    large = [(a, b) for a, b in spans[True] if b - a > 500]  # microseconds
    beside = sum(max(0.0, min(b, d) - max(a, c)) for a, b in large for c, d in spans[False])
    share = beside / sum(b - a for a, b in large)
    print(f"\n{len(large)} copies to the device, {share:.0%} of their time beside kernels")
    assert share > 0.8
