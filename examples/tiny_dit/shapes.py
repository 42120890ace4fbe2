"""Anti-aliased shapes by signed distance: the few primitives that all drawing is made of.

Coordinates and distances broadcast as [n, 1, H, W]; colours as [n, 3, 1, 1] (a constant one through `rgb`).
A signed distance is negative inside.
"""

import math

import torch


def rgb(red: float, green: float, blue: float, like: torch.Tensor) -> torch.Tensor:
    """A constant colour, [1, 3, 1, 1], on the device of `like`.

    Made by comparing channel numbers, not by `torch.tensor`: its copy to a GPU waits for all work before it.
    """
    channel = torch.arange(3, device=like.device).view(1, 3, 1, 1)
    return torch.where(channel == 0, red, torch.where(channel == 1, green, blue))


def lookup(table: tuple[tuple[float, float, float], ...], index: torch.Tensor) -> torch.Tensor:
    """Rows of a table of colours by index [n]: [n, 3, 1, 1]."""
    index = column(index)
    colour = rgb(*table[0], index)
    for number, row in enumerate(table[1:], start=1):
        colour = torch.where(index == number, rgb(*row, index), colour)
    return colour


def column(values: torch.Tensor) -> torch.Tensor:
    """One number a picture, [n] -> [n, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def mix(first, second, amount):
    """`first` where amount is 0, `second` where it is 1."""
    return first + (second - first) * amount


def smooth(low: float, high: float, value):
    """0 below `low`, 1 above `high`, a cubic between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def cover(distance, pixel):
    """How much of a pixel lies inside a shape: 0 to 1. `pixel` is a pixel's width in the distance's unit."""
    return (0.5 - distance / pixel).clamp(0, 1)


def paint(picture, coverage, colour):
    """Lay a colour over the picture."""
    return picture + (colour - picture) * coverage


def circle(x, y, radius):
    return (x * x + y * y).sqrt() - radius


def ellipse(x, y, radius_x, radius_y):
    """Near enough to a distance close to the outline, which is all that anti-aliasing asks for."""
    scaled = ((x / radius_x) ** 2 + (y / radius_y) ** 2).sqrt()
    gradient = ((x / radius_x**2) ** 2 + (y / radius_y**2) ** 2).sqrt()
    return scaled * (scaled - 1) / gradient.clamp(min=1e-4)


def box(x, y, half_width, half_height):
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def capsule(x, y, start: tuple[float, float], end: tuple[float, float], radius: float):
    """A thick line with round ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return circle(x - start[0] - along * dx, y - start[1] - along * dy, radius)


def polygon(x, y, *corners: tuple[float, float]):
    """A convex polygon, its corners in counter-clockwise order with y upwards."""
    distance = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(bx - ax, by - ay)
        edge = ((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length
        distance = edge if distance is None else torch.maximum(distance, edge)
    return distance


def stripes(phase, width):
    """0 and 1 by turns, a pair per unit of phase; `width` is the phase that a pixel spans (wide: 0.5)."""
    triangle = (phase - phase.floor() - 0.5).abs() * 2 - 0.5  # from -0.5 to 0.5 and back
    return (0.5 + triangle / (2 * width).clamp(min=1e-4)).clamp(0, 1) * smooth(0.9, 0.3, width) + 0.5 * smooth(
        0.3, 0.9, width
    )


def checker(u, v, width_u, width_v):
    """A checkerboard of unit period in u and v, anti-aliased as `stripes`."""
    a, b = 2 * stripes(u, width_u) - 1, 2 * stripes(v, width_v) - 1
    return 0.5 + 0.5 * a * b
