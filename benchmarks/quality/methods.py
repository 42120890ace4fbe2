"""All that is compared: a name, a setting, and how to make the model of one generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chipmunk_compile.backend import chipmunk as backend  # the string names the same, where the package is installed
from chipmunk_compile.config import PRESETS

from .rivals import StepReuse, TaylorSteps, first_block_cache

OURS = "chipmunk"
POINTS = tuple(name for name in PRESETS if name != "exact")  # presets on the frontier


@dataclass(frozen=True)
class Method:
    """`make()` returns the callable for one generation; what it compiles is compiled once."""

    name: str
    setting: dict[str, Any]
    make: Callable[[], Callable]
    steps: int | None = None  # where they are not the harness's own
    ready: bool = False  # it runs nothing but what is compiled already

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{name.rpartition('.')[2]}={value}" for name, value in self.setting.items())])


def chipmunk(model: torch.nn.Module, **options: Any) -> Method:
    """chipmunk with options; double underscores stand for dots."""
    options = {name.replace("__", "."): value for name, value in options.items()}
    compiled = torch.compile(model, backend=backend, options=options)
    return Method(OURS, options, lambda: compiled)


def quick_methods(model: torch.nn.Module, dense: Callable, steps: int) -> list[Method]:
    """The shipped model's table: each preset, its control, and each rival at a few speeds."""
    methods = [chipmunk(model, preset=preset) for preset in POINTS]
    methods.append(chipmunk(model, schedule__refresh_every=5))  # deltas alone
    methods.append(chipmunk(model, schedule__refresh_every=5, attention__sparsity=1.0, mlp__sparsity=1.0))
    methods.append(chipmunk(model, schedule__compute_every=2, schedule__refresh_every=2))
    dense_steps = {"attention__sparsity": None, "mlp__sparsity": None}
    for every, order in ((2, 2), (3, 1)):
        methods.append(chipmunk(model, **dense_steps, schedule__compute_every=every, forecast__order=order))
    methods.append(chipmunk(model, forecast__tolerance=0.012))
    for fewer in (steps * 2 // 3, steps // 2, steps // 3, steps // 4):
        methods.append(Method("fewer steps", {"steps": fewer}, lambda: dense, fewer))
    for every in (2, 4):
        methods.append(Method("step reuse", {"every": every}, lambda e=every: StepReuse(dense, e)))
    for every, order in ((2, 2), (3, 1)):
        setting = {"every": every, "order": order}
        methods.append(Method("Taylor steps", setting, lambda e=every, o=order: TaylorSteps(dense, e, o)))
    hooked = first_block_cache(model, 0.05)
    methods.append(Method("first-block cache", {"threshold": 0.05}, lambda: restarted(hooked)))
    return methods


def restarted(hooked: Callable) -> Callable:
    hooked.restart()
    return hooked
