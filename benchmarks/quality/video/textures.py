"""Surfaces with detail that no word describes: to draw it again behind an occluder, a model must look where it was.

A texture is a picture [n, 3, size, size] in 0..1, made once a clip and looked up by every frame.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.tiny_dit.backdrops import COLOUR_TABLE
from examples.tiny_dit.shapes import column, cover, lookup, mix, smooth, stripes

CELLS = 12  # a side of a texture


def backdrops(kind: Tensor, colour: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Textures of the kinds in words.BACKDROPS, kind and colour int64 [n]: tiles, bricks, planks, marble, confetti."""
    n, device = len(kind), kind.device
    x, y, pixel = _coordinates(size, device)
    base, second = lookup(COLOUR_TABLE, colour), _random(generator, n, 3, 1, 1)
    shade, hue = _cells(generator, n, 1, size), _cells(generator, n, 3, size)
    grain = _clouds(generator, n, size)

    tile = mix(base, hue, 0.25) * (0.45 + 0.55 * shade)
    tiles = tile * _grout(x, y, pixel)
    shifted = x + 0.5 * ((y / 2).floor() % 2) * 2
    brick_shade = _lookup_cells(_random(generator, n, 1, 2 * CELLS, 2 * CELLS), shifted / 2, y / 1)
    bricks = mix(base, second, 0.2) * (0.4 + 0.6 * brick_shade) * _grout(shifted / 2, y, pixel)
    plank_shade = _lookup_cells(_random(generator, n, 1, 2 * CELLS, 2 * CELLS), x / 4 + 3.7 * y.floor(), y)
    planks = mix(base, second, 0.15) * (0.4 + 0.45 * plank_shade) * (0.75 + 0.5 * grain)
    planks = planks * smooth(0.0, 3 * pixel, (y - y.round()).abs())
    marble = mix(base, second, 0.5 + 0.5 * torch.sin(2.5 * x + 14 * grain))
    dots = _dots(generator, n, x, y, pixel, size)
    confetti = mix(base * 0.55 * (0.7 + 0.6 * grain), hue, dots)
    return _pick(kind, (tiles, bricks, planks, marble, confetti)).clamp(0, 1)


def surfaces(kind: Tensor, colour: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Textures of the kinds in words.SURFACES, int64 [n]: plain, striped, checkered, spotted, cloudy."""
    n, device = len(kind), kind.device
    x, y, pixel = _coordinates(size, device)
    base = lookup(COLOUR_TABLE, colour)
    other = 0.25 + 0.75 * _random(generator, n, 3, 1, 1)
    period = 0.28 + 0.2 * _random(generator, n, 1, 1, 1)
    lines = stripes(y * period, pixel * period) + 0 * x
    columns = stripes(x * period, pixel * period) + 0 * y
    board = 0.5 + 0.5 * (2 * lines - 1) * (2 * columns - 1)
    dots = _dots(generator, n, x / 2, y / 2, pixel / 2, size)
    clouds = smooth(0.35, 0.65, _clouds(generator, n, size))
    lit = _pick(kind, tuple(mix(base, other, share) for share in (0 * board, lines, board, dots, clouds)))
    return lit.clamp(0, 1)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _coordinates(size: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """x [1, 1, 1, size], y [1, 1, size, 1], 0..CELLS, and a pixel's width."""
    pixel = CELLS / size
    middle = (torch.arange(size, device=device) + 0.5) * pixel
    return middle.view(1, 1, 1, -1), middle.view(1, 1, -1, 1), pixel


def _cells(generator: torch.Generator, n: int, channels: int, size: int) -> Tensor:
    """One random number a cell and channel, [n, channels, size, size]."""
    return F.interpolate(_random(generator, n, channels, CELLS, CELLS), size=(size, size))


def _lookup_cells(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """values [n, 1, rows, columns] of the cell in which (x, y) lies, repeating."""
    rows, columns = values.shape[2:]
    row, col = (y + 0 * x).floor().long() % rows, (x + 0 * y).floor().long() % columns
    return values[:, :, row[0, 0], col[0, 0]]


def _grout(x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Dark lines between cells."""
    edge = torch.minimum((x - x.round()).abs() + 0 * y, (y - y.round()).abs() + 0 * x)
    return 0.35 + 0.65 * smooth(0.02, 0.05 + 2 * pixel, edge)


def _dots(generator: torch.Generator, n: int, x: Tensor, y: Tensor, pixel: float, size: int) -> Tensor:
    """One disc a cell, off its border, of its own place and radius: coverage [n, 1, size, size]."""
    values = _random(generator, n, 3, CELLS, CELLS)
    cells = torch.cat([_lookup_cells(values[:, i : i + 1], x, y) for i in range(3)], 1)
    radius = 0.18 + 0.14 * cells[:, 2:]
    middle = radius + (1 - 2 * radius) * cells[:, :2]
    dx, dy = x - x.floor() - middle[:, :1], y - y.floor() - middle[:, 1:]
    return cover((dx * dx + dy * dy).sqrt() - radius, pixel)


def _clouds(generator: torch.Generator, n: int, size: int) -> Tensor:
    """Smooth noise of three octaves in 0..1, [n, 1, size, size]."""
    total = 0.0
    for cells, weight in ((CELLS // 3, 0.5), (2 * CELLS // 3, 0.3), (4 * CELLS // 3, 0.2)):
        coarse = _random(generator, n, 1, cells, cells)
        total = total + weight * F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return (0.5 + (total - 0.5) * math.sqrt(3)).clamp(0, 1)


def _pick(kind: Tensor, pictures: tuple[Tensor, ...]) -> Tensor:
    """pictures[kind] for each row; all are drawn: nothing then waits to learn which are needed."""
    picked = pictures[0]
    for number, picture in enumerate(pictures[1:], start=1):
        picked = torch.where(column(kind) == number, picture, picked)
    return picked
