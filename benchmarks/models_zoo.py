"""Full-size diffusion transformers with random weights, and the inputs of a denoising loop.

Weights are made where they are used, in seconds: matrices N(0, 1/fan-in), norms 1, biases 0, so activations and the
gates of modulation stay near unit size at any depth. Random weights have real speed; they say nothing about pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

STEPS = 50

# Attention and MLP sparsity, dense layers and refreshes at which speeds are compared.
IMAGE = {
    "attention.sparsity": 0.835, "mlp.sparsity": 0.7, "dense_layers": 2,
    "schedule.refresh_at": [0, 1, 10, 20, 30, 40],
}  # fmt: skip
VIDEO = {
    "attention.sparsity": 0.93, "attention.chunk": 128, "mlp.sparsity": None, "dense_layers": 2,
    "schedule.refresh_at": [0, 1, 10, 40],
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One model at one size. `latents`: frames, height and width of what the loop denoises, in tokens for FLUX."""

    name: str
    model: str
    shape: str
    family: str  # "flux" | "wan" | "hunyuan"
    latents: tuple[int, int, int]
    config: dict[str, Any]
    layers: tuple[int, ...]  # of the whole model: double and single blocks, or blocks
    built: tuple[int, ...]  # of what is timed; fewer where the whole takes minutes
    options: dict[str, Any]
    text: int = 512  # tokens
    calls: int = 1  # a step: 2 for guidance by two calls
    masked: bool = True  # HunyuanVideo: with its text mask, as diffusers runs it

    @property
    def heads(self) -> tuple[int, int]:
        return self.config["num_attention_heads"], self.config["attention_head_dim"]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Sides by which the MLPs' matrix products are told: neurons, and those beside the attention's output."""
        width = self.heads[0] * self.heads[1]
        return (self.config["ffn_dim"],) if self.family == "wan" else (4 * width, 5 * width)

    @property
    def tokens(self) -> int:
        """That self-attention sees."""
        frames, height, width = self.latents
        return {
            "flux": height * width + self.text,
            "wan": frames * height * width // 4,
            "hunyuan": frames * height * width // 4 + self.text,
        }[self.family]

    def with_layers(self, total: int) -> Subject:
        """About `total` layers, double and single ones in proportion, one of each at least."""
        whole = sum(self.layers)
        return replace(self, built=tuple(max(1, round(n * min(total, whole) / whole)) for n in self.layers))

    @property
    def half(self) -> Subject:
        """The same with half the layers: two depths tell what a layer costs."""
        return replace(self, built=tuple(max(1, n // 2) for n in self.built))

    @property
    def whole(self) -> bool:
        return self.built == self.layers


def _heads(heads: int, head_dim: int, **more) -> dict[str, Any]:
    return {"num_attention_heads": heads, "attention_head_dim": head_dim, **more}


def _flux(name: str, height: int, width: int, **more) -> Subject:
    grid = (1, height // 16, width // 16)
    config = _heads(24, 128, guidance_embeds=True)
    layers = dict(layers=(19, 38), built=(19, 38))
    return Subject(name, "FLUX.1-dev", f"{width}x{height}", "flux", grid, config, **layers, options=IMAGE, **more)


def _wan(name: str, model: str, height: int, width: int, config: dict, layers: int, built: int) -> Subject:
    latents = (21, height // 8, width // 8)
    shape = f"{width}x{height}, 81 frames"
    return Subject(name, model, shape, "wan", latents, config, (layers,), (built,), options=VIDEO, calls=2)


def _hunyuan(name: str, model: str, masked: bool) -> Subject:
    layers = dict(layers=(20, 40), built=(2, 4))
    shape, latents, config = "1280x720, 129 frames", (33, 90, 160), _heads(24, 128, guidance_embeds=True)
    return Subject(name, model, shape, "hunyuan", latents, config, **layers, options=VIDEO, text=256, masked=masked)


_WAN_14B = _heads(40, 128, ffn_dim=13824)
_WAN_1B = _heads(12, 128, ffn_dim=8960)
# FLUX's depth, so narrow that the GPU is always done first: what is timed is the host.
_NARROW = Subject(
    "flux-narrow", "FLUX.1's depth, width 512", "512x512", "flux", (1, 32, 32),
    _heads(4, 128, guidance_embeds=True), (19, 38), (19, 38), options=IMAGE,
)  # fmt: skip
SUBJECTS = {
    subject.name: subject
    for subject in (
        _flux("flux-1280x768", 768, 1280),
        _flux("flux-1024x1024", 1024, 1024),
        _flux("flux-2304x1280", 1280, 2304),
        _wan("wan-14b-720p", "Wan2.1-14B", 720, 1280, _WAN_14B, 40, 4),
        _wan("wan-14b-480p", "Wan2.1-14B", 480, 832, _WAN_14B, 40, 4),
        _wan("wan-1.3b-480p", "Wan2.1-1.3B", 480, 832, _WAN_1B, 30, 30),
        _hunyuan("hunyuan-720p", "HunyuanVideo, text mask dropped", masked=False),
        _hunyuan("hunyuan-720p-masked", "HunyuanVideo", masked=True),
        _NARROW,
    )
}


def tiny(subject: Subject) -> Subject:
    """The same script in seconds on a CPU: narrow, few tokens, two layers of each kind."""
    latents = (1, 16, 24) if subject.family == "flux" else (4, 16, 24)
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16}
    narrow |= {"ffn_dim": 64} if subject.family == "wan" else {"pooled_projection_dim": 12}
    if subject.family == "flux":
        narrow |= {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": 24, "in_channels": 16}
    elif subject.family == "wan":
        narrow |= {"text_dim": 24}
    else:
        narrow |= {"text_embed_dim": 24, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1}
    layers = (3, 3) if len(subject.layers) == 2 else (4,)
    built = layers if subject.whole else (2, 2)[: len(layers)]
    options = {**subject.options, "min_tokens": 64, "attention.chunk": 32, "dense_layers": 1}
    config = {**subject.config, **narrow}
    return replace(subject, latents=latents, config=config, layers=layers, built=built, text=8, options=options)


def small(subject: Subject) -> Subject:
    """Full width, two layers of each kind, at most some thousand tokens: at sparsity 0 every column is a list entry."""
    frames, height, width = subject.latents
    latents = subject.latents if subject.family == "flux" else (min(frames, 5), min(height, 60), min(width, 80))
    return replace(subject, latents=latents, built=tuple(min(n, 2) for n in subject.built))


def build(subject: Subject, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, made on the device."""
    model = _construct(subject, device, dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = parameter.shape[-1] if name.endswith("scale_shift_table") else parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            if name.endswith(("timestep_embedder.linear_1.weight", "time_embedder.linear_1.weight")):
                parameter.mul_(_slow_frequencies(parameter.shape[1], device).to(dtype))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def _slow_frequencies(columns: int, device: torch.device) -> torch.Tensor:
    """Weights of a sinusoidal embedding's columns, of unit mean square: those that turn far in one step count little.

    Trained models change little from step to step. Without this, random ones are new at every timestep.
    """
    half = columns // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=device) / half)
    weight = 1.0 / (1.0 + (frequency * 1000.0 / STEPS * 2.0) ** 2)
    weight = torch.cat([weight, weight])
    return weight / weight.square().mean().sqrt()


def _construct(subject: Subject, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no copy of 12 billion weights in float32
    try:
        with device:
            if subject.family == "flux":
                double, single = subject.built
                kind = diffusers.FluxTransformer2DModel
                return kind(num_layers=double, num_single_layers=single, **subject.config)
            if subject.family == "wan":
                return diffusers.WanTransformer3DModel(num_layers=subject.built[0], **subject.config)
            double, single = subject.built
            kind = diffusers.HunyuanVideoTransformer3DModel
            model = kind(num_layers=double, num_single_layers=single, **subject.config)
    finally:
        torch.set_default_dtype(before)
    if not subject.masked:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.set_processor(_Unmasked())
    return model


class _Unmasked(HunyuanVideoAttnProcessor2_0):
    """HunyuanVideo's attention over all text tokens, padding included: SDPA may then take its fast kernels."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):  # fmt: skip
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class Loop:
    """The inputs of one generation: conditioning that stays, latents that drift, a timestep that falls.

    step(k) -> the keyword arguments of each call of step k of STEPS.
    """

    def __init__(self, subject: Subject, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.subject, self._dtype = subject, dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._fixed = [self._conditioning() for _ in range(subject.calls)]
        self.noise, self._target = self._randn(*self._latent_shape()), self._randn(*self._latent_shape())

    def step(self, k: int) -> list[dict[str, Any]]:
        return self.at(torch.lerp(self.noise, self._target, k / STEPS), 1.0 - k / STEPS)

    def at(self, latents: torch.Tensor, time: float) -> list[dict[str, Any]]:
        """The calls of a step: latents, and a time that falls from 1 to 0."""
        scale = 1.0 if self.subject.family == "flux" else 1000.0
        dtype = torch.float32 if self.subject.family == "wan" else self._dtype
        moment = torch.full((1,), scale * time, device=self._device, dtype=dtype)
        return [{"hidden_states": latents, "timestep": moment, **fixed} for fixed in self._fixed]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(self.step, range(STEPS))

    def _latent_shape(self) -> tuple[int, ...]:
        frames, height, width = self.subject.latents
        if self.subject.family == "flux":
            return (1, height * width, self.subject.config.get("in_channels", 64))
        return (1, 16, frames, height, width)

    def _conditioning(self) -> dict[str, Any]:
        subject, config = self.subject, self.subject.config
        fixed: dict[str, Any] = {"return_dict": False}
        if subject.family == "wan":
            return fixed | {"encoder_hidden_states": self._randn(1, subject.text, config.get("text_dim", 4096))}
        pooled = self._randn(1, config.get("pooled_projection_dim", 768))
        guidance = torch.full((1,), 3.5, device=self._device, dtype=torch.float32)
        if subject.family == "flux":
            _, height, width = subject.latents
            ids = torch.zeros(height, width, 3, device=self._device, dtype=self._dtype)
            ids[..., 1] = torch.arange(height, device=self._device)[:, None]
            ids[..., 2] = torch.arange(width, device=self._device)
            return fixed | {
                "encoder_hidden_states": self._randn(1, subject.text, config.get("joint_attention_dim", 4096)),
                "pooled_projections": pooled,
                "guidance": guidance,
                "img_ids": ids.view(-1, 3),
                "txt_ids": torch.zeros(subject.text, 3, device=self._device, dtype=self._dtype),
            }
        mask = torch.zeros(1, subject.text, device=self._device, dtype=torch.bool)
        mask[:, : max(1, subject.text // 4)] = True  # a prompt of 64 tokens, padded as the pipeline does
        return fixed | {
            "encoder_hidden_states": self._randn(1, subject.text, config.get("text_embed_dim", 4096)),
            "encoder_attention_mask": mask,
            "pooled_projections": pooled,
            "guidance": (1000 * guidance).to(self._dtype),
        }

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype, generator=self._generator)
