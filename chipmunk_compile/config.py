"""Options: frozen dataclasses, presets, strict validation of the flat dict that `torch.compile(options=...)` gives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have. The message says what to write instead."""


@dataclass(frozen=True)
class AttentionOptions:
    """Sparse attention."""

    sparsity: float | None = 0.835
    """Share of key columns that a delta step leaves out, 0 to 1; 0.93 computes 7%. None: attention stays dense."""
    chunk: int = 64
    """Consecutive query tokens that share their columns: 32, 64, 128 or 192."""
    samples: int = 8
    """Query tokens per chunk whose exact softmax rows choose the columns."""


@dataclass(frozen=True)
class MlpOptions:
    """Sparse MLPs."""

    sparsity: float | None = 0.7
    """Share of hidden neurons that a delta step leaves out, 0 to 1. None: MLPs stay dense."""
    chunk: int = 128
    """Consecutive tokens that share their neurons: 32, 64, 128 or 192."""
    samples: int = 8
    """Tokens per chunk whose true change chooses the neurons."""


@dataclass(frozen=True)
class ScheduleOptions:
    """Which steps recompute everything."""

    refresh_every: int = 5
    """A refresh at every such step, counted from the first one of the generation."""
    refresh_at: tuple[int, ...] | None = None
    """Steps of a generation, from 0, that are refreshes instead of every so many: (10, 40). Where one is forecast, the
    next computed step is the refresh. The warm-up is refreshed in any case."""
    warmup: int = 2
    """This many first steps are refreshes: the picture is decided there."""
    compute_every: int = 1
    """After the warm-up one step in so many is computed, and counted for refreshes; the others are forecast. Behind a
    warm-up of one step the first gap is half as long."""
    forecast_at: tuple[int, ...] | None = None
    """Steps of a generation, from 0, that are forecast instead: (7, 11, 13). The warm-up is computed in any case."""


@dataclass(frozen=True)
class ForecastOptions:
    """What outputs of earlier steps say about later ones."""

    order: int = 1
    """Of the extrapolation, in the timestep: 0 reuses the last output, 1 is a line, 2 a parabola."""
    tolerance: float | None = None
    """Steps are forecast as far as their expected error, as a share of the output, times the square root of the gap's
    share of the whole way, stays below this: 0.008 is careful, 0.06 is bold. None: `schedule.compute_every` says which
    are."""
    repay: bool = False
    """A computed step adds to its output what the forecasts before it left out of the latents."""
    refresh_every: int | None = None
    """Of the steps computed between forecasts, a refresh at every such one and deltas between; 1: all are computed
    whole, as the dense model does. None: as `schedule.refresh_every` and `schedule.refresh_at` say."""
    warmup: int | None = None
    """So many first steps are computed, where steps can be forecast. None: as `schedule.warmup` says."""
    residual: float = 0.0
    """Share of the error that a delta step is expected to make, learned at each refresh, that is corrected: 0 to 2.
    Above 0 a refresh costs one delta pass more. For a model captured as one graph."""


