"""Whole diffusion transformers of full size with random weights on one GPU, against Inductor with the fastest SDPA.

    python -m benchmarks.models --only flux-1280x768        dense, refresh, delta and forecast steps; loops really run
    python -m benchmarks.models --only wan-14b-720p         some layers, at two depths: what a layer costs, times 40
    python -m benchmarks.models --only hunyuan-720p --layers 60         the whole model
    python -m benchmarks.models --only flux-1280x768 --tiny             on a CPU, in minutes: that it runs
    python -m benchmarks.models --draw benchmarks/results/models-nvidia-h200.json          tables; needs no GPU

Each row is one model, size and setting. Steps run through `torch.compile(model, backend="chipmunk", options=...)`, with
nothing patched and nothing said about steps; what ran is read off `chipmunk_compile.counters()`. The dense model is
`torch.compile(model)`, called where the fastest SDPA on this machine comes first. Rows are written as they come, into
benchmarks/results/models-<device>.json; what is there of the same sources is not measured again, so a run that was cut
off goes on where it stopped. --budget SECONDS starts no new part after so long.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch

from benchmarks import models_report as report
from benchmarks.kernels_report import Results, default_path, provenance
from benchmarks.models_run import Depth, exactness, free, log
from benchmarks.models_timing import dense_attention_ms
from benchmarks.models_zoo import SUBJECTS, Subject, tiny

PARTS = ("dense", "table", "forecast", "exact")
SOURCES = ("chipmunk_compile", "passes", "kernels")
STARTED = time.perf_counter()


class Bench:
    """One run of the script: what was asked for, the rows, the time that is left."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.dtype = torch.float32 if options.tiny else torch.bfloat16
        self.extra = dict(options.set)
        if options.mode:
            self.extra["mode"] = options.mode
        self.failed = False

    def wants(self, part: str) -> bool:
        if part not in self.options.parts:
            return False
        if time.perf_counter() - STARTED > self.options.budget:
            log.info("out of budget: %s is left for another run", part)
            return False
        return True

    def measure(self, subject: Subject) -> None:
        """Both rows of one model and size, table and forecast, with all that they share."""
        settings = {name: {**subject.options, **more, **self.extra} for name, more in report.SETTINGS.items()}
        if not subject.whole:  # which layers are dense is put together from what a layer costs
            settings = {name: {**options, "dense_layers": 0} for name, options in settings.items()}
        rows = {name: self._row(subject, name, options) for name, options in settings.items()}
        missing = [name for name in rows if name in self.options.parts and "loop_speedup" not in rows[name]]
        common = {key: value for row in rows.values() for key, value in row.items() if key in report.COMMON}
        if "sdpa" not in common:
            # A mask keeps some backends away: then torch chooses, as it would for diffusers.
            masked = subject.family == "hunyuan" and subject.masked
            common["sdpa_ms"] = {} if masked else dense_attention_ms(subject, self.device, self.dtype)
            common["sdpa"] = min(common["sdpa_ms"], key=common["sdpa_ms"].get, default=None)
        if missing or ("dense" in self.options.parts and "dense_ms" not in common):
            depths = [subject] if subject.whole or subject.half.built == subject.built else [subject.half, subject]
            found: dict[str, list[dict]] = {name: [] for name in rows}
            for at in depths:
                self._depth(subject, at, settings, missing, rows, common, found, last=at is depths[-1])
        known = all("at_sparsity_0" in row.get("error", {}) for row in rows.values())
        if not known and self.wants("exact"):
            error = exactness(subject, settings["table"], common["sdpa"], self.device, self.dtype)
            for row in rows.values():
                row["error"] = {**row.get("error", {}), **error}
                self._write(row)

    def _depth(self, subject, at: Subject, settings, missing, rows, common, found, last: bool) -> None:
        """Measures one depth; the last one completes the rows."""
        with Depth(at, common["sdpa"], self.device, self.dtype, self.options.mode, self.options.once) as depth:
            dense: dict = {}
            if not (subject.whole and "dense_ms" in common) and self.wants("dense"):
                dense = depth.dense(brief=not last)
                log.info("%s", report.line(dense))
            if last:
                common |= dense
                for row in rows.values():  # at once: what comes next may be cut off
                    row |= common
                    if "dense_ms" in row and "loop_speedup" not in self.results.before(row):
                        self.results.add(report.rounded(row))
            for name in missing:
                if name == "forecast" and found["table"] and not last:
                    continue  # what a layer costs is known; a forecast runs none
                if not self.wants(name):
                    continue
                try:
                    ours = depth.ours(settings[name], brief=not last)
                except Exception as failure:  # a row that fails must not cost the others
                    self.fail(subject, failure)
                    rows[name]["failure"] = f"{type(failure).__name__}: {failure}"[:500]
                    self._write(rows[name])
                    free(self.device)
                    continue
                if name == "forecast" and found["table"]:  # the same programs: compiled a moment ago
                    ours["warm_start_s"] = ours.pop("cold_start_s", None)
                    ours["cold_start_s"] = rows["table"].get("cold_start_s")
                found[name].append({**dense, **ours, "depth": sum(at.built)})
                if last:
                    rows[name].pop("failure", None)
                    rows[name] |= ours
                    measured = found[name] if len(found[name]) > 1 or name == "table" else found["table"]
                    rows[name] |= report.loop(settings[name], subject, measured, rows[name])
                    self._write(rows[name])

    def fail(self, subject: Subject, failure: Exception) -> None:
        log.error("FAILED %s", subject.name, exc_info=failure)
        self.failed = True

    def _row(self, subject: Subject, setting: str, options: dict) -> dict:
        """What is known of a row before it is measured, or what was measured of it before."""
        head = {
            "name": subject.name, "model": subject.model, "shape": subject.shape,
            "layers": report.layers(subject), "preset": options.get("preset", "balanced"), "setting": setting,
            "extra": json.dumps(self.extra, sort_keys=True) if self.extra else "", "settings": options,
            "tokens": subject.tokens, "calls_per_step": subject.calls,
        }  # fmt: skip
        return {**head, **(self.results.find(tuple(head[name] for name in report.KEY)) or {})}

    def _write(self, row: dict) -> None:
        self.results.add(report.rounded(row))
        log.info("%s", report.line(row))


