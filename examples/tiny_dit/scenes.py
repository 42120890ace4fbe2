"""Random scenes: what is in a picture, where, and the words that say so.

A scene is numbers only (`Scenes`, one row a picture); `pictures.draw` turns it into pixels. What has a word
is drawn from a small set, what has none (wave phases, hues, exact places) is continuous.
Places and sizes are fractions of the picture; x grows to the right, y grows downwards.
"""

from dataclasses import dataclass, fields

import torch

from .words import (
    CELESTIALS,
    COLOURS,
    COLUMNS,
    DEPTHS,
    GROUNDS,
    INDEX,
    KINDS,
    PATTERNS,
    SKIES,
    TEXT_TOKENS,
    VOCABULARY,
)

MAX_OBJECTS = 4
COLUMN_X = (0.12, 0.31, 0.50, 0.69, 0.88)

# How often a ground carries a kind, columns as in KINDS: no boats on land, mostly boats at sea.
KIND_WEIGHTS = {
    "hills": (2, 1, 3, 3, 2, 1, 0, 2, 2, 0),
    "mountains": (1, 1, 3, 2, 3, 1, 0, 2, 1, 0),
    "sea": (2, 0, 0, 0, 0, 2, 5, 2, 0, 0),
    "desert": (2, 2, 1, 0, 0, 1, 0, 2, 0, 4),
    "checkerboard": (4, 4, 0, 1, 1, 1, 0, 1, 2, 1),
    "field": (1, 1, 3, 3, 1, 1, 0, 2, 2, 0),
}

# How often a kind has a colour, columns as in COLOURS.
COLOUR_WEIGHTS = {
    "tree": (2, 2, 2, 5, 0, 0, 2, 0),
    "pine": (0, 0, 0, 4, 2, 0, 0, 1),
    "cactus": (0, 0, 0, 1, 0, 0, 0, 0),
}
PATTERNED = ("ball", "box", "balloon", "tower")  # kinds that may be striped or checkered


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; n pictures, k = MAX_OBJECTS objects in drawing order (far to near).

    Attributes:
        sky, ground: int64 [n], indices into SKIES and GROUNDS.
        celestial: int64 [n], 0 none, 1 sun, 2 moon; celestial_place: [n, 2] its x and y.
        clouds: bool [n]; cloud_places: [n, 3, 3] x, y, size of each cloud.
        ground_colour: int64 [n], index into COLOURS (checkerboard and field).
        noise: [n, 16] uniform numbers for shapes that no word describes.
        stars: [n, 3, 12, 12] offset x, offset y, brightness of one star per cell of the sky.
        kind: int64 [n, k], index into KINDS, -1 for an empty place.
        colour, pattern: int64 [n, k], indices into COLOURS and (plain, *PATTERNS).
        place: [n, k, 3] x and y of the middle of the base, size.
        object_noise: [n, k, 3] uniform numbers.
        words: [n, TEXT_TOKENS, VOCABULARY], the caption, as `words.encode_captions` would give it.
    """

    sky: torch.Tensor
    ground: torch.Tensor
    celestial: torch.Tensor
    celestial_place: torch.Tensor
    clouds: torch.Tensor
    cloud_places: torch.Tensor
    ground_colour: torch.Tensor
    noise: torch.Tensor
    stars: torch.Tensor
    kind: torch.Tensor
    colour: torch.Tensor
    pattern: torch.Tensor
    place: torch.Tensor
    object_noise: torch.Tensor
    words: torch.Tensor

    def __getitem__(self, rows) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: str | torch.device) -> "Scenes":
        """A copy on another device."""
        return Scenes(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def to_device(value: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Copy from the CPU without waiting for the device: only page-locked memory allows that."""
    return value.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else value.to(device)


