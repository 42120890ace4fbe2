"""Skies and grounds.

Each ground painter takes the picture so far [n, 3, H, W] in 0..1, the scenes, the coordinates
(x [1, 1, 1, W], y [1, 1, H, 1], 0..1, y downwards), a pixel's width, and two colours of the sky
[n, 3, 1, 1]: the haze at the horizon and the light on things.
"""

import math

import torch
import torch.nn.functional as F

from .shapes import checker, circle, column, cover, ellipse, lookup, mix, paint, rgb, smooth, stripes

HORIZON = 0.56

# Per sky: colour at the top, half-way and at the horizon, and the light that falls on things.
SKY_TABLE = (
    ((0.16, 0.44, 0.88), (0.42, 0.70, 0.97), (0.83, 0.94, 1.00), (1.00, 1.00, 1.00)),  # day
    ((0.25, 0.16, 0.42), (0.85, 0.36, 0.38), (1.00, 0.78, 0.42), (1.00, 0.76, 0.66)),  # sunset
    ((0.02, 0.03, 0.12), (0.06, 0.09, 0.25), (0.16, 0.21, 0.42), (0.36, 0.42, 0.66)),  # night
    ((0.50, 0.60, 0.88), (0.92, 0.74, 0.82), (1.00, 0.92, 0.78), (1.00, 0.92, 0.90)),  # dawn
    ((0.44, 0.49, 0.56), (0.60, 0.65, 0.70), (0.78, 0.81, 0.83), (0.80, 0.82, 0.85)),  # overcast
)
COLOUR_TABLE = (
    (0.86, 0.16, 0.15),  # red
    (0.96, 0.52, 0.10),  # orange
    (0.97, 0.83, 0.20),  # yellow
    (0.20, 0.60, 0.24),  # green
    (0.16, 0.38, 0.85),  # blue
    (0.52, 0.24, 0.68),  # purple
    (0.96, 0.52, 0.70),  # pink
    (0.95, 0.95, 0.93),  # white
)
HAZE, LIGHT = (tuple(row[i] for row in SKY_TABLE) for i in (2, 3))
TAU = 2 * math.pi


def paint_sky(scene, x, y, pixel):
    """The whole picture as sky: gradient, stars, sun or moon, clouds."""
    top, middle, bottom, light = (lookup(colours, scene.sky) for colours in zip(*SKY_TABLE, strict=True))
    height = (y / HORIZON).clamp(0, 1)
    picture = mix(mix(top, middle, smooth(0.0, 0.6, height)), bottom, smooth(0.45, 1.0, height)) + 0 * x
    night = column(scene.sky == 2).float()

    # One star per cell, so that a pixel looks at one star only. It keeps off its cell's border.
    rows, columns = y.shape[-2], x.shape[-1]
    star_x, star_y, brightness = F.interpolate(scene.stars, size=(rows, columns)).split(1, dim=1)
    cell_x, cell_y = (x * 12) % 1, (y * 12) % 1
    star = cover(circle(cell_x - 0.15 - 0.7 * star_x, cell_y - 0.15 - 0.7 * star_y, 0.06), 12 * pixel)
    picture = picture + star * night * (brightness - 0.45).clamp(min=0) * 1.7

    centre_x, centre_y = column(scene.celestial_place[:, 0]), column(scene.celestial_place[:, 1])
    dx, dy = x - centre_x, y - centre_y
    distance = circle(dx, dy, 0.0)
    sun, moon = column(scene.celestial == 1).float(), column(scene.celestial == 2).float()
    low = column(scene.sky == 1).float()
    glow = torch.exp(-distance * (7 - 2.5 * low)) * 0.65 * sun + torch.exp(-distance * 10) * 0.35 * moon
    warm = mix(rgb(1.0, 0.96, 0.78, x), rgb(1.0, 0.80, 0.45, x), low)
    picture = paint(picture, glow, mix(warm, rgb(0.75, 0.80, 0.95, x), moon))
    picture = paint(picture, cover(distance - 0.062 - 0.022 * low, pixel) * sun, mix(warm, rgb(1.0, 1.0, 0.9, x), 0.6))
    crescent = torch.maximum(distance - 0.075, 0.062 - circle(dx - 0.036, dy + 0.018, 0.0))
    picture = paint(picture, cover(crescent, pixel) * moon, rgb(0.97, 0.96, 0.86, x))

    # A cloud is four ellipses over a flat foot; lit from above.
    for i in range(3):
        place = scene.cloud_places[:, i]
        size = column(place[:, 2])
        u, v = (x - column(place[:, 0])) / size, (y - column(place[:, 1])) / size
        puffs = (
            (0.0, -0.10, 0.55, 0.36),
            (-0.55, 0.05, 0.42, 0.22),
            (0.50, 0.02, 0.48, 0.26),
            (0.15, 0.08, 0.95, 0.18),
        )
        shape = None
        for puff_x, puff_y, radius_x, radius_y in puffs:
            puff = ellipse(u - puff_x, v - puff_y, radius_x, radius_y)
            shape = puff if shape is None else torch.minimum(shape, puff)
        shape = torch.maximum(shape, v - 0.2)
        white = light * mix(rgb(1.0, 1.0, 1.0, x), rgb(0.72, 0.75, 0.82, x), smooth(-0.35, 0.25, v))
        grey = column(scene.sky == 4).float()
        white = mix(white, rgb(0.50, 0.53, 0.58, x), 0.45 * grey)
        picture = paint(picture, cover(shape, 3 * pixel / size) * 0.9 * column(scene.clouds).float(), white)
    return picture


