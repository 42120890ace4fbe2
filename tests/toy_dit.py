"""A diffusion transformer in forty lines of plain torch, as people write them, and how tests compile and call it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.backend import chipmunk

TOKENS, TEXT, CHANNELS = 63, 5, 6  # odd on purpose: the last chunk is ragged


ACTIVATIONS = {
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu2": lambda h: F.relu(h).square(),
    "geglu": lambda h, g: h * F.gelu(g),
    "swiglu": lambda h, g: F.silu(h) * g,
}
GATED = ("geglu", "swiglu")


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, activation: str) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim * (2 if activation in GATED else 1)), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(self, x, c):
        shift, scale, gate = self.modulation(F.silu(c))[:, None].chunk(3, -1)
        q, k, v = (
            self.qkv(self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + gate * self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def attend(self, q, k, v):
        """[B, H, N, D] each; a method of its own so that tests can put their own meaning in its place."""
        return F.scaled_dot_product_attention(q, k, v)

    def mlp(self, x):
        h = self.up(x).chunk(2 if self.activation in GATED else 1, -1)
        return self.down(ACTIVATIONS[self.activation](*h))


class ToyDiT(nn.Module):
    """forward(x [B, N, CHANNELS], t [B], prompt [B, TEXT, CHANNELS]) -> [B, N, CHANNELS]."""

    def __init__(self, dim=32, heads=2, layers=2, broken=False, activation="gelu_tanh") -> None:
        super().__init__()
        self.dim, self.broken = dim, broken
        self.into, self.text = nn.Linear(CHANNELS, dim), nn.Linear(CHANNELS, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, activation) for _ in range(layers))
        self.final = nn.Linear(dim, CHANNELS)

    def forward(self, x, t, prompt):
        frequencies = torch.exp(-torch.arange(self.dim // 2, device=x.device) * 0.3)
        angles = 1000 * t[:, None] * frequencies
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        h = torch.cat([self.text(prompt), self.into(x)], 1)
        h = self.blocks[0](h, c)
        if self.broken:
            torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            h = block(h, c)
        return self.final(h[:, prompt.shape[1] :])


def toy(seed: int = 0, **kwargs) -> ToyDiT:
    torch.manual_seed(seed)
    return ToyDiT(**kwargs).eval().requires_grad_(False)


SMALL = {"min_tokens": 8, "attention.chunk": 32, "mlp.chunk": 32}


def compile_toy(model: nn.Module, **options) -> tuple:
    """(the compiled model, the list of runners that it makes when called)."""
    runners = []

    def spy(gm, inputs, **kwargs):
        runners.append(chipmunk(gm, inputs, **kwargs))
        return runners[-1]

    return torch.compile(model, backend=spy, options={**SMALL, **options}), runners


class Loop:
    """A denoising loop's inputs: a prompt that stays, latents that move a little, a timestep that falls."""

    def __init__(self, steps: int = 6, batch: int = 1, seed: int = 0, start: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randn(batch, TEXT, CHANNELS, generator=generator)
        self.latents = torch.randn(batch, TOKENS, CHANNELS, generator=generator)
        self.noise = torch.randn(batch, TOKENS, CHANNELS, generator=generator)
        self.steps, self.start = steps, start

    def __iter__(self):
        for i in range(self.steps):
            share = i / self.steps
            x = (1 - share) * self.noise + share * self.latents
            yield x, torch.full((len(x),), self.start * (1 - share)), self.prompt

    def run(self, model) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(*inputs) for inputs in self]


def worst(outputs, references) -> float:
    """The largest relative error of any step, in the infinity norm."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(outputs, references, strict=True))
