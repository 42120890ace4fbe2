"""The harness on a GPU: trained models, many seeds, every method at every number of steps, rows kept as they come."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import chipmunk_compile
from benchmarks.kernels_report import Results, default_path, digest, provenance, rounded
from benchmarks.models_timing import fastest_sdpa

from . import checkpoints, frechet, metrics
from .attention_mass import attention_mass, table
from .methods import OURS, Method
from .sampling import captions, generate, pictures_of, starting_noise
from .sdpa import inference_sdpa
from .settings import Builder
from .subjects import SUBJECTS, tiny

log = logging.getLogger("quality")
STARTED = time.perf_counter()
KEY = ("model", "label", "steps")
SOURCES = ("chipmunk_compile", "passes", "kernels")
# What a row that runs nothing of ours depends on.
RIVALS = ("caches", "hooks", "metrics", "rivals", "sampling", "sdpa", "subjects", "windows")
FLOOR_CLIPS = 4  # of which the fp32 eager generation is made: it is slow
RECENT = 3  # dense generations whose median a row is held against
APART = 25.0  # seconds after which a dense generation is timed anew, amid a row's own


class Bench:
    """One trained model on one device, with the dense generations that all else is held against."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.subject = tiny(SUBJECTS[args.model]) if args.tiny else SUBJECTS[args.model]
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.batch = self.subject.measured
        self.seeds = self.batch * math.ceil(args.seeds / self.batch)
        self.model = checkpoints.load_weights(args.checkpoint, self.device, self.dtype)
        self.text = captions(self.subject, self.seeds, seed=1).to(self.device, self.dtype)
        self.noise = starting_noise(self.subject, self.seeds, 1, self.device)
        self.sdpa, sdpa_ms = inference_sdpa(self.subject, self.batch, self.device)
        compiled = self.model if args.eager else torch.compile(self.model, dynamic=False, mode=args.mode)
        self.dense = self.fast(compiled)
        weights = checkpoints.digest(args.checkpoint)
        head = provenance(*SOURCES) if not args.tiny else {"device": "cpu", "sources": digest(*SOURCES)}
        # Rows of other weights, or of other programs, are rows of something else.
        self.rivals = f"{digest(*(f'benchmarks/quality/{name}.py' for name in RIVALS))}-{weights}"
        head |= {"sources": f"{head['sources']}-{weights}", "weights": weights, "model": args.model,
                 "tokens": self.subject.tokens,
                 "grid": list(self.subject.grid), "guidance": self.subject.guidance, "clips_a_call": self.batch,
                 "sdpa": self.sdpa, "sdpa_ms": rounded(sdpa_ms)}  # fmt: skip
        path = args.output or default_path(f"quality-{self.subject.name}")
        before = json.loads(path.read_text()) if path.is_file() else {}
        if before.get("weights") == weights:
            head |= {name: before[name] for name in ("attention_mass", "frechet_dense") if name in before}
        self.results = Results(path, head, args.again, KEY)
        self.expected: dict[int, Tensor] = {}
        self.dense_seconds: dict[int, list[float]] = {}
        self.dense_at: dict[int, float] = {}
        self.encoder = self.real = None

    def fast(self, called: Callable) -> Callable:
        """The same, where the fastest SDPA of this machine comes first."""
        if self.sdpa is None:
            return called

        def call(**inputs):
            with fastest_sdpa(self.sdpa):
                return called(**inputs)

        return call

    @property
    def late(self) -> bool:
        return time.perf_counter() - STARTED > self.args.budget

    def run(self, called: Callable, part: int, steps: int) -> tuple[Tensor, float]:
        """A whole generation of one batch: latents, and seconds on the wall."""
        rows = slice(part * self.batch, (part + 1) * self.batch)
        self._synchronize()
        started = time.perf_counter()
        latents = generate(called, self.subject, self.noise[rows], self.text[rows], steps, self.dtype)
        self._synchronize()
        return latents, time.perf_counter() - started

    @property
    def parts(self) -> int:
        return self.seeds // self.batch

    def reference(self, steps: int) -> None:
        """Compiled dense of every seed, and how long it takes."""
        self.run(self.dense, 0, 2)  # compiles
        made = [self.run(self.dense, part, steps) for part in range(self.parts)]
        self.expected[steps] = torch.cat([latents for latents, _ in made])
        self.dense_seconds[steps] = [seconds for _, seconds in made]
        self.dense_at[steps] = time.perf_counter()
        log.info("dense, %d steps: %.3f s a batch of %d, over %d batches", steps,
                 statistics.median(self.dense_seconds[steps]), self.batch, self.parts)  # fmt: skip

    def measure(self, method: Method, steps: int) -> dict:
        """One row. Now and then a dense generation runs amid the method's own, so that both see the same clocks; its
        time is the median of the last few."""
        own_steps = method.steps or steps
        chipmunk_compile.reset()
        if not method.ready:  # compiles every program: R R f d f d .., a refresh at 8 too
            self.run(method.make(), 0, min(own_steps, 9))
        seconds, made = [], []
        before = chipmunk_compile.counters()
        for part in range(self.parts):
            if part == self.parts // 2 and time.perf_counter() - self.dense_at[steps] > APART:
                self.dense_seconds[steps].append(self.run(self.dense, part, steps)[1])
                self.dense_at[steps] = time.perf_counter()
            latents, own = self.run(method.make(), part, own_steps)
            seconds.append(own)
            made.append(latents)
        after = chipmunk_compile.counters()
        programs = ("dense", "refresh", "delta", "forecast")
        ran = {name: round((after[name] - before[name]) / self.parts, 1) for name in programs}  # means over batches
        dense = statistics.median(self.dense_seconds[steps][-RECENT:])
        return {
            "model": self.args.model, "method": method.name, "setting": method.setting, "label": method.label,
            "steps": steps, "calls": {name: n for name, n in ran.items() if n} or None,
            "seconds": statistics.median(seconds), "dense_seconds": dense,
            "speedup": dense / statistics.median(seconds), "clips": self.seeds,
            **self.scores(torch.cat(made), self.expected[steps]),
            "frechet_dense": self.results.head["frechet_dense"].get(str(steps)),  # a classifier trained anew is another
        }  # fmt: skip

    def scores(self, latents: Tensor, expected: Tensor) -> dict:
        """Means over clips with half of their 95% intervals, and the Fréchet distance from drawn frames."""
        each = [
            (metrics.psnr(a, b), metrics.ssim(a, b), metrics.relative_l1(x, y))
            for x, y in zip(latents.split(self.batch), expected.split(self.batch))
            for a, b in [(pictures_of(x), pictures_of(y))]
        ]
        found = {}
        for name, values in zip(("psnr", "ssim", "rel_l1"), zip(*each)):
            values = torch.cat(values).double()
            found[name] = values.mean().item()
            found[f"{name}_ci"] = 1.96 * values.std().item() / len(values) ** 0.5
        found["frechet"] = self.frechet(latents)
        return found

    def frechet(self, latents: Tensor) -> float | None:
        if self.encoder is None:
            return None
        return frechet.frechet(frechet.statistics(self.encoder, latents), self.real)

    def prepare_frechet(self) -> None:
        if self.args.encoder_seconds <= 0:
            return
        started = time.perf_counter()
        self.encoder = frechet.train_encoder(self.subject, self.args.checkpoint, self.device, self.args.encoder_seconds)
        self.real = frechet.real_statistics(
            self.encoder, self.subject, self.device, 64 if self.args.tiny else frechet.REAL
        )
        log.info("features for the Fréchet distance in %.0f s", time.perf_counter() - started)

    def look(self) -> None:
        """Attention mass by layer, into the file's head."""
        if "attention_mass" in self.results.head and not self.args.again:
            return
        mass = attention_mass(self.model, self.subject, self.noise[:1], self.text[:1], self.dtype)
        self.results.head["attention_mass"] = rounded(mass) | {
            "layers": [[round(m, 4) for m in row] for row in mass["layers"]]
        }
        log.info("%s", table(mass))

    def floor(self, steps: int) -> dict | None:
        """The noise floor: the model in fp32, as it is, against compiled bf16."""
        whole = copy.deepcopy(self.model).float()
        noise, text = self.noise[:FLOOR_CLIPS], self.text[:FLOOR_CLIPS].float()
        latents = generate(whole, self.subject, noise, text, steps, torch.float32)
        scores = self.scores(latents, self.expected[steps][: len(latents)]) | {"frechet": None}  # of too few clips
        return {
            "model": self.args.model, "method": "dense fp32 eager", "setting": {}, "label": "dense fp32 eager",
            "steps": steps, "speedup": None, "clips": len(latents), **scores,
        }  # fmt: skip

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def allow_many_programs() -> None:
    """Every setting is a program of the same code, and Dynamo runs eagerly after eight of those."""
    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.accumulated_recompile_limit = 4096


