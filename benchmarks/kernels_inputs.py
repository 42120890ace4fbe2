"""Shapes and inputs of the kernel benchmarks: bf16, [batch, heads, tokens, head_dim] as diffusers lays them out.

Columns come in three ways:

    equal      every chunk attends the same number of columns, at random places
    varying    from 30% to 100% of that, chunk by chunk
    selected   the columns that a refresh chooses, where attention is local in a 3-D grid and chunks are its patches
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from chipmunk_compile.kernels import cuda, reference
from chipmunk_compile.passes.token_order import token_order

BF16 = torch.bfloat16
DEVICE = "cuda"
HEAD_DIM = 128
SCALE = HEAD_DIM**-0.5
SAMPLES = 8  # of a chunk, which choose its columns


@dataclass(frozen=True)
class AttentionShape:
    """One self-attention. kept: columns of a chunk. grid: of the image tokens, behind which text may follow."""

    what: str
    heads: int
    tokens: int
    kept: int
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.heads}x{self.tokens}x{HEAD_DIM} ({self.what})"

    @property
    def dense_flops(self) -> float:
        return 4.0 * self.heads * self.tokens**2 * HEAD_DIM


@dataclass(frozen=True)
class MlpShape:
    """One MLP. kept: neurons of a chunk. region: of kernels/expression.py."""

    tokens: int
    region: str
    width: int = 3072
    hidden: int = 12288
    kept: int = 3712  # 30.2%
    chunk: int = 128

    @property
    def inputs(self) -> int:
        return 2 if "h1" in self.region else 1

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.width}x{self.hidden} {self.region}"


FLUX = AttentionShape("FLUX.1, 16.7%", 24, 4608, 768, (1, 64, 64))
LONG = AttentionShape("7%", 24, 32768, 2304, (8, 64, 64))
LONGER = AttentionShape("7%", 24, 65536, 4608, (16, 64, 64))
WAN = AttentionShape("Wan2.1-14B 720p, 7%", 40, 75600, 5312, (21, 45, 80))
HUNYUAN = AttentionShape("HunyuanVideo 720p, 7%", 24, 119056, 8320, (33, 45, 80))
GELU, SWIGLU = "gelu_tanh(h0)", "mul(silu(h0), h1)"


@functools.lru_cache(maxsize=1)
def queries_keys_values(shape: AttentionShape) -> list[torch.Tensor]:
    size = (1, shape.tokens, shape.heads, HEAD_DIM)
    return [torch.randn(size, device=DEVICE, dtype=BF16).transpose(1, 2) for _ in range(3)]


def tables(segments: list[int], chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chunk_starts and sample_tokens, on the GPU."""
    starts = reference.chunk_table(segments, chunk)
    return starts.to(DEVICE), reference.sample_table(starts, SAMPLES).to(DEVICE)


def spread_columns(heads: int, chunks: int, total: int, kept: int) -> torch.Tensor:
    """Random ascending columns, one in each of `kept` equal stretches: int32 [1, H, C, kept]."""
    stretch = torch.arange(kept, device=DEVICE, dtype=torch.float64) * (total / kept)
    columns = torch.empty(1, heads, chunks, kept, dtype=torch.int32, device=DEVICE)
    for head in range(heads):
        columns[0, head] = (stretch + torch.rand(chunks, kept, device=DEVICE) * (total / kept - 1)).int()
    return columns


def random_state(shape: AttentionShape, chunks: int, varying: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(o_cache, columns, counts) with random columns."""
    o_cache = torch.randn(1, shape.tokens, shape.heads, HEAD_DIM, device=DEVICE, dtype=BF16).transpose(1, 2)
    share = 0.3 + 0.7 * torch.rand(1, shape.heads, chunks, device=DEVICE) if varying else 1.0
    counts = (torch.full((1, shape.heads, chunks), shape.kept, device=DEVICE) * share).int()
    return o_cache, spread_columns(shape.heads, chunks, shape.tokens, shape.kept), counts


def local_attention(shape: AttentionShape, chunk: int):
    """(query, key, value, chunk_starts, state) after a refresh of attention that is local in the shape's grid.

    The logit of two tokens falls off with their distance, in another way for each head; tokens stand in the order of
    patches, and what the grid lacks of them is text, near to nothing.
    """
    order, lengths = token_order(shape.grid, chunk)
    axes = [torch.arange(n, dtype=torch.float32) / n for n in shape.grid]
    place = torch.cartesian_prod(*axes)[order].to(DEVICE)  # [image tokens, 3]
    both = torch.zeros(1, shape.tokens, shape.heads, HEAD_DIM, device=DEVICE)
    for head in range(shape.heads):
        waves = torch.randn(3, HEAD_DIM // 2, device=DEVICE) * (2 + 14 * head / shape.heads)
        angles = place @ waves * math.tau / 4
        both[0, : len(place), head] = torch.cat([angles.cos(), angles.sin()], -1) * 1.2
    query, key = ((both + 0.35 * torch.randn_like(both)).to(BF16).transpose(1, 2) for _ in range(2))
    value = torch.randn(1, shape.tokens, shape.heads, HEAD_DIM, device=DEVICE, dtype=BF16).transpose(1, 2)
    rest = shape.tokens - len(place)
    tail = [rest - i if rest - i < chunk else chunk for i in range(0, rest, chunk)]
    starts = torch.tensor([0, *lengths, *tail]).cumsum(0).int()
    sampled = reference.sample_table(starts, SAMPLES).to(DEVICE)
    starts = starts.to(DEVICE)
    state = reference.attention_state(
        1, shape.heads, shape.tokens, shape.tokens, HEAD_DIM, shape.kept, len(starts) - 1, BF16, DEVICE
    )
    longest = max(*lengths, *tail, 1)
    cuda.attention_refresh(query, key, value, None, starts, sampled, *state, SCALE, longest)
    return query, key, value, starts, state, longest


def normal(*size: int, dtype=BF16) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype)


@functools.lru_cache(maxsize=1)
def mlp_weights(shape: MlpShape) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """(up weights, up biases, down weight, down bias): GELU's MLP has biases, the gated one none."""
    weights = [normal(shape.hidden, shape.width) * shape.width**-0.5 for _ in range(shape.inputs)]
    down = normal(shape.width, shape.hidden) * shape.hidden**-0.5
    biased = shape.inputs == 1
    return weights, [normal(shape.hidden)] if biased else [], down, normal(shape.width) if biased else None
