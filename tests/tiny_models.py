"""Real diffusers transformers, tiny: what the tests run instead of pictures of them.

Every function returns `(model, kwargs)`: float32, eval mode, seeded, one call `model(**kwargs)` takes milliseconds.
All weights are random and none is zero, since an output that is zero by initialisation proves nothing.
Sizes are chosen so that no two axes that mean different things have the same length by accident.

    model, kwargs = MODELS["flux"]()
    model, kwargs = flux(batch=3, height=6, width=10)
"""

from __future__ import annotations

import diffusers
import torch

Tiny = tuple[torch.nn.Module, dict]


def _randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: matrices at 1/sqrt(fan in), norm weights around one, the rest small but not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            noise = noise / max(1, parameter[0].numel()) ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        parameter.data.copy_(noise)
    return model.eval().requires_grad_(False)


class _Random:
    """Seeded normal tensors, one generator per model."""

    def __init__(self, seed: int = 1):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def _built(cls: type, **config) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _randomised(cls(**config))


def _timestep(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def _image_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """[height * width, axes] float: (0, row, column), zeros behind when there are more axes."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(height * width, axes)


def flux(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """FLUX.1: packed latents [batch, height * width, 16], ids as inputs, joint attention [text | image]."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        pooled_projections=randn(batch, 12),
        timestep=_timestep(batch, 0.5),
        img_ids=_image_ids(height, width),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((batch,), 3.5),
    )


def flux2(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """FLUX.2: as FLUX, with four-axis ids and fused QKV + MLP in the single blocks."""
    model = _built(
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
    randn = _Random()
    text_ids = torch.zeros(text, 4)
    text_ids[:, 3] = torch.arange(text)
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=_timestep(batch, 0.5),
        img_ids=_image_ids(height, width, axes=4),
        txt_ids=text_ids,
        guidance=torch.full((batch,), 3.5),
    )


def sd3(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """Stable Diffusion 3.5: latents [batch, 4, 2 height, 2 width]; a dual-attention block; learned positions."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        pooled_projections=randn(batch, 20),
        timestep=_timestep(batch),
    )


def pixart(batch: int = 2, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """PixArt-Sigma: one self-attention and one cross-attention a block, a text padding mask."""
    model = _built(
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
    randn = _Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=_timestep(batch),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
    )


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
    model = _built(diffusers.WanTransformer3DModel, **_wan_config(layers))
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
    )


def wan_i2v(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Wan image-to-video: 257 image tokens join the text, each with keys of its own."""
    model = _built(diffusers.WanTransformer3DModel, **_wan_config(layers), image_dim=14, added_kv_proj_dim=24)
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_hidden_states_image=randn(batch, 257, 14),
    )


def wan_vace(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Wan VACE: a control video of the same grid runs through blocks of its own."""
    model = _built(
        diffusers.WanVACETransformer3DModel, **_wan_config(layers), vace_layers=list(range(layers)), vace_in_channels=8
    )
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
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
    model = _built(
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
    randn = _Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_attention_mask=mask,
        pooled_projections=randn(batch, 12),
        guidance=torch.full((batch,), 6.0),
    )


def qwen_image(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """QwenImage: packed latents [batch, height * width, 16]; RoPE built from `img_shapes`, complex numbers."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        encoder_hidden_states_mask=torch.ones(batch, text, dtype=torch.bool),
        timestep=_timestep(batch, 0.5),
        img_shapes=[(1, height, width)] * batch,
    )


def cogvideox(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """CogVideoX: latents [batch, frames, 4, 2 height, 2 width], RoPE tables as inputs, [text | video]."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, frames, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
        image_rotary_emb=(randn(frames * height * width, 16), randn(frames * height * width, 16)),
    )


def ltx(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """LTX-Video: packed latents [batch, frames * height * width, 16], RoPE in the graph, a text padding mask."""
    model = _built(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=20,
    )
    randn = _Random()
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(batch, frames * height * width, 16),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
        encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(0.05, 32.0, 32.0),
    )


def mochi(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Mochi: learned RoPE frequencies, text tokens selected by their mask for each sample."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=_timestep(batch),
        encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool),
    )


def auraflow(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """AuraFlow: register tokens before the text, positions selected from a learned table."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=_timestep(batch, 0.5),
    )


def lumina2(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """Lumina 2: refiners for text and image, one joint sequence [text | image] filled in place, grouped heads."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        timestep=_timestep(batch, 0.5),
        encoder_hidden_states=randn(batch, text, 20),
        encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool),
    )


def chroma(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2, single: int = 2) -> Tiny:
    """Chroma: FLUX with modulation from an approximator and a mask over the joint sequence."""
    model = _built(
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
    randn = _Random()
    mask = torch.ones(batch, text + height * width, dtype=torch.bool)
    mask[-1, text - 2 : text + 3] = False
    return model, dict(
        hidden_states=randn(batch, height * width, 16),
        encoder_hidden_states=randn(batch, text, 24),
        timestep=_timestep(batch, 0.5),
        img_ids=_image_ids(height, width),
        txt_ids=torch.zeros(text, 3),
        attention_mask=mask,
    )


def z_image(batch: int = 2, height: int = 8, width: int = 12, text: int = 32, layers: int = 2) -> Tiny:
    """Z-Image: lists of images, tokens padded to multiples of 32, [image | text]."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        x=[randn(4, 1, 2 * height, 2 * width) for _ in range(batch)],
        t=_timestep(batch, 0.5),
        cap_feats=[randn(text, 20) for _ in range(batch)],
    )


def kandinsky5(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Kandinsky 5: latents [batch, frames, 2 height, 2 width, 4], channels last, rotation matrices as RoPE."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, frames, 2 * height, 2 * width, 4),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
        pooled_projections=randn(batch, 12),
        visual_rope_pos=[torch.arange(frames), torch.arange(height), torch.arange(width)],
        text_rope_pos=torch.arange(text),
    )


def cosmos(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Cosmos: patches flattened without a convolution, learned positions per axis."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
        attention_mask=torch.ones(batch, text),
        fps=30,
    )


def cogview4(batch: int = 2, height: int = 6, width: int = 10, text: int = 7, layers: int = 2) -> Tiny:
    """CogView4: patches flattened by views, RoPE in the graph, [text | image]."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
        original_size=torch.tensor([[96.0, 160.0]] * batch),
        target_size=torch.tensor([[96.0, 160.0]] * batch),
        crop_coords=torch.tensor([[0.0, 0.0]] * batch),
    )


def dit(batch: int = 2, height: int = 8, width: int = 8, layers: int = 2) -> Tiny:
    """DiT: class labels, one self-attention a block."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, 2 * height, 2 * width),
        timestep=torch.full((batch,), 7, dtype=torch.long),
        class_labels=torch.arange(batch),
    )


