"""Runs one model, dense and through our backend, and hands back what was measured as columns of a row."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections import Counter

import torch

import chipmunk_compile
from benchmarks import models_timing as timing
from benchmarks.models_zoo import STEPS, Loop, Subject, build, small
from chipmunk_compile.backend import chipmunk  # the string names the same, where the package is installed
from chipmunk_compile.config import Config

log = logging.getLogger("models")
ENOUGH_S = 8.0  # of timed steps of one kind
# The first steps of a generation, so many that each program ran: R R d d d, and R R d d d d d f d.
STEPS_PLAIN, STEPS_FORECAST = 5, 9


class Depth:
    """One model of so many layers on the device, with the dense model compiled beside ours: they share the weights."""

    def __init__(self, subject: Subject, sdpa: str | None, device, dtype, mode: str | None, once: bool = False) -> None:
        """once: one generation is all that runs, and of it the steps that compile are left out."""
        self.subject, self.sdpa, self.device, self.dtype, self.mode = subject, sdpa, device, dtype, mode
        self.once = once
        self._dense = None

    def __enter__(self) -> Depth:
        started = time.perf_counter()
        self.model = build(self.subject, self.device, self.dtype)
        timing.synchronize(self.device)
        weights = sum(p.nbytes for p in self.model.parameters())
        took = time.perf_counter() - started
        log.info("built %s layers, %.1f GB of weights, in %.1f s", self.subject.built, weights / 1e9, took)
        return self

    def __exit__(self, *_: object) -> None:
        self.model = self._dense = None
        free(self.device)

    def call_dense(self, **inputs):
        with timing.fastest_sdpa(self.sdpa):
            return self._dense(**inputs)

    def dense(self, brief: bool) -> dict:
        """Columns of Inductor's model. brief: milliseconds alone."""
        log.info("dense: compiling (SDPA: %s)", self.sdpa or "torch's own choice")
        before = _from_caches()
        self._dense = torch.compile(self.model, dynamic=False, mode=self.mode)
        loop = Loop(self.subject, self.device, self.dtype)
        first = self._wall(lambda: timing.run_step(self.call_dense, loop.step(0), self.device))
        caches = "warm" if _from_caches() > before else "cold"
        log.info("dense: first step in %.1f s, caches %s", first, caches)
        self._reset_peak()
        ready = timing.run_step(self.call_dense, loop.step(1), self.device)[0].ms
        if self.once:
            return {"dense_ms": ready, "dense_peak_bytes": self._peak(), "dense_cold_start_s": first - ready / 1e3}
        count = _enough(3 * ready)
        ms = timing.medians(self._generations(self.call_dense, 3, count))["dense"]
        found = {"dense_ms": ms}
        if brief:
            return found
        found |= {"dense_peak_bytes": self._peak(), "caches": caches, "dense_cold_start_s": first - ms / 1e3}
        idle = [timing.run_step(self.call_dense, loop.step(k), self.device, idle=True)[2] for k in range(2, 5)]
        found["dense_host_ms"] = statistics.median(idle)
        parts = timing.profile(lambda: self._run(self.call_dense, loop.step(5)), self.device, self.subject.hidden)
        found["dense_until_first_launch_ms"] = parts.pop("until_first_launch", None)
        found["dense_parts_ms"] = _with_gaps(parts, ms)
        if self._loops:
            found["dense_loop_s"] = self.loop(self.call_dense)[0]
            log.info("dense: %d steps really run in %.2f s", STEPS, found["dense_loop_s"])
        return found

    def ours(self, options: dict, brief: bool) -> dict:
        """Columns of the model that our backend compiled. brief: milliseconds alone."""
        steps = STEPS_FORECAST if Config.from_options(options).forecasts else STEPS_PLAIN
        log.info("ours: %s", options)
        ours = torch.compile(self.model, backend=chipmunk, dynamic=False, options=options)

        def compiled(**inputs):  # what is not treated attends as the dense model does
            with timing.fastest_sdpa(self.sdpa):
                return ours(**inputs)

        self._reset_peak()
        first, timed, output, held = self._first_generation(compiled, steps)
        if not self.once:
            self._reset_peak()
            timed = self._generations(compiled, steps, _enough(timed[-1].ms * steps))
        ms = timing.medians(timed)
        counted = dict(Counter(step.program for step in timed))
        log.info("ours: %s ms, medians of %s", {k: round(v, 2) for k, v in ms.items()}, counted)
        found = {f"{program}_ms": value for program, value in ms.items()}
        if not brief:
            found |= {"peak_bytes": self._peak(), **held}
            found["cold_start_s"] = first - sum(ms.get(name, 0.0) for name in ("refresh", "delta")) / 1e3
            if self.once:
                found["error"] = self._error(output, Loop(self.subject, self.device, self.dtype, seed=100), steps)
            else:
                found |= self._look(compiled, steps, ms)
            if self._loops:
                seconds, ran = self.loop(compiled)
                found["loop_really_run"] = {"seconds": seconds, "steps": dict(ran)}
                log.info("ours: %d steps really run in %.2f s: %s", STEPS, seconds, dict(ran))
        chipmunk_compile.reset()
        return found

    @property
    def _loops(self) -> bool:
        """Whether all 50 steps are run: where that takes seconds."""
        return self.subject.family == "flux" and self.subject.whole

    def _generations(self, call, steps: int, count: int) -> list[timing.Step]:
        return timing.generations(call, self.subject, self.device, self.dtype, steps=steps, count=count)

    def _first_generation(self, compiled, steps: int) -> tuple[float, list[timing.Step], torch.Tensor, dict]:
        """Seconds of the first refresh and the first delta step, which compile; the other steps; the last output; the
        bytes that its state took."""
        loop, seen, others = Loop(self.subject, self.device, self.dtype, seed=100), {}, []
        for k in range(steps):
            start = time.perf_counter()
            timer, program, host_ms, output = timing.run_step(compiled, loop.step(k), self.device)
            timing.synchronize(self.device)
            took = time.perf_counter() - start
            if program not in seen:
                log.info("ours: the first %s step in %.1f s", program, took)
                seen[program] = took
            else:
                others.append(timing.Step(program, timer.ms, host_ms))
        counted = chipmunk_compile.counters()
        held = {name: counted[name] for name in ("state_bytes", "host_state_bytes")}
        return seen.get("refresh", 0.0) + seen.get("delta", 0.0), others, output, held

    def _look(self, compiled, steps: int, ms: dict) -> dict:
        """One generation more, its queue empty before each step: the host's time, what the last delta step differs in
        from a dense one, and where the time of the next goes."""
        loop, host = Loop(self.subject, self.device, self.dtype, seed=50), []
        for k in range(steps):
            _, program, host_ms, output = timing.run_step(compiled, loop.step(k), self.device, idle=True)
            host.append(timing.Step(program, 0.0, host_ms))
        assert program == "delta", program
        error = self._error(output, loop, steps)
        counted = chipmunk_compile.counters()["delta"]
        parts = timing.profile(lambda: self._run(compiled, loop.step(steps)), self.device, self.subject.hidden)
        assert not parts or chipmunk_compile.counters()["delta"] == counted + self.subject.calls
        first = parts.pop("until_first_launch", None)
        again = Loop(self.subject, self.device, self.dtype, seed=51)
        refresh = timing.profile(lambda: self._run(compiled, again.step(0)), self.device, self.subject.hidden)
        refresh.pop("until_first_launch", None)
        return {
            "host_ms": timing.medians(host, "host_ms"), "until_first_launch_ms": first, "error": error,
            "parts_ms": _with_gaps(parts, ms["delta"]), "refresh_parts_ms": _with_gaps(refresh, ms["refresh"]),
        }  # fmt: skip

    def _error(self, output: torch.Tensor, loop: Loop, steps: int) -> dict:
        """Of the last of `steps` steps, a delta step: how far its output lies from a dense one's."""
        output = output.float()
        reference = self.call_dense if self._dense is not None else self.model
        dense = reference(**loop.step(steps - 1)[0])[0].float()
        before = reference(**loop.step(1)[0])[0].float()
        return {
            "delta_to_dense": relative(output, dense), "last_refresh_to_dense": relative(before, dense),
            "dense_by": "eager" if self._dense is None else "Inductor", "age": steps - 2,
        }  # fmt: skip

    def loop(self, call) -> tuple[float, Counter]:
        """Seconds of a whole generation with the scheduler's arithmetic, and how many steps each program ran."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
        image = self.subject.tokens - self.subject.text
        shift = 0.5 + (image - 256) * (1.15 - 0.5) / (4096 - 256)
        sigmas = [1.0 - k * (1.0 - 1.0 / STEPS) / (STEPS - 1) for k in range(STEPS)]
        scheduler.set_timesteps(sigmas=sigmas, mu=shift, device=self.device)
        loop, ran = Loop(self.subject, self.device, self.dtype, seed=200), Counter()
        latents = loop.noise
        timing.synchronize(self.device)
        started = time.perf_counter()
        for moment in scheduler.timesteps:
            time_now = moment.expand(1).to(self.dtype) / 1000
            calls = [{**call_, "timestep": time_now} for call_ in loop.at(latents, 0.0)]
            _, program, _, output = timing.run_step(call, calls, self.device)
            latents = scheduler.step(output, moment, latents, return_dict=False)[0]
            ran[program] += 1
        timing.synchronize(self.device)
        seconds = time.perf_counter() - started
        assert latents.isfinite().all()
        return seconds, ran

    def _run(self, call, calls: list[dict]) -> None:
        for inputs in calls:
            call(**inputs)

    def _wall(self, run) -> float:
        started = time.perf_counter()
        run()
        timing.synchronize(self.device)
        return time.perf_counter() - started

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def exactness(subject: Subject, options: dict, sdpa: str | None, device, dtype) -> dict:
    """Two layers of each kind at sparsity 0: a delta step against Inductor's, and eager against Inductor's."""
    subject = small(subject)
    every = {"preset": "exact", "dense_layers": 0, "schedule.refresh_at": []}
    kept = {name: None for name in ("attention.sparsity", "mlp.sparsity") if options[name] is None}
    plain = {name: value for name, value in options.items() if name not in ("attention.sparsity", "mlp.sparsity")}
    plain = {name: value for name, value in plain.items() if not name.startswith("schedule.")}
    with Depth(subject, sdpa, device, dtype, None) as depth:
        depth._dense = torch.compile(depth.model, dynamic=False)
        compiled = torch.compile(depth.model, backend=chipmunk, dynamic=False, options={**plain, **every, **kept})
        loop = Loop(subject, device, dtype, seed=60)
        for k in range(4):
            _, program, _, output = timing.run_step(compiled, loop.step(k), device)
        assert program == "delta", program
        output = output.float()
        dense = depth.call_dense(**loop.step(3)[0])[0].float()
        eager = depth.model(**loop.step(3)[0])[0].float()
        found = {"at_sparsity_0": relative(output, dense), "eager_to_inductor": relative(eager, dense)}
        log.info("sparsity 0, layers %s, %d tokens: %s", subject.built, subject.tokens, found)
        chipmunk_compile.reset()
    return found


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def free(device: torch.device) -> None:
    """Gives back what a model held, compiled programs too."""
    torch._dynamo.reset()
    chipmunk_compile.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _with_gaps(parts: dict[str, float], ms: float) -> dict[str, float]:
    """Parts and what is left of the step as it ran unprofiled: waiting for launches, and for the timestep's read."""
    return {**parts, "gaps": ms - sum(parts.values())} if parts else {}


def _enough(generation_ms: float) -> int:
    """Generations to time."""
    return max(1, min(8, int(1e3 * ENOUGH_S / generation_ms)))


def _from_caches() -> int:
    """Programs that this process found compiled on disk."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
