"""Other image transformers: latents [batch, channels, 2 height, 2 width], or packed ones with shapes beside them."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

from tests import tiny_images
from tests.tiny_parts import Random, Tiny, built, timestep
from tests.zoo.entry import Entry

HEIGHT, WIDTH, TEXT = 6, 10, 7


def cogview3() -> Tiny:
    """CogView3-Plus: [text | image] joint attention, positions in a table."""
    model = built(
        diffusers.CogView3PlusTransformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=20,
        time_embed_dim=10,
        condition_dim=6,
        pos_embed_max_size=16,
        sample_size=16,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(2, TEXT, 20),
        timestep=timestep(2),
        original_size=torch.tensor([[96.0, 160.0]] * 2),
        target_size=torch.tensor([[96.0, 160.0]] * 2),
        crop_coords=torch.tensor([[0.0, 0.0]] * 2),
    )


def glm_image() -> Tiny:
    """GLM-Image: tokens of an autoregressive prior are added to the image tokens."""
    model = built(
        diffusers.GlmImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=20,
        time_embed_dim=10,
        condition_dim=6,
        prior_vq_quantizer_codebook_size=64,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(2, TEXT, 20),
        prior_token_id=torch.arange(2 * HEIGHT * WIDTH).reshape(2, -1) % 64,
        prior_token_drop=torch.zeros(2, HEIGHT * WIDTH, dtype=torch.bool),
        timestep=timestep(2),
        target_size=torch.tensor([[96.0, 160.0]] * 2),
        crop_coords=torch.tensor([[0.0, 0.0]] * 2),
    )


def ernie_image() -> Tiny:
    """ERNIE-Image: [image | text] in one sequence, batch second in the attention, a text padding mask."""
    model = built(
        diffusers.ErnieImageTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=40,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_in_dim=20,
        rope_theta=256,
        rope_axes_dim=(4, 6, 6),
        qk_layernorm=True,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, HEIGHT, WIDTH),
        timestep=timestep(2),
        text_bth=randn(2, TEXT, 20),
        text_lens=torch.tensor([TEXT, TEXT - 2]),
    )


def hunyuan_dit() -> Tiny:
    """HunyuanDiT: skip connections, self- and cross-attention, RoPE tables as inputs."""
    model = built(
        diffusers.HunyuanDiT2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=20,
        cross_attention_dim_t5=16,
        pooled_projection_dim=10,
        hidden_size=32,
        text_len=4,
        text_len_t5=3,
        activation_fn="gelu-approximate",
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 16, 16),
        encoder_hidden_states=randn(2, 4, 20),
        text_embedding_mask=torch.ones(2, 4),
        encoder_hidden_states_t5=randn(2, 3, 16),
        text_embedding_mask_t5=torch.ones(2, 3),
        timestep=timestep(2),
        image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * 2),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=[randn(64, 16), randn(64, 16)],
    )


def hunyuan_image() -> Tiny:
    """HunyuanImage 2.1: [image | text] joint attention, a text refiner, a text padding mask."""
    model = built(
        diffusers.HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=20,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )
    randn = Random()
    mask = torch.ones(1, TEXT)
    mask[-1, -2:] = 0
    return model, dict(
        hidden_states=randn(1, 4, HEIGHT, WIDTH),
        timestep=timestep(1),
        encoder_hidden_states=randn(1, TEXT, 20),
        encoder_attention_mask=mask,
        encoder_hidden_states_2=randn(1, 5, 12),
        encoder_attention_mask_2=torch.ones(1, 5),
    )


def lumina_next() -> Tiny:
    """Lumina-Next: grouped heads, gated cross-attention beside self-attention, time-aware RoPE."""
    model = built(
        diffusers.LuminaNextDiT2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        learn_sigma=False,
        qk_norm=True,
        cross_attention_dim=20,
    )
    randn = Random()
    angles = randn(384, 384, 6)
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(2, TEXT, 20),
        timestep=timestep(2, 0.5),
        encoder_mask=torch.ones(2, TEXT),
        image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        cross_attention_kwargs={},
    )


def nucleus_moe() -> Tiny:
    """Nucleus: experts choose tokens in some blocks; text keys are made once; grouped heads."""
    model = built(
        diffusers.NucleusMoEImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, HEIGHT * WIDTH, 16),
        encoder_hidden_states=randn(1, TEXT, 24),
        encoder_hidden_states_mask=torch.ones(1, TEXT, dtype=torch.long),
        timestep=timestep(1, 0.5),
        img_shapes=[(1, HEIGHT, WIDTH)],
    )


def omnigen() -> Tiny:
    """OmniGen: a language model that reads prompt, timestep and image; an N x N mask, batch by batch."""
    model = built(
        diffusers.OmniGenTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=40,
        num_layers=2,
        pad_token_id=0,
        vocab_size=100,
        in_channels=4,
        time_step_dim=10,
        pos_embed_max_size=16,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )
    randn = Random()
    tokens = TEXT + 1 + 64
    mask = torch.ones(2, tokens, tokens)
    mask[:, : TEXT + 1] = torch.ones(TEXT + 1, tokens).tril()
    return model, dict(
        hidden_states=randn(2, 4, 16, 16),
        timestep=timestep(2, 0.5),
        input_ids=torch.arange(2 * TEXT).reshape(2, TEXT),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=mask,
        position_ids=torch.arange(tokens).repeat(2, 1),
    )


def prx() -> Tiny:
    """PRX: image queries attend to text and image keys."""
    model = built(
        diffusers.PRXTransformer2DModel,
        in_channels=4,
        patch_size=2,
        context_in_dim=20,
        hidden_size=32,
        mlp_ratio=3.5,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states=randn(2, TEXT, 20),
        timestep=timestep(2, 0.5),
    )


def prior() -> Tiny:
    """The unCLIP prior: one image embedding behind the text's, a causal mask."""
    model = built(
        diffusers.PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=12,
        num_embeddings=30,
        additional_embeddings=4,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 12),
        timestep=timestep(2),
        proj_embedding=randn(2, 12),
        encoder_hidden_states=randn(2, 30, 12),
    )


