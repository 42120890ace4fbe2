"""What is read of a call, and what need not be read again."""

import pytest
import torch

from chipmunk_compile import evidence
from chipmunk_compile.evidence import TimesRead
from tests.toy_dit import Loop, compile_toy, toy


@pytest.fixture
def reads(monkeypatch) -> list:
    """Filled with the times of each read from the device."""
    made, read = [], evidence.read_evidence

    def counted(times, inputs, positions, meanwhile=None):
        made.append(read(times, inputs, positions, meanwhile))
        return made[-1]

    monkeypatch.setattr(evidence, "read_evidence", counted)
    return made


def test_a_timestep_handed_over_twice_is_read_once(reads):
    last, now, latents = TimesRead(), torch.full((2,), 0.5), torch.ones(3, 4)
    prompt, other = torch.ones(2, 5)
    first, prints = last.read([now], [latents, prompt], [0])
    assert first == (0.5,) and set(prints) == {0}
    assert last.read([now], [latents, other], []) == ((0.5,), {}) and len(reads) == 1
    last.read([now], [latents, other], [])
    assert len(reads) == 2, "the same once more: another step, of buffers written in ways that move no version"


@pytest.mark.parametrize("change", ["written", "another", "another beside it", "unknown latents", "gone"])
def test_what_may_have_changed_is_read_again(change, reads):
    last, now, latents = TimesRead(), torch.full((2,), 0.5), torch.ones(3, 4)
    last.read([now], [latents], [])
    times, positions = [now], []
    if change == "written":
        now.fill_(0.25)
    elif change == "another":
        times = [now.clone()]
    elif change == "another beside it":
        times = [now, torch.ones(1)]
    elif change == "unknown latents":
        positions = [0]
    else:
        del times, now  # another object may lie where this one lay
        times = [torch.full((2,), 0.5)]
    last.read(times, [latents], positions)
    assert len(reads) == 2 and reads[1][0][0] == (0.25 if change == "written" else 0.5)


def test_inference_tensors_show_no_writes_and_are_always_read(reads):
    with torch.inference_mode():
        last, now = TimesRead(), torch.full((2,), 0.5)
        last.read([now], [], [])
        now.fill_(0.25)
        assert last.read([now], [], [])[0] == (0.25,) and len(reads) == 2


@pytest.mark.usefixtures("uncompiled")
def test_guidance_by_two_calls_reads_once_a_step(reads):
    loop, other = Loop(steps=10, seed=1), Loop(steps=10, seed=2)
    model, _ = compile_toy(toy())
    with torch.no_grad():
        for _ in range(2):
            reads.clear()
            for x, t, prompt in loop:
                model(x, t, prompt)
                model(x, t, other.prompt)
    assert len(reads) == 10
