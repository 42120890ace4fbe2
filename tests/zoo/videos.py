"""Other video transformers: latents [batch, channels, frames, 2 height, 2 width] unless said otherwise."""

from __future__ import annotations

import diffusers
import torch

from tests import tiny_videos
from tests.tiny_parts import Random, Tiny, built, timestep
from tests.zoo.entry import Entry

FRAMES, HEIGHT, WIDTH, TEXT = 3, 4, 6, 7
TOKENS = FRAMES * HEIGHT * WIDTH


def consisid() -> Tiny:
    """ConsisID: CogVideoX with cross-attention to a face after each block."""
    model = built(
        diffusers.ConsisIDTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=10,
        text_embed_dim=20,
        num_layers=2,
        sample_width=2 * WIDTH,
        sample_height=2 * HEIGHT,
        sample_frames=4 * (FRAMES - 1) + 1,
        patch_size=2,
        max_text_seq_length=TEXT,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=6,
        LFE_vit_dim=14,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=3,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, FRAMES, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1),
        id_vit_hidden=[randn(1, 2, 14)],
        id_cond=randn(1, 6),
    )


def cosmos3() -> Tiny:
    """Cosmos 3: text and video packed into one sequence, scattered and gathered by index; grouped heads."""
    model = built(
        diffusers.Cosmos3OmniTransformer,
        head_dim=12,
        hidden_act="relu2",
        hidden_size=24,
        intermediate_size=40,
        latent_channel=4,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=4,
        qk_norm_for_text=False,
        rope_axes_dim=[2, 2, 2],
        rope_theta=1e8,
        vocab_size=32,
    )
    randn = Random()
    tokens = HEIGHT * WIDTH
    seen = torch.arange(TEXT, TEXT + tokens)
    return model, dict(
        input_ids=torch.arange(TEXT),
        text_indexes=torch.arange(TEXT),
        position_ids=torch.arange(TEXT + tokens).repeat(3, 1),
        und_len=TEXT,
        sequence_length=TEXT + tokens,
        vision_tokens=[randn(1, 4, 1, HEIGHT, WIDTH)],
        vision_token_shapes=[(1, HEIGHT, WIDTH)],
        vision_sequence_indexes=seen,
        vision_mse_loss_indexes=seen,
        vision_timesteps=timestep(tokens, 0.5),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


def easyanimate() -> Tiny:
    """EasyAnimate: [text | video] joint attention, a convolution per frame as patch embedding."""
    model = built(
        diffusers.EasyAnimateTransformer3DModel,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        mmdit_layers=1,
        num_layers=2,
        out_channels=4,
        patch_size=2,
        sample_height=60,
        sample_width=90,
        text_embed_dim=20,
        time_embed_dim=10,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        timestep=timestep(2),
        encoder_hidden_states=randn(2, TEXT, 20),
    )


def hunyuan_video15() -> Tiny:
    """HunyuanVideo 1.5: text, glyph and image tokens reordered so that padding is last."""
    model = built(
        diffusers.HunyuanVideo15Transformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=20,
        text_embed_2_dim=12,
        image_embed_dim=14,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 4, FRAMES, HEIGHT, WIDTH),
        timestep=timestep(1),
        encoder_hidden_states=randn(1, TEXT, 20),
        encoder_attention_mask=torch.ones(1, TEXT),
        encoder_hidden_states_2=randn(1, 5, 12),
        encoder_attention_mask_2=torch.ones(1, 5),
        image_embeds=torch.zeros(1, 3, 14),
    )


def framepack() -> Tiny:
    """HunyuanVideo Framepack: clean and compressed history frames before the noisy ones."""
    model = built(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=14,
        has_clean_x_embedder=True,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        timestep=timestep(1),
        encoder_hidden_states=randn(1, TEXT, 20),
        pooled_projections=randn(1, 12),
        encoder_attention_mask=torch.ones(1, TEXT),
        guidance=torch.full((1,), 6.0),
        image_embeds=randn(1, 5, 14),
        indices_latents=torch.arange(FRAMES),
        latents_clean=randn(1, 4, 2, 2 * HEIGHT, 2 * WIDTH),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=randn(1, 4, 2, 2 * HEIGHT, 2 * WIDTH),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=randn(1, 4, 8, 2 * HEIGHT, 2 * WIDTH),
        indices_latents_history_4x=torch.arange(8),
    )


def _joyimage(cls: type) -> torch.nn.Module:
    return built(
        cls,
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=20,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
        theta=256,
    )


def joyimage() -> Tiny:
    """JoyImage-Edit: double blocks over [image | text]."""
    randn, model = Random(), _joyimage(diffusers.JoyImageEditTransformer3DModel)
    return model, dict(
        hidden_states=randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1),
    )


def joyimage_plus() -> Tiny:
    """JoyImage-Edit-Plus: patches of a target and of references, packed; a key mask."""
    randn = Random()
    mask = (torch.arange(TEXT) < TEXT - 2).float()[None]
    return _joyimage(diffusers.JoyImageEditPlusTransformer3DModel), dict(
        hidden_states=randn(1, 2 * HEIGHT * WIDTH, 4, 1, 2, 2),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1),
        shape_list=[[(1, HEIGHT, WIDTH), (1, HEIGHT, WIDTH)]],
        encoder_hidden_states_mask=mask,
    )