def _setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:  # a text as it is: memory_budget=60GB
        return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--layers", type=int, help="build about so many, double and single ones in proportion")
    parser.add_argument("--mode", help='Inductor\'s mode for both, as "reduce-overhead"')
    parser.add_argument(
        "--set", nargs="+", type=_setting, default=[], metavar="OPTION=JSON", help="attention.chunk=128"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no new part")
    parser.add_argument("--once", action="store_true", help="one generation's first steps: for what takes minutes")
    parser.add_argument("--card", type=float, metavar="GB", help="take no more of the device's memory than a card has")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--tiny", action="store_true", help="narrow, a few layers and tokens, on the CPU")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="print tables of the rows, draw them beside the file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s", stream=sys.stdout)
    if options.draw:
        whole = json.loads(options.draw.read_text())
        report.plot(whole, options.draw.with_suffix(".svg"))
        print(report.markdown(whole))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU (only --draw and --tiny do not)")
    if options.tiny:
        head, path = {"device": "cpu", "sources": "tiny"}, options.output or Path("out") / "models-tiny.json"
        path.parent.mkdir(exist_ok=True)
    else:
        head, path = provenance(*SOURCES), options.output or default_path("models")
    if options.card:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1e9 * options.card / whole)
    bench = Bench(options, Results(path, head, options.again, report.KEY))
    with torch.no_grad():
        for name in options.only:
            subject = tiny(SUBJECTS[name]) if options.tiny else SUBJECTS[name]
            log.info("== %s: %d tokens, %s layers", name, subject.tokens, report.layers(subject))
            try:
                bench.measure(subject.with_layers(options.layers) if options.layers else subject)
            except Exception as failure:  # nor may a model that fails
                bench.fail(subject, failure)
                free(bench.device)
    log.info("wrote %s", path)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
