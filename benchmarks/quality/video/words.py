"""The vocabulary of moving scenes. A phrase is one text token: the sum of the one-hot vectors of its words, as in
examples/tiny_dit/words.py; a phrase left out is a zero vector, and so is every phrase of the unconditional caption."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.tiny_dit.words import COLOURS

BACKDROPS = ("tiles", "bricks", "planks", "marble", "confetti")
CAMERAS = ("still", "pan-left", "pan-right", "pan-up", "pan-down", "zoom-in", "zoom-out")
SHAPES = ("disc", "square", "ring", "cross", "triangle")
SURFACES = ("plain", "striped", "checkered", "spotted", "cloudy")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # 45 degrees apart
SIZES = ("small", "large")
DEPTHS = ("back", "middle", "front")  # in the order of drawing

WORDS = BACKDROPS + CAMERAS + SHAPES + SURFACES + DIRECTIONS + SIZES + DEPTHS + COLOURS
INDEX = {word: index for index, word in enumerate(WORDS)}
VOCABULARY = 64  # width of a text token
PHRASES = 8  # backdrop, camera, one for each object; the rest stays empty
OBJECTS = len(DEPTHS)


def say(tokens: Tensor, phrase: int, words: tuple[str, ...], chosen: Tensor) -> None:
    """Puts words[chosen] [n] into a phrase of tokens [n, PHRASES, VOCABULARY]."""
    first = INDEX[words[0]]
    tokens[torch.arange(len(chosen), device=chosen.device), phrase, first + chosen] = 1.0


def read(tokens: Tensor) -> list[str]:
    """Captions of text tokens [n, PHRASES, VOCABULARY]."""
    return [
        ", ".join(" ".join(WORDS[i] for i in phrase.nonzero().flatten()) for phrase in rows if phrase.any())
        for rows in tokens.cpu()
    ]
