"""FLUX and what was built like it: packed latents [batch, tokens, channels], ids as inputs, joint attention."""

from __future__ import annotations

import diffusers
import torch

from tests import tiny_images
from tests.tiny_parts import Random, Tiny, built, image_ids, timestep
from tests.zoo.entry import Entry

HEIGHT, WIDTH, TEXT = 6, 10, 7
TOKENS = HEIGHT * WIDTH


def _joint(cls: type, channels: int = 16, batch: int = 2, **config) -> tuple[torch.nn.Module, Random, dict]:
    """A model with two double and two single blocks, and the inputs that all of the family take."""
    sizes = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
    model = built(cls, in_channels=channels, joint_attention_dim=24, **sizes, **config)
    randn = Random()
    return (
        model,
        randn,
        dict(
            hidden_states=randn(batch, TOKENS, channels),
            encoder_hidden_states=randn(batch, TEXT, 24),
            timestep=timestep(batch, 0.5),
            img_ids=image_ids(HEIGHT, WIDTH),
            txt_ids=torch.zeros(TEXT, 3),
        ),
    )


def bria() -> Tiny:
    """Bria 3: FLUX with an additive mask over queries and keys, built from the text's lengths by the pipeline."""
    model, _, inputs = _joint(
        diffusers.BriaTransformer2DModel, patch_size=1, pooled_projection_dim=None, axes_dims_rope=[4, 6, 6]
    )
    return model, inputs


def bria_fibo() -> Tiny:
    """Bria FIBO: every block joins features of another layer of the text encoder to the text."""
    model, randn, inputs = _joint(
        diffusers.BriaFiboTransformer2DModel,
        patch_size=1,
        text_encoder_dim=12,
        pooled_projection_dim=None,
        axes_dims_rope=[4, 6, 6],
    )
    return model, inputs | dict(text_encoder_layers=[randn(2, TEXT, 12) for _ in range(4)])


def bria_fibo2() -> Tiny:
    """Bria FIBO 2: text resampled to gist tokens by a perceiver, cross-attention in some blocks."""
    model = built(
        diffusers.BriaFibo2Transformer2DModel,
        in_channels=4,
        patch_size=2,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=20,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=16,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        timestep=timestep(2, 0.5),
        encoder_hidden_states=randn(2, 2, TEXT, 20),
    )


def longcat_image() -> Tiny:
    """LongCat-Image."""
    model, _, inputs = _joint(
        diffusers.LongCatImageTransformer2DModel, patch_size=1, pooled_projection_dim=12, axes_dims_rope=[4, 6, 6]
    )
    return model, inputs | dict(guidance=torch.full((2,), 3.5))


def ovis_image() -> Tiny:
    """Ovis-Image: gated MLPs, one linear and a chunk."""
    model, _, inputs = _joint(
        diffusers.OvisImageTransformer2DModel, patch_size=1, out_channels=16, axes_dims_rope=(4, 6, 6)
    )
    return model, inputs


def flux3() -> Tiny:
    """FLUX.3: blocks for text and for image alone, then joint ones with fused linears; modulation per token."""
    model, _, inputs = _joint(
        diffusers.Flux3Transformer2DModel,
        timestep_channels=20,
        cond_in_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, inputs | dict(img_ids=image_ids(HEIGHT, WIDTH, axes=4), txt_ids=torch.zeros(TEXT, 4))


def krea2() -> Tiny:
    """Krea 2: features of several text layers, grouped heads, gated attention, a text padding mask."""
    model = built(
        diffusers.Krea2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=20,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=28,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    randn = Random()
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    return model, dict(
        hidden_states=randn(2, TOKENS, 16),
        encoder_hidden_states=randn(2, TEXT, 3, 24),
        timestep=timestep(2, 0.5),
        position_ids=torch.cat([torch.zeros(TEXT, 3), image_ids(HEIGHT, WIDTH)]),
        encoder_attention_mask=mask,
    )


def ideogram4() -> Tiny:
    """Ideogram 4: text and image share one sequence; an indicator says which a token is."""
    model = built(
        diffusers.Ideogram4Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=40,
        adaln_dim=20,
        llm_features_dim=24,
        rope_theta=10_000,
        mrope_section=(4, 2, 2),
    )
    randn = Random()
    tokens = TEXT + TOKENS
    positions = torch.zeros(1, tokens, 3, dtype=torch.long)
    positions[:, :TEXT] = torch.arange(TEXT)[None, :, None]
    positions[:, TEXT:] = image_ids(HEIGHT, WIDTH).long() + 65536
    indicator = torch.full((1, tokens), 2)
    indicator[:, :TEXT] = 3
    return model, dict(
        hidden_states=randn(1, tokens, 16),
        encoder_hidden_states=randn(1, tokens, 24),
        timestep=timestep(1, 0.5),
        position_ids=positions,
        segment_ids=torch.ones(1, tokens, dtype=torch.long),
        indicator=indicator,
    )


def hidream() -> Tiny:
    """HiDream: a mixture of experts beside a shared gated MLP; text from two encoders at every block."""
    model = built(
        diffusers.HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[12, 20],
        text_emb_dim=14,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        encoder_hidden_states_t5=randn(2, TEXT, 12),
        encoder_hidden_states_llama3=randn(2, 2, TEXT, 20),
        pooled_embeds=randn(2, 14),
        timesteps=timestep(2),
    )


ENTRIES = (
    Entry("FluxTransformer2DModel", tiny_images.flux),
    Entry("Flux2Transformer2DModel", tiny_images.flux2),
    Entry("Flux3Transformer2DModel", flux3),
    Entry("ChromaTransformer2DModel", tiny_images.chroma),
    Entry("BriaTransformer2DModel", bria),
    Entry("BriaFiboTransformer2DModel", bria_fibo),
    Entry("BriaFibo2Transformer2DModel", bria_fibo2),
    Entry("LongCatImageTransformer2DModel", longcat_image),
    Entry("OvisImageTransformer2DModel", ovis_image),
    Entry("Krea2Transformer2DModel", krea2),
    Entry("Ideogram4Transformer2DModel", ideogram4),
    Entry("HiDreamImageTransformer2DModel", hidream, times=("timesteps",)),
)