def run(args: argparse.Namespace) -> Path:
    """All methods, unless time runs out; a method that fails has a row that says so."""
    torch.manual_seed(0)
    allow_many_programs()
    bench = Bench(args)
    with torch.no_grad():
        bench.look()
        for steps in args.steps:
            bench.reference(steps)
        with torch.enable_grad():
            bench.prepare_frechet()
        found = {str(n): rounded(bench.frechet(x)) for n, x in bench.expected.items()}
        bench.results.head["frechet_dense"] = {**bench.results.head.get("frechet_dense", {}), **found}
        builder = Builder(
            bench.model, bench.subject, bench.dense, bench.fast,
            lambda called: bench.run(bench.fast(called), 0, max(args.steps)), compiled=not args.eager,
            **({"min_tokens": 64} if args.tiny else {}),
        )  # fmt: skip
        for same in zip(*(builder.methods(steps) for steps in args.steps)):
            for steps, method in zip(args.steps, same):
                _row(bench, method, steps)
        for steps in args.steps:
            known = bench.results.find((args.model, "dense fp32 eager", steps), bench.rivals)
            if not bench.late and not known and not args.only:
                _add(bench, bench.floor(steps) | {"sources": bench.rivals})
    log.info("%s", summary(bench.results.whole["rows"], args.steps))
    return bench.results.path