def qwen_image21() -> Tiny:
    """QwenImage 2.1: text attends to text, the image to all: block-causal attention, in segments."""
    model = built(
        diffusers.QwenImage21Transformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    randn = Random()
    slots = HEIGHT * WIDTH // 4
    mask = torch.zeros(1, TEXT + slots, dtype=torch.bool)
    mask[:, TEXT:] = True
    return model, dict(
        hidden_states=randn(1, HEIGHT * WIDTH, 16),
        encoder_hidden_states=randn(1, TEXT, 20),
        timestep=timestep(1, 0.5),
        img_shapes=[[(1, HEIGHT, WIDTH)]],
        img_mask=mask,
    )


def _unet_transformer(cls: type, **config) -> Tiny:
    model = built(
        cls,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=20,
        **config,
    )
    randn = Random()
    return model, dict(hidden_states=randn(2, 32, HEIGHT, WIDTH), encoder_hidden_states=randn(2, TEXT, 20))


def transformer_2d() -> Tiny:
    """Transformer2DModel, a U-Net's attention block: channels in, 1x1 convolutions around the tokens."""
    return _unet_transformer(diffusers.Transformer2DModel)


def dreamlite() -> Tiny:
    """DreamLite's: RMS norm of queries and keys."""
    return _unet_transformer(diffusers.DreamLiteTransformer2DModel, qk_norm="rms_norm")


def dual_transformer() -> Tiny:
    """Two of them, each with a part of the condition."""
    model, inputs = _unet_transformer(DualTransformer2DModel)
    model.condition_lengths = [4, 3]
    return model, inputs


ENTRIES = (
    Entry("SD3Transformer2DModel", tiny_images.sd3),
    Entry("PixArtTransformer2DModel", tiny_images.pixart),
    Entry("DiTTransformer2DModel", tiny_images.dit),
    Entry("QwenImageTransformer2DModel", tiny_images.qwen_image),
    Entry("QwenImage21Transformer2DModel", qwen_image21),
    Entry("AuraFlowTransformer2DModel", tiny_images.auraflow),
    Entry("Lumina2Transformer2DModel", tiny_images.lumina2),
    Entry("LuminaNextDiT2DModel", lumina_next),
    Entry("ZImageTransformer2DModel", tiny_images.z_image, ("x",), ("t",)),
    Entry("CogView3PlusTransformer2DModel", cogview3),
    Entry("CogView4Transformer2DModel", tiny_images.cogview4),
    Entry("GlmImageTransformer2DModel", glm_image),
    Entry("ErnieImageTransformer2DModel", ernie_image),
    Entry("HunyuanDiT2DModel", hunyuan_dit),
    Entry("HunyuanImageTransformer2DModel", hunyuan_image),
    Entry("NucleusMoEImageTransformer2DModel", nucleus_moe),
    Entry("OmniGenTransformer2DModel", omnigen),
    Entry("PRXTransformer2DModel", prx),
    Entry("PriorTransformer", prior),
    Entry("SanaTransformer2DModel", tiny_images.sana),
    Entry("Transformer2DModel", transformer_2d, times=()),
    Entry("DreamLiteTransformer2DModel", dreamlite, times=()),
    Entry("DualTransformer2DModel", dual_transformer, times=()),
)
