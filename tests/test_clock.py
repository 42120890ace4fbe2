"""The clock finds generation, stream and step from evidence, and says `fresh` where the evidence is thin."""

import gc

import pytest
import torch

from chipmunk_compile.clock import InferredClock
from chipmunk_compile.counting import CountedClock
from chipmunk_compile.evidence import fingerprint


def tensor():
    return torch.randn(8, 40)


def times(steps, start=1.0):
    return [start * (1 - i / steps) for i in range(steps)]


class Caller:
    """Calls a clock as a denoising loop does, and writes down (generation, step, fresh) and the stream."""

    def __init__(self, clock):
        self.clock, self.reads = clock, 0

    def __call__(self, time, *inputs):
        def read(positions):
            self.reads += 1
            return (time,), {p: tuple(fingerprint(inputs[p]).tolist()) for p in positions}

        tick = self.clock.tick(inputs, read)
        self.clock.finish()
        return tick

    def generation(self, prompts, moments, ids=None):
        """One call per prompt and moment: latents move a little at each step and are shared by the calls of a step."""
        ticks, latents = [], tensor()
        for time in moments:
            latents = 0.95 * latents + 0.1 * tensor()
            ticks.append([self(time, latents, prompt, *([ids] if ids is not None else [])) for prompt in prompts])
        return ticks


def steps(ticks):
    return [[tick.step for tick in step] for step in ticks]


@pytest.fixture
def call():
    return Caller(InferredClock())


def test_one_stream(call):
    ticks = call.generation([tensor()], times(6))
    assert steps(ticks) == [[0], [1], [2], [3], [4], [5]]
    assert [t.fresh for (t,) in ticks] == [True, True, False, False, False, False]  # one step proves nothing yet
    assert len({t.stream for (t,) in ticks}) == 1


def test_guidance_by_two_calls_is_two_streams_of_one_generation(call):
    prompts, ids = [tensor(), tensor()], tensor()
    ticks = call.generation(prompts, times(5), ids)
    assert steps(ticks) == [[i, i] for i in range(5)]
    assert len({step[0].stream for step in ticks}) == len({step[1].stream for step in ticks}) == 1
    assert ticks[0][0].stream is not ticks[0][1].stream
    assert call.clock.generation == 1


@pytest.mark.parametrize("first", [5, 3])  # finished, and broken off
@pytest.mark.parametrize("start", [1.0, 0.5])  # from noise, and from the middle of the schedule
def test_another_prompt_is_another_generation(call, first, start):
    call.generation([tensor()], times(5))
    call.generation([tensor()], times(5)[:first])
    ticks = call.generation([tensor()], times(5, start))
    assert steps(ticks) == [[0], [1], [2], [3], [4]]
    assert ticks[0][0].fresh and not ticks[2][0].fresh
    assert call.clock.generation == 3


def test_the_same_prompt_again_is_another_generation(call):
    prompt = tensor()
    for number in (1, 2, 3):
        ticks = call.generation([prompt], times(5)[: 5 - number])  # 4 steps, then broken off earlier and earlier
        assert ticks[0][0].fresh and ticks[0][0].step == 0
        assert call.clock.generation == number


def test_the_same_prompt_lower_down_the_schedule_is_another_generation(call):
    prompt = tensor()
    call.generation([prompt], times(20)[:4])
    ticks = call.generation([prompt], times(20)[12:])
    assert ticks[0][0].fresh and ticks[0][0].step == 0


def test_two_streams_of_the_same_prompts_again(call):
    prompts, ids = [tensor(), tensor()], tensor()
    call.generation(prompts, times(5), ids)
    ticks = call.generation(prompts, times(5), ids)
    assert steps(ticks) == [[i, i] for i in range(5)]
    assert call.clock.generation == 2


def test_a_timestep_that_repeats_is_a_new_step(call):
    prompt = tensor()
    call.generation([prompt], times(4))
    ticks = call.generation([prompt], [1.0, 0.9, 0.9, 0.8, 0.8, 0.7])  # Heun
    assert steps(ticks) == [[i] for i in range(6)]
    assert not any(t.fresh for (t,) in ticks[1:])


