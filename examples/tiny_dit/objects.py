"""Things that stand, float or fly in a scene.

Each painter takes the pictures [n, 3, H, W] that have such a thing, local coordinates u (right) and v (up) in
units of its size with the origin at the middle of its base, a pixel's width in that unit, and `look`.
"""

from dataclasses import dataclass

import torch

from .backdrops import COLOUR_TABLE, LIGHT
from .scenes import Scenes
from .shapes import (
    box,
    capsule,
    checker,
    circle,
    column,
    cover,
    ellipse,
    lookup,
    mix,
    paint,
    polygon,
    rgb,
    smooth,
    stripes,
)
from .words import COLOURS, KINDS, PATTERNS, SKIES


@dataclass
class Look:
    """How one object per picture looks.

    Attributes:
        colour: its named colour in this light, [n, 3, 1, 1]; white: white in this light.
        light: [n, 3, 1, 1]; side: where the light comes from, -1 left to 1 right, [n, 1, 1, 1].
        striped, checkered, night, pale (its colour is white): 0 or 1, [n, 1, 1, 1].
        noise: [n, 3, 1, 1] uniform numbers.
    """

    colour: torch.Tensor
    white: torch.Tensor
    light: torch.Tensor
    side: torch.Tensor
    striped: torch.Tensor
    checkered: torch.Tensor
    night: torch.Tensor
    pale: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def of(cls, scene: Scenes, place: int) -> "Look":
        """The look of the objects in one place of the drawing order."""
        light, colour, pattern = lookup(LIGHT, scene.sky), scene.colour[:, place], scene.pattern[:, place]
        # Light comes from where the sun or the moon is, else a little from the left.
        side = (2.5 * (scene.celestial_place[:, 0] - 0.5)).clamp(-1, 1)
        return cls(
            colour=lookup(COLOUR_TABLE, colour) * light,
            white=light * 0.96,
            light=light,
            side=column(torch.where(scene.celestial > 0, side, -0.3)),
            striped=column(pattern == 1 + PATTERNS.index("striped")).float(),
            checkered=column(pattern == 1 + PATTERNS.index("checkered")).float(),
            night=column(scene.sky == SKIES.index("night")).float(),
            pale=column(colour == COLOURS.index("white")).float(),
            noise=scene.object_noise[:, place].reshape(-1, 3, 1, 1),
        )

    def tint(self, red: float, green: float, blue: float) -> torch.Tensor:
        """A constant colour in this light."""
        return rgb(red, green, blue, self.light) * self.light

    def pattern(self, a, b, width_a, width_b) -> torch.Tensor:
        """The thing's surface over coordinates a, b: plain, striped along b, or checkered with white."""
        white = self.striped * stripes(b, width_b) + self.checkered * checker(a, b, width_a, width_b)
        return mix(self.colour, self.white, white)


def paint_shadow(picture, u, v, look, kind: int):
    """A soft shadow around the base of a thing of words.KINDS[kind]; none under a balloon."""
    if KINDS[kind] == "balloon":
        return picture
    shadow = smooth(1.0, 0.2, ((u + 0.10 * look.side) / 0.52) ** 2 + ((v + 0.01) / 0.085) ** 2)
    return picture * (1 - 0.45 * shadow)


def ball(picture, u, v, pixel, look):
    radius = 0.36
    x, y = u / radius, (v - radius) / radius
    z = (1 - x * x - y * y).clamp(min=1e-4).sqrt()
    # Turn the pattern's axis a little, each ball its own way.
    tilt = (look.noise[:, :1] - 0.5) * 2.2
    a, b = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    longitude, latitude = (
        torch.atan2(a, z) / 1.2 + look.noise[:, 1:2],
        torch.asin(b.clamp(-0.999, 0.999)) / 0.8,
    )
    width = pixel / radius / z.clamp(min=0.25)
    surface = look.pattern(longitude, latitude, width / 1.2, width / 0.8)
    diffuse = (0.55 * look.side * x + 0.55 * y + 0.62 * z).clamp(min=0)
    surface = surface * (0.40 + 0.68 * diffuse) + 0.5 * diffuse.clamp(0, 1) ** 24 * look.light
    return paint(picture, cover(circle(u, v - radius, radius), pixel), surface)


