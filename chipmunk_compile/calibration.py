"""What a calibration found: the options for a model at a target quality, with what every setting tried gave; a small
JSON file of it."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, OptionError

FORMAT = "chipmunk_compile calibration"
VERSION = 1
# Times as fast as dense that a setting must be: below it, a measured speed-up is noise.
FASTER = 1.03


class CalibrationError(ValueError):
    """A run that cannot be calibrated, or a file that is no calibration. The message says what to do."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried."""

    setting: dict[str, Any]
    """Options, laid over those that calibrate() was given."""
    psnr: float
    """Of the worst picture of the run against dense, dB; 120 for equal ones."""
    mean_psnr: float
    work: float
    """Predicted share of a dense generation's matrix work; the least possible where forecasts have a tolerance."""
    speedup: float | None
    """Measured: seconds of a whole dense run over those of one right behind it. None where the target was missed."""
    state_bytes: int
    """Cached by all streams, predicted from shapes."""
    calls: dict[str, int]
    """Calls of the model's graphs by program, in one run."""

    @property
    def at_most(self) -> float:
        """Predicted speed-up if all but the matrix work cost nothing: no more than this is to be had."""
        return 1.0 / self.work if self.work > 0 else float("inf")


@dataclass(frozen=True)
class Calibration:
    """The fastest setting tried that meets a target, and how it was found.

    `options` go to `torch.compile(model, backend="chipmunk", options=calibration.options)`.
    """

    options: dict[str, Any]
    target_psnr: float
    met: bool
    """Whether a setting met the target and was faster than dense. If not, `options` compute everything ("exact")."""
    model: str
    steps: int
    streams: int
    device: str
    torch: str
    peak: float
    """Of the signal, in the PSNR: 255 for bytes, else what was given or the range of the dense pictures."""
    dense_seconds: float
    """Of one whole run, compiled by Inductor."""
    repeat_psnr: float
    """Of the worst picture of a second dense run against the first: what the run itself does not repeat."""
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial | None:
        """The trial whose setting was taken."""
        met = [t for t in self.trials if t.speedup is not None and t.speedup >= FASTER and t.psnr >= self.target_psnr]
        return max(met, key=lambda trial: trial.speedup, default=None)

    def __str__(self) -> str:
        head = (
            f"calibration: {self.model}, {self.steps} steps, {self.streams} stream{'s' * (self.streams != 1)}, "
            f"{self.device}; target {self.target_psnr:g} dB\n"
            f"  a dense run takes {self.dense_seconds:.2f} s; PSNR against it, peak {self.peak:.4g}"
        )
        titles = ("", "setting", "PSNR worst (mean)", "speed-up", "at most", "state")
        table = [titles, *(self._row(trial) for trial in self.trials)]
        widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
        lines = [
            f"  {row[0]:<{widths[0]}} {row[1]:<{widths[1]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:], widths[2:]))
            for row in table
        ]
        return "\n".join([head, "", *lines, "", *(f"  {line}" for line in self._verdict())])

    def _row(self, trial: Trial) -> tuple[str, ...]:
        return (
            "*" if trial is self.chosen else "",
            describe(trial.setting),
            f"{trial.psnr:.1f} ({trial.mean_psnr:.1f})",
            "-" if trial.speedup is None else f"{trial.speedup:.2f}x",
            "-" if trial.work >= 1 else f"{trial.at_most:.2f}x",
            f"{trial.state_bytes / 1e6:.1f} MB",
        )

    def _verdict(self) -> list[str]:
        chosen = self.chosen
        how = [
            "speed-up: measured, whole runs; - where the target was missed. at most: predicted, by matrix work alone"
        ]
        if chosen is not None:
            return [f"* {chosen.speedup:.2f}x at {chosen.psnr:.1f} dB: options={self.options}", *how]
        exact = next((t for t in self.trials if t.setting.get("preset") == "exact"), None)
        best = max((trial.psnr for trial in self.trials if trial is not exact), default=None)
        if exact is not None and exact.psnr < self.target_psnr:
            why = f"even with every column computed it is {exact.psnr:.1f} dB: rounding alone misses the target"
        elif best is None:
            why = "no setting could be faster than dense"
        elif best >= self.target_psnr:
            why = "settings that meet it are no faster than dense"
        else:
            why = f"no setting meets it; the best gave {best:.1f} dB"
        return [f"the target was not met: {why}. options={self.options} computes everything and is not faster", *how]

    def save(self, path: str | os.PathLike) -> Path:
        """Writes JSON to `path`, all or nothing: a reader never sees half a file."""
        path = Path(path)
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        whole = {"format": FORMAT, "version": VERSION, **vars(self), "trials": trials}
        content = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(content)
            os.chmod(name, 0o644)  # mkstemp's own is for the owner alone
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return path


def load_calibration(path: str | os.PathLike) -> Calibration:
    """What `Calibration.save` wrote.

    Raises CalibrationError for a file that is none or of another version, OptionError for options that this release
    does not have, and OSError where there is no file.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is no JSON ({error}): write it with Calibration.save()") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CalibrationError(f"{path} is no calibration: write it with Calibration.save()")
    if found.get("version") != VERSION:
        raise CalibrationError(
            f"{path} has version {found.get('version')!r}, this release reads {VERSION}: calibrate again"
        )
    del found["format"], found["version"]
    trials = found.get("trials")
    if not isinstance(trials, list):
        raise CalibrationError(f"{path}: trials must be a list: calibrate again")
    found["trials"] = tuple(_checked(Trial, trial, path) for trial in trials)
    calibration = _checked(Calibration, found, path)
    try:
        Config.from_options(calibration.options)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    return calibration


_TYPES = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "dict": (dict,), "tuple": (tuple,)}


def _checked(kind: type, found: Any, path: str | os.PathLike) -> Any:
    """A frozen dataclass of exactly its fields, of their types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(found, Mapping) or set(found) != set(fields):
        wrong = sorted(set(found) ^ set(fields)) if isinstance(found, Mapping) else type(found).__name__
        raise CalibrationError(
            f"{path}: a {kind.__name__.lower()} with wrong or missing parts {wrong}: calibrate again"
        )
    for name, annotation in fields.items():
        allowed = _TYPES[annotation.partition("[")[0].partition(" ")[0]]
        value = found[name]
        if value is None and "None" in annotation:
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise CalibrationError(f"{path}: {name}={value!r} is no {annotation}: calibrate again")
    return kind(**found)


def describe(setting: Mapping[str, Any]) -> str:
    """A setting on one line, without what goes without saying."""
    rest = dict(setting)
    words = []
    if "attention.sparsity" in rest and "mlp.sparsity" in rest:
        attention, mlp = rest.pop("attention.sparsity"), rest.pop("mlp.sparsity")
        sparse = [
            f"{kind} {share:.1%}" for kind, share in (("attention", attention), ("mlp", mlp)) if share is not None
        ]
        words.append(", ".join(sparse) + " sparse" if sparse else "no sparsity")
    every = rest.get("schedule.compute_every", 1)
    if every == 1:
        rest.pop("schedule.compute_every", None)
    return "; ".join([*words, *(f"{name.rpartition('.')[2]} {value}" for name, value in rest.items())])
