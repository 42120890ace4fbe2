"""calibrate(): the fastest setting that keeps the user's own pictures at a target PSNR, from a few real generations.

The model is compiled once (switchboard.py). After the dense runs, settings are tried from the one with the least
predicted work on, so the search can stop as soon as nothing that is left could be faster than what was found.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import telemetry
from .calibration import FASTER, Calibration, CalibrationError, Trial, describe
from .clock import InferredClock
from .config import Config
from .evidence import call_evidence, read_evidence
from .judge import MOST
from .owners import is_compiled
from .pictures import pictures_of, psnr
from .progress import progress_bar
from .report import generation_share
from .schedule import Program
from .switchboard import Switchboard

log = logging.getLogger(__name__)
NO_SPARSITY = {"attention.sparsity": None, "mlp.sparsity": None}
BALANCED = {"attention.sparsity": 0.835, "mlp.sparsity": 0.7}
FAST = {"attention.sparsity": 0.93, "mlp.sparsity": 0.8}
ATTENTION = {"attention.sparsity": 0.93, "mlp.sparsity": None}  # long video: no activations are cached
# Further timings of a setting whose first ones cannot be: the machine was busy with something else.
AGAIN = 2
EXACT = {
    "preset": "exact", "attention.sparsity": 0.0, "mlp.sparsity": 0.0, "schedule.compute_every": 1,
    "forecast.tolerance": None, "forecast.repay": False, "forecast.residual": 0.0,
}  # fmt: skip


def ladder() -> tuple[dict[str, Any], ...]:
    """What is tried: settings that docs/quality.md found to pay, from three sparsities and none."""
    forecasts = [{**NO_SPARSITY, "schedule.compute_every": 2, "forecast.order": 2}]
    forecasts += [
        {
            **NO_SPARSITY,
            "schedule.compute_every": every,
            "forecast.order": order,
            "forecast.repay": True,
            "forecast.warmup": 1,
        }
        for every, order in ((2, 1), (3, 1), (4, 1), (5, 1), (7, 0), (8, 0))
    ]
    both = [
        {**sparse, "schedule.compute_every": every, "schedule.refresh_every": refresh, "forecast.order": order}
        for sparse, every, refresh, order in (
            (BALANCED, 2, 2, 1), (BALANCED, 2, 3, 2), (BALANCED, 3, 2, 1), (ATTENTION, 2, 3, 2), (ATTENTION, 3, 3, 1),
        )
    ]  # fmt: skip
    deltas = [
        {**sparse, "schedule.refresh_every": refresh, "forecast.residual": residual}
        for sparse, refresh, residual in (
            (BALANCED, 3, 0.0), (BALANCED, 5, 0.0), (BALANCED, 5, 1.0), (FAST, 8, 0.0), (ATTENTION, 5, 1.0),
            (ATTENTION, 10, 0.0),
        )
    ]  # fmt: skip
    judged = [
        {**NO_SPARSITY, "forecast.tolerance": tolerance, "forecast.repay": True}
        for tolerance in (0.06, 0.03, 0.02, 0.012, 0.008)
    ]
    judged += [
        {**BALANCED, "forecast.tolerance": tolerance, "forecast.repay": True, "schedule.refresh_every": 2}
        for tolerance in (0.03, 0.02)
    ]
    return (*judged, *forecasts, *both, *deltas)


def calibrate(
    model: torch.nn.Module,
    run: Callable[[torch.nn.Module], Any],
    target_psnr: float = 35.0,
    *,
    options: Mapping[str, Any] | None = None,
    settings: Sequence[Mapping[str, Any]] | None = None,
    peak: float | None = None,
    repeats: int = 1,
    progress: bool = True,
) -> Calibration:
    """The fastest of `settings` at which every picture of `run` stays at `target_psnr` dB or above.

    ```python
    model = pipe.transformer

    def run(transformer):
        pipe.transformer = transformer
        return pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent")

    found = chipmunk_compile.calibrate(model, run, target_psnr=35)
    pipe.transformer = torch.compile(model, backend="chipmunk", options=found.options)
    ```

    model: the module, not compiled in place. run(model): denoises with the compiled module that it is given, from the
        same noise at every call and with as many steps as will be taken later, and returns latents or pictures: a
        tensor, an array, PIL images, lists of these, or what a pipeline returns. The first dimension counts pictures.
    options: that hold for every setting ("grid", "min_tokens", "mode", ...). settings: options laid over them, in any
        order; `ladder()` when not given.
    peak: of the signal, for the PSNR; 255 for bytes, the range of the dense pictures when not given.
    repeats: times that each setting that meets the target is timed, behind a dense run each time; the median counts.
    progress: a bar on stderr.

    Where no setting meets the target and is faster than dense, the result says so, and its options compute everything.
    Runs without gradients. Drops the cached state of every compiled model, as `reset()` does.

    Raises CalibrationError where `run` does not call the model, returns no pictures, or does not repeat itself,
    OptionError for bad options, and whatever `run` raises.
    """
    _check(target_psnr, repeats, peak)
    model = getattr(model, "_orig_mod", model)
    if any(map(is_compiled, model.modules())):
        raise CalibrationError(
            f"the {type(model).__name__}, or a block of it, was compiled in place (compile(), "
            "compile_repeated_blocks()) and would not reach the backend: give calibrate() a model that was not"
        )
    common = _plain(options or {})
    tried = [_plain(setting) for setting in (ladder() if settings is None else settings)]
    base = Config.from_options(common)
    configs = [Config.from_options({**common, **setting}) for setting in (*tried, EXACT)]
    board = Switchboard(base, configs)
    bench = _Bench(model, run, board, peak, repeats)
    with torch.no_grad(), progress_bar(2 + len(tried), "calibrating", progress) as bar:
        bar.at("dense")
        bench.dense(target_psnr, bar.advance)
        best, trials = 0.0, []
        candidates = [_Candidate(setting, config, bench) for setting, config in zip(tried, configs)]
        for candidate in sorted(candidates, key=lambda c: c.work):
            if candidate.work >= 1.0 or best * candidate.work >= 1.0:  # could not be faster, nor could those after it
                break
            if not candidate.adds_sparsity:
                continue
            bar.at(describe(candidate.setting))
            trials.append(bench.trial(candidate, target_psnr))
            best = max(best, trials[-1].speedup or 0.0)
            bar.advance()
        if best < FASTER:
            bar.at("exact")
            trials.append(bench.trial(_Candidate(EXACT, configs[-1], bench), math.inf))
    telemetry.reset()
    found = bench.calibration({}, target_psnr, False, trials)
    chosen = found.chosen
    setting = chosen.setting if chosen is not None else EXACT
    return bench.calibration({**common, **setting}, target_psnr, chosen is not None, trials)


class _Candidate:
    """A setting, and what is predicted of it once the model's graphs are known."""

    def __init__(self, setting: dict[str, Any], config: Config, bench: _Bench) -> None:
        self.setting, self.config = setting, config
        work = bench.board.work(config)
        self.work = generation_share(bench.survey.steps, _boldest(config).where_forecast(), work.refresh, work.delta)
        # Where no site is sparse, settings that differ in sparsity are one and the same.
        wanted = config.attention.sparsity is not None or config.mlp.sparsity is not None
        self.adds_sparsity = bool(work.sites) or not wanted
        self.state_bytes = bench.survey.streams * (work.state_bytes + _history_bytes(config, bench.survey.output_bytes))


