"""What a probe saw, as tables and as a picture, from its rows alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .config import Config

if TYPE_CHECKING:
    from .probing import probe

Rows = Sequence[dict[str, Any]]
# Lines of layers in a table; of more, as many evenly spaced.
MOST_LAYERS = 16
BARS = "▁▂▃▄▅▆▇█"
# Columns of the tables: what a row calls it, two lines of a heading.
ATTENTION = {
    "mass_5": ("best", "5%"), "mass_10": ("", "10%"), "mass_20": ("", "20%"), "mass_30": ("", "30%"),
    "columns_90": ("90%", "needs"), "columns_95": ("95%", "needs"), "mass_chosen": ("chosen", "hold"),
    "change": ("change", "a step"), "caught": ("delta", "follows"),
}  # fmt: skip
MLP = {
    "energy_10": ("best", "10%"), "energy_20": ("", "20%"), "energy_30": ("", "30%"), "caught": ("chosen", "hold"),
    "act_change": ("hidden", "change"), "change": ("output", "change"),
}  # fmt: skip
WHAT = {
    "attention": "attention: share of its mass that the best columns of a chunk hold, and columns that it takes",
    "mlp": "mlp: share of the change's energy that the neurons of a chunk with most of it hold",
}


def text(seen: probe) -> str:
    """The report that `print(seen)` shows."""
    rows = seen.rows
    if not seen.forwards:
        return (
            f"probe: no forward of {seen.model} ran inside the block; give probe() the module that the pipeline calls"
        )
    lines = [_title(seen, rows)]
    for kind, columns in (("attention", ATTENTION), ("mlp", MLP)):
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            lines += ["", f"  {WHAT[kind]}", *(f"  {line}" for line in _table(of_kind, columns))]
    lines += ["", *(f"  {line}" for line in _over_steps(rows))]
    verdict = [f"  {line}" for line in _verdict(rows, seen.config)]
    lines += ["", *verdict] if verdict else []
    return "\n".join([*lines, *_not_seen(seen)])


def mean(rows: Rows, name: str) -> float | None:
    """Of the rows that have the number; None where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def sites(rows: Rows) -> dict[str, list[dict]]:
    """Rows by site, in the order of the model."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["site"], []).append(row)
    return found


def by_step(rows: Rows, name: str) -> list[float | None]:
    """Means over layers and streams, one for each step."""
    steps = max((row["step"] for row in rows), default=-1) + 1
    return [mean([row for row in rows if row["step"] == step], name) for step in range(steps)]


def _title(seen: probe, rows: Rows) -> str:
    steps = len(by_step(rows, "change"))
    streams = max((row["stream"] for row in rows), default=0) + 1
    counts = [len(sites([r for r in rows if r["kind"] == kind])) for kind in ("attention", "mlp")]
    return (
        f"probe: {seen.model}, {steps} steps, {_count(streams, 'stream')} a step, {_count(seen.forwards, 'call')}\n"
        f"  {_count(counts[0], 'attention')} and {_count(counts[1], 'MLP')}; up to {seen.chunks} chunks of each, up to "
        f"{seen.tokens} tokens of each chunk remembered: {seen.state_bytes / 1e6:.1f} MB"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _table(rows: Rows, columns: dict[str, tuple[str, str]]) -> list[str]:
    layers = sites(rows)
    names = list(layers)
    shown = names if len(names) <= MOST_LAYERS else [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))]
                                                     for i in range(MOST_LAYERS)]  # fmt: skip
    width = max(len("all layers"), *(len(name) for name in shown))
    lines = [" " * width + "".join(f"{head[i]:>8}" for head in columns.values()) for i in (0, 1)]
    lines += [f"{name:<{width}}" + _numbers(layers[name], columns) for name in shown]
    left = len(names) - len(shown)
    lines += [f"({left} more layers in .rows)"] if left else []
    return [*lines, f"{'all layers':<{width}}" + _numbers(rows, columns)]


def _numbers(rows: Rows, columns: dict[str, tuple[str, str]]) -> str:
    return "".join(f"{_percent(mean(rows, name)):>8}" for name in columns)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if abs(value) < 0.0995 else f"{value:.0%}"


def _over_steps(rows: Rows) -> list[str]:
    """Bars over steps, each line scaled to its own largest."""
    wanted = (
        ("model's output, change", "model", "change"), ("  and from the line", "model", "line"),
        ("attention outputs", "attention", "change"), ("MLP outputs", "mlp", "change"),
        ("attention, delta follows", "attention", "caught"),
    )  # fmt: skip
    lines = []
    for label, kind, name in wanted:
        of_kind = [row for row in rows if row["kind"] == kind]
        values = by_step(of_kind, name)
        average = mean(of_kind, name)
        if average is not None:
            known = [(value, step) for step, value in enumerate(values) if value is not None]
            most, at = max(known)
            lines.append(f"{label:<26}{bars(values)}  {_percent(average)} a step, most {_percent(most)} at step {at}")
    return (
        ["over the steps of a generation (relative L2 of what changed since the step before)", *lines] if lines else []
    )


def bars(values: Sequence[float | None]) -> str:
    """One block character a value, as high as its share of the largest; a blank for None."""
    top = max((value for value in values if value is not None), default=0.0)
    heights = [None if v is None else min(len(BARS) - 1, int(max(v, 0.0) / top * len(BARS))) if top > 0 else 0
               for v in values]  # fmt: skip
    return "".join(" " if height is None else BARS[height] for height in heights)


def _verdict(rows: Rows, config: Config) -> list[str]:
    """What the numbers mean for the options that were given."""
    lines = []
    attention = [row for row in rows if row["kind"] == "attention"]
    later = [row for row in attention if row["age"] > 0]
    if mean(later, "caught") is not None:
        mass, caught = (_percent(mean(later, name)) for name in ("mass_chosen", "caught"))
        lines.append(
            f"attention: {1 - config.attention.sparsity:.1%} of the columns, chosen at the last refresh, hold {mass} "
            f"of the mass; a delta step follows {caught} of what changed since"
        )
    mlps = [row for row in rows if row["kind"] == "mlp"]
    if mean(mlps, "caught") is not None:
        lines.append(
            f"mlp: {1 - config.mlp.sparsity:.1%} of the neurons, chosen anew at every step, hold "
            f"{_percent(mean(mlps, 'caught'))} of the change's energy"
        )
    model = [row for row in rows if row["kind"] == "model"]
    if mean(model, "line") is not None:
        lines.append(
            f"output: a step that reuses the last one is off by {_percent(mean(model, 'change'))}, one that draws the "
            f"line through the last two by {_percent(mean(model, 'line'))}"
        )
    return lines


def _not_seen(seen: probe) -> list[str]:
    lines = []
    if seen.captured < seen.forwards:
        lines.append(f"  in {seen.forwards - seen.captured} of {seen.forwards} calls no site was seen")
    reasons: dict = {}
    for declined in seen.declined.values():
        reasons.setdefault(declined.reason, []).append(declined)
    lines += [f"  {reason.name} x{len(which)}: {reason.value}" for reason, which in reasons.items()]
    return ["", "  not looked at:", *(f"  {line}" for line in lines)] if lines else []


def plot(seen: probe, path: str | os.PathLike) -> None:
    """Four panels: concentration of attention and of MLPs by layer, change and what a delta follows by step."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture of a probe needs matplotlib: pip install matplotlib. print(seen) and seen.rows do without"
        ) from error
    rows = seen.rows
    if not rows:
        raise ValueError(f"nothing to draw: {text(seen)}")
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)  # chosen here: the backend of the process is the user's
    panels = figure.subplots(2, 2)
    for panel, kind, names, what in (
        (panels[0][0], "attention", [name for name in ATTENTION if name.startswith("mass_")][:4], "attention mass"),
        (panels[0][1], "mlp", [name for name in MLP if name.startswith("energy_")], "energy of an MLP's change"),
    ):
        layers = sites([row for row in rows if row["kind"] == kind])
        for name in names:
            values = [mean(of_layer, name) for of_layer in layers.values()]
            panel.plot([_or_nan(v) for v in values], marker=".", label=f"best {name.partition('_')[2]}%")
        panel.set(title=f"{what} in the best columns of a chunk", xlabel="layer", ylim=(0, 1))
    for panel, lines, title in (
        (panels[1][0], (("model", "change"), ("model", "line"), ("attention", "change"), ("mlp", "change")),
         "change since the step before, relative L2"),
        (panels[1][1], (("attention", "mass_chosen"), ("attention", "caught"), ("mlp", "caught")),
         "what the chosen columns hold"),
    ):  # fmt: skip
        for kind, name in lines:
            values = by_step([row for row in rows if row["kind"] == kind], name)
            panel.plot([_or_nan(v) for v in values], marker=".", label=_LABELS[kind, name])
        panel.set(title=title, xlabel="step")
    panels[1][0].set_yscale("log")
    panels[1][1].set_ylim(top=1)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    figure.suptitle(f"{seen.model}: {seen.config.attention.sparsity:.1%} / {seen.config.mlp.sparsity:.1%} sparse")
    figure.savefig(path, dpi=120)


_LABELS = {
    ("model", "change"): "the model's output",
    ("model", "line"): "the same, from the line through two outputs",
    ("attention", "change"): "attention outputs",
    ("mlp", "change"): "MLP outputs",
    ("attention", "mass_chosen"): "attention: mass in columns of the last refresh",
    ("attention", "caught"): "attention: change since the refresh that a delta follows",
    ("mlp", "caught"): "MLP: energy of the change in the chosen neurons",
}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
