"""How near a picture is to another. Pictures are [batch, 3, height, width] in 0..1; frames of a clip are channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB; 120 for equal ones. [batch]"""
    error = (pictures - reference).double().square().mean((1, 2, 3)).clamp_min(1e-12)
    return -10 * error.log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004: Gaussian window of 11, sigma 1.5). [batch]"""
    offsets = torch.arange(11, dtype=torch.float64, device=pictures.device) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line /= line.sum()
    channels = pictures.shape[1]
    window = torch.outer(line, line).expand(channels, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    a, b = pictures.double(), reference.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def relative_l1(latents: Tensor, reference: Tensor) -> Tensor:
    """Sum of absolute differences over the reference's, of each picture's latents. [batch]"""
    difference = (latents - reference).abs().flatten(1).sum(1)
    return difference / reference.abs().flatten(1).sum(1)
