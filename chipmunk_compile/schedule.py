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

        warmup=2, refresh_every=3, forecast_at=(4, 5) R R d R f f d d R d d R

        warmup=2, refresh_at=(4, 7)                  R R d d R d d R d d d d
        warmup=2, refresh_at=(4, 7), compute_every=2 R R f d f R f R f d f d

        warmup=1, refresh_every=1, compute_every=4   R f R f f f R f f f R f

    The first gap is half as long where the warm-up is one step: that saw nothing but noise, and is reused as it is.

    Warm-up steps are refreshes rather than dense ones: a refresh costs little more, and a model then needs two
    compiles instead of three.
    """
    if step < schedule.warmup:
        return Program.REFRESH
    if _is_forecast(step, schedule):
        return Program.FORECAST
    if schedule.refresh_at is not None:
        before = step - 1
        while _is_forecast(before, schedule):
            before -= 1
        due = any(before < at <= step for at in schedule.refresh_at)
    else:
        due = _computed_before(step, schedule) % schedule.refresh_every == 0
    return Program.REFRESH if due else Program.DELTA


def _is_forecast(step: int, schedule: ScheduleOptions) -> bool:
    if step < schedule.warmup:
        return False
    if schedule.forecast_at is not None:
        return step in schedule.forecast_at
    return _since_warmup(step, schedule) % schedule.compute_every > 0


def _computed_before(step: int, schedule: ScheduleOptions) -> int:
    """Of the steps before this computed one."""
    if schedule.forecast_at is not None:
        return step - sum(schedule.warmup <= at < step for at in schedule.forecast_at)
    return schedule.warmup - 1 + _since_warmup(step, schedule) // schedule.compute_every


def _since_warmup(step: int, schedule: ScheduleOptions) -> int:
    """Steps, the first gap counted as whole."""
    halved = schedule.compute_every // 2 if schedule.warmup == 1 else 0
    return step - schedule.warmup + 1 + halved


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
    longest += max(schedule.forecast_at or (0,))
    return next((steps for steps in range(1, longest + 1) if pays(steps, schedule)), None)
