"""Tiny video transformers of diffusers (see tests/tiny_models.py)."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_parts import Random, Tiny, built, timestep


def _wan_config(layers: int) -> dict:
    return dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=40,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def wan(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Wan text-to-video: latents [batch, 4, frames, 2 height, 2 width], a 3-D patch convolution."""
    model = built(diffusers.WanTransformer3DModel, **_wan_config(layers))
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
    )


def wan_i2v(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Wan image-to-video: 257 image tokens join the text, each with keys of its own."""
    model = built(diffusers.WanTransformer3DModel, **_wan_config(layers), image_dim=14, added_kv_proj_dim=24)
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_hidden_states_image=randn(batch, 257, 14),
    )


def wan_vace(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Wan VACE: a control video of the same grid runs through blocks of its own."""
    model = built(
        diffusers.WanVACETransformer3DModel,
        **_wan_config(layers),
        vace_layers=list(range(layers)),
        vace_in_channels=8,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        control_hidden_states=randn(batch, 8, frames, 2 * height, 2 * width),
        control_hidden_states_scale=torch.linspace(0.5, 1.0, layers),
    )


def hunyuan_video(
    batch: int = 1,
    frames: int = 3,
    height: int = 4,
    width: int = 6,
    text: int = 7,
    layers: int = 2,
    single: int = 2,
) -> Tiny:
    """HunyuanVideo: [image | text] joint attention, a text refiner, a text padding mask."""
    model = built(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=single,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    randn = Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_attention_mask=mask,
        pooled_projections=randn(batch, 12),
        guidance=torch.full((batch,), 6.0),
    )


def cogvideox(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """CogVideoX: latents [batch, frames, 4, 2 height, 2 width], RoPE tables as inputs, [text | video]."""
    model = built(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=10,
        text_embed_dim=20,
        num_layers=layers,
        sample_width=2 * width,
        sample_height=2 * height,
        sample_frames=4 * (frames - 1) + 1,
        patch_size=2,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=True,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, frames, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
        image_rotary_emb=(randn(frames * height * width, 16), randn(frames * height * width, 16)),
    )


def ltx(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """LTX-Video: packed latents [batch, tokens, 16], RoPE in the graph, a text padding mask."""
    model = built(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=20,
    )
    randn = Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, frames * height * width, 16),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
        encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(0.05, 32.0, 32.0),
    )


def mochi(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Mochi: learned RoPE frequencies, text tokens selected by their mask for each sample."""
    model = built(
        diffusers.MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=10,
        max_sequence_length=text,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=timestep(batch),
        encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool),
    )


def kandinsky5(
    batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2
) -> Tiny:
    """Kandinsky 5: latents [batch, frames, 2 height, 2 width, 4], rotation matrices as RoPE."""
    model = built(
        diffusers.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=40,
        num_text_blocks=1,
        num_visual_blocks=layers,
        axes_dims=(4, 6, 6),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, frames, 2 * height, 2 * width, 4),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
        pooled_projections=randn(batch, 12),
        visual_rope_pos=[torch.arange(frames), torch.arange(height), torch.arange(width)],
        text_rope_pos=torch.arange(text),
    )


def cosmos(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Cosmos: patches flattened without a convolution, learned positions per axis."""
    model = built(
        diffusers.CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,  # needs torchvision
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        attention_mask=torch.ones(batch, text),
        fps=30,
    )


def latte(batch: int = 1, frames: int = 3, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """Latte: blocks attend over space and over time in turn, regrouping tokens in between."""
    model = built(
        diffusers.LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=20,
        video_length=frames,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
    )


def allegro(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Allegro: RoPE positions as inputs, a video padding mask, cross-attention."""
    model = built(
        diffusers.AllegroTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=48,
        sample_height=2 * height,
        sample_width=2 * width,
        sample_frames=frames,
        caption_channels=20,
    )
    randn = Random()
    tokens = frames * height * width
    positions = [torch.arange(n) for n in (frames, height, width)]
    grids = torch.stack([g.reshape(-1) for g in torch.meshgrid(*positions, indexing="ij")]).reshape(3, 1, tokens)
    tables = tuple((randn(n, 8), randn(n, 8)) for n in (frames, height, width))
    mask = torch.ones(batch, frames, 2 * height, 2 * width)
    mask[-1, ..., -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=timestep(batch),
        attention_mask=mask,
        encoder_attention_mask=torch.ones(batch, text),
        image_rotary_emb=(tables, grids),
    )