def sample_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` random scenes, on the CPU (the generator too): a seed means the same on every device."""

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def choice(high, *shape):
        return torch.randint(high, shape, generator=generator)

    def weighted(weights):  # [..., choices] -> int64 [...]
        flat = torch.multinomial(weights.flatten(0, -2), 1, generator=generator)
        return flat.view(weights.shape[:-1])

    n, k = count, MAX_OBJECTS
    sky, ground, ground_colour = choice(len(SKIES), n), choice(len(GROUNDS), n), choice(len(COLOURS), n)

    # A moon belongs to the night, a sun to the rest; an overcast sky hides both.
    night, overcast = sky == SKIES.index("night"), sky == SKIES.index("overcast")
    celestial = torch.where(night, 2, 1) * ((uniform(n) < 0.7) & ~overcast)
    celestial_column = choice(len(COLUMNS), n)
    low_sun = sky == SKIES.index("sunset")
    celestial_place = torch.stack(
        (
            torch.tensor(COLUMN_X)[celestial_column] + uniform(n, low=-0.04, high=0.04),
            torch.where(low_sun, uniform(n, low=0.34, high=0.46), uniform(n, low=0.12, high=0.26)),
        ),
        dim=-1,
    )
    clouds = overcast | (uniform(n) < 0.4)
    cloud_places = torch.stack(
        (
            torch.tensor((0.18, 0.52, 0.85)) + uniform(n, 3, low=-0.13, high=0.13),
            uniform(n, 3, low=0.08, high=0.34),
            uniform(n, 3, low=0.10, high=0.19),
        ),
        dim=-1,
    )

    # Objects take different columns, so that a caption tells them apart; near ones may still cover far ones.
    number = weighted(torch.tensor([1.0, 3.0, 3.0, 2.0]).expand(n, 4)) + 1
    column = uniform(n, len(COLUMNS)).argsort(dim=1)[:, :k]
    kind_table = torch.tensor([KIND_WEIGHTS[name] for name in GROUNDS], dtype=torch.float32)
    kind = weighted(kind_table[ground][:, None].expand(n, k, -1))
    depth = choice(len(DEPTHS), n, k)
    flying = kind == KINDS.index("balloon")
    present = torch.arange(k) < number[:, None]
    # Drawing order: balloons, then far, then near; empty places last.
    order = (depth + 1 - 2 * flying.long() + 9 * (~present).long()).argsort(dim=1)
    column, kind, depth, flying, present = (x.gather(1, order) for x in (column, kind, depth, flying, present))

    colour_table = torch.tensor([COLOUR_WEIGHTS.get(name, (1,) * len(COLOURS)) for name in KINDS])
    colour = weighted(colour_table.float()[kind])
    patterned = torch.isin(kind, torch.tensor([KINDS.index(name) for name in PATTERNED]))
    pattern = choice(len(PATTERNS) + 1, n, k) * patterned

    near = depth == DEPTHS.index("near")
    base = torch.where(near, 0.90, 0.70) + uniform(n, k, low=-0.02, high=0.03)
    size = torch.where(near, 0.33, 0.22) * uniform(n, k, low=0.92, high=1.1)
    base = torch.where(flying, uniform(n, k, low=0.40, high=0.52), base)
    size = torch.where(flying, torch.where(near, 0.34, 0.22), size)
    x = torch.tensor(COLUMN_X)[column] + uniform(n, k, low=-0.03, high=0.03)
    kind = torch.where(present, kind, -1)

    words = torch.zeros(n, TEXT_TOKENS, VOCABULARY)

    def say(token, names, index, where):
        """Put word names[index] into a text token wherever `where` holds."""
        lookup = torch.tensor([INDEX[name] for name in names])
        words[:, token].scatter_add_(1, lookup[index][:, None], where.float()[:, None])

    always, coloured = torch.ones_like(clouds), ground >= GROUNDS.index("checkerboard")
    say(0, SKIES, sky, always)
    say(1, CELESTIALS, (celestial - 1).clamp(min=0), celestial > 0)
    say(1, COLUMNS, celestial_column, celestial > 0)
    say(2, CELESTIALS, torch.full_like(sky, 2), clouds)
    say(3, GROUNDS, ground, always)
    say(3, COLOURS, ground_colour, coloured)
    for i in range(k):
        here = present[:, i]
        say(4 + i, PATTERNS, (pattern[:, i] - 1).clamp(min=0), here & (pattern[:, i] > 0))
        for names, index in (
            (COLOURS, colour),
            (KINDS, kind.clamp(min=0)),
            (DEPTHS, depth),
            (COLUMNS, column),
        ):
            say(4 + i, names, index[:, i], here)

    return Scenes(
        sky=sky,
        ground=ground,
        celestial=celestial,
        celestial_place=celestial_place,
        clouds=clouds,
        cloud_places=cloud_places,
        ground_colour=ground_colour,
        noise=uniform(n, 16),
        stars=uniform(n, 3, 12, 12),
        kind=kind,
        colour=colour,
        pattern=pattern,
        place=torch.stack((x, base, size), dim=-1),
        object_noise=uniform(n, k, 3),
        words=words,
    )