def crate(picture, u, v, pixel, look):
    """A cube seen from the right and from above."""
    front = look.pattern(u / 0.3, v / 0.3, pixel / 0.3, pixel / 0.3)
    top = polygon(u, v, (-0.34, 0.56), (0.26, 0.56), (0.42, 0.72), (-0.18, 0.72))
    right = polygon(u, v, (0.26, 0.0), (0.42, 0.16), (0.42, 0.72), (0.26, 0.56))
    picture = paint(picture, cover(top, pixel), mix(look.colour, look.white, 0.35))
    picture = paint(picture, cover(right, pixel), look.colour * (0.6 + 0.15 * look.side))
    return paint(picture, cover(box(u + 0.04, v - 0.28, 0.30, 0.28), pixel), front * (0.92 - 0.1 * look.side))


def house(picture, u, v, pixel, look):
    roof = mix(look.tint(0.42, 0.22, 0.16), look.tint(0.28, 0.30, 0.36), (look.noise[:, :1] > 0.5).float())
    glass = mix(look.tint(0.62, 0.80, 0.92), rgb(1.0, 0.86, 0.45, u), look.night)
    picture = paint(picture, cover(box(u - 0.22, v - 0.72, 0.055, 0.16), pixel), roof * 0.8)
    wall = look.colour * (1.0 - 0.16 * smooth(0.0, 0.4, -look.side * u))
    picture = paint(picture, cover(box(u, v - 0.24, 0.40, 0.24), pixel), wall)
    picture = paint(picture, cover(polygon(u, v, (-0.50, 0.46), (0.50, 0.46), (0.0, 0.88)), pixel), roof)
    picture = paint(picture, cover(box(u, v - 0.13, 0.075, 0.13), pixel), look.tint(0.30, 0.18, 0.12))
    for middle in (-0.23, 0.23):
        picture = paint(picture, cover(box(u - middle, v - 0.26, 0.085, 0.085), pixel), look.white)
        picture = paint(picture, cover(box(u - middle, v - 0.26, 0.062, 0.062), pixel), glass)
    return picture


def tree(picture, u, v, pixel, look):
    trunk = polygon(u, v, (-0.075, 0.0), (0.075, 0.0), (0.045, 0.5), (-0.045, 0.5))
    picture = paint(picture, cover(trunk, pixel), look.tint(0.40, 0.26, 0.16))
    for x, y, radius in ((-0.20, 0.52, 0.21), (0.21, 0.54, 0.20), (0.0, 0.74, 0.26), (0.03, 0.50, 0.20)):
        shade = 0.85 + 0.9 * (0.5 * look.side * (u - x) + (v - y))
        picture = paint(picture, cover(circle(u - x, v - y, radius), pixel), look.colour * shade)
    return picture


def pine(picture, u, v, pixel, look):
    picture = paint(picture, cover(box(u, v - 0.08, 0.055, 0.08), pixel), look.tint(0.36, 0.24, 0.16))
    for base, half, height in ((0.14, 0.36, 0.44), (0.40, 0.28, 0.38), (0.64, 0.19, 0.36)):
        leaf = polygon(u, v, (-half, base), (half, base), (0.0, base + height))
        shade = 0.55 + 0.5 * smooth(0.0, height, v - base) + 0.16 * look.side * u.sign()
        picture = paint(picture, cover(leaf, pixel), look.colour * shade)
    return picture


def tower(picture, u, v, pixel, look):
    """A lighthouse."""
    body = polygon(u, v, (-0.18, 0.0), (0.18, 0.0), (0.115, 0.86), (-0.115, 0.86))
    surface = look.pattern(u / 0.22, v / 0.3, pixel / 0.22, pixel / 0.3) * (0.86 + 1.2 * look.side * u)
    lamp = mix(look.tint(0.70, 0.86, 0.95), rgb(1.0, 0.93, 0.55, u), look.night)
    glow = torch.exp(-circle(u, v - 0.95, 0.0) * 5) * 0.6 * look.night
    picture = paint(picture, glow, rgb(1.0, 0.93, 0.60, u))
    picture = paint(picture, cover(body, pixel), surface)
    picture = paint(picture, cover(box(u, v - 0.88, 0.16, 0.022), pixel), look.tint(0.25, 0.25, 0.28))
    picture = paint(picture, cover(box(u, v - 0.96, 0.08, 0.07), pixel), lamp)
    roof = polygon(u, v, (-0.12, 1.02), (0.12, 1.02), (0.0, 1.17))
    return paint(picture, cover(roof, pixel), look.tint(0.55, 0.14, 0.13))


