"""The toy DiT with its tokens spread over ranks, in plain torch: Ulysses, ring, and keys gathered from all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn

from tests.toy_dit import CHANNELS, Block, ToyDiT, toy

TOKENS, TEXT = 128, 64  # of all ranks; whole chunks of 32 on each


def exchange(x: torch.Tensor, group) -> torch.Tensor:
    """[W, ...]: part w of every rank goes to rank w. The result's part w came from rank w."""
    flat = funcol.all_to_all_single(x.flatten(), None, None, group)
    return funcol.wait_tensor(flat).view(x.shape)


class UlyssesBlock(Block):
    def attend(self, q, k, v):
        """[B, H, S / W, D] each: exchanged for [B, H / W, S, D], and back."""
        group = dist.group.WORLD
        world = dist.get_world_size(group)
        q, k, v = (
            exchange(x.unflatten(1, (world, -1)).permute(1, 3, 0, 2, 4).contiguous(), group).flatten(0, 1)
            for x in (q, k, v)
        )  # [S, B, H / W, D]
        o = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
        o = exchange(o.unflatten(2, (world, -1)).permute(2, 1, 0, 3, 4).contiguous(), group)  # [W, H / W, B, S / W, D]
        return o.flatten(0, 1).transpose(0, 1)


class GatheringBlock(Block):
    def attend(self, q, k, v):
        """Queries of this rank, keys and values of all."""
        k, v = (gathered(x) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class RingBlock(Block):
    def attend(self, q, k, v):
        """Keys and values of one rank after the other, joined by their log-sum-exp."""
        world = dist.get_world_size()
        out = total = None
        for k_part, v_part in zip(*(gathered(x).chunk(world, 2) for x in (k, v))):
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k_part, v_part)
            lse = lse[..., None]
            if out is None:
                out, total = part, lse
            else:
                out = out - torch.sigmoid(lse - total) * (out - part)
                total = total - F.logsigmoid(total - lse)
        return out


def gathered(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S / W, D] of each rank -> [B, H, S, D]."""
    return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), 2, dist.group.WORLD))


def spread(block: type[Block], heads: int = 4, **kwargs) -> ToyDiT:
    """`toy(heads=heads, **kwargs)`, its blocks of another class: called with this rank's share of tokens and text."""
    model = toy(heads=heads, **kwargs)
    blocks = nn.ModuleList(block(model.dim, heads, b.activation) for b in model.blocks)
    blocks.load_state_dict(model.blocks.state_dict())
    model.blocks = blocks
    return model.eval().requires_grad_(False)


class Steps:
    """A denoising loop's inputs. `share`: (rank, ranks), those of one rank; all of them when not given."""

    def __init__(self, share: tuple[int, int] | None = None, steps: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prompt, self.latents, self.noise = (
            torch.randn(1, n, CHANNELS, generator=generator) for n in (TEXT, TOKENS, TOKENS)
        )
        if share is not None:
            rank, ranks = share
            self.prompt, self.latents, self.noise = (
                x.chunk(ranks, 1)[rank].clone() for x in (self.prompt, self.latents, self.noise)
            )
        self.steps = steps

    def __iter__(self):
        for i in range(self.steps):
            done = i / self.steps
            yield (1 - done) * self.noise + done * self.latents, self.noise.new_tensor([1 - done]), self.prompt

    def run(self, model) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(*inputs).clone() for inputs in self]
