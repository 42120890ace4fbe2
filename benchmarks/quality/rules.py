"""The rules by which steps are forecast, and those that were tried in their place.

    python -m benchmarks.quality.rules --model video image --checkpoint FOLDER [--steps 28] [--clips 8] [--only RULE ..]
    python -m benchmarks.quality.rules --model shipped [--steps 28]

Models that `python -m benchmarks.quality.train` left in FOLDER/<model>, and the shipped one (examples/tiny_dit), run
with each rule at many tolerances, or computing every so many steps. Prints the PSNR against every step computed, at so
many computed steps: a line through what lies near, since a single placement may be lucky. Nothing is timed. On a GPU in
bfloat16; on a CPU in float32 (with --tiny, that it runs).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History, lagrange
from chipmunk_compile.judge import Judge

from .simulated import MODELS, Model

COUNTS = (5, 6, 7, 8, 9, 10, 12, 14, 16, 18)  # computed steps that are printed
EVERY = (2, 3, 4, 5, 6, 7, 8)
NEAR = 0.1  # in the logarithm of the number of computed steps


class ErrorAlone(Judge):
    def _cost(self, error: float, share: float) -> float:
        return 0.25 * error


class LeftInLatents(Judge):
    """What a gap's error adds up to in the latents."""

    def _cost(self, error: float, share: float) -> float:
        return 4.0 * error * share


class AnyDistance(Judge):
    """The first error, seen over one step, is believed of any gap."""

    farthest = math.inf


class FromNoise(History):
    """The first output, made from noise alone, is part of the first line."""

    def record(self, moment: float, outputs: Sequence[Tensor], span: float = 0.0, step: int = 1) -> None:
        super().record(moment, outputs, span, step + 1)


class Undamped(History):
    def damping(self) -> list[float] | None:
        self._lesson = None
        return None


class NotTakenBack(History):
    """A line of which nothing came true yet is followed as far as it is long, and no further."""

    def _weights(self, moment: float) -> list[float]:
        if len(self.moments) > 1 and self.damping() is None:
            *_, before, last = self.moments
            way = abs(last - before)
            moment = last + min(max(moment - last, -way), way)
        return lagrange(self.moments, moment)


def _made(kind: type[History] = History, judge: type[Judge] = Judge, **options) -> Callable[[float], History]:
    def make(tolerance: float) -> History:
        history = kind(ForecastOptions(**{"order": 1, "repay": True, **options}, tolerance=tolerance))
        history.judge = judge(tolerance)
        return history

    return make


# Each makes the history of one stream, for a tolerance.
RULES = {
    "as it is": _made(),
    "error alone": _made(judge=ErrorAlone),
    "left in latents": _made(judge=LeftInLatents),
    "any distance": _made(judge=AnyDistance),
    "line from noise": _made(FromNoise),
    "undamped": _made(Undamped),
    "not repaid": _made(repay=False),
    "reuse": _made(order=0),
    "parabola": _made(order=2),
}
EVEN = "every few, reused, first gap whole"
# The same, where one step in so many is computed: nothing is judged.
FIXED = {
    "every few steps": lambda: History(ForecastOptions(order=1, repay=True)),
    "every few, reused": lambda: History(ForecastOptions(order=0, repay=True)),
    "every few, undamped": lambda: Undamped(ForecastOptions(order=1, repay=True)),
    "every few, not taken back": lambda: NotTakenBack(ForecastOptions(order=1, repay=True)),
    "every few, reused, not repaid": lambda: History(ForecastOptions(order=0)),
    EVEN: lambda: History(ForecastOptions(order=0, repay=True)),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["shipped"])
    parser.add_argument("--checkpoint", type=Path, help="a folder of folders of weights")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--tolerances", type=int, default=15, help="so many, from 0.005 to 0.2")
    parser.add_argument("--only", nargs="*", choices=[*RULES, *FIXED, "fewer steps"])
    parser.add_argument("--output", type=Path, help="a JSON file of all that was run")
    parser.add_argument("--tiny", action="store_true", help="models of no weights worth anything, on the CPU")
    args = parser.parse_args(arguments)
    tolerances = [0.005 * 40.0 ** (k / max(1, args.tolerances - 1)) for k in range(args.tolerances)]
    rows = []
    with torch.no_grad():
        for name in args.model:
            model = MODELS[name](args.checkpoint and args.checkpoint / name, args.clips, args.tiny)
            print(f"| {name}, computed of {args.steps} | " + " | ".join(map(str, COUNTS)) + " |")
            print("|---" * (len(COUNTS) + 1) + "|", flush=True)
            for rule, points in _points(model, args.steps, tolerances):
                if args.only and rule not in args.only:
                    continue
                bar = tqdm(points, desc=f"{name}: {rule}", unit="setting", leave=False, file=sys.stderr)
                found = [(setting, *run()) for setting, run in bar]
                rows += [
                    {"model": name, "rule": rule, "steps": args.steps, "setting": s, "computed": n, "psnr": p, "at": at}
                    for s, p, n, at in found
                ]
                curve = [(computed, psnr) for _, psnr, computed, _ in found]
                cells = [f"{value:.1f}" if (value := near(curve, count)) is not None else "" for count in COUNTS]
                print(f"| {rule} | {' | '.join(cells)} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


def _points(model: Model, steps: int, tolerances: Sequence[float]):
    """(rule, [(setting, what runs it)])"""
    few = [n for n in COUNTS if n < steps]
    yield "fewer steps", [(n, lambda n=n: model.fewer(n, steps)) for n in few]
    for rule, make in RULES.items():
        yield rule, [(t, lambda t=t, make=make: model.judged(lambda: make(t), steps)) for t in tolerances]
    for rule, make in FIXED.items():
        firsts = {e: e if rule == EVEN else (e + 1) // 2 for e in EVERY}
        yield (
            rule,
            [
                (e, lambda e=e, at=at, make=make: model.fixed(make, range(at, steps, e), steps))
                for e, at in firsts.items()
            ],
        )


def near(points: Sequence[tuple[float, float]], count: float) -> float | None:
    """Decibels at that many computed steps, by a line through points (computed steps, decibels) that lie near; None
    where none do."""
    far = [math.log(computed / count) for computed, psnr in points]
    weights = [math.exp(-((x / NEAR) ** 2) / 2) for x in far]
    total = sum(weights)
    if total < 0.9:
        return None
    middle = sum(w * x for w, x in zip(weights, far)) / total
    mean = sum(w * psnr for w, (_, psnr) in zip(weights, points)) / total
    spread = sum(w * (x - middle) ** 2 for w, x in zip(weights, far))
    along = sum(w * (x - middle) * (psnr - mean) for w, x, (_, psnr) in zip(weights, far, points))
    return mean - middle * (along / spread if spread > 1e-6 else 0.0)


if __name__ == "__main__":
    main()
