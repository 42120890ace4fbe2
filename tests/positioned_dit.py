"""A toy DiT whose tokens have positions: ids, a learned table and a buffer; large enough for token order to pay."""

from __future__ import annotations

import torch

from tests.toy_dit import CHANNELS, TEXT, ToyDiT

GRID = (21, 23)
TOKENS = GRID[0] * GRID[1]


class Positioned(ToyDiT):
    """forward(x, t, prompt, ids [N, 2]): angles of the ids, a learned table and a buffer are added to the tokens."""

    def __init__(self) -> None:
        super().__init__(dim=64, layers=2)
        self.table = torch.nn.Parameter(torch.randn(TOKENS, 64))
        self.register_buffer("ramp", torch.linspace(-1, 1, TOKENS)[:, None])

    def forward(self, x, t, prompt, ids):
        c = self.time(torch.sin(t[:, None] * torch.arange(64)))
        h = self.into(x) * ids.sin().sum(-1, keepdim=True) + self.ramp.cumsum(0) + self.table
        h = torch.cat([self.text(prompt), h], 1)
        for block in self.blocks:
            h = block(h, c)
        return self.final(h[:, TEXT:]).unflatten(1, GRID).flip(1)  # a view that says the grid


class PositionedLoop:
    """A denoising loop's inputs, ids left out."""

    def __init__(self, steps: int = 6, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randn(batch, TEXT, CHANNELS, generator=generator)
        self.ends = torch.randn(2, batch, TOKENS, CHANNELS, generator=generator)
        self.steps = steps

    def __iter__(self):
        for i in range(self.steps):
            share = i / self.steps
            yield (
                share * self.ends[0] + (1 - share) * self.ends[1],
                torch.full((len(self.prompt),), 1 - share),
                self.prompt,
            )


def position_ids() -> torch.Tensor:
    """[TOKENS, 2], row-major."""
    return torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).flatten(0, 1).float()


def positioned() -> Positioned:
    torch.manual_seed(0)
    return Positioned().eval().requires_grad_(False)