def test_a_first_timestep_that_repeats_is_not_trusted(call):
    prompt = tensor()
    call.generation([prompt], times(4))
    ticks = call.generation([prompt], [1.0, 1.0, 0.9])  # two steps rounded to one, or a generation begun again
    assert [t.fresh for (t,) in ticks] == [True, True, False]


def test_models_that_count_up(call):
    ticks = call.generation([tensor()], [0.0, 0.1, 0.2, 0.3, 0.4])
    assert steps(ticks) == [[i] for i in range(5)]
    assert steps(call.generation([tensor()], [0.0, 0.1, 0.2])) == [[0], [1], [2]]


def test_prompts_made_anew_at_every_step_are_known_by_content(call):
    prompts, ids, latents = [tensor(), tensor()], tensor(), tensor()
    ticks = []
    for time in times(12):
        latents = 0.95 * latents + 0.1 * tensor()
        ticks.append([call(time, latents, p.clone(), ids.clone()) for p in prompts])
    assert not any(t.fresh for step in ticks[6:] for t in step)
    assert len({step[0].stream for step in ticks[6:]}) == 1
    assert ticks[-1][0].stream is not ticks[-1][1].stream


def test_latents_alone_are_ordered_by_time(call):
    latents = tensor()
    ticks = [call(time, latents * (1 + time)) for time in times(5)]
    assert [t.step for t in ticks] == [0, 1, 2, 3, 4]
    assert call(1.0, tensor()).step == 0


def test_another_noise_is_another_generation(call):
    """Prompt and ids stay the same objects and time goes on evenly: only the latents tell."""
    prompt, ids = tensor(), tensor()
    call.generation([prompt], times(10)[:4], ids)
    assert not call.generation([prompt], times(10)[:4], ids)[3][0].fresh
    ticks = call.generation([prompt], times(10)[4:], ids)
    assert ticks[0][0].fresh and not ticks[1][0].fresh


def test_new_noise_at_every_step_says_nothing_in_the_end(call):
    prompt, ids = tensor(), tensor()
    ticks = [call(time, tensor(), prompt, ids) for time in times(8)]
    assert [t.step for t in ticks] == list(range(8))
    assert not any(t.fresh for t in ticks[4:])


def test_unrelated_calls_are_never_steps(call):
    """A loop that evaluates many prompts at falling times, with one table of ids for all."""
    ids = tensor()
    ticks = [call(time, tensor(), tensor(), ids) for time in times(8)]
    assert all(t.fresh for t in ticks)


def test_prompts_that_alternate_at_every_time(call):
    first, second, ids, latents = tensor(), tensor(), tensor(), tensor()
    ticks = [call(time, latents * (1 + time), (first, second)[i % 2], ids) for i, time in enumerate(times(12))]
    assert ticks[10].stream is not ticks[11].stream and ticks[10].stream is ticks[8].stream


def test_a_static_buffer_filled_anew_is_another_input(call):
    prompt, latents = tensor(), tensor()
    call.generation([prompt], times(5))
    prompt.copy_(tensor())
    assert call(0.1, latents, prompt).fresh


@pytest.mark.parametrize("written", [True, False])
def test_a_static_buffer_of_inference_mode_is_looked_into(call, written):
    """No version tells that it was written to."""
    with torch.inference_mode():
        buffer, prompts, latents = tensor(), [tensor(), tensor()], tensor()
        ticks = []
        for time in times(5):
            latents = 0.95 * latents + 0.1 * tensor()
            for prompt in prompts if written else prompts[:1]:
                ticks.append(call(time, latents, buffer.copy_(prompt)))
    streams = 2 if written else 1
    assert [tick.step for tick in ticks] == [step for step in range(5) for _ in range(streams)]
    assert not any(tick.fresh for tick in ticks[-2 * streams :])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_latents_that_other_hands_change_are_not_built_on(call, share):
    """As a callback does that pastes a picture into half of them."""
    prompt, latents, fresh = tensor(), tensor(), []
    for k, time in enumerate(times(8)):
        latents = 0.97 * latents + 0.05 * tensor()
        if k == 5:
            rows = round(share * len(latents))
            latents[:rows] = 0.5 * latents[:rows] + 0.5 * tensor()[:rows]
        fresh.append(call(time, latents, prompt).fresh)
    assert fresh == [True, True, False, False, False, share > 0, False, False]


