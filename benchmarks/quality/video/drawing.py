"""Clips of scenes: the backdrop under a moving camera, then objects from back to front."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.tiny_dit import shapes

from .scenes import Scenes, sample_scenes
from .textures import backdrops, surfaces
from .words import OBJECTS

MARGIN = 2.2  # side of a backdrop in pictures: what the widest pan or zoom can see
AT_ONCE = 64  # clips drawn in one go: 16 frames of 96 x 96 are then 9.4 M pixels a plane


@torch.no_grad()
def draw(scenes: Scenes, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Clips [n, 3, frames, size, size] in -1..1, on the device of scenes and generator."""
    n, device = len(scenes), scenes.backdrop.device
    moment = (torch.arange(frames, device=device) + 0.5) / frames - 0.5  # 0 at half time
    middle = (torch.arange(size, device=device) + 0.5) / size
    x, y = middle.view(1, 1, 1, 1, -1), middle.view(1, 1, 1, -1, 1)

    scale = (scenes.zoom[:, None].log() * moment).exp().view(n, frames, 1, 1, 1)
    way = scenes.pan[:, None] * moment[:, None]  # [n, frames, 2]
    eye_x, eye_y = (way[..., i].view(n, frames, 1, 1, 1) for i in range(2))
    ground = backdrops(scenes.backdrop, scenes.backdrop_colour, round(MARGIN * size), generator)
    seen_x, seen_y = ((x - 0.5) / scale + eye_x), ((y - 0.5) / scale + eye_y)
    clip = _look_up(ground, seen_x * (2 / MARGIN), seen_y * (2 / MARGIN))

    for i in range(OBJECTS):
        texture = surfaces(scenes.surface[:, i], scenes.colour[:, i], max(8, size // 2), generator)
        place = scenes.place[:, i, None] + scenes.velocity[:, i, None] * (moment[:, None] + 0.5)
        turn = (scenes.angle[:, i, None] + scenes.spin[:, i, None] * moment).view(n, frames, 1, 1, 1)
        radius = scenes.radius[:, i].view(n, 1, 1, 1, 1)
        dx = (x - place[..., 0].view(n, frames, 1, 1, 1)) / radius
        dy = (y - place[..., 1].view(n, frames, 1, 1, 1)) / radius
        u, v = turn.cos() * dx + turn.sin() * dy, turn.cos() * dy - turn.sin() * dx
        inside = shapes.cover(_distance(scenes.shape[:, i], u, v), 1 / (size * radius))
        light = (0.95 - 0.25 * (dx + dy)).clamp(0.5, 1.2)  # from above left, whatever way the object turns
        painted = _look_up(texture, u / 1.3, v / 1.3) * light
        rim = shapes.cover(_distance(scenes.shape[:, i], u, v) + 0.10, 1 / (size * radius))
        clip = shapes.paint(clip, inside, painted * (0.35 + 0.65 * rim))
    return clip.transpose(1, 2).clamp(0, 1) * 2 - 1


def _look_up(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """texture [n, 3, rows, columns] at x, y [n, frames, 1, height, width], -1..1 from edge to edge: [n, frames, 3, ...]

    All frames of a clip share its texture: they are one tall picture to look up.
    """
    x, y = torch.broadcast_tensors(x, y)
    n, frames, _, height, width = x.shape
    grid = torch.stack((x, y), -1).reshape(n, frames * height, width, 2)
    found = F.grid_sample(texture, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return found.view(n, 3, frames, height, width).transpose(1, 2)


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance from the outline of the shapes in words.SHAPES, in units of the radius."""
    disc = shapes.circle(u, v, 0.95)
    square = shapes.box(u, v, 0.8, 0.8)
    ring = torch.maximum(disc, 0.5 - shapes.circle(u, v, 0.0))
    cross = torch.minimum(shapes.box(u, v, 0.95, 0.34), shapes.box(u, v, 0.34, 0.95))
    triangle = shapes.polygon(u, v, (0.0, 1.0), (-0.9, -0.65), (0.9, -0.65))
    picked = disc
    for number, distance in enumerate((square, ring, cross, triangle), start=1):
        picked = torch.where(shape.view(-1, 1, 1, 1, 1) == number, distance, picked)
    return picked


def clips(batch: int, seed: int, device: torch.device, frames: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh batches for ever: clips [batch, 3, frames, size, size] in -1..1, text [batch, PHRASES, VOCABULARY]."""
    generator = torch.Generator(device).manual_seed(seed)
    count = batch * max(1, AT_ONCE // batch) if torch.device(device).type == "cuda" else batch
    while True:
        scenes = sample_scenes(count, generator)
        drawn = [draw(scenes[i : i + AT_ONCE], frames, size, generator) for i in range(0, count, AT_ONCE)]
        yield from zip(torch.cat(drawn).split(batch), scenes.text.split(batch), strict=True)
