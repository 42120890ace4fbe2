"""Pictures or latents out of whatever a generation returns, and how near they are to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration import CalibrationError

EQUAL = 120.0  # dB of equal pictures: the error counts as no less than a millionth of the peak


def pictures_of(returned: Any) -> list[Tensor]:
    """Each picture (or clip, or latent) as a tensor on the CPU, a copy.

    returned: a tensor or array whose first dimension counts pictures (one of fewer than three dimensions, and an array
    [height, width, 1, 3 or 4], is one picture), a PIL image, a list or tuple of any of these, or an object that has
    them as `images` or `frames`, as diffusers' pipelines return. A list of PIL images in a list is a clip.

    Raises CalibrationError for anything else.
    """
    for name in ("images", "frames"):
        if not isinstance(returned, Tensor) and hasattr(returned, name):
            return pictures_of(getattr(returned, name))
    if isinstance(returned, (list, tuple)) and returned:
        each = [pictures_of(part) for part in returned]
        nested = isinstance(returned[0], (list, tuple))
        return [torch.stack(clip) for clip in each] if nested else [picture for part in each for picture in part]
    tensor = _tensor(returned)
    channels_last = not isinstance(returned, Tensor) and tensor.dim() == 3 and tensor.shape[-1] in (1, 3, 4)
    whole = tensor.dim() < 3 or channels_last
    return [tensor] if whole else list(tensor)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if hasattr(value, "__array_interface__"):  # numpy, PIL
        import numpy

        array = numpy.array(value)
        if array.dtype != object:
            return torch.from_numpy(array)
    raise CalibrationError(
        f"run() returned {type(value).__name__}: return pictures or latents, as a tensor, an array, PIL images, a "
        "list of these, or what a pipeline returns"
    )


def psnr(pictures: Sequence[Tensor], reference: Sequence[Tensor], peak: float) -> list[float]:
    """Peak signal-to-noise ratio of each picture, dB: 10 log10(peak^2 / mean squared error), at most EQUAL.

    -EQUAL where a picture is not finite.
    """
    if [p.shape for p in pictures] != [r.shape for r in reference]:
        shapes = " and ".join(str([tuple(p.shape) for p in part]) for part in (pictures, reference))
        raise CalibrationError(f"run() returned pictures of other shapes than before: {shapes}")
    errors = [((p.double() - r.double()) / peak).square().mean() for p, r in zip(pictures, reference)]
    return [-10 * e.clamp_min(1e-12).log10().item() if e.isfinite() else -EQUAL for e in errors]