def test_a_control_that_is_switched_off_at_first_is_no_conditioning(call):
    """Its zeros of one step are as those of the next, and say nothing of later generations."""
    for generation in range(3):
        prompt, latents, control, fresh = tensor(), tensor(), tensor(), []
        for time in times(6):
            latents, control = 0.95 * latents + 0.1 * tensor(), 0.95 * control + 0.1 * tensor()
            residual = control.clone() if generation else torch.zeros_like(control)
            fresh.append(call(time, latents, prompt, residual).fresh)
        assert not any(fresh[2:]) and call.clock.generation == generation + 1


def test_two_pictures_latents_and_no_conditioning_at_all(call):
    """A list of them, handed to one call: all inputs move."""
    one, other, ticks = tensor(), tensor(), []
    for time in times(5):
        one, other = (0.95 * latents + 0.1 * tensor() for latents in (one, other))
        ticks.append(call(time, one, other))
    assert [tick.step for tick in ticks] == [0, 1, 2, 3, 4] and not ticks[-1].fresh
    assert call(1.0, tensor(), tensor()).step == 0 and call.clock.generation == 2


def test_pipelines_that_interleave_keep_their_streams(call):
    call.generation([tensor()], times(4))
    first, second, a, b = tensor(), tensor(), tensor(), tensor()
    ticks = []
    for time in times(12):
        ticks.append((call(time, a * (1 + time), first), call(time / 2, b * (1 + time), second)))
    late = ticks[6:]
    assert not any(t.fresh for pair in late for t in pair)
    assert len({a.stream for a, _ in late}) == len({b.stream for _, b in late}) == 1
    assert late[0][0].stream is not late[0][1].stream


def test_latents_are_no_conditioning_even_when_they_stay():
    call = Caller(InferredClock(latents=frozenset({0})))
    prompt, latents = tensor(), tensor()
    for time in times(5):
        call(time, latents, prompt)  # the same latents at each step, as a profiling loop has them
    ticks = call.generation([prompt], times(8))
    assert steps(ticks) == [[i] for i in range(8)]
    assert not any(t.fresh for (t,) in ticks[1:])


def test_state_goes_with_the_prompt(call):
    prompt = tensor()
    stream = call.generation([prompt], times(5))[-1][0].stream
    stream.states["owner"] = object()
    del prompt
    gc.collect()
    assert stream.dead and not stream.states


def test_a_new_generation_reuses_the_memory_of_the_last(call):
    class Held:
        filled = True
        bytes = 1

    old = call.generation([tensor()], times(3))[-1][0].stream
    keep = tensor()
    old = call.generation([keep], times(3))[-1][0].stream
    held = old.states["owner"] = Held()
    prompt = tensor()
    new = call.generation([prompt], times(3))[0][0].stream
    assert new.states["owner"] is held and not held.filled
    assert not old.states


def test_counting_reads_nothing():
    call = Caller(CountedClock(steps=4, streams=2))
    ticks = call.generation([tensor(), tensor()], times(4))
    assert steps(ticks) == [[i, i] for i in range(4)]
    assert ticks[0][0].stream is not ticks[0][1].stream
    assert call.reads == 0
    assert call.clock.live == []  # the last step frees the state


def test_counting_notices_a_generation_that_was_broken_off():
    call = Caller(CountedClock(steps=6, streams=2))
    call.generation([tensor(), tensor()], times(6)[:3])
    ticks = call.generation([tensor(), tensor()], times(6))
    assert steps(ticks) == [[i, i] for i in range(6)]
    assert ticks[0][0].fresh and ticks[0][1].fresh
