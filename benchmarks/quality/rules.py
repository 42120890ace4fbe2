"""The rules by which steps are forecast, and those that were tried in their place.

    python -m benchmarks.quality.rules --model video --checkpoint FOLDER [--steps 28] [--clips 12] [--only NAME ...]

A trained model (`python -m benchmarks.quality.train`) denoises with each rule at several tolerances; prints the PSNR
against every step computed, at 1/2, 1/3, .. as many computed steps, between the nearest two tolerances. Nothing
is timed. On a GPU in bfloat16, compiled; on a CPU in float32, as it is (with --tiny, that it runs).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.models_timing import fastest_sdpa
from chipmunk_compile.config import ForecastOptions
from chipmunk_compile.forecast import History
from chipmunk_compile.judge import Arriving, Judge

from . import checkpoints, metrics
from .sampling import captions, generate, pictures_of, starting_noise
from .sdpa import inference_sdpa
from .simulated import Simulated
from .subjects import SUBJECTS, tiny

TOLERANCES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.2)
SPEEDS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


class Slower(Judge):
    """Errors are taken to grow with the gap itself, not with its square."""

    def _left_after(self, moment: float, gap: float) -> float:
        judged = super()._left_after(moment, gap) - self._left
        return self._left + judged / (gap / self._gap) ** self.order if self._gap and gap else math.inf


class Early(History):
    """With two steps computed, a forecast may follow: by what reusing the first would have missed at the second."""

    def record(self, moment: float, outputs: Sequence[torch.Tensor], span: float = 0.0) -> None:
        if len(self.moments) != 1:
            return super().record(moment, outputs, span)
        before, gap = self.outputs[0], abs(moment - self.moments[0])
        super().record(moment, outputs, span)
        missed = sum((a.float() - b).square().sum() for a, b in zip(outputs, before))
        reused = (missed / sum(a.float().square().sum() for a in outputs)).sqrt()
        self.judge.computed -= 1
        self.judge.weigh(moment, gap, Arriving(reused.view(1)), span)


class Fading(History):
    """What a forecast adds fades with how far it reaches, as a damped trend does (Gardner and McKenzie): the rate comes
    from what came true at the last gap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rate: float | None = None
        self._gap = 0.0

    def forecast(self, moment: float) -> list[torch.Tensor]:
        self._gap = abs(moment - self.moments[-1])
        return super().forecast(moment)

    def _compare(self, moment: float, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        self._gap = abs(moment - self.moments[-1])
        return super()._compare(moment, outputs)

    def damping(self) -> list[float] | None:
        if self.told is not None:
            rate = _inverse(self.told.values[1]) / self.judge._gap
            self._rate, self.told = rate if self._rate is None else (rate + self._rate) / 2, None
        return None if self._rate is None else [_faded(self._rate * self._gap)] * len(self.outputs[-1])


def _faded(reach: float) -> float:
    """The mean of exp(-x) from 0 to `reach`."""
    return 1.0 if abs(reach) < 1e-6 else -math.expm1(-reach) / reach


def _inverse(share: float) -> float:
    """Where `_faded` is `share`, by bisection."""
    low, high = -0.7, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _faded(middle) > share else (low, middle)
    return (low + high) / 2


def _made(kind: type[History] = History, judge: type[Judge] = Judge, **options) -> Callable[[float], History]:
    def make(tolerance: float) -> History:
        asked = ForecastOptions(**{"order": 1, "repay": True, **options}, tolerance=tolerance)
        history = kind(asked)
        history.judge = judge(tolerance, asked.order)
        return history

    return make


# Each makes the history of one stream, for a tolerance.
RULES = {
    "as it is": _made(),
    "not repaid": _made(repay=False),
    "reuse": _made(order=0),
    "parabola": _made(order=2),
    "errors grow with the gap": _made(judge=Slower),
    "from the third step on": _made(Early),
    "fading with the gap": _made(Fading),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="video")
    parser.add_argument("--checkpoint", type=Path, help="folder of the weights; with --tiny, none are read")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--tolerance", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--only", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--tiny", action="store_true", help="a model of no weights worth anything, on the CPU")
    args = parser.parse_args(arguments)
    if args.checkpoint is None and not args.tiny:
        parser.error("--checkpoint is needed")
    denoise, dense = _loop(args)
    print(" | ".join(["| rule", *(f"{speed:g}x" for speed in SPEEDS)]) + " |\n" + "|---" * (len(SPEEDS) + 1) + "|")
    for name in args.only:
        points = []
        for tolerance in tqdm(args.tolerance, desc=name, unit="tolerance", leave=False, file=sys.stderr):
            pictures, computed = denoise(lambda t=tolerance, n=name: RULES[n](t))
            points.append((args.steps / computed, metrics.psnr(pictures, dense).mean().item()))
        cells = [f"{value:.1f}" if (value := at(points, speed)) is not None else "" for speed in SPEEDS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _loop(args: argparse.Namespace) -> tuple[Callable, torch.Tensor]:
    """(what denoises with a rule: pictures, and steps computed; the pictures of all steps computed)."""
    on_gpu = torch.cuda.is_available() and not args.tiny
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    subject = tiny(SUBJECTS[args.model]) if args.tiny else SUBJECTS[args.model]
    torch.manual_seed(0)
    model = subject.build().eval() if args.tiny else checkpoints.load_weights(args.checkpoint, device, dtype)
    called, batch = torch.compile(model, dynamic=False) if on_gpu else model, subject.measured
    sdpa = inference_sdpa(subject, batch, device)[0] if on_gpu else None
    count = max(1, args.clips // batch) * batch
    noise = starting_noise(subject, count, 1, device)
    text = captions(subject, count, 1).to(device, dtype)

    def call(**inputs) -> tuple[torch.Tensor]:
        if sdpa is None:
            return called(**inputs)
        with fastest_sdpa(sdpa):
            return called(**inputs)

    def denoise(history: Callable[[], History] | None) -> tuple[torch.Tensor, float]:
        pictures, computed = [], 0
        for some, words in zip(noise.split(batch), text.split(batch)):
            streams = Simulated(call, history) if history is not None else call
            pictures.append(pictures_of(generate(streams, subject, some, words, args.steps, dtype)))
            computed += streams.computed / 2 if history is not None else args.steps
        return torch.cat(pictures), computed / len(pictures)

    return denoise, denoise(None)[0]


def at(points: Sequence[tuple[float, float]], speed: float) -> float | None:
    """Between the two of (speed, decibels) that are nearest; None beyond them."""
    points = sorted(points)
    for (slow, much), (fast, little) in zip(points, points[1:]):
        if slow <= speed <= fast:
            return much + (little - much) * (math.log(speed / slow) / math.log(fast / slow) if fast > slow else 0.0)
    return None


if __name__ == "__main__":
    main()
