"""Random moving scenes as numbers: what is in a clip, how it moves, and the words that say so.

Places and sizes are fractions of the picture, x to the right and y downwards; velocities are per clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import words
from .words import BACKDROPS, CAMERAS, COLOURS, DIRECTIONS, OBJECTS, SHAPES, SIZES, SURFACES

# The camera's way over a clip, in pictures; a zoom's factor.
PAN, ZOOM = (0.25, 0.6), (1.25, 1.6)
RADII = ((0.10, 0.14), (0.17, 0.23))  # of small and large objects
TRAVEL, TURN = (0.35, 0.8), (-2.5, 2.5)  # an object's way over a clip in pictures; its rotation in radians


@dataclass(frozen=True)
class Scenes:
    """A batch of n scenes of k = OBJECTS objects each, drawn from back to front.

    Attributes:
        backdrop, backdrop_colour, camera: int64 [n].
        pan: [n, 2], the camera's way; zoom: [n], its last scale over its first.
        shape, surface, colour: int64 [n, k].
        place, velocity: [n, k, 2]; radius, angle, spin: [n, k].
        text: [n, PHRASES, VOCABULARY].
    """

    backdrop: Tensor
    backdrop_colour: Tensor
    camera: Tensor
    pan: Tensor
    zoom: Tensor
    shape: Tensor
    surface: Tensor
    colour: Tensor
    place: Tensor
    velocity: Tensor
    radius: Tensor
    angle: Tensor
    spin: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.backdrop)

    def __getitem__(self, rows) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


def sample_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` scenes on the generator's device. Nothing is read back, so a GPU never waits."""
    device, n, k = generator.device, count, OBJECTS

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    def choice(options: tuple, *shape: int) -> Tensor:
        return torch.randint(len(options), shape, generator=generator, device=device)

    backdrop, backdrop_colour, camera = choice(BACKDROPS, n), choice(COLOURS, n), choice(CAMERAS, n)
    # Rows of the cameras' unit ways: the picture's content moves the other way.
    sideways = (camera == CAMERAS.index("pan-right")).float() - (camera == CAMERAS.index("pan-left")).float()
    upright = (camera == CAMERAS.index("pan-down")).float() - (camera == CAMERAS.index("pan-up")).float()
    pan = torch.stack((sideways, upright), -1) * uniform(*PAN, n, 1)
    inwards = (camera == CAMERAS.index("zoom-in")).float() - (camera == CAMERAS.index("zoom-out")).float()
    zoom = uniform(*ZOOM, n) ** inwards

    shape, surface, colour = choice(SHAPES, n, k), choice(SURFACES, n, k), choice(COLOURS, n, k)
    direction, size = choice(DIRECTIONS, n, k), choice(SIZES, n, k)
    heading = direction * (2 * math.pi / len(DIRECTIONS)) + uniform(-0.2, 0.2, n, k)
    velocity = torch.stack((heading.cos(), heading.sin()), -1) * uniform(*TRAVEL, n, k, 1)
    # Half-way through the clip an object is near the middle: there they meet and cover one another.
    place = uniform(0.25, 0.75, n, k, 2) - velocity / 2
    radius = torch.where(size == 0, uniform(*RADII[0], n, k), uniform(*RADII[1], n, k))

    text = torch.zeros(n, words.PHRASES, words.VOCABULARY, device=device)
    words.say(text, 0, BACKDROPS, backdrop)
    words.say(text, 0, COLOURS, backdrop_colour)
    words.say(text, 1, CAMERAS, camera)
    for i in range(k):
        words.say(text, 2 + i, words.DEPTHS, torch.full((n,), i, device=device))
        for names, chosen in ((SHAPES, shape), (SURFACES, surface), (COLOURS, colour), (DIRECTIONS, direction),
                              (SIZES, size)):  # fmt: skip
            words.say(text, 2 + i, names, chosen[:, i])
    return Scenes(
        backdrop, backdrop_colour, camera, pan, zoom, shape, surface, colour, place, velocity, radius,
        uniform(0.0, 2 * math.pi, n, k), uniform(*TURN, n, k), text,
    )  # fmt: skip
