"""Transformers of sound and of molecules: latents [batch, channels, length] or [batch, length, channels]."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_parts import Random, Tiny, built, timestep
from tests.zoo.entry import Entry

LENGTH, TEXT = 56, 7


def ace_step() -> Tiny:
    """ACE-Step: grouped heads, sliding windows in every second block, cross-attention to text and lyrics."""
    model = built(
        diffusers.AceStepTransformer1DModel,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=18,
        audio_acoustic_hidden_dim=6,
        patch_size=2,
        sliding_window=16,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 2 * LENGTH, 6),
        timestep=timestep(2, 0.5),
        timestep_r=timestep(2, 0.5),
        encoder_hidden_states=randn(2, TEXT, 32),
        context_latents=randn(2, 2 * LENGTH, 12),
    )


def longcat_audio() -> Tiny:
    """LongCat-Audio: self- and cross-attention with key masks."""
    model = built(
        diffusers.LongCatAudioDiTTransformer,
        dit_dim=64,
        dit_depth=2,
        dit_heads=4,
        dit_text_dim=20,
        latent_dim=6,
        text_conv=False,
    )
    randn = Random()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[-1, -5:] = False
    return model, dict(
        hidden_states=randn(2, LENGTH, 6),
        encoder_hidden_states=randn(2, TEXT, 20),
        encoder_attention_mask=torch.ones(2, TEXT, dtype=torch.bool),
        attention_mask=mask,
        timestep=timestep(2, 0.5),
    )


def stable_audio() -> Tiny:
    """Stable Audio Open: a prepended token, grouped heads in cross-attention, partial RoPE."""
    model = built(
        diffusers.StableAudioDiTModel,
        sample_size=LENGTH,
        in_channels=6,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=6,
        cross_attention_dim=24,
        time_proj_dim=20,
        global_states_input_dim=14,
        cross_attention_input_dim=18,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 6, LENGTH),
        timestep=timestep(2),
        encoder_hidden_states=randn(2, TEXT, 18),
        global_hidden_states=randn(2, 1, 14),
        rotary_embedding=(randn(LENGTH + 1, 4), randn(LENGTH + 1, 4)),
    )


def stable_audio3() -> Tiny:
    """Stable Audio 3: memory tokens before the sound."""
    model = built(
        diffusers.StableAudio3DiTModel,
        io_channels=6,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=18,
        global_cond_dim=14,
        local_add_cond_dim=5,
        timestep_features_dim=20,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(2, 6, LENGTH),
        timestep=timestep(2, 0.5),
        encoder_hidden_states=randn(2, TEXT, 18),
        global_hidden_states=randn(2, 14),
    )


def minimax_music() -> Tiny:
    """MiniMax-Music 3: the condition joins the latents by channels."""
    model = built(
        diffusers.MiniMaxMusic3Transformer1DModel,
        in_channels=6,
        condition_dim=14,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=40,
        rotary_dim=8,
        fourier_embedding_dim=20,
    )
    randn = Random()
    return model, dict(
        hidden_states=randn(1, 6, LENGTH), encoder_hidden_states=randn(1, LENGTH, 14), timestep=timestep(1, 0.5)
    )


def minimax_depth() -> Tiny:
    """MiniMax-Music 3's depth decoder: a causal language model over eight codes, no denoiser."""
    model = built(
        diffusers.MiniMaxMusic3RVQDepthDecoder,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        audio_vocab_size=20,
        max_position_embeddings=64,
    )
    return model, dict(inputs_embeds=Random()(2, LENGTH, 32))


def t5_film() -> Tiny:
    """The T5 decoder of spectrogram diffusion: conditioned by FiLM, explicit positions."""
    model = built(
        diffusers.T5FilmDecoder,
        input_dims=6,
        targets_length=LENGTH,
        max_decoder_noise_time=2000.0,
        d_model=32,
        num_layers=2,
        num_heads=2,
        d_kv=16,
        d_ff=40,
    )
    randn = Random()
    return model, dict(
        encodings_and_masks=[(randn(2, TEXT, 32), torch.ones(2, TEXT))],
        decoder_input_tokens=randn(2, LENGTH, 6),
        decoder_noise_time=timestep(2, 0.5),
    )


def rfd4_proteina() -> Tiny:
    """La-Proteina for RFdiffusion 4: attention biased by pairs of residues, triangle updates of the pairs."""
    model = built(
        diffusers.RFD4ProteinaTransformer,
        nlayers=2,
        token_dim=32,
        nheads=2,
        dim_cond=20,
        pair_repr_dim=12,
        latent_dim=6,
        t_emb_dim=20,
        feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
        tri_mult_c=14,
        num_sequence_classes=9,
    )
    randn = Random()
    return model, dict(
        bb_ca=randn(1, LENGTH, 3),
        local_latents=randn(1, LENGTH, 6),
        bb_ca_time=timestep(1, 0.5),
        local_latents_time=timestep(1, 0.5),
        padding_mask=torch.ones(1, LENGTH, dtype=torch.bool),
        conditioning={
            "is_in_context_conditioning": torch.zeros(1, LENGTH, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, LENGTH, dtype=torch.bool),
        },
    )


ENTRIES = (
    Entry("AceStepTransformer1DModel", ace_step),
    Entry("LongCatAudioDiTTransformer", longcat_audio),
    Entry("StableAudioDiTModel", stable_audio),
    Entry("StableAudio3DiTModel", stable_audio3),
    Entry("MiniMaxMusic3Transformer1DModel", minimax_music),
    Entry("MiniMaxMusic3RVQDepthDecoder", minimax_depth, ("inputs_embeds",), ()),
    Entry("T5FilmDecoder", t5_film, ("decoder_input_tokens",), ("decoder_noise_time",)),
    Entry("RFD4ProteinaTransformer", rfd4_proteina, ("bb_ca", "local_latents"), ("bb_ca_time", "local_latents_time")),
)
