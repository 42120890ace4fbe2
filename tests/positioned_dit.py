"""A toy DiT whose tokens have positions: ids, a learned table and a buffer; large enough for token order to pay."""

from __future__ import annotations

import torch

from tests.toy_dit import CHANNELS, TEXT, ToyDiT

GRID = (21, 23)
TOKENS = GRID[0] * GRID[1]


class Positioned(ToyDiT):
    """forward(x [B, N, C], t [B], prompt, ids [N, 2]) -> [B, N, C]. Angles of the ids scale the tokens; a learned table
    and a buffer are added to them.

    grids: of the images whose tokens lie one behind the other. text: where its tokens are joined: "before", "after" or
    "nowhere". free: nothing in the graph depends on the order of tokens, nor says their grid.
    """

    def __init__(self, grids=(GRID,), text="before", free=False) -> None:
        super().__init__(dim=64, layers=3)
        self.grids, self.text_at, self.free = grids, text, free
        self.lengths = [height * width for height, width in grids]
        self.table = torch.nn.Parameter(torch.randn(sum(self.lengths), 64))
        self.register_buffer("ramp", torch.linspace(-1, 1, sum(self.lengths))[:, None])

    def forward(self, x, t, prompt, ids):
        c = self.time(torch.sin(t[:, None] * torch.arange(64)))
        h = self.into(x) * ids.sin().sum(-1, keepdim=True) + self.table
        if not self.free:
            h = h + self.ramp.cumsum(0)
        text = self.text(prompt)
        h = {"before": torch.cat([text, h], 1), "after": torch.cat([h, text], 1), "nowhere": h}[self.text_at]
        for block in self.blocks:
            h = block(h, c)
        start = TEXT if self.text_at == "before" else 0
        h = self.final(h[:, start : start + x.shape[1]])
        if self.free:
            return h
        images = zip(h.split(self.lengths, 1) if len(self.grids) > 1 else [h], self.grids)
        return torch.cat([image.unflatten(1, grid).flip(1).flatten(1, 2) for image, grid in images], 1)


class PositionedLoop:
    """A denoising loop's inputs, ids left out."""

    def __init__(self, steps: int = 6, batch: int = 1, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randn(batch, TEXT, CHANNELS, generator=generator)
        self.ends = torch.randn(2, batch, tokens, CHANNELS, generator=generator)
        self.steps = steps

    def __iter__(self):
        for i in range(self.steps):
            share = i / self.steps
            yield (
                share * self.ends[0] + (1 - share) * self.ends[1],
                torch.full((len(self.prompt),), 1 - share),
                self.prompt,
            )


def position_ids(grids=(GRID,)) -> torch.Tensor:
    """[N, 2], row-major, image after image."""
    return torch.cat([torch.cartesian_prod(*map(torch.arange, grid)).float() for grid in grids])


def positioned(**kwargs) -> Positioned:
    torch.manual_seed(0)
    return Positioned(**kwargs).eval().requires_grad_(False)
