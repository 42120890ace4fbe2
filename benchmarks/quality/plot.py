"""Speed against likeness, one panel for each number of steps, with the noise floor; needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path


def draw(path: Path) -> Path:
    """quality-<model>-<device>.json -> the same name with .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = json.loads(path.read_text())
    rows = [row for row in whole["rows"] if "psnr" in row]
    counts = sorted({row["steps"] for row in rows}, reverse=True)
    figure, panels = pyplot.subplots(1, len(counts), figsize=(5.2 * len(counts), 4.6), squeeze=False, sharey=True)
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
                ours = name.startswith("chipmunk")
                panel.errorbar(x, y, yerr=error, fmt=marker, color=colour, label=name, markersize=7 if ours else 5,
                               linestyle="none", markeredgecolor="black" if ours else colour)  # fmt: skip
        for row in of_steps:
            if row["method"] == "dense fp32 eager":
                panel.axhline(row["psnr"], color="#999999", linestyle="--", linewidth=1)
                panel.annotate("bf16 + compile against fp32 eager", (0.99, row["psnr"]), fontsize=7, ha="right",
                               xycoords=("axes fraction", "data"), va="bottom", color="#666666")  # fmt: skip
        panel.set_xscale("log")
        panel.set_title(f"{steps} steps")
        panel.set_xlabel(f"times as fast as compiled dense, {whole['device']}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR against compiled dense, dB (95% intervals)")
    panels[0][-1].legend(fontsize=7, loc="upper right")
    figure.suptitle(f"{whole.get('model', '')}: {whole.get('tokens', '')} tokens")
    figure.tight_layout()
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def _family(row: dict) -> str:
    """Methods of one kind share a colour; ours are told apart by what they use."""
    if row["method"] != "chipmunk":
        return row["method"]
    setting = row["setting"]
    dense = "attention.sparsity" in setting and setting["attention.sparsity"] is None
    if dense and setting.get("mlp.sparsity", 0) is None:
        return "chipmunk: forecasts alone"
    if setting.get("schedule.compute_every", 1) > 1:
        return "chipmunk: deltas and forecasts"
    return "chipmunk: residual" if setting.get("forecast.residual") else "chipmunk: deltas"
