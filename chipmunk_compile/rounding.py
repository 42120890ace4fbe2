"""The time that a rounded timestep stands for.

Pipelines of bfloat16 models hand over the timestep in bfloat16, of 8 bits: between 0.5 and 1 a multiple of 1/256. Fifty
steps of FLUX at 2304x1280 are 1/500 long at first, so some repeat the time of the one before, and others come out at
twice their length. What forecasts go by is how long steps are beside each other, so a step is taken to be as long as
those of late were on the average. Times that are no such multiples, or far enough apart, stay as they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

# Multiples that rounded times are apart, for their distance to tell how long the steps between them are.
ENOUGH = 10


class Unrounded:
    """Of one generation."""

    def __init__(self) -> None:
        self._rounded: list[float] = []
        self._offset = 0.0
        self._exact = False

    def follow(self, times: Sequence[float], first: Sequence[float]) -> float:
        """The time of the next step: the sum of `times`, with what it lost to rounding. first: of the first step."""
        rounded = sum(times)
        past, self._rounded = self._rounded, [*self._rounded, rounded]
        if not past:
            return rounded
        grains = [_grain(now) for then, now in zip(first, times) if then != now]
        self._exact = self._exact or 0.0 in grains
        grain = 0.0 if self._exact else sum(grains)
        move = rounded - past[-1]
        if not move and not self._stood_for_less(past, grain):  # evaluated twice, as Heun's method does
            self._rounded = past
            return rounded + self._offset
        far = (n for n, time in enumerate(reversed(past), 1) if abs(rounded - time) >= ENOUGH * grain)
        steps = next(far, len(past))
        self._offset += (rounded - past[-steps]) / steps - move
        return rounded + self._offset

    def _stood_for_less(self, past: list[float], grain: float) -> bool:
        """Whether steps are so short that rounding repeats their time: they never move it by more than one multiple."""
        moves = [abs(b - a) for a, b in zip(past, past[1:]) if a != b]
        return bool(moves) and moves[-1] <= grain


def _grain(time: float) -> float:
    """What bfloat16 numbers near `time` are apart, below it; 0 if it is none of them."""
    if time == 0.0 or not math.isfinite(time):
        return 0.0
    (bits,) = struct.unpack("<I", struct.pack("<f", time))
    if bits & 0xFFFF or struct.unpack("<f", struct.pack("<f", time))[0] != time:
        return 0.0
    mantissa, exponent = math.frexp(abs(time))
    return math.ldexp(1.0, exponent - (9 if mantissa == 0.5 else 8))
