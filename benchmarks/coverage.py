"""What is accelerated of every transformer class of diffusers and of plain-PyTorch ones: the coverage table.

    python -m benchmarks.coverage [--only NAME ...] [--resume] [--inductor]

Runs each model of tests/zoo for some denoising steps at sparsity 0, refresh and delta programs both, compares with its
dense self, and counts the accelerated attention and MLPs against what the eager model calls. Writes
benchmarks/results/coverage.json after every model (`--resume` skips those that it holds) and docs/coverage.md.

Graphs run as they are, a second or so a model, and compare with eager. With --inductor every program is compiled and
compares with torch.compile(model): a minute a model on two cores; that error has a column of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import platform
import sys
import time
import warnings
from collections import Counter

import diffusers
import torch

from chipmunk_compile.passes.reasons import Reason
from tests.zoo import STEPS, ZOO
from tests.zoo.coverage import KINDS, MIN_TOKENS, NOT_CAPTURED, NOT_SEEN, InductorFails, cover

HERE = pathlib.Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "coverage.json", HERE.parent / "docs" / "coverage.md"
OTHER_REASONS = {
    NOT_CAPTURED: "it runs outside the graphs that Dynamo captures: after a graph break, or behind its recompile limit",
    NOT_SEEN: "no pass has seen it",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models whose name contains one of these")
    parser.add_argument("--resume", action="store_true", help="skip models that the results hold already")
    parser.add_argument("--inductor", action="store_true", help="compile every program")
    parser.add_argument("--threads", type=int, default=1, help="of torch; tiny tensors gain nothing by more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    results = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    mode = "inductor" if arguments.inductor else "graphs"
    names = [n for n in ZOO if not arguments.only or any(part in n for part in arguments.only)]
    todo = [n for n in names if not (arguments.resume and mode in results.get(n, {}))]
    for done, name in enumerate(todo):
        _progress(done, len(todo), name)
        started = time.perf_counter()
        try:
            row = cover(ZOO[name], arguments.inductor).to_dict()
        except InductorFails as error:
            row = {"inductor_fails": str(error)[:200]}
        except Exception as error:  # the table says so; the other models still run
            row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        row["seconds"] = round(time.perf_counter() - started, 1)
        results.setdefault(name, {})[mode] = row
        _write(results)
    _progress(len(todo), len(todo), "")
    print()
    print(_table(results))
    print(_totals(results))


def _progress(done: int, total: int, name: str) -> None:
    width = 30
    filled = width * done // max(total, 1)
    print(
        f"\r[{'#' * filled}{'.' * (width - filled)}] {done}/{total} {name:48.48}", end="", file=sys.stderr, flush=True
    )


def _write(results: dict) -> None:
    ordered = {name: results[name] for name in ZOO if name in results}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": platform.machine()}
    RESULTS.write_text(json.dumps({"versions": versions, "models": ordered}, indent=1) + "\n")
    TABLE.write_text(_page(ordered))


def _page(results: dict) -> str:
    return f"""# What is accelerated, model by model

Every transformer class of diffusers {diffusers.__version__}, tiny, and transformers in plain PyTorch as people write
them ([tests/zoo](../tests/zoo)). Made by `python -m benchmarks.coverage`; nothing here is written by hand.

Each model runs {STEPS} steps at sparsity 0, refreshes and deltas, new latents and a new timestep at every call. What
counts is what the *eager* model calls, found by watching its functions: **attention** is self-attention over at least
{MIN_TOKENS} tokens whose keys depend on the latents, without a mask or with a key mask; **MLP** is linear maps with
something elementwise and not affine between them (two-layer, gated, or fused with attention), over at least as many
tokens of the latents. Text, pooled conditions and timesteps are in neither. **error** is the largest difference to the
dense model over its largest value; *compiled* is the same with every program through Inductor ("Inductor fails":
`torch.compile(model)` does by itself).

{_totals(results)}

{_table(results)}

## What stays dense, and why

{_exceptions(results)}

## What the columns do not say

- **order**: a tiny model gains too little by a token order for its gathers (WALLED_IN);
  [permutation.md](permutation.md) has full-size models.
- **steps**: where no timestep reaches the graphs that have sites, `chipmunk_compile.generation(model, steps=...)`
  told the steps.
"""


def _row(name: str, modes: dict) -> list[str]:
    row = modes.get("graphs") or modes.get("inductor")
    if "failed" in row:
        return [name, "-", "-", "-", "-", "-", f"failed: {row['failed']}", ""]
    compiled = modes.get("inductor", {})
    fails = "Inductor fails" if "inductor_fails" in compiled else "-"
    return [
        name,
        str(row["graphs"]),
        *(f"{row['accelerated'][kind]} of {row['of'][kind]}" for kind in KINDS),
        row["permutation"],
        row["clock"] or "-",
        f"{modes['graphs']['error']:.0e}" if "error" in modes.get("graphs", {}) else "-",
        f"{compiled['error']:.0e}" if "error" in compiled else fails,
    ]


def _table(results: dict) -> str:
    head = ["model", "graphs", "attention", "MLP", "order", "steps", "error", "compiled"]
    rows = [_row(name, modes) for name, modes in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _shown(results: dict) -> list[dict]:
    rows = [modes.get("graphs") or modes["inductor"] for modes in results.values()]
    return [row for row in rows if "failed" not in row]


def _totals(results: dict) -> str:
    rows = _shown(results)
    parts = []
    for kind in KINDS:
        taken, of = (sum(row[key][kind] for row in rows) for key in ("accelerated", "of"))
        parts.append(f"{taken} of {of} {'MLPs' if kind == 'mlp' else 'attentions'} ({taken / max(of, 1):.1%})")
    mistaken = sum(len(row["mistaken"]) for row in rows)
    compiled = [modes["inductor"] for modes in results.values() if "error" in modes.get("inductor", {})]
    exact = [row["error"] for row in (*rows, *compiled) if row["tolerance"] <= 1e-4]
    rounded = [row["error"] for row in (*rows, *compiled) if row["tolerance"] > 1e-4]
    return (
        f"{len(results)} models, {len(results) - len(rows)} failed. Accelerated: {' and '.join(parts)}; "
        f"{mistaken} cross-attentions or conditioning MLPs by mistake. Largest error {max(exact, default=0):.1e}, "
        f"and {max(rounded, default=0):.1e} of those that round to bfloat16 themselves; {len(compiled)} models "
        "with every program through Inductor."
    )


def _exceptions(results: dict) -> str:
    lines = []
    for name, modes in results.items():
        row = modes.get("graphs") or modes["inductor"]
        if "failed" in row:
            continue
        for (kind, reason), count in Counter((m["kind"], m["reason"]) for m in row["missed"]).items():
            detail = next(m["detail"] for m in row["missed"] if (m["kind"], m["reason"]) == (kind, reason))
            meaning = OTHER_REASONS.get(reason) or Reason[reason].value
            lines.append(f"- {name}, {count} {kind}: **{reason}**, {meaning}{f' ({detail})' if detail else ''}")
        lines += [f"- {name}: a graph is dense, **{reason}**" for reason in row["reasons"] if "NO_SITES" not in reason]
    return "\n".join(lines) or "Nothing."


if __name__ == "__main__":
    main()
