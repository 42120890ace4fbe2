"""The training pictures, drawn on the fly: no data set to fetch, none to store."""

from collections.abc import Iterator

import torch

from .backdrops import GROUND_PAINTERS, HAZE, LIGHT, paint_sky
from .objects import PAINTERS, Look, paint_shadow
from .scenes import MAX_OBJECTS, Scenes, sample_scenes, to_device
from .shapes import column, lookup

SIZE = 160  # pixels a side


@torch.no_grad()
def draw(scenes: Scenes, device: str | torch.device = "cpu", size: int = SIZE) -> torch.Tensor:
    """Draw scenes that lie on the CPU; pictures [n, 3, size, size] in -1..1 on `device`.

    A ground or an object is painted only into the pictures that have it. Which those are is known on the CPU,
    so nothing waits for the device.
    """
    middle = (torch.arange(size, device=device) + 0.5) / size
    x, y, pixel = middle.view(1, 1, 1, -1), middle.view(1, 1, -1, 1), 1 / size
    grounds = _rows_by(scenes.ground, device)
    objects = [_rows_by(scenes.kind[:, i], device) for i in range(MAX_OBJECTS)]
    scenes = scenes.to(device)

    picture = paint_sky(scenes, x, y, pixel)
    for ground, rows in grounds:
        scene = scenes[rows]
        haze, light = lookup(HAZE, scene.sky), lookup(LIGHT, scene.sky)
        picture[rows] = GROUND_PAINTERS[ground](picture[rows], scene, x, y, pixel, haze, light)
    for i, kinds in enumerate(objects):
        for kind, rows in kinds:
            if kind < 0:  # an empty place
                continue
            scene = scenes[rows]
            place = scene.place[:, i]
            size_ = column(place[:, 2])
            u, v = (x - column(place[:, 0])) / size_, (column(place[:, 1]) - y) / size_
            look = Look.of(scene, i)
            painted = paint_shadow(picture[rows], u, v, look, kind)
            picture[rows] = PAINTERS[kind](painted, u, v, pixel / size_, look)
    return picture.clamp(0, 1) * 2 - 1


def _rows_by(index: torch.Tensor, device) -> list[tuple[int, torch.Tensor]]:
    """For each value in `index` [n], on the CPU, the rows that have it; one transfer for all."""
    order = index.argsort(stable=True)
    values, counts = index[order].unique_consecutive(return_counts=True)
    return list(zip(values.tolist(), to_device(order, device).split(counts.tolist()), strict=True))


def stream(
    batch: int, seed: int, device: str | torch.device, size: int = SIZE
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fresh batches for ever: pictures [batch, 3, size, size], text tokens [batch, TEXT_TOKENS, VOCABULARY].

    On a GPU about 1024 are drawn at a time: for one batch a painter's kernels would be too small to fill it.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = max(1, 1024 // batch) if torch.device(device).type == "cuda" else 1
    while True:
        scenes = sample_scenes(batches * batch, generator)
        pictures = draw(scenes, device, size)
        yield from zip(pictures.split(batch), to_device(scenes.words, device).split(batch), strict=True)