def _waves(x, scene, first, frequency):
    """A smooth random curve over x, about -1 to 1; uses scene.noise[first : first + 3]."""
    a, b, c = (column(scene.noise[:, first + i]) for i in range(3))
    frequency = frequency * (0.8 + 0.4 * c)
    return 0.65 * torch.sin(TAU * (frequency * x + a)) + 0.35 * torch.sin(TAU * (2.3 * frequency * x + b))


def hills(picture, scene, x, y, pixel, haze, light):
    """Three rows of hills, paler with distance."""
    hue = column(scene.noise[:, 15])
    rows = ((0.50, 0.055, 1.3, 0.55), (0.57, 0.045, 1.0, 0.28), (0.64, 0.035, 0.8, 0.0))
    for i, (base, rise, frequency, far) in enumerate(rows):
        edge = base - rise * _waves(x, scene, 3 * i, frequency)
        green = mix(rgb(0.33, 0.62, 0.22, x), rgb(0.52, 0.66, 0.20, x), hue) * (1 - 0.12 * i)
        shade = 1.12 - 0.9 * (y - edge).clamp(0, 0.5)
        picture = paint(picture, cover(edge - y, pixel), mix(green * shade * light, haze, far))
    return picture


def _ridge(x, a, b, c):
    """Peaks: straight slopes with smaller ones on top; 0 to 1, with its slope's sign."""

    def tent(t):
        return 1 - 2 * (t - t.floor() - 0.5).abs()

    return 0.62 * tent(1.4 * x + a) + 0.26 * tent(3.7 * x + b) + 0.12 * tent(9.1 * x + c)


def mountains(picture, scene, x, y, pixel, haze, light):
    """A ridge with snow and a lit side, over a meadow."""
    a, b, c = (column(scene.noise[:, i]) for i in range(3))
    height = _ridge(x, a, b, c)
    edge = HORIZON + 0.02 - 0.36 * height
    lit = smooth(-0.3, 0.3, _ridge(x + 0.02, a, b, c) - _ridge(x - 0.02, a, b, c) + 0.6 * (a - 0.5))
    rock = mix(rgb(0.34, 0.33, 0.42, x), rgb(0.56, 0.53, 0.55, x), lit)
    snow = mix(rgb(0.70, 0.76, 0.88, x), rgb(0.98, 0.98, 1.0, x), lit)
    line = 0.375 + 0.035 * _waves(x, scene, 3, 5.0)
    face = mix(rock, snow, cover(y - line, 2 * pixel))
    face = mix(face * light, haze, smooth(0.35, 0.62, y) * 0.65)
    picture = paint(picture, cover(edge - y, pixel), face)
    edge = 0.60 - 0.02 * _waves(x, scene, 6, 0.9)
    meadow = rgb(0.40, 0.60, 0.26, x) * (1.1 - 0.8 * (y - edge).clamp(0, 0.5)) * light
    return paint(picture, cover(edge - y, pixel), meadow)


