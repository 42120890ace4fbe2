"""From weights and captions to pictures: what a diffusers pipeline would do around the transformer.

Pictures are patches of 4x4 pixels, packed into tokens as FLUX packs its latents; there is no VAE, so what the
model denoises is what you see.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tqdm.auto import tqdm

from .words import TEXT_TOKENS, encode_captions

WEIGHTS = Path(__file__).parent / "weights"
PATCH = 4  # pixels a side
SHIFT = 3.0  # of the timestep schedule, in training as in sampling

CAPTIONS = (
    "day sky, sun right, clouds, sea, red boat near center, striped red tower far left",
    "sunset sky, sun center, mountains, blue house near left, green pine near right",
    "night sky, moon left, purple checkerboard, checkered red ball near center, yellow box far right",
    "dawn sky, clouds, purple field, striped orange balloon near left, white house near right",
)


@dataclass(frozen=True)
class Conditioning:
    """What the transformer is told about a batch; the same objects at every step, as in diffusers' pipelines.

    Attributes:
        encoder_hidden_states: [batch, TEXT_TOKENS, VOCABULARY], one token a phrase.
        pooled_projections: [batch, VOCABULARY], how often each word occurs.
        txt_ids: [TEXT_TOKENS, 3], all zero: the order of phrases means nothing.
        img_ids: [image tokens, 3], (0, row, column) of each patch.
    """

    encoder_hidden_states: torch.Tensor
    pooled_projections: torch.Tensor
    txt_ids: torch.Tensor
    img_ids: torch.Tensor


def load_model(
    path: str | Path = WEIGHTS, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
    """The trained transformer, ready to denoise (eval mode, no gradients). The file holds fp16."""
    # Without the last argument diffusers warns that accelerate is missing, which a small model does not need.
    model = FluxTransformer2DModel.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False)
    return model.to(device).eval().requires_grad_(False)


def condition(text_tokens: torch.Tensor, height: int = 160, width: int = 160, spacing: float = 1.0) -> Conditioning:
    """Conditioning from text tokens [batch, TEXT_TOKENS, VOCABULARY], on their device and in their dtype.

    `spacing` is the distance in ids from one patch to the next. At 2 a picture of half the size spans the
    same ids as one of full size, so what is learned at half the size about places holds at full size.
    """
    rows, columns = _grid(height, width)
    ids = torch.zeros(rows, columns, 3, device=text_tokens.device, dtype=text_tokens.dtype)
    first = (spacing - 1) / 2  # the middle of a patch stays where it is
    ids[..., 1] += first + spacing * torch.arange(rows, device=ids.device)[:, None]
    ids[..., 2] += first + spacing * torch.arange(columns, device=ids.device)[None, :]
    return Conditioning(
        encoder_hidden_states=text_tokens,
        pooled_projections=text_tokens.sum(1),
        txt_ids=torch.zeros(TEXT_TOKENS, 3, device=ids.device, dtype=ids.dtype),
        img_ids=ids.view(-1, 3),
    )


def prepare(captions: list[str], model: FluxTransformer2DModel, height: int = 160, width: int = 160) -> Conditioning:
    """Conditioning from captions (see `words`), on the model's device and in its dtype."""
    return condition(encode_captions(captions).to(model.device, model.dtype), height, width)


def starting_noise(
    batch: int, seed: int, model: FluxTransformer2DModel, height: int = 160, width: int = 160
) -> torch.Tensor:
    """Gaussian noise [batch, image tokens, 48]; drawn on the CPU: a seed means the same on every device."""
    rows, columns = _grid(height, width)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, rows * columns, 3 * PATCH * PATCH, generator=generator)
    return noise.to(model.device, model.dtype)


@torch.no_grad()
def denoise(
    model: Callable,
    noise: torch.Tensor,
    conditioning: Conditioning,
    steps: int = 28,
    progress: bool | Callable[[int, int], None] = False,
) -> torch.Tensor:
    """Plain Euler steps from noise to picture tokens, one model call a step.

    Args:
        model: `FluxTransformer2DModel` or anything called like it, a compiled one included.
        noise: [batch, image tokens, 48]; left as it is.
        conditioning: from `prepare`; the same tensor objects go into every call.
        steps: model calls.
        progress: True for a bar, or a function called as progress(steps done, steps).

    Returns:
        Picture tokens like `noise`; `unpack` makes pictures of them.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=noise.device)
    tokens = noise
    for done, timestep in enumerate(tqdm(scheduler.timesteps, disable=progress is not True), start=1):
        velocity = model(
            hidden_states=tokens,
            timestep=(timestep / 1000).expand(len(tokens)).to(tokens.dtype),
            encoder_hidden_states=conditioning.encoder_hidden_states,
            pooled_projections=conditioning.pooled_projections,
            img_ids=conditioning.img_ids,
            txt_ids=conditioning.txt_ids,
            return_dict=False,
        )[0]
        tokens = scheduler.step(velocity, timestep, tokens, return_dict=False)[0]
        if callable(progress):
            progress(done, steps)
    return tokens


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [batch, 3, height, width] as tokens [batch, height/4 * width/4, 48]."""
    batch, channels, height, width = pictures.shape
    rows, columns = _grid(height, width)
    patches = pictures.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int = 160, width: int = 160) -> torch.Tensor:
    """Tokens [batch, height/4 * width/4, 48] as pictures [batch, 3, height, width], values about -1..1."""
    rows, columns = _grid(height, width)
    patches = tokens.reshape(len(tokens), rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, height, width)


def _grid(height: int, width: int) -> tuple[int, int]:
    if height % PATCH or width % PATCH:
        raise ValueError(f"a picture of {height}x{width} pixels does not divide into patches of {PATCH}x{PATCH}")
    return height // PATCH, width // PATCH