def _row(bench: Bench, method: Method, steps: int) -> None:
    args = bench.args
    sources = bench.results.head["sources"] if method.name == OURS else bench.rivals
    known = bench.results.find((args.model, method.label, steps), sources)
    if bench.late or known is not None or (args.only and not any(name in method.label for name in args.only)):
        return
    started = time.perf_counter()
    try:
        row = bench.measure(method, steps)
    except Exception as failure:  # a method that fails must not cost the others
        log.error("FAILED %s", method.label, exc_info=failure)
        row = {
            "model": args.model, "method": method.name, "setting": method.setting, "label": method.label,
            "steps": steps, "failure": f"{type(failure).__name__}: {failure}"[:300],
        }  # fmt: skip
    row |= {"took_s": time.perf_counter() - started, "sources": sources}
    _add(bench, row)


def _add(bench: Bench, row: dict) -> None:
    bench.results.add(rounded(row))
    if "psnr" in row:
        log.info("%s", line(row))


def line(row: dict) -> str:
    speed = f"{row['speedup']:5.2f}x" if row["speedup"] else "      "
    distance = f"  frechet {row['frechet']:.3g}" if row.get("frechet") is not None else ""
    return (
        f"{row['steps']:3d} steps  {speed}  {row['psnr']:5.1f} +- {row['psnr_ci']:.1f} dB  ssim {row['ssim']:.4f}  "
        f"l1 {row['rel_l1']:.4f}{distance}  {row['label']}  {row.get('calls') or ''}  ({row.get('took_s', 0):.0f} s)"
    )


def summary(rows: list[dict], steps: list[int]) -> str:
    """Rows by number of steps and speed."""
    known = [row for row in rows if "psnr" in row and row["steps"] in steps]
    known.sort(key=lambda row: (-row["steps"], row["speedup"] or 0.0))
    return "\n".join(["all rows", *(line(row) for row in known)])
