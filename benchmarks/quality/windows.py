"""Sparse attention without a cache: sliding tile attention (arXiv 2502.04507), by flex_attention.

Tokens are put in the order of tiles of 128 (boxes of neighbours), and a tile attends to the tiles within a window
around it. Which columns are seen never depends on what is in them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from chipmunk_compile.passes.token_order import patch_size, token_order

TILE = 128


class TileWindow:
    """An attention processor for WanTransformer3DModel's self-attention."""

    def __init__(self, order: Tensor, mask: BlockMask) -> None:
        self.order, self.back, self.mask = order, order.argsort(), mask

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        hidden_states = hidden_states[:, self.order]
        query, key, value = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (query, key, value))
        cos, sin = (t[:, self.order] for t in rotary_emb)
        query, key = (_rotate(t, cos, sin) for t in (query, key))
        out = flex_attention(*(t.transpose(1, 2) for t in (query, key, value)), block_mask=self.mask)
        out = out.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[0](out)[:, self.back]


def tile_window_model(model: torch.nn.Module, grid: tuple[int, int, int], window: tuple[int, int, int], device):
    """(the model with a window of so many tiles to each side, the share of columns seen), or None where tiles of the
    grid are not all full. To be compiled: flex_attention is slow otherwise."""
    order, lengths = token_order(grid, TILE)
    if set(lengths) != {TILE}:
        return None
    mask = _mask(grid, order, window, device)
    windowed = copy.deepcopy(model)
    for block in windowed.blocks:
        block.attn1.processor = TileWindow(order.to(device), mask)
    return windowed, 1 - mask.sparsity() / 100


def _mask(grid: tuple[int, int, int], order: Tensor, window: tuple[int, int, int], device) -> BlockMask:
    sides = patch_size(grid, TILE)
    first = order[::TILE]  # of each tile: its smallest place
    places = (first // (grid[1] * grid[2]), first // grid[2] % grid[1], first % grid[2])
    places = [(place // side).to(device) for place, side in zip(places, sides)]

    def near(batch, head, q, k):
        a, b = q // TILE, k // TILE
        frames, rows, columns = ((place[a] - place[b]).abs() <= reach for place, reach in zip(places, window))
        return frames & rows & columns

    tokens = len(order)
    return create_block_mask(near, None, None, tokens, tokens, device=str(device), BLOCK_SIZE=TILE)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over pairs of channels; cos and sin hold each value twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)
