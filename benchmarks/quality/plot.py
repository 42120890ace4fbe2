"""Speed against likeness, as a plot with one panel for each number of steps and as a table; needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

from .methods import OURS

JUDGED = "chipmunk: as many forecasts as prove good"
REFERENCE = "the reference's recipe"
TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
# Rows as fast as dense are dense, or nearly: they would press all others together.
LEAST_SPEEDUP = 1.05


def draw(path: Path) -> Path:
    """quality-<model>-<device>.json -> the same name with .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = json.loads(path.read_text())
    rows = _measured(whole)
    counts = sorted({row["steps"] for row in whole["rows"]}, reverse=True)
    figure, panels = pyplot.subplots(1, len(counts), figsize=(6.4 * len(counts), 6.4), squeeze=False, sharey=True)
    families = sorted({_family(row) for row in rows if row["speedup"]})
    styles = {name: (f"C{i % 10}", "osv^D<>pP*Xhd"[i % 13]) for i, name in enumerate(families)}
    for panel, steps in zip(panels[0], counts):
        of_steps = [row for row in rows if row["steps"] == steps]
        for name in families:
            points = sorted((row["speedup"], row["psnr"], row.get("psnr_ci", 0.0)) for row in of_steps
                            if row["speedup"] and _family(row) == name)  # fmt: skip
            if points:
                x, y, error = zip(*points)
                colour, marker = styles[name]
                ours = name.startswith(OURS)
                panel.errorbar(x, y, yerr=error, fmt=marker, color=colour, label=name, markersize=7 if ours else 5,
                               linestyle="-" if name == JUDGED else "none",
                               markeredgecolor="black" if ours else colour)  # fmt: skip
        for row in of_steps:
            if row["method"] == "dense fp32 eager":
                panel.axhline(row["psnr"], color="#999999", linestyle="--", linewidth=1)
                panel.annotate("bf16 + compile against fp32 eager", (0.99, row["psnr"]), fontsize=7, ha="right",
                               xycoords=("axes fraction", "data"), va="bottom", color="#666666")  # fmt: skip
        panel.set_xscale("log", subs=())
        ticks = [tick for tick in TICKS if panel.get_xlim()[0] <= tick <= panel.get_xlim()[1]]
        panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        panel.set_title(f"{steps} steps")
        panel.set_xlabel(f"times as fast as compiled dense, {whole['device']}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR against compiled dense, dB (95% intervals)")
    names = {name: handle for panel in panels[0] for handle, name in zip(*panel.get_legend_handles_labels())}
    ordered = sorted(names, key=lambda name: (not name.startswith(OURS), name))
    figure.suptitle(f"{whole.get('model', '')}: {whole.get('tokens', '')} tokens")
    figure.legend([names[name] for name in ordered], ordered, fontsize=8, loc="lower center",
                  ncols=2 * len(counts), frameon=False)  # fmt: skip
    figure.tight_layout(rect=(0, 0.03 * -(-len(ordered) // (2 * len(counts))), 1, 1))
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def table(path: Path, steps: int) -> str:
    """Markdown: all methods at that number of steps, the slowest first. In brackets, half of the 95% interval."""
    whole = json.loads(path.read_text())
    rows = sorted((row for row in _measured(whole) if row["steps"] == steps and row["speedup"]), key=_speed)
    lines = ["| method | speed-up | PSNR | SSIM | relative L1 | Fréchet |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = row["method"] == OURS and _family(row) != REFERENCE
        label = f"**{row['label']}**" if ours else row["label"]
        frechet = f"{row['frechet']:.1f}" if row.get("frechet") is not None else ""
        psnr = f"{row['psnr']:.1f} ({row['psnr_ci']:.1f}) dB"
        lines.append(
            f"| {label} | {row['speedup']:.2f}x | {psnr} | {row['ssim']:.4f} | {row['rel_l1']:.3f} | {frechet} |"
        )
    return "\n".join(lines)


def _measured(whole: dict) -> list[dict]:
    rows = [row for row in whole["rows"] if "psnr" in row]
    return [row for row in rows if row["speedup"] is None or row["speedup"] >= LEAST_SPEEDUP]


def _speed(row: dict) -> float:
    return row["speedup"]


def _family(row: dict) -> str:
    """Methods of one kind share a colour; ours are told apart by what they use."""
    setting = row["setting"]
    if row["method"] != OURS:
        return row["method"]
    if setting.get("attention.chunk") == 192:
        return REFERENCE
    whole = setting.get("forecast.refresh_every") == 1 or ("attention.sparsity", None) in setting.items()
    if whole:
        return "chipmunk: forecasts at fixed steps"
    if setting.get("forecast.repay") is False:
        return "chipmunk: the same, not repaid"
    if "forecast.tolerance" in setting and "schedule.refresh_every" not in setting or "preset" in setting:
        return JUDGED
    forecasts = "forecast.tolerance" in setting or setting.get("schedule.compute_every", 1) > 1
    return "chipmunk: deltas between forecasts" if forecasts else "chipmunk: deltas"