def latte(batch: int = 1, frames: int = 3, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """Latte: blocks attend over space and over time in turn, regrouping tokens in between."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        timestep=_timestep(batch),
        encoder_hidden_states=randn(batch, text, 20),
    )


def sana(batch: int = 2, height: int = 8, width: int = 8, text: int = 7, layers: int = 2) -> Tiny:
    """Sana: linear attention and a depthwise convolution inside the feed-forward."""
    model = _built(
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
    randn = _Random()
    return model, dict(
        hidden_states=randn(batch, 4, height, width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
    )


def allegro(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, layers: int = 2) -> Tiny:
    """Allegro: RoPE positions as inputs, a video padding mask, cross-attention."""
    model = _built(
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
    randn = _Random()
    tokens = frames * height * width
    positions = [torch.arange(n) for n in (frames, height, width)]
    grids = torch.stack([g.reshape(-1) for g in torch.meshgrid(*positions, indexing="ij")]).reshape(3, 1, tokens)
    tables = tuple((randn(n, 8), randn(n, 8)) for n in (frames, height, width))
    mask = torch.ones(batch, frames, 2 * height, 2 * width)
    mask[-1, ..., -2:] = 0
    return model, dict(
        hidden_states=randn(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=randn(batch, text, 20),
        timestep=_timestep(batch),
        attention_mask=mask,
        encoder_attention_mask=torch.ones(batch, text),
        image_rotary_emb=(tables, grids),
    )


MODELS = {
    function.__name__: function
    for function in (
        flux,
        flux2,
        sd3,
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
        sana,
        allegro,
    )
}
