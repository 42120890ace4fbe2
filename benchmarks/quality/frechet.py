"""Fréchet distance between generated frames and drawn ones, with features of a small classifier trained here.

The classifier reads a caption's words off single frames (or pictures); its last hidden layer, 48 numbers, is what is
compared. Trajectories may part and still end in good pictures: PSNR does not see that, this does.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .subjects import Subject, unfold

FEATURES = 48
SIDE = 64  # pixels that the classifier sees
REAL = 2048  # drawn frames that generated ones are held against
FILE = "encoder.safetensors"


class Encoder(nn.Module):
    """Words of the caption from frames [n, 3, SIDE, SIDE]; `features` is the layer before them."""

    def __init__(self, words: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU(), nn.AvgPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (SIDE // 16) ** 2, FEATURES), nn.GELU())
        self.words = nn.Linear(FEATURES, words)

    def features(self, frames: Tensor) -> Tensor:
        return self.body(frames)


def frames_of(latents: Tensor, every: int = 1) -> Tensor:
    """Frames [n, 3, SIDE, SIDE] in about -1..1, clip after clip; one frame in `every`."""
    frames = unfold(latents)[:, :, ::every].transpose(1, 2).flatten(0, 1)
    return F.interpolate(frames.clamp(-1, 1), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def train_encoder(subject: Subject, folder: Path, device, seconds: float = 40.0, batch: int = 64) -> Encoder:
    """The one that lies in the folder, or a new one, after so many seconds of training."""
    torch.manual_seed(0)
    encoder = Encoder(subject.config["text_dim"]).to(device)
    path = folder / FILE
    if path.is_file():
        encoder.load_state_dict(load_file(path, device=str(device)))
        return encoder.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    started, source = time.monotonic(), subject.stream(batch, 77, device)
    while time.monotonic() - started < seconds:
        latents, text = next(source)
        every = max(1, subject.frames // 2)
        frames = frames_of(latents, every)
        said = text.amax(1).repeat_interleave(len(frames) // len(latents), 0)
        loss = F.binary_cross_entropy_with_logits(encoder.words(encoder.features(frames)), said)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    save_file(encoder.state_dict(), path)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def statistics(encoder: Encoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [FEATURES] and covariance of the features of all frames, float64 on the CPU."""
    found = torch.cat([encoder.features(frames_of(part)) for part in latents.split(16)]).double().cpu()
    return found.mean(0), found.T.cov()


@torch.no_grad()
def real_statistics(encoder: Encoder, subject: Subject, device, frames: int = REAL) -> tuple[Tensor, Tensor]:
    """Of so many drawn frames."""
    clips = max(2, frames // subject.frames)
    source = subject.stream(min(clips, 32), 99, device)
    drawn = []
    while sum(map(len, drawn)) < clips:
        drawn.append(next(source)[0])
    return statistics(encoder, torch.cat(drawn))


def frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017), the root by eigenvalues of the product."""
    (mean_a, cov_a), (mean_b, cov_b) = first, second
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)
