"""Rows of the kernel benchmarks: kept on disk as they come, taken up again, printed, drawn."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
KEY = ("kernel", "shape", "counts", "chunk")
WORST = 1e-2  # relative error of a bf16 result that is right


@dataclass(frozen=True)
class Case:
    """One row to be: what it is, and the function that measures the rest of it."""

    kernel: str
    shape: str
    counts: str
    chunk: int
    measure: Callable[[], dict]

    @property
    def key(self) -> tuple:
        return tuple(getattr(self, name) for name in KEY)

    def run(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in KEY if getattr(self, name)}
        return {**row, **{name: rounded(value) for name, value in self.measure().items()}}


class Results:
    """The JSON file of one device. Rows measured with the kernels as they are now are not measured again.

    head: of `provenance`; its "sources" say which kernels these are. key: the columns that name a row.
    """

    def __init__(self, path: Path, head: dict[str, Any], again: bool = False, key: Sequence[str] = KEY) -> None:
        self.path, self.head, self._names = path, head, key
        before = json.loads(path.read_text())["rows"] if path.is_file() else []
        self.rows = {self._key(row): row for row in before}
        self._again = again

    def has(self, case: Case) -> bool:
        return self.find(case.key) is not None

    def find(self, key: tuple, sources: str | None = None) -> dict[str, Any] | None:
        """The row of that key, unless it is to be measured again or was measured with other sources.

        sources: that row's, where they are not those of the head."""
        row = self.rows.get(key)
        wanted = sources or self.head["sources"]
        return row if row is not None and not self._again and row["sources"] == wanted else None

    def before(self, row: dict[str, Any]) -> dict[str, Any]:
        """What stands where that row will, of whatever sources; nothing if there is none."""
        return self.rows.get(self._key(row), {})

    def add(self, row: dict[str, Any]) -> None:
        """Written at once: a run that is cut off has lost nothing."""
        self.rows[self._key(row)] = {"sources": self.head["sources"], **row}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.whole, indent=1) + "\n")
        os.replace(temporary, self.path)

    @property
    def whole(self) -> dict[str, Any]:
        return {**self.head, "rows": list(self.rows.values())}

    def _key(self, row: dict[str, Any]) -> tuple:
        return tuple(row.get(name, 0 if name == "chunk" else "") for name in self._names)


def default_path(what: str = "kernels") -> Path:
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{what}-{'-'.join(torch.cuda.get_device_name().lower().split())}.json"


def provenance(*folders: str) -> dict[str, Any]:
    """What was measured and on what. folders: of the sources whose change makes rows those of another program."""
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": git.stdout.strip(),
        "sources": digest(*folders or ("kernels",)),
        "date": time.strftime("%Y-%m-%d"),
    }


def digest(*sources: str) -> str:
    """Of all that makes the programs, files and folders: rows of others are no longer theirs."""
    hashed = hashlib.sha256()
    roots = [ROOT / source for source in sources]
    for path in sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))):
        if path.suffix in (".py", ".jinja", ".json") and path.is_file():
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    name = " ".join(str(row[key]) for key in KEY if key in row)
    words = [f"{name}:"]
    if "ms" in row:
        words.append(f"{row['ms']:.4g} ms")
    if "tflops" in row:
        words.append(f"{row['tflops']:.0f} TF")
    if "bytes_per_s" in row:
        words.append(f"{row['bytes_per_s'] / 1e12:.2f} TB/s")
    if "ratio" in row:
        words.append(f"{row['ratio']:.2f}x of {row.get('ideal_ratio', 0):.2f} vs {row['baseline']}")
    more = ("cost", "parts_ms", "choose_ms", "mass_lacking", "host_us", "rel_error", "peak_temp_bytes")
    words += [f"{key} {row[key]}" for key in more if key in row]
    if not row.get("rel_error", 0.0) < WORST:
        words.append("WRONG")
    return " ".join(words)


def markdown(whole: dict[str, Any]) -> str:
    """The rows that compare with dense kernels, as a table."""
    lines = [
        "| kernel | shape | columns | chunk | ms | TFLOP/s | against dense | ideal | temporary MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in whole["rows"]:
        if "ratio" in row and "ideal_ratio" in row:
            cells = (row["kernel"], row["shape"], row.get("counts", ""), row.get("chunk", ""), f"{row['ms']:.3g}")
            ratio = f"costs {row['cost']:.2f}x" if "cost" in row else f"{row['ratio']:.2f}x"
            ideal = "1.0x" if "cost" in row else f"{row['ideal_ratio']:.1f}x"
            rates = (f"{row['tflops']:.0f}", ratio, ideal, f"{row['peak_temp_bytes'] / 1e6:.1f}")
            lines.append(f"| {' | '.join(map(str, (*cells, *rates)))} |")
    return "\n".join(lines)


def plot(whole: dict[str, Any], path: Path) -> None:
    """Speed-ups beside what the kept columns would allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in whole["rows"] if "ratio" in r and "ideal_ratio" in r and r["kernel"] != "attention_refresh"]
    names = [f"{r['kernel']} {r['shape']}\nchunk {r['chunk']}, {r['counts']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1))
    axes.barh(names, [r["ideal_ratio"] for r in rows], color="#dddddd", label="kept columns alone")
    axes.barh(names, [r["ratio"] for r in rows], color="#3366aa", label="measured")
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the fastest dense kernel, {whole['device']}")
    axes.tick_params(axis="y", labelsize=6)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