def boat(picture, u, v, pixel, look):
    lean = 0.12 * (look.noise[:, :1] - 0.5)
    u = u + lean * v
    hull = polygon(u, v, (-0.30, -0.02), (0.28, -0.02), (0.44, 0.16), (-0.42, 0.16))
    picture = paint(picture, cover(box(u, v - 0.5, 0.014, 0.46), pixel), look.tint(0.35, 0.24, 0.16))
    sail = polygon(u, v, (0.03, 0.24), (0.40, 0.24), (0.03, 0.95))
    jib = polygon(u, v, (-0.34, 0.22), (-0.03, 0.22), (-0.03, 0.80))
    picture = paint(picture, cover(sail, pixel), look.colour * (1.02 - 0.5 * u))
    picture = paint(picture, cover(jib, pixel), look.white * (0.96 + 0.4 * u))
    picture = paint(picture, cover(hull, pixel), look.tint(0.45, 0.27, 0.16) * (0.8 + 1.6 * v))
    return paint(picture, cover(box(u - 0.01, v - 0.145, 0.40, 0.018), pixel), look.white)


def balloon(picture, u, v, pixel, look):
    radius = 0.38
    y = v - 0.72
    half = radius * (1 - 0.42 * smooth(0.0, -0.45, y))  # the envelope narrows towards the basket
    skin = torch.maximum(ellipse(u, y, radius, 0.42), u.abs() - half)
    across = (u / half).clamp(-0.999, 0.999)
    longitude = torch.asin(across) / 0.9 + look.noise[:, :1]
    width = pixel / half / (1 - across * across).clamp(min=0.06).sqrt() / 0.9
    surface = look.pattern(v / 0.34, longitude, pixel / 0.34, width)
    shade = 0.84 + 0.55 * look.side * u + 0.35 * y
    ropes = box(u.abs() - 0.10 - 0.16 * (v - 0.1), v - 0.22, 0.012, 0.12)
    basket = look.tint(0.52, 0.34, 0.18) * (1.1 - 2 * (v - 0.07).abs())
    picture = paint(picture, cover(ropes, pixel), look.tint(0.30, 0.24, 0.20))
    picture = paint(picture, cover(skin, pixel), surface * shade)
    return paint(picture, cover(box(u, v - 0.07, 0.105, 0.07), pixel), basket)


def mushroom(picture, u, v, pixel, look):
    stem = polygon(u, v, (-0.14, 0.0), (0.14, 0.0), (0.10, 0.42), (-0.10, 0.42))
    picture = paint(picture, cover(stem, pixel), look.tint(0.95, 0.90, 0.80) * (0.92 + look.side * u))
    cap = torch.maximum(ellipse(u, v - 0.36, 0.42, 0.40), 0.36 - v)
    coverage = cover(cap, pixel)
    picture = paint(picture, coverage, look.colour * (0.72 + 0.7 * (v - 0.36) + 0.35 * look.side * u))
    dots = None
    for x, y, radius in ((-0.20, 0.50, 0.065), (0.05, 0.62, 0.075), (0.22, 0.47, 0.055), (-0.02, 0.43, 0.04)):
        dot = circle(u - x, v - y, radius)
        dots = dot if dots is None else torch.minimum(dots, dot)
    # White dots would not show on a white cap: those are yellow.
    spot = mix(look.white, look.tint(0.98, 0.85, 0.35), look.pale)
    return paint(picture, cover(dots, pixel) * coverage, spot)


def cactus(picture, u, v, pixel, look):
    arms = (
        ((0.0, 0.0), (0.0, 0.80), 0.11),
        ((-0.27, 0.36), (0.0, 0.36), 0.065),
        ((-0.27, 0.36), (-0.27, 0.58), 0.065),
        ((0.0, 0.26), (0.26, 0.26), 0.065),
        ((0.26, 0.26), (0.26, 0.62), 0.065),
    )
    distance = None
    for start, end, radius in arms:
        arm = capsule(u, v, start, end, radius)
        distance = arm if distance is None else torch.minimum(distance, arm)
    shade = 0.62 + 0.5 * smooth(0.0, 0.09, -distance) + 0.4 * look.side * u
    return paint(picture, cover(distance, pixel), look.colour * shade)


PAINTERS = (ball, crate, house, tree, pine, tower, boat, balloon, mushroom, cactus)  # as in words.KINDS
