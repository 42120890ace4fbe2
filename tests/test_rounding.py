"""Timesteps rounded to bfloat16, as pipelines of bfloat16 models hand them over: how long steps are beside each other
is what forecasts go by."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.clock import InferredClock
from chipmunk_compile.evidence import read_evidence
from chipmunk_compile.rounding import Unrounded


def schedule(steps: int, shift: float) -> list[float]:
    """Of a flow, shifted towards noise as larger pictures are."""
    even = [1 - k / steps for k in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def rounded(times) -> list[float]:
    """As FLUX's pipeline does: of 1000 times the level."""
    return (torch.tensor(times) * 1000).bfloat16().div(1000).tolist()


def followed(times, beside=()) -> list[float]:
    unrounded = Unrounded()
    return [unrounded.follow((time, *beside), (times[0], *beside)) for time in times]


def wrong(found, true) -> float:
    """How far the lengths of steps, relative to the two before, are off: root mean square."""
    off = []
    for k in range(6, len(true)):
        ratios = [(t[k] - t[k - 1]) / ((t[k - 1] - t[k - 3]) or 1e-9) for t in (found, true)]
        off.append(min(abs(ratios[0] / ratios[1] - 1), 3.0))
    return (sum(o * o for o in off) / len(off)) ** 0.5


SHORT = [(28, 3.2, 0.1), (50, 3.2, 0.07), (28, 11.0, 0.13), (50, 11.0, 0.11), (100, 11.0, 0.13)]


@pytest.mark.parametrize("steps, shift, most", SHORT)
def test_lengths_of_steps_are_nearly_those_before_rounding(steps, shift, most):
    true = schedule(steps, shift)
    times = rounded(true)
    found = followed(times)
    assert wrong(found, true) < min(most, 0.8 * wrong(times, true))
    assert sum(a == b for a, b in zip(found, found[1:])) <= 2 < len(times)
    assert max(abs(a - b) for a, b in zip(found, true)) < 0.05


@pytest.mark.parametrize("times", [
    schedule(28, 3.0), schedule(50, 11.0), [981.0 - 20 * k for k in range(50)], [1 - k / 32 for k in range(32)],
    [1 - k / 512 for k in range(512)], [float(round(999 - 35.7 * k)) for k in range(28)], [k / 8 for k in range(8)],
    rounded(schedule(8, 3.0)),
])  # fmt: skip
def test_exact_times_and_coarse_ones_stay_as_they_are(times):
    times = torch.tensor(times).tolist()
    assert followed(times) == pytest.approx(times, abs=1e-9)


def test_a_time_evaluated_twice_stays_one():
    """Heun's method, in bfloat16 too, where its steps are longer than what is rounded away."""
    for levels in (schedule(20, 3.0), rounded(schedule(20, 3.0))):
        times = [levels[0], *(time for level in levels[1:] for time in (level, level))]
        found = followed(times)
        assert all(a == b for a, b in zip(found[1::2], found[2::2]))
        assert len(set(found)) == len(levels)


def test_what_never_moves_tells_nothing():
    """A guidance scale is a number of its own."""
    times = rounded(schedule(50, 11.0))
    assert [t - 3.5 for t in followed(times, beside=(3.5,))] == pytest.approx(followed(times))


class Pipeline:
    """Calls a clock as a pipeline of a bfloat16 model does; each prompt is a call of every step."""

    def __init__(self, prompts: int = 1) -> None:
        self.clock, self.generator = InferredClock(frozenset({0})), torch.Generator().manual_seed(0)
        self.prompts = [self.randn(1, 8, 16) for _ in range(prompts)]

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def generate(self, levels, edited: int | None = None) -> list[list]:
        noise, target, ticks = self.randn(1, 512, 16), self.randn(1, 512, 16) / 2, []
        for step, level in enumerate(levels):
            latents = (level * noise + (1 - level) * target).bfloat16()
            if edited is not None and step >= edited:
                latents = latents + 0.5 * noise.flip(1)
            time = torch.tensor([1000 * level]).bfloat16() / 1000
            ticks.append([self.tick(time, [latents, prompt]) for prompt in self.prompts])
        return ticks

    def tick(self, time, inputs):
        return self.clock.tick(inputs, lambda wanted, *_: read_evidence([time], inputs, wanted))


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("steps", [28, 50])
def test_short_steps_are_told_apart_and_none_is_taken_for_an_edit(prompts, steps):
    pipeline = Pipeline(prompts)
    pipeline.generate(schedule(steps, 11.0))
    for _ in range(2):
        ticks = pipeline.generate(schedule(steps, 11.0))
        assert all(len({tick.time for tick in step}) == 1 for step in ticks), "of all calls of a step"
        assert all([tick.step for tick in step] == [k] * prompts for k, step in enumerate(ticks))
        assert len({step[0].time for step in ticks}) >= steps - 1
        assert not any(tick.fresh for step in ticks[2:] for tick in step)
    assert pipeline.clock.generation == 3


def test_a_call_made_twice_is_one_time_and_latents_that_stay_do_not_stop_it():
    pipeline, latents = Pipeline(), torch.randn(1, 512, 16)
    for _ in range(2):
        levels = schedule(50, 11.0)
        ticks = []
        for level in levels:
            time, inputs = torch.tensor([1000 * level]).bfloat16() / 1000, [latents, pipeline.prompts[0]]
            ticks += [pipeline.tick(time, inputs), pipeline.tick(time, inputs)]
        assert all(a.time == b.time for a, b in zip(ticks[::2], ticks[1::2]))
    assert len({tick.time for tick in ticks}) == len(set(rounded(levels)))


def test_edited_latents_are_noticed_all_the_same():
    pipeline = Pipeline()
    for _ in range(2):
        ticks = pipeline.generate(schedule(50, 11.0), edited=30)
    assert [k for k, (tick,) in enumerate(ticks) if tick.fresh and k > 1] == [30]
