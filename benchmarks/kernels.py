"""The GPU kernels against the fastest dense ones on the same GPU, in the same run.

    python -m benchmarks.kernels --all                         every row, about 12 minutes on an H200
    python -m benchmarks.kernels --only flux mlp --budget 500  some groups, and no new row after 500 seconds
    python -m benchmarks.kernels --draw results.json           a table and a plot of what was measured; needs no GPU

Times are medians of CUDA graph replays, with a cold L2 cache, in milliseconds; the host's share is a row of its own.
Every result is checked against float64 at sampled chunks. A row's `ratio` is dense time over its own, `ideal_ratio`
what the kept columns alone allow. Rows are written as they come, into benchmarks/results/kernels-<device>.json, and
what is there of the same kernels is not measured again: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import kernels_report as report

log = logging.getLogger("kernels")


def groups() -> dict[str, Callable[[], Iterator[report.Case]]]:
    """What can be asked for, in the order of asking for all."""
    from benchmarks import kernels_attention as attention
    from benchmarks import kernels_inputs as inputs
    from benchmarks import kernels_mlp as mlp

    def shapes(tokens: int) -> list[inputs.MlpShape]:
        return [inputs.MlpShape(tokens, region) for region in (inputs.GELU, inputs.SWIGLU)]

    return {
        "ceilings": mlp.ceilings,
        "flux": lambda: attention.deltas(inputs.FLUX, 64, 128),
        "long": lambda: attention.deltas(inputs.LONG, 64, 128),
        "mlp": lambda: mlp.mlps(*shapes(4096), *shapes(32768)),
        "refresh": lambda: attention.refreshes(inputs.LONG, 64, 128),
        "longer": lambda: attention.deltas(inputs.LONGER, 64, 128),
        "wan": lambda: attention.deltas(inputs.WAN, 128),
        "hunyuan": lambda: attention.deltas(inputs.HUNYUAN, 128),
        "hunyuan-refresh": lambda: attention.refreshes(inputs.HUNYUAN, 128),
        "flux-refresh": lambda: attention.refreshes(inputs.FLUX, 64),
        "permute": mlp.permutes,
        "host": mlp.hosts,
    }


def measure(cases: list[report.Case], results: report.Results, budget: float) -> bool:
    """Measures what is lacking, in order, while the budget (seconds) lasts. Returns whether every result was right."""
    began, right = time.monotonic(), True
    for case in cases:
        if results.has(case):
            continue
        if time.monotonic() - began > budget:
            log.info("out of budget: the rest is left for another run")
            break
        start = time.monotonic()
        try:
            row = case.run()
        except Exception:  # a row that fails must not cost the others
            log.exception("FAILED %s", case.key)
            right = False
            torch.cuda.empty_cache()
            continue
        results.add(row)
        right &= row.get("rel_error", 0.0) < report.WORST
        log.info("%s [%.1f s]", report.line(row), time.monotonic() - start)
        torch.cuda.empty_cache()
    return right


def once(cases: list[report.Case]) -> None:
    """Everything, unmeasured but for correctness: for profilers and sanitizers."""
    from unittest import mock

    from benchmarks import kernels_attention, kernels_mlp

    def run_once(run, prepare=None) -> float:
        run()
        return 1.0

    with (
        mock.patch.object(kernels_attention, "milliseconds", run_once),
        mock.patch.object(kernels_attention, "_dense", lambda shape: ("none", 1.0)),
        mock.patch.object(kernels_mlp, "milliseconds", run_once),
        mock.patch.object(kernels_mlp, "_dense", lambda shape: ("none", 1.0)),
    ):
        for case in cases:
            log.info("%s rel_error %s", case.key, case.run().get("rel_error"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every group")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GROUP", help="ceilings, flux, long, mlp, refresh, ..."
    )
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no new row")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--once", action="store_true", help="run everything once, untimed: for profilers")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument(
        "--draw", type=Path, metavar="JSON", help="print a table of the rows, draw them beside the file"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.draw:
        whole = json.loads(options.draw.read_text())
        report.plot(whole, options.draw.with_suffix(".svg"))
        log.info(report.markdown(whole))
        return 0
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU (only --draw does not)")
    known = groups()
    names = list(known) if options.all else options.only
    if not names or not set(names) <= set(known):
        parser.error(f"--all, or --only some of {', '.join(known)}")
    torch.manual_seed(int(time.time()))
    cases = [case for name in names for case in known[name]()]
    with torch.no_grad():
        if options.once:
            once(cases)
            return 0
        results = report.Results(options.output or report.default_path(), report.provenance(), options.again)
        return 0 if measure(cases, results, options.budget) else 1


if __name__ == "__main__":
    sys.exit(main())