@dataclass(frozen=True)
class Config:
    """All options of one compiled model."""

    preset: str = "balanced"
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    mlp: MlpOptions = field(default_factory=MlpOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    forecast: ForecastOptions = field(default_factory=ForecastOptions)
    min_tokens: int = 768
    """Sites with fewer tokens stay dense: below it a sparse step does not pay."""
    dense_layers: int = 0
    """So many first layers stay dense; a layer is a self-attention over tokens and the MLPs behind it."""
    steps: int | None = None
    """Denoising steps of a generation. When given, calls are counted and nothing is read from the device."""
    streams: int | None = None
    """Calls per step (2 for guidance by two calls). Used with `steps`; 1 when not given."""
    grid: tuple[int, int, int] | None = None
    """Frames, rows and columns of the image tokens, for the token order; found in the graph when not given."""
    order: str = "patch"
    """Order of tokens inside: "patch" (chunks are boxes of neighbours), "hilbert", or "raster" (as they come)."""
    memory_budget: int | None = None
    """Bytes of state on the device, of all streams together: an integer, or a text such as "60GB" or "1.5 GiB". What
    goes over it lies in host memory between its uses, or stays dense. None: as much as it takes."""
    mode: str | None = None
    """Inductor's mode: "default", "reduce-overhead", "max-autotune", ..."""
    inductor: tuple[tuple[str, Any], ...] = ()
    """Inductor's own options, handed on as they are."""

    @staticmethod
    def from_options(options: Mapping[str, Any] | None = None, *, mode: str | None = None) -> Config:
        """The configuration for `torch.compile(model, backend="chipmunk", options=options, mode=mode)`.

        options: flat names as in the fields above, dotted for groups ("attention.sparsity"). "calibration" is the path
        of a file of `Calibration.save`; the other options are laid over those in it.
        Raises OptionError for an unknown name (it offers the nearest) and for an impossible value.
        """
        options = dict(options or {})
        if "calibration" in options:
            options = {**_calibrated(options.pop("calibration")), **options}
        for name in options:
            if name not in RULES:
                raise OptionError(_unknown(name))
        preset = options.pop("preset", "balanced")
        if preset not in PRESETS:
            raise OptionError(f"preset={preset!r}: choose one of {', '.join(map(repr, PRESETS))}")
        if mode is not None:
            options.setdefault("mode", mode)
        flat = {**_preset_beside(preset, options), **options}
        config = Config(preset=preset)
        for name, value in flat.items():
            config = _set(config, name, RULES[name](name, value))
        if config.streams is not None and config.steps is None:
            raise OptionError("streams says how many calls make one step; give steps too")
        which = {
            "forecast.tolerance": config.forecast.tolerance is not None,
            "schedule.compute_every": config.schedule.compute_every > 1,
            "schedule.forecast_at": config.schedule.forecast_at is not None,
        }
        if sum(which.values()) > 1:
            given = " and ".join(name for name, is_given in which.items() if is_given)
            raise OptionError(f"{given} both say which steps are computed: give one")
        return config

    @property
    def forecasts(self) -> bool:
        """Whether steps may go uncomputed."""
        schedule = self.schedule
        return schedule.compute_every > 1 or bool(schedule.forecast_at) or self.forecast.tolerance is not None

    @property
    def runs_whole(self) -> bool:
        """Whether every step is forecast or computed whole, as far as steps can be forecast."""
        return self.forecasts and self.schedule.refresh_every == 1 and self.schedule.refresh_at is None

    def where_computed(self) -> Config:
        """What holds for a model that must run at every step."""
        return replace(self, schedule=replace(self.schedule, compute_every=1, forecast_at=None))

    def where_forecast(self, in_pieces: bool = False) -> Config:
        """What holds for a model whose steps can be forecast, as one graph or in pieces."""
        schedule, forecast = self.schedule, self.forecast
        if self.forecasts and forecast.refresh_every is not None:
            schedule = replace(schedule, refresh_every=forecast.refresh_every, refresh_at=None)
        if self.forecasts and forecast.warmup is not None:
            schedule = replace(schedule, warmup=forecast.warmup)
        return replace(self, schedule=schedule, forecast=replace(forecast, residual=0.0) if in_pieces else forecast)

    def inductor_options(self) -> dict[str, Any]:
        """What Inductor gets: its mode, spelled out, then its own options."""
        import torch._inductor

        expanded = dict(torch._inductor.list_mode_options(self.mode)) if self.mode else {}
        return {**expanded, **dict(self.inductor)}

    @property
    def replays_cuda_graphs(self) -> bool:
        import torch._inductor.config

        return self.inductor_options().get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)


# Points on the frontier of docs/quality.md. Where steps can be forecast, forecasts as far as they prove good are the
# best there is, and where so few steps are computed that nothing proves good, those evenly spread; models that must run
# at every step run deltas. "exact" computes every column, so it differs from dense by rounding alone.
_OTHERS_WHOLE = {"forecast.repay": True, "forecast.refresh_every": 1}
_OVER_LONG_GAPS = {"forecast.warmup": 1, "forecast.order": 0}  # lines lead astray there
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"attention.sparsity": 0.0, "mlp.sparsity": 0.0},
    "quality": {"schedule.refresh_every": 3, "forecast.tolerance": 0.008, **_OTHERS_WHOLE},
    "balanced": {"schedule.refresh_every": 5, "forecast.tolerance": 0.02, **_OTHERS_WHOLE},
    "fast": {"schedule.refresh_every": 8, "forecast.tolerance": 0.06, **_OTHERS_WHOLE},
    "draft": {"schedule.refresh_every": 12, "schedule.compute_every": 7, **_OTHERS_WHOLE, **_OVER_LONG_GAPS},
    "sketch": {"schedule.refresh_every": 16, "schedule.compute_every": 8, **_OTHERS_WHOLE, **_OVER_LONG_GAPS},
}
# Options that say how deltas are to be: beside any of them a preset's forecasts, which leave none, do not count.
_OF_DELTAS = (
    "attention.", "mlp.", "schedule.refresh_", "schedule.compute_every", "schedule.forecast_at", "forecast.residual",
)  # fmt: skip

CHUNKS = (32, 64, 128, 192)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ORDERS = ("patch", "hilbert", "raster")


