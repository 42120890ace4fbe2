"""Rows of the benchmark of whole models: loops put together, lines, tables, a plot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.kernels_report import rounded
from benchmarks.models_zoo import STEPS, Subject
from chipmunk_compile.config import Config
from chipmunk_compile.schedule import program_at

__all__ = ["COMMON", "KEY", "SETTINGS", "layers", "line", "loop", "markdown", "plot", "rounded"]
KEY = ("model", "shape", "layers", "setting", "extra")
# The steps, of 50, that Chipmunk's published configurations do not compute (arXiv 2506.03275).
PUBLISHED = (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43)
SETTINGS: dict[str, dict[str, Any]] = {"table": {}, "forecast": {"schedule.forecast_at": PUBLISHED}}
# Columns of the dense model, the same in all rows of a model and size.
COMMON = (
    "sdpa", "sdpa_ms",
    "dense_ms", "dense_peak_bytes", "caches", "dense_cold_start_s", "dense_host_ms", "dense_until_first_launch_ms",
    "dense_parts_ms", "dense_loop_s",
)  # fmt: skip
PROGRAMS = ("dense", "refresh", "delta", "forecast")


def layers(subject: Subject) -> str:
    built, whole = sum(subject.built), sum(subject.layers)
    return f"all {whole}" if subject.whole else f"{built} of {whole}"


def steps_of(options: dict) -> Counter[str]:
    """How many steps of a loop each program runs."""
    schedule = Config.from_options(options).schedule
    return Counter(program_at(step, schedule).value for step in range(STEPS))


def loop(options: dict, subject: Subject, depths: list[dict], figures: dict) -> dict:
    """The loop that a row's steps add up to. Of two depths: first what each program would take at full depth."""
    ms = {program: figures.get(f"{program}_ms") for program in PROGRAMS}
    found: dict[str, Any] = {}
    if not subject.whole:
        if len(depths) < 2 or not all("dense_ms" in depth for depth in depths):
            return {}
        ms = whole_model(depths, sum(subject.layers), subject.options["dense_layers"])
        if "forecast_ms" in figures:
            ms["forecast"] = figures["forecast_ms"]
        found["whole_model_ms"] = ms
        taken = " and ".join(str(depth["depth"]) for depth in depths)
        dense = subject.options["dense_layers"]
        found["loop_by"] = f"a layer's cost from {taken} layers, {dense} of {sum(subject.layers)} dense"
    steps = steps_of(options)
    if any(ms.get(program) is None for program in ("dense", *steps)):
        return found
    ours = sum(count * ms[program] for program, count in steps.items())
    found |= {"loop_steps": dict(steps), "loop_speedup": STEPS * ms["dense"] / ours}
    found |= {"loop_s": ours / 1e3, "dense_loop_sum_s": STEPS * ms["dense"] / 1e3}
    ran = figures.get("loop_really_run")
    if ran and figures.get("dense_loop_s"):
        found["loop_really_run"] = {**ran, "dense_seconds": figures["dense_loop_s"]}
        found["loop_really_run"]["speedup"] = figures["dense_loop_s"] / ran["seconds"]
    return found


def whole_model(depths: list[dict], layers: int, dense_layers: int) -> dict[str, float]:
    """Milliseconds of each program at full depth, by a line through two depths. Dense layers cost what dense does."""
    less, more = depths
    apart = more["depth"] - less["depth"]

    def line(program: str) -> tuple[float, float]:
        layer = (more[f"{program}_ms"] - less[f"{program}_ms"]) / apart
        return layer, more[f"{program}_ms"] - more["depth"] * layer

    dense_layer, dense_rest = line("dense")
    whole = {"dense": dense_rest + layers * dense_layer}
    for program in ("refresh", "delta"):
        if f"{program}_ms" in less and f"{program}_ms" in more:
            layer, rest = line(program)
            whole[program] = rest + dense_layers * dense_layer + (layers - dense_layers) * layer
    return whole


def line(row: dict) -> str:
    """A row, or what is known of it, as one line of text."""
    words = [str(row[name]) for name in ("name", "layers", "setting", "extra") if row.get(name)]
    for program in PROGRAMS:
        if row.get(f"{program}_ms") is not None:
            words.append(f"{program} {row[f'{program}_ms']:.2f} ms")
    for name in ("sdpa", "dense_host_ms", "host_ms", "parts_ms", "dense_parts_ms", "dense_cold_start_s", "cold_start_s",
                 "state_bytes", "host_state_bytes", "peak_bytes",
                 "whole_model_ms", "error", "loop_really_run", "failure"):  # fmt: skip
        if row.get(name):
            words.append(f"{name} {rounded(row[name])}")
    if "loop_speedup" in row:
        words.append(f"LOOP {row['loop_speedup']:.3f}x")
    return " | ".join(words)


def markdown(whole: dict) -> str:
    """Two tables: speeds, and where the time of a delta step goes."""
    speeds = [
        "| model | size | layers | setting | dense ms | refresh | delta | forecast | 50 steps | really run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    parts = ["| model | size | step | attention | MLP | other matmul | pointwise | selection | permutation | gaps |"]
    parts.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in whole["rows"]:
        ms = row.get("whole_model_ms") or {program: row.get(f"{program}_ms") for program in PROGRAMS}
        cells = [row["model"], row["shape"], row["layers"], row["setting"]]
        cells += ["" if ms.get(program) is None else f"{ms[program]:.4g}" for program in PROGRAMS]
        cells.append(f"{row['loop_speedup']:.2f}x" if "loop_speedup" in row else row.get("failure", ""))
        cells.append(f"{row['loop_really_run']['speedup']:.2f}x" if "speedup" in row.get("loop_really_run", {}) else "")
        speeds.append(f"| {' | '.join(cells)} |")
        if row["setting"] == "table":
            for step, column in (("dense", "dense_parts_ms"), ("delta", "parts_ms")):
                if row.get(column):
                    names = ("attention", "mlp", "matmul", "pointwise", "selection", "permutation", "gaps")
                    values = " | ".join(f"{row[column].get(name, 0.0):.3g}" for name in names)
                    parts.append(f"| {row['model']} | {row['shape']} | {step} | {values} |")
    return "\n".join([*speeds, "", *parts])


def plot(whole: dict, path: Path) -> None:
    """Speed-ups of 50 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in whole["rows"] if "loop_speedup" in row]
    names = [f"{row['model']} {row['shape']}\n{row['setting']}, {row['layers']} layers" for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1))
    axes.barh(names, [row["loop_speedup"] for row in rows], color="#3366aa")
    axes.invert_yaxis()
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.set_xlabel(f"times as fast as Inductor over {STEPS} steps, {whole['device']}")
    axes.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
