"""Whole diffusers pipelines with tiny random components: prompts go in as text, pictures come out."""

from __future__ import annotations

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[EOS]", "[UNK]", "a", "cat", "fox", "on", "the", "moon", "and", "sea", "blurry", "bad"]


def _tokenizer(length: int) -> transformers.PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=length,
    )


def _t5(kind: str, dim: int) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(WORDS), d_model=dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def flux_pipeline() -> diffusers.FluxPipeline:
    """FLUX at 32x48 pixels: 96 image tokens."""
    torch.manual_seed(0)
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=4,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=_tokenizer(77),
        text_encoder_2=_t5("T5", 24),
        tokenizer_2=_tokenizer(16),
        transformer=transformer.eval(),
    )


def wan_pipeline() -> diffusers.WanPipeline:
    """Wan at 9 frames of 64x64 pixels: 3 x 4 x 4 tokens."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=24, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(16),
        text_encoder=_t5("UMT5", 24),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