def kandinsky6() -> Tiny:
    """Kandinsky 6: latents [batch, frames, 2 height, 2 width, channels], the video path without audio."""
    model = built(
        diffusers.Kandinsky6Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=32,
        model_dim=32,
        ff_dim=40,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=6,
        out_audio_dim=6,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, FRAMES, 2 * HEIGHT, 2 * WIDTH, 4),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1),
        pooled_projections=randn(1, 12),
    )


def kandinsky6_sr() -> Tiny:
    """Kandinsky 6 super-resolution: block masks that depend on the values (flex_attention)."""
    model = built(
        diffusers.Kandinsky6SRTransformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=32,
        model_dim=32,
        ff_dim=40,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return model, dict(hidden_states=Random()(1, 1, 16, 16, 9), timestep=timestep(1))


def ltx2() -> Tiny:
    """LTX-2: video and audio streams with attention across; RMS norm over all heads."""
    model = built(
        diffusers.LTX2VideoTransformer3DModel,
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
    return model, dict(
        hidden_states=randn(2, TOKENS, 16),
        audio_hidden_states=randn(2, 9, 6),
        encoder_hidden_states=randn(2, TEXT, 20),
        audio_encoder_hidden_states=randn(2, TEXT, 20),
        timestep=timestep(2),
        encoder_attention_mask=torch.ones(2, TEXT, dtype=torch.bool),
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        audio_num_frames=9,
        fps=25.0,
    )


def minimax_h3() -> Tiny:
    """MiniMax-H3: text, audio and video rows in one packed sequence, scattered and gathered by index."""
    model = built(
        diffusers.MiniMaxH3Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=40,
        in_channels=4,
        audio_in_channels=6,
        patch_size=(1, 2, 2),
        text_dim=20,
        freq_dim=10,
        time_embed_hidden_dim=28,
        time_embed_dim=14,
        rope_freq_dim=2,
    )
    randn = Random()
    audio, video = 5, TOKENS
    tags = torch.tensor([1] * TEXT + [2] * audio + [0] * video)
    rows = torch.arange(len(tags))
    return model, dict(
        hidden_states=randn(2, video, 16),
        audio_hidden_states=randn(2, audio, 6),
        encoder_hidden_states=randn(2, TEXT, 20),
        timestep=torch.tensor([0.7, 0.3]),
        timestep_indices=(tags == 2).long(),
        token_tags=tags,
        position_ids=torch.stack([rows, rows % 4, rows % 3], -1).float(),
        video_indices=rows[TEXT + audio :],
        audio_indices=rows[TEXT : TEXT + audio],
        text_indices=rows[:TEXT],
    )


def motif_video() -> Tiny:
    """Motif-Video: double, single and decoder blocks over [video | text]."""
    model = built(
        diffusers.MotifVideoTransformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 9, FRAMES, HEIGHT, WIDTH),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1),
    )


def temporal() -> Tiny:
    """TransformerTemporalModel, a video U-Net's block: the tokens are the frames of one pixel."""
    model = built(
        diffusers.TransformerTemporalModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        norm_num_groups=4,
    )
    return model, dict(hidden_states=Random()(24, 32, 2, 3), num_frames=24)


ENTRIES = (
    Entry("HunyuanVideoTransformer3DModel", tiny_videos.hunyuan_video),
    Entry("HunyuanVideo15Transformer3DModel", hunyuan_video15),
    Entry("HunyuanVideoFramepackTransformer3DModel", framepack),
    Entry("CogVideoXTransformer3DModel", tiny_videos.cogvideox),
    Entry("ConsisIDTransformer3DModel", consisid),
    Entry("LTXVideoTransformer3DModel", tiny_videos.ltx),
    Entry("LTX2VideoTransformer3DModel", ltx2),
    Entry("MochiTransformer3DModel", tiny_videos.mochi),
    Entry("Kandinsky5Transformer3DModel", tiny_videos.kandinsky5),
    Entry("Kandinsky6Transformer3DModel", kandinsky6),
    Entry("Kandinsky6SRTransformer3DModel", kandinsky6_sr),
    Entry("CosmosTransformer3DModel", tiny_videos.cosmos),
    Entry("Cosmos3OmniTransformer", cosmos3, ("vision_tokens",), ("vision_timesteps",)),
    Entry("LatteTransformer3DModel", tiny_videos.latte),
    Entry("AllegroTransformer3DModel", tiny_videos.allegro),
    Entry("EasyAnimateTransformer3DModel", easyanimate),
    Entry("JoyImageEditTransformer3DModel", joyimage),
    Entry("JoyImageEditPlusTransformer3DModel", joyimage_plus),
    Entry("MiniMaxH3Transformer3DModel", minimax_h3, ("hidden_states", "audio_hidden_states")),
    Entry("MotifVideoTransformer3DModel", motif_video),
    Entry("TransformerTemporalModel", temporal, times=(), batch=1),
)
