"""All that a trained model is measured with: each rival at several speeds, each of our settings beside them.

A list is in the order in which it is measured: a run that is cut off has the most telling rows. Methods that differ in
the number of steps alone share what they compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch

from benchmarks.models_report import PUBLISHED
from chipmunk_compile.config import PRESETS

from . import caches, hooks, windows
from .methods import POINTS, Method, chipmunk
from .rivals import StepReuse, TaylorSteps
from .subjects import Subject

DENSE = {"attention__sparsity": None, "mlp__sparsity": None}
# How preset "draft" forecasts, but by lines, which gaps shorter than its own allow.
EVEN = {name.replace(".", "__"): value for name, value in PRESETS["draft"].items() if name.startswith("forecast.")}
EVEN |= {"forecast__order": 1}


class Builder:
    """Makes methods for one model.

    dense: the compiled model, called where the fastest SDPA comes first; fast: puts any other callable there.
    calibrate(called): a dense generation of a few clips, with a state of its own for each stream. extra: options of all
    our settings.
    """

    def __init__(
        self, model: torch.nn.Module, subject: Subject, dense: Callable, fast: Callable, calibrate: Callable,
        compiled: bool = True, **extra: object,
    ) -> None:  # fmt: skip
        self.model, self.subject, self.dense, self.fast, self.calibrate = model, subject, dense, fast, calibrate
        self.compiled, self.extra = compiled, extra
        self._ours: dict[tuple, Method] = {}
        self.parts = cache(lambda: caches.Parts(model, compiled))
        self.coefficients = cache(lambda: caches.fit_teacache(self.parts(), calibrate))
        self.hooked = cache(lambda make, *numbers: make(model, *numbers))
        self.windowed = cache(self._windowed)

    def methods(self, steps: int) -> Iterator[Method]:
        """The same labels in the same order for any number of steps."""
        yield from self._first(steps)
        yield from self._rivals_of_blocks(steps)
        yield from self._ours_judged()
        yield from self._more(steps)
        yield from self._windows()
        yield from self._ours_combined()
        yield from self._ours_alone(steps)

    def ours(self, **options) -> Method:
        """As methods.chipmunk: double underscores stand for dots. Compiled once for all numbers of steps."""
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in self._ours:
            ours = chipmunk(self.model, **options, **self.extra)
            self._ours[key] = replace(ours, make=lambda: self.fast(ours.make()))
        return self._ours[key]

    def _first(self, steps: int) -> Iterator[Method]:
        """Presets, and what needs no compiling."""
        yield Method("dense again", {}, lambda: self.dense, ready=True)
        for preset in POINTS:
            yield self.ours(preset=preset)
        for share in (0.75, 0.5, 0.33, 0.25, 0.2, 0.167, 0.143):
            yield Method("fewer steps", {"share": share}, lambda: self.dense, max(2, round(share * steps)), ready=True)
        for every in (2, 3, 4, 5, 6, 7):
            yield self._streams("step reuse", {"every": every}, lambda e=every: StepReuse(self.dense, e), ready=True)
        for every, order in ((2, 1), (2, 2), (3, 1), (4, 1), (5, 1), (6, 1)):
            yield self._streams("Taylor steps", {"every": every, "order": order},
                                lambda e=every, o=order: TaylorSteps(self.dense, e, o), ready=True)  # fmt: skip

    def _ours_judged(self) -> Iterator[Method]:
        """Forecasts as far as they prove good, and for the highest speeds all but every few steps."""
        for tolerance in (0.005, 0.012, 0.03, 0.1):  # 0.008, 0.02 and 0.06 are presets
            yield self.ours(forecast__tolerance=tolerance)
        for every in (4, 5, 6, 9):  # 7 and 8 are presets
            yield self.ours(schedule__compute_every=every, **EVEN)
        for tolerance in (0.008, 0.02):
            yield self.ours(forecast__tolerance=tolerance, forecast__repay=False)

    def _ours_combined(self) -> Iterator[Method]:
        """Forecasts at fixed steps, and sparse deltas between them, and between those that are judged."""
        for refresh in (2, 3):
            for tolerance in (0.008, 0.02, 0.06):
                yield self.ours(mlp__sparsity=None, schedule__refresh_every=refresh, forecast__tolerance=tolerance,
                                forecast__repay=True)  # fmt: skip
        for every, order in ((2, 2), (3, 1), (3, 2), (4, 1), (4, 2)):
            yield self.ours(**DENSE, schedule__compute_every=every, forecast__order=order)
        for every, refresh, order in ((2, 2, 1), (2, 2, 2), (2, 3, 2), (3, 2, 1), (2, 5, 1)):
            yield self.ours(schedule__compute_every=every, schedule__refresh_every=refresh, forecast__order=order)
        yield self.ours(schedule__compute_every=2, schedule__refresh_every=3, forecast__residual=1.0)
        for refresh in (3, 5, 8):
            yield self.ours(schedule__refresh_every=refresh, forecast__residual=1.0)

    def _rivals_of_blocks(self, steps: int) -> Iterator[Method]:
        for threshold in (0.04, 0.08, 0.15, 0.25):
            yield self._streams("TeaCache", {"threshold": threshold},
                                lambda t=threshold: caches.TeaCache(self.parts(), t, self.coefficients()))  # fmt: skip
        for threshold in (0.03, 0.06, 0.12, 0.2):
            yield self._streams("first-block cache", {"threshold": threshold},
                                lambda t=threshold: caches.FirstBlock(self.parts(), t))  # fmt: skip
        # The reference: chunks of 192, 7% of the keys, refreshes at steps 0, 1, 10 and 40, two dense layers; then with
        # the steps left out that its own configurations leave out, of 50.
        reference = {
            "attention__sparsity": 0.93, "attention__chunk": 192, "mlp__sparsity": 0.7,
            "schedule__refresh_at": (10, 40), "dense_layers": 2,
        }  # fmt: skip
        yield self.ours(**reference)
        skipped = tuple(sorted({round(at * steps / 50) for at in PUBLISHED}))
        yield self.ours(**reference, schedule__forecast_at=skipped, forecast__order=0)

    def _windows(self) -> Iterator[Method]:
        video = self.subject.frames > 1
        for window in ((1, 1, 1), (2, 1, 1), (4, 2, 2)) if video else ((0, 1, 1), (0, 2, 1), (0, 2, 2)):
            if self.windowed(window) is not None:
                share = round(self.windowed(window)[1], 3)
                yield Method("tile window", {"window": list(window), "kept": share},
                             lambda w=window: self.fast(self.windowed(w)[0]))  # fmt: skip

    def _ours_alone(self, steps: int) -> Iterator[Method]:
        """What sparsity and cadence do by themselves."""
        yield self.ours(attention__sparsity=1.0, mlp__sparsity=1.0)  # caches alone: the control
        for refresh in (3, 10):
            yield self.ours(attention__sparsity=0.93, mlp__sparsity=None, schedule__refresh_every=refresh)
        yield self.ours(attention__sparsity=0.93, mlp__sparsity=None, schedule__refresh_every=5, forecast__residual=1.0)
        yield self.ours(attention__sparsity=0.93, mlp__sparsity=None, schedule__compute_every=2,
                        schedule__refresh_every=3, forecast__order=2)  # fmt: skip
        for refresh in (5, 10):
            yield self.ours(attention__sparsity=0.835, mlp__sparsity=None, schedule__refresh_every=refresh)
        yield self.ours(attention__sparsity=0.7, mlp__sparsity=0.5)
        yield self.ours(attention__sparsity=0.93, mlp__sparsity=0.8, forecast__residual=1.0)
        yield self.ours(attention__chunk=128)

    def _more(self, steps: int) -> Iterator[Method]:
        for make, name, choices in (
            (hooks.first_block_cache, "diffusers first-block cache", ({"threshold": 0.06}, {"threshold": 0.12})),
            (hooks.attention_broadcast, "diffusers attention broadcast", ({"every": 2}, {"every": 3})),
            (hooks.taylor_seer, "diffusers TaylorSeer", ({"every": 3, "order": 1}, {"every": 5, "order": 2})),
        ):
            for setting in choices:
                yield Method(name, setting,
                             lambda m=make, s=setting: self.fast(self.hooked(m, *s.values()).restart()))  # fmt: skip

    def _streams(self, name: str, setting: dict, make: Callable, ready: bool = False) -> Method:
        return Method(name, setting, lambda: self.fast(caches.PerStream(make)), ready=ready)

    def _windowed(self, window: tuple[int, int, int]):
        device = next(self.model.parameters()).device
        found = windows.tile_window_model(self.model, self.subject.grid, window, device)
        return found and (torch.compile(found[0], dynamic=False) if self.compiled else found[0], found[1])
