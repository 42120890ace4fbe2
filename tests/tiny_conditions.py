"""What pipelines hand to tiny models beside latents: residuals, picture embeddings, a timestep for each token.

Every function returns `(model, kwargs)` as those of tests/tiny_models.py do.
"""

from __future__ import annotations

import diffusers
import torch

from tests import tiny_models
from tests.tiny_parts import Random, Tiny, built

FRAMES, PIXELS = 3, 24  # of the tiny video models: 4 x 6 tokens a frame


def flux_with_residuals(**sizes) -> Tiny:
    """FLUX beside a ControlNet of one block of either kind, whose residuals serve them all."""
    model, kwargs = tiny_models.flux(**sizes)
    randn, (batch, tokens, _) = Random(seed=2), kwargs["hidden_states"].shape
    residuals = [[0.3 * randn(batch, tokens, 32)] for _ in range(2)]
    return model, kwargs | dict(controlnet_block_samples=residuals[0], controlnet_single_block_samples=residuals[1])


def sd3_with_residuals(**sizes) -> Tiny:
    model, kwargs = tiny_models.sd3(**sizes)
    batch, _, height, width = kwargs["hidden_states"].shape
    residuals = [0.3 * Random(seed=2)(batch, height * width // 4, 32)]
    return model, kwargs | dict(block_controlnet_hidden_states=residuals)


def flux_with_picture(**sizes) -> Tiny:
    """FLUX with an IP-Adapter: keys and values of four picture tokens for each double block."""
    model, kwargs = tiny_models.flux(**sizes)
    randn, blocks = Random(seed=2), range(len(model.transformer_blocks))
    shapes = {"proj.weight": (4 * 24, 10), "proj.bias": (4 * 24,), "norm.weight": (24,), "norm.bias": (24,)}
    heads = {f"{i}.to_{n}_ip.weight": (32, 24) for i in blocks for n in "kv"}
    heads |= {f"{i}.to_{n}_ip.bias": (32,) for i in blocks for n in "kv"}
    weights = {
        part: {name: 0.3 * randn(*shape) for name, shape in of.items()}
        for part, of in (("image_proj", shapes), ("ip_adapter", heads))
    }
    model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    picture = [randn(len(kwargs["hidden_states"]), 1, 10)]
    return model.eval().requires_grad_(False), kwargs | dict(
        joint_attention_kwargs={"ip_adapter_image_embeds": picture}
    )


def wan_with_a_time_per_token(**sizes) -> Tiny:
    """Wan 2.2 TI2V: the first frame is given, so its time is 0."""
    model, kwargs = tiny_models.wan(**sizes)
    return model, kwargs | dict(timestep=_time_per_token(kwargs["timestep"], first=0.0))


def ltx_with_a_time_per_token(**sizes) -> Tiny:
    """LTX: the first frame is given up to some noise."""
    model, kwargs = tiny_models.ltx(**sizes)
    return model, kwargs | dict(timestep=_time_per_token(kwargs["timestep"], first=0.3))


def flux_controlnet() -> Tiny:
    """The ControlNet of FLUX itself: a transformer that returns residuals."""
    model = built(
        diffusers.FluxControlNetModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    _, kwargs = tiny_models.flux()
    return model, kwargs | dict(controlnet_cond=Random(seed=2)(2, 60, 16))


def _time_per_token(timestep: torch.Tensor, first: float) -> torch.Tensor:
    """[batch, tokens]: `first` of the timestep for the first frame's tokens, all of it for the others."""
    times = timestep[:, None].repeat(1, FRAMES * PIXELS)
    times[:, :PIXELS] *= first
    return times


WITH_CONDITIONS = {
    function.__name__: function
    for function in (
        flux_with_residuals,
        sd3_with_residuals,
        flux_with_picture,
        wan_with_a_time_per_token,
        ltx_with_a_time_per_token,
    )
}