def sea(picture, scene, x, y, pixel, haze, light):
    """Water in perspective, with a glitter path under the sun or the moon."""
    depth = ((y - HORIZON) / (1 - HORIZON)).clamp(0, 1)
    a = column(scene.noise[:, 0])
    sway = 0.25 * _waves(x, scene, 1, 2.0) / (0.35 + depth)
    wave = torch.sin(TAU * (3.2 * (depth + 0.1).log() + a + sway)) * smooth(0.0, 0.3, depth)
    water = mix(rgb(0.20, 0.58, 0.72, x), rgb(0.04, 0.25, 0.48, x), smooth(0.0, 1.0, depth))
    water = mix(water * light, haze, 0.35 * (1 - depth) ** 3) * (1 + 0.13 * wave)
    path = torch.exp(-(((x - column(scene.celestial_place[:, 0])) / (0.06 + 0.10 * depth)) ** 2))
    path = path * smooth(-0.1, 0.9, wave + 0.35) * column(scene.celestial > 0).float() * 0.6
    water = paint(water, path, mix(haze, rgb(1.0, 0.97, 0.85, x), 0.6))
    return paint(picture, cover(HORIZON - y + 0 * x, pixel), water)


def desert(picture, scene, x, y, pixel, haze, light):
    """Dunes: every crest parts a lit slope from a shaded one."""
    sand, shadow = rgb(0.93, 0.76, 0.47, x), rgb(0.76, 0.54, 0.32, x)
    rows = ((0.54, 0.04, 1.1, 0.4), (0.60, 0.05, 0.7, 0.15), (0.70, 0.05, 0.5, 0.0))
    for i, (base, rise, frequency, far) in enumerate(rows):
        curve = _waves(x, scene, 3 * i, frequency)
        edge = base - rise * curve
        slope = _waves(x + 0.03 + 0.5 * (y - edge).clamp(0, 1), scene, 3 * i, frequency) - curve
        ripple = torch.sin(TAU * (26 * (y - edge) + 0.8 * curve)) * 0.018 * smooth(0.0, 0.06, y - edge)
        colour = mix(shadow, sand, smooth(-0.35, 0.25, slope)) + ripple
        picture = paint(picture, cover(edge - y, pixel), mix(colour * light, haze, far))
    return picture


def _far_hills(picture, scene, x, y, pixel, haze, light):
    """A low blue line behind a flat ground."""
    edge = HORIZON - 0.025 - 0.022 * _waves(x, scene, 6, 1.4)
    return paint(picture, cover(edge - y, pixel), mix(rgb(0.30, 0.42, 0.50, x) * light, haze, 0.5))


def checkerboard(picture, scene, x, y, pixel, haze, light):
    """A tiled floor to the horizon."""
    picture = _far_hills(picture, scene, x, y, pixel, haze, light)
    depth = (y - HORIZON).clamp(min=0.004)
    u = (x - 0.5 + 0.3 * (column(scene.noise[:, 0]) - 0.5)) / depth * 0.5 + column(scene.noise[:, 1])
    v = 0.30 / depth + column(scene.noise[:, 2])
    width_u, width_v = 0.5 * pixel / depth, 0.30 * pixel / depth**2
    dark = lookup(COLOUR_TABLE, scene.ground_colour)
    # White tiles on white would vanish: the other tile is then a dark slate.
    other = mix(rgb(0.94, 0.92, 0.88, x), rgb(0.22, 0.24, 0.28, x), column(scene.ground_colour == 7).float())
    floor = mix(dark * 0.9, other, checker(u, v, width_u, width_v)) * light
    floor = mix(floor, haze, torch.exp(-depth * 13) * 0.75)
    return paint(picture, cover(HORIZON - y + 0 * x, pixel), floor)


def field(picture, scene, x, y, pixel, haze, light):
    """Rows of flowers that meet at the horizon."""
    picture = _far_hills(picture, scene, x, y, pixel, haze, light)
    depth = (y - HORIZON).clamp(min=0.004)
    u = (x - 0.5 + 0.6 * (column(scene.noise[:, 0]) - 0.5)) / (depth + 0.03) * 0.55 + column(scene.noise[:, 1])
    rows = stripes(u, 0.35 + 0.55 * pixel / (depth + 0.03))
    flowers = lookup(COLOUR_TABLE, scene.ground_colour)
    # A green field is a crop on brown earth, every other one stands in green.
    between = mix(rgb(0.22, 0.42, 0.16, x), rgb(0.38, 0.27, 0.16, x), column(scene.ground_colour == 3).float())
    colour = mix(between, flowers, rows) * (0.92 + 0.16 * rows) * light
    colour = mix(colour, haze, torch.exp(-depth * 14) * 0.55)
    return paint(picture, cover(HORIZON - y + 0 * x, pixel), colour)


GROUND_PAINTERS = (hills, mountains, sea, desert, checkerboard, field)
