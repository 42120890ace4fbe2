"""What is trained and measured: two diffusers transformers of one class, for clips and for pictures, without a VAE.

Latents are pixels: 2 x 2 of them become 12 channels (space to depth, invertible), and the model's own patches are
1 x 2 x 2, so a token is 4 x 4 pixels of one frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from examples.tiny_dit import pictures, words

from .video import drawing
from .video import words as video_words

FOLD = 2  # pixels a side that become channels
PATCH = (1, 2, 2)
# 17 M parameters: 34 MB in fp16. Heads of 128, as in the models that this stands for.
CONFIG = {
    "patch_size": PATCH, "num_attention_heads": 3, "attention_head_dim": 128, "in_channels": 3 * FOLD * FOLD,
    "out_channels": 3 * FOLD * FOLD, "text_dim": 64, "freq_dim": 256, "ffn_dim": 1024, "num_layers": 8,
    "rope_max_seq_len": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model to train and measure.

    frames, size: of a clip, pixels a side. shift: of the noise schedule, in training as in sampling. guidance: the
    scale of classifier-free guidance. batch, coarse_batch: clips a training step, at full and at half size. measured:
    clips a call when measured, so many that a forward takes 100 ms (video) or 30 (image), as those of models of usual
    size do, for which these stand: of FLUX.1-dev at 1280x768 it takes 125.
    """

    name: str
    frames: int
    size: int
    phrases: int
    shift: float
    guidance: float
    batch: int
    coarse_batch: int
    measured: int
    config: dict = field(default_factory=lambda: dict(CONFIG))

    @property
    def grid(self) -> tuple[int, int, int]:
        side = self.size // (FOLD * PATCH[1])
        return self.frames, side, side

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows, columns."""
        return 3 * FOLD * FOLD, self.frames, self.size // FOLD, self.size // FOLD

    @property
    def heads(self) -> tuple[int, int]:
        return self.config["num_attention_heads"], self.config["attention_head_dim"]

    def build(self) -> WanTransformer3DModel:
        return WanTransformer3DModel(**self.config)

    def stream(self, batch: int, seed: int, device, coarse: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents [batch, *self.latents] (half as many rows and columns if coarse), text [batch, phrases, 64]."""
        if self.frames > 1:
            for drawn, text in drawing.clips(batch, seed, device, self.frames, self.size):
                yield fold(F.avg_pool3d(drawn, (1, 2, 2)) if coarse else drawn), text
        else:
            for drawn, text in pictures.stream(batch, seed, device, self.size // 2 if coarse else self.size):
                yield fold(drawn[:, :, None]), text

    def flops(self, coarse: bool = False) -> float:
        """Of one forward of one clip: matrix products and self-attention."""
        tokens = self.tokens // 4 if coarse else self.tokens
        width = self.heads[0] * self.heads[1]
        linear = 2 * tokens * (6 * width * width + 2 * width * self.config["ffn_dim"])
        return self.config["num_layers"] * (linear + 4 * tokens * tokens * width)


def fold(clips: Tensor) -> Tensor:
    """Clips [n, 3, frames, height, width] as latents [n, 12, frames, height / 2, width / 2]."""
    return F.pixel_unshuffle(clips.transpose(1, 2), FOLD).transpose(1, 2).contiguous()


def unfold(latents: Tensor) -> Tensor:
    """The clips of latents, values about -1..1."""
    return F.pixel_shuffle(latents.transpose(1, 2), FOLD).transpose(1, 2)


# Videos repeat themselves, so noise hides less of them: a larger shift.
VIDEO = Subject("video", 16, 96, video_words.PHRASES, 5.0, 2.5, batch=16, coarse_batch=64, measured=32)
IMAGE = Subject("image", 1, 256, words.TEXT_TOKENS, 3.0, 2.5, batch=32, coarse_batch=128, measured=32)
SUBJECTS = {subject.name: subject for subject in (VIDEO, IMAGE)}


def tiny(subject: Subject) -> Subject:
    """Everything that the subject has, but little of it: minutes of a GPU become seconds of a CPU."""
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}
    frames, size = (4, 32) if subject.frames > 1 else (1, 64)
    return replace(
        subject, name=f"tiny-{subject.name}", frames=frames, size=size, batch=4, coarse_batch=8, measured=2,
        config={**subject.config, **narrow},
    )  # fmt: skip
