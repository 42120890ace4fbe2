"""diffusers' own caches, on a copy of the model, with all that they do not hook compiled.

Their hooks keep counters and decide in Python: compiled whole, the model would be compiled anew at every step. So each
hooked module's own forward is compiled before the hook goes around it.

FasterCache is left out: it wants both guidance streams in one batch, this loop (as Wan's pipeline) calls twice.
MagCache is left out: it wants a table of ratios per model and step count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

CONTEXTS = ("cond", "uncond")


class Hooked:
    """The model with one of diffusers' caches; `restart()` before each generation."""

    def __init__(self, model: torch.nn.Module, make_config: Callable[[Hooked], object], inside: str | None) -> None:
        """inside: what of a block its hooks go around: "attn1", or None for the whole block."""
        self.model = copy.deepcopy(model)
        self.moment = 1000.0
        for block in self.model.blocks:
            hooked = block if inside is None else getattr(block, inside)
            hooked.forward = torch.compile(hooked.forward, dynamic=False)
            if inside is not None:
                block.ffn.forward = torch.compile(block.ffn.forward, dynamic=False)
                block.attn2.forward = torch.compile(block.attn2.forward, dynamic=False)
        self.model.enable_cache(make_config(self))
        self.contexts: dict[int, str] = {}

    def restart(self) -> Hooked:
        self.model._reset_stateful_cache()
        self.contexts.clear()
        return self

    def __call__(self, **inputs):
        self.moment = inputs["timestep"]
        key = id(inputs["encoder_hidden_states"])
        name = self.contexts.setdefault(key, CONTEXTS[len(self.contexts) % 2])
        with self.model.cache_context(name):
            return self.model(**inputs)


def first_block_cache(model: torch.nn.Module, threshold: float) -> Hooked:
    from diffusers import FirstBlockCacheConfig

    return Hooked(model, lambda hooked: FirstBlockCacheConfig(threshold=threshold), None)


def attention_broadcast(model: torch.nn.Module, every: int) -> Hooked:
    """Pyramid attention broadcast: self-attention computed at one step in `every`, but for the first and last ones."""
    from diffusers import PyramidAttentionBroadcastConfig

    def config(hooked: Hooked) -> object:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=(100, 950),
            spatial_attention_block_identifiers=("blocks.*attn1",),
            current_timestep_callback=lambda: float(hooked.moment[0]),
        )

    return Hooked(model, config, "attn1")


def taylor_seer(model: torch.nn.Module, every: int, order: int) -> Hooked:
    """TaylorSeer: every layer's output told from derivatives of its last computed ones."""
    from diffusers import TaylorSeerCacheConfig

    def config(hooked: Hooked) -> object:
        return TaylorSeerCacheConfig(
            cache_interval=every, max_order=order, disable_cache_before_step=3, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"],
        )  # fmt: skip

    return Hooked(model, config, "attn1")