def _boldest(config: Config) -> Config:
    """Where steps are forecast as far as forecasts prove good, the schedule that forecasts most."""
    if config.forecast.tolerance is None:
        return config
    return replace(config, schedule=replace(config.schedule, compute_every=MOST + 1))


def _history_bytes(config: Config, output: int) -> int:
    """Of the outputs that forecasts and corrections keep."""
    asked = config.forecasts or config.forecast.residual > 0
    return output * (config.forecast.order + 1 + (config.forecast.residual > 0)) if asked else 0


@dataclass(eq=False)
class Survey:
    """What a run does, seen by a hook on the compiled model: steps, streams and the size of an output."""

    steps: int = 0
    streams: int = 0
    output_bytes: int = 0
    clock: InferredClock = field(default_factory=InferredClock)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        times, inputs = call_evidence(args, kwargs)
        tick = self.clock.tick(inputs, lambda wanted: read_evidence(times, inputs, wanted))
        self.steps = max(self.steps, tick.step + 1)
        self.streams = max(self.streams, sum(s.generation == tick.stream.generation for s in self.clock.live))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.output_bytes = sum(tensor.nbytes for tensor in tensors)


class _Bench:
    """Runs the user's generation with one setting after the other."""

    def __init__(self, model, run: Callable, board: Switchboard, peak: float | None, repeats: int) -> None:
        self.name = type(model).__name__
        self.board, self.survey = board, Survey()
        self._run, self._peak, self._repeats = run, peak, repeats
        self._compiled = torch.compile(model, backend=board)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.reference: list[Tensor] = []
        self.dense_seconds: list[float] = []
        self.repeat_psnr = math.nan

    def dense(self, target: float, advance: Callable[[], None]) -> None:
        """The dense run, twice: what all else is held against, and how well the run repeats itself."""
        hook = self._compiled.register_forward_hook(self.survey, with_kwargs=True)
        try:
            self.reference, _ = self._once(None)
        finally:
            hook.remove()
            self.survey.clock.release()
        advance()
        if not self.board.graphs or not self.survey.steps:
            raise CalibrationError(
                f"run() did not call the {self.name} that it was given: run(model) must denoise by model(...)"
            )
        if self._peak is None:
            self._peak = _peak_of(self.reference)
        again, seconds = self._once(None)
        self.dense_seconds = [seconds]
        advance()
        self.repeat_psnr = min(psnr(again, self.reference, self._peak))
        if not self.repeat_psnr >= target:
            raise CalibrationError(
                f"two dense runs differ: {self.repeat_psnr:.1f} dB, below the target of {target:g} dB. Make run() "
                "start from the same noise at every call (generator=torch.Generator().manual_seed(0))"
            )

    def trial(self, candidate: _Candidate, target: float) -> Trial:
        """One setting: run once for its pictures, and again for its time where they meet the target.

        The second run counts too: a clock that has seen a generation knows more, so another step may be forecast.
        """
        each = psnr(self._once(candidate.config)[0], self.reference, self._peak)
        counted = telemetry.counters()
        calls = {program.value: counted[program.value] for program in Program if counted[program.value]}
        speedup = None
        if min(each) >= target:
            speedup, again = self._timed(candidate)
            each = [min(pair) for pair in zip(each, psnr(again, self.reference, self._peak))]
        worst, mean = min(each), math.fsum(each) / len(each)
        speedup = speedup if worst >= target else None
        log.info("%s: %.1f dB, %s", describe(candidate.setting), worst, f"{speedup:.2f}x" if speedup else "missed")
        return Trial(candidate.setting, worst, mean, candidate.work, speedup, candidate.state_bytes, calls)

    def calibration(self, options: dict, target: float, met: bool, trials: Sequence[Trial]) -> Calibration:
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return Calibration(
            options, float(target), met, self.name, self.survey.steps, self.survey.streams, device, torch.__version__,
            self._peak, statistics.median(self.dense_seconds), self.repeat_psnr, tuple(trials),
        )  # fmt: skip

    def _timed(self, candidate: _Candidate) -> tuple[float, list[Tensor]]:
        """The speed-up, and the pictures. Each run behind a dense one: a machine that is busy slows both."""
        ratios: list[float] = []
        while len(ratios) < self._repeats or (
            len(ratios) < self._repeats + AGAIN and _is_noise(ratios, candidate.work)
        ):
            self.dense_seconds.append(self._once(None)[1])
            pictures, seconds = self._once(candidate.config)
            ratios.append(self.dense_seconds[-1] / seconds)
        return statistics.median(ratios), pictures

    def _once(self, setting: Config | None) -> tuple[list[Tensor], float]:
        telemetry.reset()  # another setting's state; and this one starts as a first generation does
        self.board.setting = setting
        self._synchronize()
        started = time.perf_counter()
        returned = self._run(self._compiled)
        self._synchronize()
        seconds = time.perf_counter() - started
        return pictures_of(returned), seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _is_noise(ratios: Sequence[float], work: float) -> bool:
    """Whether a speed-up is more than leaving out matrix work can give; by a tenth, a sparse kernel may be the better
    one of the two."""
    return statistics.median(ratios) * work > 1.1


def _check(target_psnr: float, repeats: int, peak: float | None) -> None:
    for name, value in (("target_psnr", target_psnr), ("peak", peak)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf) and not (name == "peak" and value is None):
            raise ValueError(f"calibrate({name}={value!r}): a positive number")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"calibrate(repeats={repeats!r}): a positive integer")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As a file will hold them."""
    try:
        return json.loads(json.dumps(dict(options)))
    except TypeError as error:
        raise CalibrationError(f"options that a file cannot hold: {error}") from None


def _peak_of(pictures: Sequence[Tensor]) -> float:
    if all(picture.dtype == torch.uint8 for picture in pictures):
        return 255.0
    low, high = (
        function(torch.stack([function(picture) for picture in pictures])) for function in (torch.min, torch.max)
    )
    return (high - low).item() or 1.0
