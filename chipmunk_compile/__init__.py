"""chipmunk_compile: a torch.compile backend that speeds up diffusion transformers by sparse deltas between steps.

`torch.compile(model, backend="chipmunk")` needs no import of this package. Names load when first used: torch itself
imports the package while it is being imported (TORCH_LOGS="+chipmunk_compile").
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibrating import calibrate
    from .calibration import Calibration, CalibrationError, load_calibration
    from .config import Config, OptionError
    from .explaining import explain
    from .generations import generation
    from .passes.reasons import Reason
    from .probing import probe
    from .programs import disabled
    from .report import Report
    from .telemetry import counters, reset

_HOME = {
    "Calibration": "calibration",
    "CalibrationError": "calibration",
    "Config": "config",
    "OptionError": "config",
    "Reason": "passes.reasons",
    "Report": "report",
    "calibrate": "calibrating",
    "counters": "telemetry",
    "disabled": "programs",
    "explain": "explaining",
    "generation": "generations",
    "load_calibration": "calibration",
    "probe": "probing",
    "reset": "telemetry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
