"""Diffusion transformers at the width and resolution that people run, on the meta device: shapes without
memory.

Every function returns `(model, kwargs)` in bfloat16 for one denoising call. Layers repeat, so two of each
kind stand for all unless `layers` says otherwise. The few models that read values while they are traced
(NEEDS_VALUES) must be built on a real device, and take about 2 GB there.

    with torch.device("meta"):
        model, kwargs = FULL_SIZE["flux"](layers=19, single=38)
"""

from __future__ import annotations

import diffusers
import torch

Full = tuple[torch.nn.Module, dict]


def _built(name: str, **config) -> torch.nn.Module:
    return getattr(diffusers, name)(**config).to(torch.bfloat16).eval().requires_grad_(False)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _ones(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def flux(layers: int = 2, single: int = 2) -> Full:
    """FLUX.1-dev, 1024 x 1024."""
    model = _built("FluxTransformer2DModel", num_layers=layers, num_single_layers=single, guidance_embeds=True)
    return model, dict(
        hidden_states=_empty(1, 4096, 64),
        encoder_hidden_states=_empty(1, 512, 4096),
        pooled_projections=_empty(1, 768),
        timestep=_empty(1),
        img_ids=_empty(4096, 3),
        txt_ids=_empty(512, 3),
        guidance=_empty(1, dtype=torch.float32),
    )


def flux2(layers: int = 2, single: int = 2) -> Full:
    """FLUX.2-dev, 1024 x 1024."""
    model = _built("Flux2Transformer2DModel", num_layers=layers, num_single_layers=single)
    return model, dict(
        hidden_states=_empty(1, 4096, 128),
        encoder_hidden_states=_empty(1, 512, 15360),
        timestep=_empty(1),
        img_ids=_empty(1, 4096, 4, dtype=torch.int64),
        txt_ids=_empty(1, 512, 4, dtype=torch.int64),
        guidance=_empty(1, dtype=torch.float32),
    )


def sd35(layers: int = 2) -> Full:
    """Stable Diffusion 3.5 large, 1024 x 1024, classifier-free guidance in one batch."""
    model = _built(
        "SD3Transformer2DModel",
        num_layers=layers,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return model, dict(
        hidden_states=_empty(2, 16, 128, 128),
        encoder_hidden_states=_empty(2, 333, 4096),
        pooled_projections=_empty(2, 2048),
        timestep=_empty(2),
    )


def pixart(layers: int = 2) -> Full:
    """PixArt-Sigma, 1024 x 1024, classifier-free guidance in one batch."""
    model = _built(
        "PixArtTransformer2DModel",
        num_layers=layers,
        caption_channels=4096,
        use_additional_conditions=False,
        interpolation_scale=2,
    )
    return model, dict(
        hidden_states=_empty(2, 4, 128, 128),
        encoder_hidden_states=_empty(2, 300, 4096),
        timestep=_empty(2),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=_ones(2, 300, dtype=torch.int64),
    )


def wan(layers: int = 2) -> Full:
    """Wan2.1 T2V 14B, 720 x 1280, 81 frames."""
    return _built("WanTransformer3DModel", num_layers=layers), dict(
        hidden_states=_empty(1, 16, 21, 90, 160),
        timestep=_empty(1, dtype=torch.float32),
        encoder_hidden_states=_empty(1, 512, 4096),
    )


def wan_i2v(layers: int = 2) -> Full:
    """Wan2.1 I2V 14B, 720 x 1280, 81 frames."""
    model = _built("WanTransformer3DModel", num_layers=layers, in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    return model, dict(
        hidden_states=_empty(1, 36, 21, 90, 160),
        timestep=_empty(1, dtype=torch.float32),
        encoder_hidden_states=_empty(1, 512, 4096),
        encoder_hidden_states_image=_empty(1, 257, 1280),
    )


def wan_vace(layers: int = 2) -> Full:
    """Wan2.1 VACE 14B, 720 x 1280, 81 frames."""
    model = _built("WanVACETransformer3DModel", num_layers=layers, vace_layers=list(range(0, layers, 2)))
    return model, dict(
        hidden_states=_empty(1, 16, 21, 90, 160),
        timestep=_empty(1, dtype=torch.float32),
        encoder_hidden_states=_empty(1, 512, 4096),
        control_hidden_states=_empty(1, 96, 21, 90, 160),
        control_hidden_states_scale=_empty(len(model.config.vace_layers)),
    )


def hunyuan_video(layers: int = 2, single: int = 2) -> Full:
    """HunyuanVideo, 720 x 1280, 129 frames."""
    model = _built("HunyuanVideoTransformer3DModel", num_layers=layers, num_single_layers=single)
    return model, dict(
        hidden_states=_empty(1, 16, 33, 90, 160),
        timestep=_empty(1, dtype=torch.int64),
        encoder_hidden_states=_empty(1, 256, 4096),
        encoder_attention_mask=_ones(1, 256),
        pooled_projections=_empty(1, 768),
        guidance=_empty(1),
    )


def qwen_image(layers: int = 2) -> Full:
    """Qwen-Image, 1328 x 1328."""
    return _built("QwenImageTransformer2DModel", num_layers=layers), dict(
        hidden_states=_empty(1, 83 * 83, 64),
        encoder_hidden_states=_empty(1, 128, 3584),
        timestep=_empty(1),
        img_shapes=[(1, 83, 83)],
    )


def cogvideox(layers: int = 2) -> Full:
    """CogVideoX-5B, 480 x 720, 49 frames, classifier-free guidance in one batch."""
    model = _built(
        "CogVideoXTransformer3DModel",
        num_layers=layers,
        num_attention_heads=48,
        use_rotary_positional_embeddings=True,
    )
    tokens = 13 * 30 * 45
    return model, dict(
        hidden_states=_empty(2, 13, 16, 60, 90),
        encoder_hidden_states=_empty(2, 226, 4096),
        timestep=_empty(2, dtype=torch.int64),
        image_rotary_emb=(_empty(tokens, 64, dtype=torch.float32), _empty(tokens, 64, dtype=torch.float32)),
    )


def ltx(layers: int = 2) -> Full:
    """LTX-Video 0.9.1, 512 x 768, 121 frames, classifier-free guidance in one batch."""
    return _built("LTXVideoTransformer3DModel", num_layers=layers), dict(
        hidden_states=_empty(2, 16 * 16 * 24, 128),
        encoder_hidden_states=_empty(2, 128, 4096),
        timestep=_empty(2),
        encoder_attention_mask=_ones(2, 128),
        num_frames=16,
        height=16,
        width=24,
        rope_interpolation_scale=(8 / 25, 32, 32),
    )


def mochi(layers: int = 2) -> Full:
    """Mochi 1 preview, 240 x 416, 13 frames, classifier-free guidance in one batch."""
    return _built("MochiTransformer3DModel", num_layers=layers), dict(
        hidden_states=_empty(2, 12, 3, 30, 52),
        encoder_hidden_states=_empty(2, 256, 4096),
        timestep=_empty(2),
        encoder_attention_mask=_ones(2, 256),
    )


def auraflow(layers: int = 2, single: int = 2) -> Full:
    """AuraFlow 0.3, 1024 x 1024, classifier-free guidance in one batch."""
    model = _built("AuraFlowTransformer2DModel", num_mmdit_layers=layers, num_single_dit_layers=single)
    return model, dict(
        hidden_states=_empty(2, 4, 128, 128), encoder_hidden_states=_empty(2, 256, 2048), timestep=_empty(2)
    )


def lumina2(layers: int = 2) -> Full:
    """Lumina-Image 2.0, 1024 x 1024."""
    return _built("Lumina2Transformer2DModel", num_layers=layers, cap_feat_dim=2304), dict(
        hidden_states=_empty(1, 16, 128, 128),
        timestep=_empty(1),
        encoder_hidden_states=_empty(1, 256, 2304),
        encoder_attention_mask=_ones(1, 256),
    )


def chroma(layers: int = 2, single: int = 2) -> Full:
    """Chroma 1, 1024 x 1024."""
    model = _built("ChromaTransformer2DModel", num_layers=layers, num_single_layers=single)
    return model, dict(
        hidden_states=_empty(1, 4096, 64),
        encoder_hidden_states=_empty(1, 512, 4096),
        timestep=_empty(1),
        img_ids=_empty(4096, 3),
        txt_ids=_empty(512, 3),
        attention_mask=_ones(1, 512 + 4096),
    )


def z_image(layers: int = 2) -> Full:
    """Z-Image, 1024 x 1024."""
    return _built("ZImageTransformer2DModel", n_layers=layers), dict(
        x=[_empty(16, 1, 128, 128)], t=_empty(1), cap_feats=[_empty(100, 2560)]
    )


def kandinsky5(layers: int = 2) -> Full:
    """Kandinsky 5 T2V Lite, 512 x 768, 5 seconds."""
    model = _built(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=16,
        out_visual_dim=16,
        model_dim=1792,
        ff_dim=7168,
        num_visual_blocks=layers,
        visual_cond=True,
    )
    return model, dict(
        hidden_states=_empty(1, 31, 64, 96, 33),
        encoder_hidden_states=_empty(1, 256, 3584),
        timestep=_empty(1),
        pooled_projections=_empty(1, 768),
        visual_rope_pos=[torch.arange(31), torch.arange(32), torch.arange(48)],
        text_rope_pos=torch.arange(256),
        scale_factor=(1.0, 2.0, 2.0),
    )


def cosmos(layers: int = 2) -> Full:
    """Cosmos Predict 1 7B, 704 x 1280, 121 frames."""
    return _built("CosmosTransformer3DModel", num_layers=layers, concat_padding_mask=False), dict(
        hidden_states=_empty(1, 16, 16, 88, 160),
        timestep=_empty(1),
        encoder_hidden_states=_empty(1, 512, 1024),
        fps=30,
    )


def cogview4(layers: int = 2) -> Full:
    """CogView4-6B, 1024 x 1024."""
    return _built("CogView4Transformer2DModel", num_layers=layers), dict(
        hidden_states=_empty(1, 16, 128, 128),
        encoder_hidden_states=_empty(1, 224, 4096),
        timestep=_empty(1),
        original_size=_empty(1, 2),
        target_size=_empty(1, 2),
        crop_coords=_empty(1, 2),
    )


def dit(layers: int = 2) -> Full:
    """DiT-XL/2, 512 x 512, classifier-free guidance in one batch."""
    model = _built("DiTTransformer2DModel", num_layers=layers, sample_size=64, out_channels=8)
    return model, dict(
        hidden_states=_empty(2, 4, 64, 64),
        timestep=_empty(2, dtype=torch.int64),
        class_labels=_empty(2, dtype=torch.int64),
    )


def latte(layers: int = 2) -> Full:
    """Latte-1, 512 x 512, 16 frames, classifier-free guidance in one batch."""
    model = _built(
        "LatteTransformer3DModel",
        num_layers=layers,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=64,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=4096,
    )
    return model, dict(
        hidden_states=_empty(2, 4, 16, 64, 64),
        timestep=_empty(2, dtype=torch.int64),
        encoder_hidden_states=_empty(2, 120, 4096),
    )


def allegro(layers: int = 2) -> Full:
    """Allegro, 720 x 1280, 88 frames, classifier-free guidance in one batch."""
    model = _built("AllegroTransformer3DModel", num_layers=layers)
    tokens = 22 * 45 * 80
    tables = tuple((_empty(n, 32), _empty(n, 32)) for n in (22, 45, 80))
    return model, dict(
        hidden_states=_empty(2, 4, 22, 90, 160),
        encoder_hidden_states=_empty(2, 512, 4096),
        timestep=_empty(2, dtype=torch.int64),
        attention_mask=_ones(2, 22, 90, 160, dtype=torch.float32),
        encoder_attention_mask=_ones(2, 512, dtype=torch.float32),
        image_rotary_emb=(tables, _empty(3, 1, tokens, dtype=torch.int64)),
    )


def sana(layers: int = 2) -> Full:
    """Sana 1.6B, 1024 x 1024, classifier-free guidance in one batch."""
    return _built("SanaTransformer2DModel", num_layers=layers), dict(
        hidden_states=_empty(2, 32, 32, 32), encoder_hidden_states=_empty(2, 300, 2304), timestep=_empty(2)
    )


FULL_SIZE = {
    function.__name__: function
    for function in (
        flux,
        flux2,
        sd35,
        pixart,
        wan,
        wan_i2v,
        wan_vace,
        hunyuan_video,
        qwen_image,
        cogvideox,
        ltx,
        mochi,
        auraflow,
        lumina2,
        chroma,
        z_image,
        kandinsky5,
        cosmos,
        cogview4,
        dit,
        latte,
        allegro,
        sana,
    )
}

NEEDS_VALUES = ("lumina2", "mochi")