def _preset_beside(preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a preset holds beside a caller's own options."""
    dropped: tuple[str, ...] = ()
    if any(name.startswith(_OF_DELTAS) for name in options):
        dropped = ("forecast.", "schedule.compute_every")
    elif options.get("forecast.tolerance") is not None:
        dropped = ("schedule.compute_every", "forecast.warmup", "forecast.order")
    return {name: value for name, value in PRESETS[preset].items() if not name.startswith(dropped)}


def _set(config: Config, name: str, value: Any) -> Config:
    group, _, leaf = name.rpartition(".")
    if not group:
        return replace(config, **{leaf: value})
    return replace(config, **{group: replace(getattr(config, group), **{leaf: value})})


def _calibrated(path: Any) -> dict[str, Any]:
    from .calibration import CalibrationError, load_calibration

    try:
        return load_calibration(path).options
    except (TypeError, OSError, CalibrationError) as error:
        raise OptionError(f"calibration={path!r}: the path of a file that Calibration.save() wrote ({error})") from None


def _unknown(name: str) -> str:
    if name == "target_psnr":
        return (
            "target_psnr is no option: it takes a few generations to find what meets it. "
            "Run chipmunk_compile.calibrate(model, run, target_psnr=...) and give options=<its result>.options"
        )
    near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
    leaf = [known for known in RULES if known.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f"did you mean {(leaf or near)[0]!r}?" if leaf or near else f"known: {', '.join(RULES)}"
    return f"unknown option {name!r}: {hint} Inductor's own options go into options={{'inductor': {{...}}}}"


def _sparsity(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise OptionError(f"{name}={value!r}: a share from 0 (every column computed) to 1 (none), or None for dense")
    return float(value)


def _order_of_forecast(name: str, value: Any) -> int:
    if value not in (0, 1, 2) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: 0 (reuse), 1 (a line) or 2 (a parabola)")
    return int(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: True or False")
    return value


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise OptionError(f"{name}={value!r}: a share above 0 and below 1, such as 0.004, or None for a fixed schedule")
    return float(value)


def _residual(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 2.0:
        raise OptionError(f"{name}={value!r}: a factor from 0 (no correction) to 2")
    return float(value)


def _chunk(name: str, value: Any) -> int:
    if value not in CHUNKS or isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: choose one of {', '.join(map(str, CHUNKS))}")
    return int(value)


def _at_least(least: int, optional: bool = False) -> Callable[[str, Any], int | None]:
    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: an integer, {least} or more")
        return value

    return check


def _steps(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    whole = isinstance(value, (tuple, list)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or any(v < 0 for v in value) or any(a >= b for a, b in zip(value, value[1:])):
        raise OptionError(f"{name}={value!r}: steps in rising order, counted from 0, such as (10, 40)")
    return tuple(value)


def _grid(name: str, value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, (tuple, list)) and len(value) == 3
    if not whole or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
        raise OptionError(
            f"{name}={value!r}: three positive integers (frames, rows, columns); frames is 1 for an image"
        )
    return tuple(value)


def _order(name: str, value: Any) -> str:
    if value not in ORDERS:
        raise OptionError(f"{name}={value!r}: choose one of {', '.join(map(repr, ORDERS))}")
    return value


def _bytes(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and (parts := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)):
        unit = UNITS.get(parts[2].upper())
        value = round(float(parts[1]) * unit) if unit else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        known = ", ".join(UNITS)
        raise OptionError(f'{name}={value!r}: bytes as an integer, a text such as "60GB" (units: {known}), or None')
    return value


def _mode(name: str, value: Any) -> str | None:
    import torch._inductor

    if value is None:
        return None
    try:
        torch._inductor.list_mode_options(value)
    except (KeyError, RuntimeError, AttributeError, TypeError):
        known = ", ".join(repr(mode) for mode in torch._inductor.list_mode_options())
        raise OptionError(f"{name}={value!r}: Inductor knows {known}") from None
    return value


def _inductor(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    import torch._inductor

    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={value!r}: a dict of Inductor's own options")
    known = torch._inductor.list_options()
    for key in value:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise OptionError(f"Inductor has no option {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return tuple(value.items())


def _preset(name: str, value: Any) -> str:
    return value  # checked first, by from_options: the other options are laid over it


# Every option and the check of its value; the order is that of the documentation.
RULES: dict[str, Callable[[str, Any], Any]] = {
    "preset": _preset,
    "attention.sparsity": _sparsity,
    "attention.chunk": _chunk,
    "attention.samples": _at_least(1),
    "mlp.sparsity": _sparsity,
    "mlp.chunk": _chunk,
    "mlp.samples": _at_least(1),
    "schedule.refresh_every": _at_least(1),
    "schedule.refresh_at": _steps,
    "schedule.warmup": _at_least(1),
    "schedule.compute_every": _at_least(1),
    "schedule.forecast_at": _steps,
    "forecast.order": _order_of_forecast,
    "forecast.tolerance": _tolerance,
    "forecast.repay": _switch,
    "forecast.refresh_every": _at_least(1, optional=True),
    "forecast.warmup": _at_least(1, optional=True),
    "forecast.residual": _residual,
    "min_tokens": _at_least(1),
    "dense_layers": _at_least(0),
    "steps": _at_least(1, optional=True),
    "streams": _at_least(1, optional=True),
    "grid": _grid,
    "order": _order,
    "memory_budget": _bytes,
    "mode": _mode,
    "inductor": _inductor,
}

assert {name.partition(".")[0] for name in RULES} == {f.name for f in fields(Config)}
