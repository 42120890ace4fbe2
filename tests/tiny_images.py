"""Tiny image transformers of diffusers (see tests/tiny_models.py)."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_parts import Random, Tiny, built, image_ids, timestep


def flux(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """FLUX.1: packed latents [batch, height * width, 16], ids as inputs, joint attention [text | image]."""
    model = built(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        pooled_projections=randn(batch, 12),
        timestep=timestep(batch, 0.5),
        img_ids=image_ids(height, width),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((batch,), 3.5),
    )


def flux2(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """FLUX.2: as FLUX, with four-axis ids and fused QKV + MLP in the single blocks."""
    model = built(
        diffusers.Flux2Transformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=20,
        axes_dims_rope=(4, 4, 4, 4),
    )
    randn = Random()
    text_ids = torch.zeros(text, 4)
    text_ids[:, 3] = torch.arange(text)
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=timestep(batch, 0.5),
        img_ids=image_ids(height, width, axes=4),
        txt_ids=text_ids,
        guidance=torch.full((batch,), 3.5),
    )


def sd3(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """Stable Diffusion 3.5: latents [batch, 4, 2 height, 2 width], dual attention, learned positions."""
    model = built(
        diffusers.SD3Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        pooled_projections=randn(batch, 20),
        timestep=timestep(batch),
    )


def pixart(batch: int = 2, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """PixArt-Sigma: one self-attention and one cross-attention a block, a text padding mask."""
    model = built(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )
    randn = Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=timestep(batch),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
    )


def qwen_image(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """QwenImage: packed latents [batch, height * width, 16]; complex RoPE built from `img_shapes`."""
    model = built(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        encoder_hidden_states_mask=torch.ones(batch, text, dtype=torch.bool),
        timestep=timestep(batch, 0.5),
        img_shapes=[(1, height, width)] * batch,
    )


def auraflow(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """AuraFlow: register tokens before the text, positions selected from a learned table."""
    model = built(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=layers,
        num_single_dit_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=timestep(batch, 0.5),
    )


def lumina2(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """Lumina 2: refiners for text and image, a joint sequence filled in place, grouped heads."""
    model = built(
        diffusers.Lumina2Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=layers,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=20,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        timestep=timestep(batch, 0.5),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool),
    )


def chroma(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """Chroma: FLUX with modulation from an approximator and a mask over the joint sequence."""
    model = built(
        diffusers.ChromaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=18,
        approximator_layers=1,
    )
    randn = Random()
    mask = torch.ones(batch, text + height * width, dtype=torch.bool)
    mask[-1, text - 2 : text + 3] = False
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=timestep(batch, 0.5),
        img_ids=image_ids(height, width),
        txt_ids=torch.zeros(text, 3),
        attention_mask=mask,
    )


def z_image(batch: int = 2, height: int = 8, width: int = 12, text: int = 32, layers: int = 2) -> Tiny:
    """Z-Image: lists of images, tokens padded to multiples of 32, [image | text]."""
    model = built(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=48,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    randn = Random()
    return model, dict(
        x=[randn(4, 1, 2 * height, 2 * width) for _ in range(batch)],
        t=timestep(batch, 0.5),
        cap_feats=[randn(text, 20) for _ in range(batch)],
    )


def cogview4(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """CogView4: patches flattened by views, RoPE in the graph, [text | image]."""
    model = built(
        diffusers.CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=20,
        time_embed_dim=10,
        condition_dim=6,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(8, 8),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
        original_size=torch.tensor([[96.0, 160.0]] * batch),
        target_size=torch.tensor([[96.0, 160.0]] * batch),
        crop_coords=torch.tensor([[0.0, 0.0]] * batch),
    )


def dit(batch: int = 2, height: int = 8, width: int = 8, layers: int = 2) -> Tiny:
    """DiT: class labels, one self-attention a block."""
    model = built(
        diffusers.DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        timestep=torch.full((batch,), 7, dtype=torch.long),
        class_labels=torch.arange(batch),
    )


def sana(batch: int = 2, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """Sana: linear attention and a depthwise convolution inside the feed-forward."""
    model = built(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=8,
        patch_size=1,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, height, width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
    )
