"""The ways people call a model: every generation gets what it would get alone, on a model that never ran before.

At a sparsity that keeps too little, state of another stream, generation or model would show.
"""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import Reason
from tests.toy_dit import CHANNELS, TEXT, TOKENS, Loop, ToyDiT, compile_toy, toy, worst

pytestmark = pytest.mark.usefixtures("uncompiled")

SPARSE = {"attention.sparsity": 0.6, "mlp.sparsity": 0.6}


def compiled_toy(**kwargs):
    return compile_toy(toy(**kwargs), **SPARSE)[0]


def alone(*loops, **kwargs):
    """The outputs of calls made step by step for all loops, on a model that never ran before."""
    torch._dynamo.reset()
    chipmunk_compile.reset()
    return together(compiled_toy(**kwargs), *loops)


def together(model, *loops):
    """[loop][step]"""
    with torch.no_grad():
        outputs = [[model(*inputs) for inputs in step] for step in zip(*loops)]
    return [list(outputs_of_loop) for outputs_of_loop in zip(*outputs)]


def check(mine, expected, tolerance=1e-6):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        assert worst(a, b) < tolerance


class TimeApart(ToyDiT):
    """Its first graph receives the timestep and what `sees` names: the latents, the prompt, or nothing more."""

    def __init__(self, sees: str) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, x, t, prompt):
        angles = 1000 * t[:, None] * torch.exp(-torch.arange(self.dim // 2) * 0.3)
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = self.blocks[0](self.into(x), c) if self.sees == "latents" else None
        text = self.text(prompt) if self.sees == "prompt" else None
        torch._dynamo.graph_break()
        h = self.into(x) if h is None else h
        h = torch.cat([self.text(prompt) if text is None else text, h], 1)
        for block in self.blocks[1:]:
            h = block(h, c)
        return self.final(h[:, prompt.shape[1] :])


def time_apart(sees):
    torch.manual_seed(0)
    return TimeApart(sees).eval().requires_grad_(False)


def guided_loops(steps):
    """The same latents with a prompt, and with another."""
    first, second = Loop(seed=1, steps=steps), Loop(seed=2, steps=steps)
    second.latents, second.noise = first.latents, first.noise
    return first, second


def fractions():
    counts = chipmunk_compile.counters()
    return counts["delta"] / (counts["delta"] + counts["refresh"] + counts["dense"])


class Scheduled(Loop):
    """A loop at given times; latents as a sampler would move them."""

    def __init__(self, times, **kwargs):
        super().__init__(**kwargs)
        self.times = times

    def __iter__(self):
        for time in self.times:
            yield time * self.noise + (1 - time) * self.latents, torch.full((len(self.noise),), time), self.prompt


def test_guidance_by_two_calls_equals_each_call_alone():
    first, second = Loop(seed=1, steps=8), Loop(seed=2, steps=8)
    expected = [alone(first)[0], alone(second)[0]]
    check(alone(first, second), expected)
    assert fractions() >= 0.5


def test_guidance_with_texts_of_different_length():
    """Another text length is another graph; both graphs see the timestep, each has a clock of its own."""
    first, second = Loop(seed=1, steps=8), Loop(seed=2, steps=8)
    second.prompt = torch.randn(1, TEXT + 3, CHANNELS)
    torch._dynamo.reset()
    model = toy()
    model = torch.compile(model, backend="chipmunk", dynamic=False, options={**SPARSE, "min_tokens": 8})
    outputs = together(model, first, second)
    dense = together(toy(), first, second)
    for mine, expected in zip(outputs, dense):
        assert worst(mine[:2], expected[:2]) < 1e-5
        assert 1e-4 < worst(mine, expected) < 0.5
    assert fractions() >= 0.5


def test_guidance_batched_and_several_pictures_of_one_prompt():
    loop = Loop(batch=4, steps=8)
    loop.prompt = loop.prompt[:1].expand(4, -1, -1).clone()
    singles = []
    for picture in range(4):
        single = Loop(batch=4, steps=8)
        single.prompt = loop.prompt[:1]
        single.noise, single.latents = loop.noise[picture : picture + 1], loop.latents[picture : picture + 1]
        singles.append(alone(single)[0])
    batched = alone(loop)[0]
    for step, output in enumerate(batched):
        for picture in range(4):
            assert worst([output[picture : picture + 1]], [singles[picture][step]]) < 1e-5


@pytest.mark.parametrize("skipped", [{4}, {1}, {3, 4, 5}, {2, 4, 6, 8}])
def test_unconditional_calls_that_are_skipped(skipped):
    """Guidance intervals and tricks that leave out the unconditional call: a step missed is no step of the stream."""
    with_prompt, without = Loop(seed=1, steps=10), Loop(seed=2, steps=10)
    model, dense = compiled_toy(), toy()
    errors = []
    with torch.no_grad():
        for step, (a, b) in enumerate(zip(with_prompt, without)):
            for inputs in (a, b) if step not in skipped else (a,):
                errors.append(worst([model(*inputs)], [dense(*inputs)]))
    assert max(errors) < 0.5 and fractions() > 0.2


@pytest.mark.parametrize("prompts", ["different", "of one text", "the same object"])
@pytest.mark.parametrize("late", [0, 3])
def test_pictures_denoised_side_by_side_on_one_model(prompts, late):
    """Two pipelines interleave their steps, one `late` steps behind the other."""
    first, second = Loop(seed=1, steps=12), Loop(seed=2, steps=12)
    if prompts != "different":
        second.prompt = first.prompt if prompts == "the same object" else first.prompt.clone()
    # The pictures grow alike at the end, as those of one prompt do.
    second.latents = first.latents + 0.3 * second.latents
    expected = [alone(first)[0], alone(second)[0]]
    torch._dynamo.reset()
    chipmunk_compile.reset()
    model, dense = compiled_toy(), toy()
    outputs, truths = ([], []), ([], [])
    steps = [list(first), list(second)]
    with torch.no_grad():
        for step in range(12 + late):
            for which, inputs in enumerate(steps):
                at = step - late * which
                if 0 <= at < 12:
                    outputs[which].append(model(*inputs[at]))
                    truths[which].append(dense(*inputs[at]))
    for mine, alone_, truth in zip(outputs, expected, truths):
        # Evidence may take a while to tell them apart; until then steps are refreshes, which are at least as good.
        errors = [worst([m], [t]) for m, t in zip(mine, truth)]
        errors_alone = [worst([a], [t]) for a, t in zip(alone_, truth)]
        assert max(errors) <= max(errors_alone) * 1.25
    if late == 0:
        check(outputs, expected)
    # Told apart by nothing but latents, they look like many generations of two steps: then dense costs least.
    assert fractions() >= (0.5 if late == 0 else 0.12)
    refreshes = chipmunk_compile.counters()["refresh"] / (2 * 12)
    assert refreshes <= (0.5 if late == 0 else 0.85)


@pytest.mark.parametrize("start", [0.8, 0.5])
def test_a_generation_that_starts_in_mid_schedule(start):
    """img2img, on a model that denoised the same prompt from noise before."""
    whole = Loop(seed=1, steps=8)
    rest = Scheduled([start * (1 - i / 6) for i in range(6)], seed=3)
    rest.prompt = whole.prompt
    expected = alone(rest)
    torch._dynamo.reset()
    model = compiled_toy()
    together(model, whole)
    check(together(model, rest), expected)


def test_samplers_that_evaluate_a_time_twice():
    times = [1.0] + [t for i in range(1, 6) for t in (1 - i / 6, 1 - i / 6)] + [0.1]
    heun = Scheduled(times)
    (outputs,) = alone(heun)
    assert fractions() >= 0.5
    assert worst(outputs, together(toy(), heun)[0]) < 0.5


@pytest.mark.parametrize("broken_off", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("again", ["same prompt and noise", "same prompt", "another prompt"])
def test_a_generation_broken_off_and_another(broken_off, again):
    first, second = Loop(seed=1, steps=8), Loop(seed=1, steps=8)
    if again != "same prompt and noise":
        second.noise = torch.randn_like(first.noise)
    second.prompt = torch.randn_like(first.prompt) if again == "another prompt" else first.prompt
    expected = alone(second)
    torch._dynamo.reset()
    model = compiled_toy()
    together(model, list(first)[:broken_off])
    outputs = together(model, second)
    if broken_off == 1 and again != "another prompt":
        # A first step repeated counts as a second one: what is certain is that nothing stale is used.
        assert worst(outputs[0][:2], together(toy(), second)[0][:2]) < 1e-5
    else:
        check(outputs, expected)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("shared_prompt", [False, True])
def test_two_threads_on_one_model(broken, shared_prompt):
    """They alternate at random; each gets what it would get alone, or better where evidence says less."""
    loops = [Loop(seed=seed, steps=10) for seed in (1, 2)]
    if shared_prompt:
        loops[1].prompt = loops[0].prompt
    truths = [together(toy(broken=broken), loop)[0] for loop in loops]
    expected = [alone(loop, broken=broken)[0] for loop in loops]
    bounds = [worst(mine, truth) for mine, truth in zip(expected, truths)]
    torch._dynamo.reset()
    chipmunk_compile.reset()
    model = compiled_toy(broken=broken)
    together(model, loops[0])  # captured and compiled by one thread
    barrier = threading.Barrier(2)

    def denoise(loop):
        barrier.wait()
        return together(model, loop)[0]

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(denoise, loops))
    for mine, truth, bound in zip(outputs, truths, bounds):
        # Refreshes fall on other steps than alone. The other thread's state would make the error four times as large.
        assert worst(mine, truth) <= 2 * bound
    assert fractions() > 0.15


def test_latents_of_another_size_are_another_graph():
    loop, larger = Loop(seed=1), Loop(seed=2)
    larger.latents, larger.noise = torch.randn(1, TOKENS + 20, CHANNELS), torch.randn(1, TOKENS + 20, CHANNELS)
    torch._dynamo.reset()
    model = torch.compile(toy(), backend="chipmunk", dynamic=False, options={**SPARSE, "min_tokens": 8})
    dense = toy()
    for one in (loop, larger, loop):
        assert worst(together(model, one)[0], together(dense, one)[0]) < 0.5
    assert fractions() >= 0.5


@pytest.mark.parametrize("sees", ["nothing", "latents"])
@pytest.mark.parametrize("guided", [range(0), range(12), range(6, 12), range(3, 6)])
def test_guidance_that_the_graph_with_the_timestep_does_not_see(sees, guided, caplog):
    """Prompts that go to a later graph name no stream: a step with two calls is dense, and so is the one behind it."""
    dense = time_apart(sees)
    model, _ = compile_toy(dense, **SPARSE)
    delta_steps = []
    with torch.no_grad(), caplog.at_level(logging.WARNING, "chipmunk_compile"):
        for step, pair in enumerate(zip(*guided_loops(steps=12))):
            before = chipmunk_compile.counters()["delta"]
            errors = [worst([model(*one)], [dense(*one)]) for one in pair[: 2 if step in guided else 1]]
            if step in guided or step - 1 in guided:
                assert max(errors[1:], default=0.0) < 1e-5 and (step == guided[0] or errors[0] < 1e-5)
            delta_steps += [step] if chipmunk_compile.counters()["delta"] > before else []
    alone = [2, 3, 4, 6, 7, 8, 9, 11]
    assert [step for step in delta_steps if step < guided.start] == [step for step in alone if step < guided.start]
    assert not set(delta_steps) & {*guided[1:], guided.stop}
    assert any(step >= 9 for step in delta_steps) == (guided.stop < 12)
    assert any(Reason.NO_CLOCK.value in record.getMessage() for record in caplog.records) == (len(guided) > 0)


def test_a_prompt_is_not_mistaken_for_latents():
    """A graph that ends at a graph break returns the text, too: with the shape of the prompt that it got."""
    loops, outputs = guided_loops(steps=8), []
    for calls in ([loops[0]], [loops[1]], loops):
        torch._dynamo.reset()
        model, _ = compile_toy(time_apart("prompt"), **SPARSE, **{"schedule.warmup": 1})
        outputs += together(model, *calls)
    check(outputs[2:3], outputs[:1])
    # The second learns at a step of the first which inputs recur: its own second step need not be a refresh any more.
    errors = [worst(outputs[i], loops[1].run(time_apart("prompt"))) for i in (1, 3)]
    assert errors[1] < 1.5 * errors[0]
    assert fractions() >= 0.2 and chipmunk_compile.counters()["streams"] == 4
