"""Which inputs may carry the timestep: those that reach a sin/cos pair through pointwise arithmetic."""

import pytest
import torch

from chipmunk_compile.passes.timestep import find_timesteps
from tests import tiny_models
from tests.capture import capture


def find(model, *args):
    """The shapes of the inputs found (Dynamo orders placeholders by first use)."""
    (gm,) = capture(model, *args)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return sorted(tuple(placeholders[i].meta["val"].shape) for i in find_timesteps(gm, set(range(len(args)))))


def embed(t, dim=8):
    angles = t.float()[..., None] * 1000 * torch.exp(-torch.arange(dim // 2) / 3)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Timed(torch.nn.Module):
    def forward(self, x, t, ids, guidance):
        rope = ids[:, 0, None] * torch.arange(1, 5)
        return x * rope.cos().sum() + rope.sin().sum() + embed(t).sum() + embed(guidance).sum()


def test_timestep_and_guidance_are_found_and_ids_are_not():
    assert find(Timed(), torch.randn(2, 4), torch.rand(2), torch.rand(16, 3), torch.rand(1)) == [(1,), (2,)]


def test_integers_and_a_time_per_token():
    class PerToken(torch.nn.Module):
        def forward(self, x, t):
            return x + embed(t).sum(-1, keepdim=True)

    assert find(PerToken(), torch.randn(2, 7, 4), torch.randint(0, 1000, (2, 7))) == [(2, 7)]
    assert find(PerToken(), torch.randn(2, 7, 4), torch.randint(0, 1000, ())) == [()]


def test_a_time_per_frame_and_products_of_their_own():
    class PerFrame(torch.nn.Module):
        def forward(self, x, t):
            frequencies = torch.exp(-torch.arange(4) / 3)
            time = torch.cat([t.flatten(), torch.zeros(1)])[:, None]
            return x * ((time * frequencies).sin().sum() + (time * frequencies).cos().sum())

    assert find(PerFrame(), torch.randn(2, 4), torch.rand(2, 1, 3)) == [(2, 1, 3)]
    assert find(PerFrame(), torch.randn(2, 4), torch.rand(2, 1, 3, 1)) == []


@pytest.mark.parametrize("pair", ["sin", "cos"])
def test_a_sine_alone_is_no_embedding(pair):
    class Siren(torch.nn.Module):
        def forward(self, x, t):
            return x * getattr(t * 30, pair)()

    assert find(Siren(), torch.randn(2, 4), torch.rand(2, 1)) == []


def test_what_went_through_a_linear_is_no_timestep():
    class Fourier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 4)

        def forward(self, x):
            h = torch.nn.functional.softmax(self.linear(x), -1)
            return h.sin() + h.cos()

    (gm,) = capture(Fourier().eval(), torch.rand(2, 1))
    assert find_timesteps(gm, set(range(3))) == []


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan_video", "cogvideox", "ltx", "pixart"])
def test_real_models(name):
    """The input that a pipeline calls `timestep` is among those found, and what is found is small."""
    model, kwargs = getattr(tiny_models, name)()
    seen = []

    def backend(gm, inputs, **_):
        from chipmunk_compile.passes.canonical import canonicalise

        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        user = {i for i, n in enumerate(names) if "kwargs" in n or not n.startswith("l_self")}
        seen.extend(names[i] for i in find_timesteps(canonicalise(gm, inputs), user))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(**kwargs)
    assert any("timestep" in name for name in seen)
    assert all("timestep" in name or "guidance" in name for name in seen)
