"""Step -> program."""

from __future__ import annotations

import enum
from functools import cache

from .config import ScheduleOptions


class Program(enum.Enum):
    """What a call runs. The value is the name under which `counters()` counts it."""

    DENSE = "dense"
    REFRESH = "refresh"
    DELTA = "delta"
    FORECAST = "forecast"


def program_at(step: int, schedule: ScheduleOptions) -> Program:
    """The program of step `step` (from 0) of a generation whose state is sound.

        warmup=2, refresh_every=3                     R R d R d d R d d R d d
        warmup=2, refresh_every=3, compute_every=2    R R f d f R f d f d f R

        warmup=2, refresh_at=(4, 7)                  R R d d R d d R d d d d
        warmup=2, refresh_at=(4, 7), compute_every=2 R R f d f R f R f d f d

    Warm-up steps are refreshes rather than dense ones: a refresh costs little more, and a model then needs two
    compiles instead of three.
    """
    if step < schedule.warmup:
        return Program.REFRESH
    computed, waiting = divmod(step - schedule.warmup + 1, schedule.compute_every)
    if waiting:
        return Program.FORECAST
    if schedule.refresh_at is not None:
        due = any(step - schedule.compute_every < at <= step for at in schedule.refresh_at)
        return Program.REFRESH if due else Program.DELTA
    return Program.DELTA if (computed + schedule.warmup - 1) % schedule.refresh_every else Program.REFRESH


def programs_of(steps: int, schedule: ScheduleOptions) -> list[Program]:
    """The programs of a generation of so many steps."""
    return [program_at(step, schedule) for step in range(steps)]


@cache
def pays(steps: int, schedule: ScheduleOptions) -> bool:
    """Whether any step of a generation does less than all: where none does, refreshes would be made for nothing."""
    return not {Program.DELTA, Program.FORECAST}.isdisjoint(programs_of(steps, schedule))


def fewest_steps(schedule: ScheduleOptions) -> int | None:
    """Of a generation that pays; None if none does."""
    period = schedule.refresh_every if schedule.refresh_at is None else len(schedule.refresh_at) + 1
    longest = schedule.warmup + (period + 1) * schedule.compute_every
    return next((steps for steps in range(1, longest + 1) if pays(steps, schedule)), None)
