"""Measuring whole models: steps by the program that ran, the host's share, dense attention, where the time goes."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk_compile
from benchmarks.models_zoo import Loop, Subject

PROGRAMS = ("dense", "refresh", "delta", "forecast")
PARTS = ("attention", "mlp", "matmul", "pointwise", "selection", "permutation", "gaps")
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Step:
    """One denoising step that ran: all its calls. Milliseconds on the device, and until the last call returned."""

    program: str  # of PROGRAMS; "dense" also for a model without our backend; "mixed" where calls differed
    ms: float
    host_ms: float


class Timer:
    """Milliseconds between two points of a stream, read once all has run."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._now()

    def stop(self) -> None:
        self._stop = self._now()

    @property
    def ms(self) -> float:
        if self._cuda:
            self._stop.synchronize()
            return self._start.elapsed_time(self._stop)
        return 1e3 * (self._stop - self._start)

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_step(call: Callable, calls: list[dict], device: torch.device, idle: bool = False):
    """(Timer, program, host milliseconds, the first call's output) of one step. idle: the queue is empty before it."""
    if idle:
        synchronize(device)
    before = chipmunk_compile.counters()
    timer, started = Timer(device), time.perf_counter()
    output = [call(**inputs)[0] for inputs in calls][0]
    host_ms = 1e3 * (time.perf_counter() - started)
    timer.stop()
    after = chipmunk_compile.counters()
    ran = {name: after[name] - before[name] for name in PROGRAMS if after[name] != before[name]}
    program = "dense" if not ran else next(iter(ran)) if list(ran.values()) == [len(calls)] else "mixed"
    return timer, program, host_ms, output


def generations(call: Callable, subject: Subject, device, dtype, *, steps: int, count: int) -> list[Step]:
    """The first `steps` steps of `count` generations, each with conditioning and noise of its own."""
    timed = []
    for seed in range(1, count + 1):
        loop = Loop(subject, device, dtype, seed)
        for k in range(steps):
            timed.append(run_step(call, loop.step(k), device)[:3])
    return [Step(program, timer.ms, host_ms) for timer, program, host_ms in timed]


def medians(steps: list[Step], field: str = "ms") -> dict[str, float]:
    """By program; steps whose calls ran different programs are left out."""
    return {
        program: statistics.median(getattr(step, field) for step in steps if step.program == program)
        for program in PROGRAMS
        if any(step.program == program for step in steps)
    }


@contextlib.contextmanager
def fastest_sdpa(name: str | None) -> Iterator[None]:
    """Inside, compiled models attend by that backend where it can, and by any other where it cannot."""
    if name is None:
        yield
        return
    first = SDPA[name]
    rest = [*(b for b in SDPA.values() if b is not first), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel([first, *rest], set_priority=True):
        yield


def dense_attention_ms(subject: Subject, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of one dense self-attention of the model's shape, by backend; none on a CPU."""
    if device.type != "cuda":
        return {}
    heads, head_dim = subject.heads
    # As models make them: heads last but one in memory.
    q, k, v = (torch.randn(1, subject.tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = {}
    for name, backend in SDPA.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            times = []
            for _ in range(4):
                timer = Timer(device)
                F.scaled_dot_product_attention(q, k, v)
                timer.stop()
                times.append(timer.ms)
            found[name] = statistics.median(times[1:])
    return found


# --- where a step's time goes ---


def profile(call: Callable[[], object], device: torch.device, hidden: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of one call on the device by PARTS (gaps left out), and until the host launched the first kernel."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity

    synchronize(device)
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True
    ) as profiler:
        with torch.profiler.record_function("benchmark_step"):
            call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return split_trace(json.loads(path.read_text())["traceEvents"], hidden)


def split_trace(events: list[dict], hidden: tuple[int, ...]) -> dict[str, float]:
    """Kernel time by part from the events of a Chrome trace, as torch.profiler writes it, in milliseconds.

    A kernel belongs to the innermost operator around its launch: of ours, selection is what is not the product
    itself; of matrix products, those with a side in `hidden` are the MLP's.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ranges = sorted((event for event in complete if event.get("cat") == "cpu_op"), key=lambda event: event["ts"])
    kernels = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    parts = dict.fromkeys((part for part in PARTS if part != "gaps"), 0.0)
    launched = sorted(
        (launches.get(k["args"].get("correlation"), {}).get("ts", -1.0), i) for i, k in enumerate(kernels)
    )
    stack: list[dict] = []
    opened = iter(ranges)
    coming = next(opened, None)
    for at, i in launched:
        while coming is not None and coming["ts"] <= at:
            stack = [event for event in stack if event["ts"] + event["dur"] > coming["ts"]] + [coming]
            coming = next(opened, None)
        stack = [event for event in stack if event["ts"] + event["dur"] > at]
        parts[part_of(kernels[i]["name"], stack, hidden)] += kernels[i]["dur"] / 1e3
    step = next((event for event in complete if event["name"] == "benchmark_step"), None)
    first = min((at for at, _ in launched if at >= 0 and step and at >= step["ts"]), default=None)
    if first is not None:
        parts["until_first_launch"] = (first - step["ts"]) / 1e3
    return parts


def part_of(kernel: str, around: list[dict], hidden: tuple[int, ...]) -> str:
    """The part that a kernel belongs to, by its name and the operators around its launch, outermost first."""
    name = kernel.lower()
    ops = [event["name"] for event in around]
    if any("chipmunk::attention" in op for op in ops):
        choosing = ("attention_scores", "attention_select", "attention_lse")
        return "selection" if name.startswith(choosing) else "attention"
    if any("chipmunk::mlp" in op for op in ops):
        return "mlp" if name.startswith(("mlp_hopper", "mlp_up", "mlp_down")) else "selection"
    if name.startswith("gather_tokens") or "index_select" in name or "_index_" in name or name.startswith("index"):
        return "permutation"
    if any("attention" in op for op in ops) or any(word in name for word in ("fmha", "flash", "sdpa", "attention")):
        return "attention"
    if name.startswith("triton_"):
        return "matmul" if "_mm" in name or name.startswith("triton_tem") else "pointwise"
    product = next((event for event in reversed(around) if event["name"] in PRODUCTS), None)
    if product is not None:
        sizes = {size for dims in product.get("args", {}).get("Input Dims", []) for size in _flat(dims)}
        return "matmul" if sizes.isdisjoint(hidden) else "mlp"
    if any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma", "gemv", "conv")):
        return "matmul"
    return "pointwise"


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::_addmm_activation")


def _flat(dims) -> list:
    return [size for part in dims for size in _flat(part)] if isinstance(dims, list) else [dims]
