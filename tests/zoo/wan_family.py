"""Wan and what was built like it, and Sana's video models: [batch, channels, frames, 2 height, 2 width]."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests import tiny_videos
from tests.tiny_parts import Random, Tiny, built, timestep
from tests.zoo.entry import Entry

FRAMES, HEIGHT, WIDTH, TEXT = 3, 4, 6, 7
WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=20,
    freq_dim=16,
    ffn_dim=40,
    num_layers=2,
)


def _inputs(randn: Random) -> dict:
    return dict(
        hidden_states=randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        timestep=timestep(1),
        encoder_hidden_states=randn(1, TEXT, 20),
    )


def chronoedit() -> Tiny:
    """ChronoEdit: Wan with frames that RoPE places far apart."""
    model = built(diffusers.ChronoEditTransformer3DModel, **WAN, rope_max_seq_len=32, rope_temporal_skip_len=8)
    return model, _inputs(Random())


def skyreels() -> Tiny:
    """SkyReels 2: Wan with a timestep per frame where frames are at different noise."""
    return built(diffusers.SkyReelsV2Transformer3DModel, **WAN, rope_max_seq_len=32), _inputs(Random())


def _anyflow(cls: type, **config) -> Tiny:
    model = built(cls, **WAN, cross_attn_norm=True, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r", **config)
    randn = Random()
    return model, dict(
        hidden_states=randn(1, FRAMES + 1, 4, 2 * HEIGHT, 2 * WIDTH),
        timestep=torch.full((1, FRAMES + 1), 500.0),
        r_timestep=torch.full((1, FRAMES + 1), 250.0),
        encoder_hidden_states=randn(1, TEXT, 20),
    )


def anyflow() -> Tiny:
    """AnyFlow: two timesteps per frame."""
    return _anyflow(diffusers.AnyFlowTransformer3DModel)


def anyflow_far() -> Tiny:
    """AnyFlow FAR: chunks of frames, each attends to the chunks before it (flex_attention)."""
    model, inputs = _anyflow(
        diffusers.AnyFlowFARTransformer3DModel, compressed_patch_size=(1, 4, 4), full_chunk_limit=3
    )
    return model, inputs | dict(chunk_partition=[2, 2])


def helios() -> Tiny:
    """Helios: history frames at three resolutions join the keys; cross-attention for the noisy frames only."""
    model = built(
        diffusers.HeliosTransformer3DModel,
        **WAN,
        cross_attn_norm=True,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    randn = Random()
    return model, _inputs(randn) | dict(
        indices_hidden_states=torch.arange(FRAMES)[None] + 9,
        indices_latents_history_short=torch.arange(1)[None] + 8,
        indices_latents_history_mid=torch.arange(2)[None] + 4,
        indices_latents_history_long=torch.arange(4)[None],
        latents_history_short=randn(1, 4, 1, 2 * HEIGHT, 2 * WIDTH),
        latents_history_mid=randn(1, 4, 2, 2 * HEIGHT, 2 * WIDTH),
        latents_history_long=randn(1, 4, 4, 2 * HEIGHT, 2 * WIDTH),
    )


def wan_animate() -> Tiny:
    """Wan Animate: a motion encoder reads a face; adapters attend to it per frame."""
    config = WAN | dict(in_channels=12)
    model = built(
        diffusers.WanAnimateTransformer3DModel,
        **config,
        latent_channels=4,
        image_dim=14,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 12, FRAMES + 1, 2 * HEIGHT, 2 * WIDTH),
        timestep=timestep(1),
        encoder_hidden_states=randn(1, TEXT, 20),
        encoder_hidden_states_image=randn(1, 5, 14),
        pose_hidden_states=randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        face_pixel_values=randn(1, 3, 9, 16, 16),
    )


def wan_animate2() -> Tiny:
    """Wan Animate 2: a denoising step attends to the keys of a reference video that one earlier call has stored."""
    layers, frames, height, width = 2, 2, 8, 8
    model = built(
        diffusers.WanAnimate2Transformer3DModel,
        patch_size=(1, 2, 2),
        text_len=16,
        in_dim=24,
        dim=48,
        ffn_dim=56,
        freq_dim=20,
        text_dim=18,
        out_dim=10,
        num_heads=4,
        num_layers=layers,
        cross_attn_norm=True,
        use_img_emb=True,
    )
    randn = Random()
    cache = WanAnimate2KVCache(layers)
    grid = torch.tensor([[frames, height // 2, width // 2]])
    shared = dict(
        encoder_hidden_states=[randn(TEXT, 18)],
        encoder_hidden_states_image=randn(1, 4, 1280),
        kv_cache=cache,
    )
    tokens = height * width // 4
    with torch.no_grad():
        model(
            hidden_states=[randn(10, frames, height, width)],
            condition_latents=[randn(14, frames, height, width)],
            timestep=torch.tensor([1.0]),
            kv_cache_mode="extract",
            seq_len=frames * tokens,
            offset_grid_sizes=grid,
            **shared,
        )
    return model, dict(
        hidden_states=[randn(10, frames + 1, height, width)],
        condition_latents=[randn(14, frames + 1, height, width)],
        timestep=torch.tensor([500.0]),
        kv_cache_mode="cached",
        seq_len=(frames + 1) * tokens,
        reference_grid_sizes=grid,
        origin_len=5,
        origin_area=[64, 64],
        **shared,
    )


def sana_video() -> Tiny:
    """Sana-Video: linear attention, a convolution inside the feed-forward."""
    model = built(
        diffusers.SanaVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, _inputs(Random())


def sana_wm() -> Tiny:
    """Sana-WM: softmax attention in every second block, linear attention in the others, in bfloat16; a timestep
    per frame."""
    model = built(
        diffusers.SanaWMTransformer3DModel,
        in_channels=4,
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        softmax_every_n=2,
        linear_head_dim=12,
        use_chunk_plucker_post_attn=False,
        chunk_plucker_post_attn_blocks=0,
        caption_channels=20,
        mlp_ratio=2.0,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 4, FRAMES, HEIGHT, WIDTH),
        timestep=torch.full((1, 1, FRAMES), 500.0),
        encoder_hidden_states=randn(1, 1, TEXT, 20),
        encoder_attention_mask=torch.ones(1, TEXT),
    )


def sana_wm_refiner() -> Tiny:
    """The refiner of Sana-WM: LTX-2's video stream, RoPE tables as inputs, a timestep per token."""
    model = built(
        diffusers.SanaWMLTX2RefinerTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=20,
        rope_double_precision=False,
    )
    randn = Random()
    tokens = FRAMES * HEIGHT * WIDTH
    table = model.build_rotary_emb_for_absolute_positions(
        1, list(range(FRAMES)), HEIGHT, WIDTH, torch.device("cpu"), 24.0
    )
    mask = torch.ones(1, TEXT)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(1, tokens, 16),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=torch.full((1, tokens), 500.0),
        video_rotary_emb=table,
        encoder_attention_mask=mask,
    )


ENTRIES = (
    Entry("WanTransformer3DModel", tiny_videos.wan),
    Entry("WanTransformer3DModel (image to video)", tiny_videos.wan_i2v),
    Entry("WanVACETransformer3DModel", tiny_videos.wan_vace),
    Entry("WanAnimateTransformer3DModel", wan_animate),
    Entry("WanAnimate2Transformer3DModel", wan_animate2),
    Entry("ChronoEditTransformer3DModel", chronoedit),
    Entry("SkyReelsV2Transformer3DModel", skyreels),
    Entry("AnyFlowTransformer3DModel", anyflow),
    Entry("AnyFlowFARTransformer3DModel", anyflow_far),
    Entry("HeliosTransformer3DModel", helios),
    Entry("SanaVideoTransformer3DModel", sana_video),
    Entry("SanaWMTransformer3DModel", sana_wm, tolerance=2e-3),
    Entry("SanaWMLTX2RefinerTransformer3DModel", sana_wm_refiner),
)
