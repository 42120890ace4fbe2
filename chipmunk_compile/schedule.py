"""Step -> program."""

from __future__ import annotations

import enum

from .config import ScheduleOptions


class Program(enum.Enum):
    """What a call runs. The value is the name under which `counters()` counts it."""

    DENSE = "dense"
    REFRESH = "refresh"
    DELTA = "delta"


def program_at(step: int, schedule: ScheduleOptions) -> Program:
    """The program of step `step` (from 0) of a generation whose state is sound.

    Warm-up steps are refreshes rather than dense ones: a refresh costs little more, and a model then needs two
    compiles instead of three.
    """
    if step < schedule.warmup or step % schedule.refresh_every == 0:
        return Program.REFRESH
    return Program.DELTA
