"""Where the token permutation lands in every model, and how long the pass takes: a table for the
documentation.

    python -m benchmarks.permutation [MODEL ...] [--timing] [--golden] [--table]

Captures each model of `full_size_models` (two layers of each kind, full width and resolution, no weights),
runs the passes up to the plan, and writes benchmarks/results/permutation.json and docs/permutation.md. With
--timing also analyses, proves, cuts and rewrites FLUX.1-dev and Wan2.1 14B at full depth, and records the
seconds. --golden writes tests/golden/token_cuts.json: look at the difference before you commit it.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import platform
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import networkx
import torch
from torch import fx

from benchmarks.full_size_models import FULL_SIZE, NEEDS_VALUES
from benchmarks.permutation_page import markdown
from chipmunk_compile.config import Config
from chipmunk_compile.passes import PASSES
from chipmunk_compile.passes.attention_sites import find_attention
from chipmunk_compile.passes.canonical import canonicalise
from chipmunk_compile.passes.mlp_sites import find_mlps
from chipmunk_compile.passes.permute_tokens import Gather, PermutationPlan, permute_tokens, plan_permutation
from chipmunk_compile.passes.reasons import Reason
from chipmunk_compile.passes.token_axis import analyse_tokens
from chipmunk_compile.plan import analyse

T = TypeVar("T")

log = logging.getLogger("permutation")
HERE = pathlib.Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "permutation.json", HERE.parent / "docs" / "permutation.md"
GOLDEN = HERE.parent / "tests" / "golden" / "token_cuts.json"
GOLDEN_MODELS = ("flux", "wan", "hunyuan_video", "sd35", "cogvideox", "ltx", "qwen_image")
MIN_TOKENS = Config().min_tokens


def captured(name: str, examine: Callable[[fx.GraphModule, list], T], **depth) -> list[T]:
    """What `examine` makes of each graph that Dynamo captures in one call of a full-size model."""
    found = []

    def backend(gm, inputs, **_):
        found.append(examine(gm, inputs))
        outputs = next(iter(reversed(gm.graph.nodes))).all_input_nodes
        small = len(gm.graph.nodes) < 200
        if name not in NEEDS_VALUES or small:
            return gm.forward
        values = [node.meta["example_value"] for node in outputs]
        return lambda *_: [torch.zeros(x.shape, dtype=x.dtype) for x in values]

    with torch.device("cpu" if name in NEEDS_VALUES else "meta"):
        model, kwargs = FULL_SIZE[name](**depth)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**kwargs, return_dict=False)
    torch._dynamo.reset()
    return found


def survey(name: str) -> dict:
    """The plan of the graph of a model that has attention to permute, as plain data; or why none."""
    record: dict = {"model": (FULL_SIZE[name].__doc__ or "").strip().rstrip(".")}
    torch._dynamo.utils.counters.clear()
    analyses = captured(name, lambda gm, inputs: analyse(gm, inputs, Config()))
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    for analysis in analyses:
        plan = analysis.permutation
        if isinstance(plan, PermutationPlan):
            return record | {
                "graphs": len(analyses),
                "tokens": [run.length for run in plan.runs],
                "grid": [run.grids or "read off ids, once a generation" for run in plan.runs],
                "sites": f"{len(plan.sites)} of {len(analysis.sites)}",
                "gathers": [_described(gather, plan) for gather in plan.gathers],
                "bytes": plan.bytes,
                "walls": [f"{wall.name}: {wall.why}" for wall in plan.walls],
            }
    declined = [analysis.permutation for analysis in analyses if analysis.permutation is not None]
    reason, detail = (declined[0].reason, dict(declined[0].detail)) if declined else (Reason.NO_SITES, {})
    left = [d.reason.name for analysis in analyses for d in analysis.declined if d.kind == "attention"]
    detail |= {"attention left dense": ", ".join(f"{name} x{n}" for name, n in Counter(left).items())} if left else {}
    detail |= {"graph breaks": "; ".join(map(_explanation, breaks))} if breaks else {}
    return record | {
        "graphs": len(analyses),
        "reason": reason.value,
        "detail": {k: str(v) for k, v in detail.items()},
    }


def _explanation(graph_break: str) -> str:
    """Of Dynamo's text about a graph break, the line that says why; else the first."""
    lines = [line.strip() for line in graph_break.strip().splitlines()]
    return next((line.partition(": ")[2] for line in lines if line.startswith("Explanation: ")), lines[0])


def _described(gather: Gather, plan: PermutationPlan) -> dict:
    value = gather.value
    return {
        "value": gather.name,
        "shape": list(value.meta["val"].shape),
        "stride": list(value.meta["val"].stride()),
        "dtype": str(value.meta["val"].dtype).removeprefix("torch."),
        "dims": [dim for dim, _ in gather.steps],
        "direction": plan.direction(gather),
        "bytes": gather.bytes,
        "fixed": gather.fixed,
    }


def timing(name: str, **depth) -> dict:
    """Seconds of the pass on a graph of full depth, on the clock and of the processor."""
    (graph,) = captured(name, _behind_passes, **depth)
    sites = [*find_attention(graph, min_tokens=MIN_TOKENS)[0], *find_mlps(graph, min_tokens=MIN_TOKENS)[0]]
    record = {"nodes": len(graph.graph.nodes), "sites": len(sites)}
    start, used = time.perf_counter(), time.process_time()
    axes = analyse_tokens(graph)
    analysed = time.perf_counter()
    plan = plan_permutation(graph, sites, axes=axes)
    planned = time.perf_counter()
    permute_tokens(graph, plan)
    done = time.perf_counter()
    record |= {"analysis": analysed - start, "proof and cut": planned - analysed, "rewrite": done - planned}
    record |= {"all": done - start, "processor": time.process_time() - used}
    return {key: round(value, 3) for key, value in record.items()}


def _behind_passes(gm: fx.GraphModule, inputs: list) -> fx.GraphModule:
    graph = canonicalise(gm, inputs)
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph


def _golden(surveys: dict[str, dict]) -> str:
    """Where tokens are permuted and what that moves, one gather a line."""
    parts = []
    for name in GOLDEN_MODELS:
        head, gathers = surveys[name], surveys[name]["gathers"]
        lines = ",\n   ".join(map(json.dumps, gathers))
        first = ", ".join(f'"{key}": {json.dumps(head[key])}' for key in ("tokens", "grid", "bytes"))
        parts.append(f' "{name}": {{\n  {first},\n  "gathers": [\n   {lines}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*FULL_SIZE, []], help="default: all")
    parser.add_argument("--table", action="store_true", help="only write the page anew, from what was measured before")
    parser.add_argument("--timing", action="store_true", help="also time FLUX and Wan at full depth (minutes)")
    parser.add_argument("--golden", action="store_true", help="write the cuts that the tests hold on to anew")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import diffusers

    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "networkx": networkx.__version__,
    }
    versions["device"] = platform.processor() or platform.machine()
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}, "timing": {}}
    surveys, timings = old["models"], old["timing"]
    for name in () if options.table else options.models or FULL_SIZE:
        surveys[name] = survey(name)
        log.info("%s: %s", name, surveys[name].get("reason") or f"{surveys[name]['bytes'] / 1e6:.1f} MB a step")
    if options.timing:
        timings["FLUX.1-dev"] = timing("flux", layers=19, single=38)
        timings["Wan2.1 T2V 14B"] = timing("wan", layers=40)
    surveys = {name: surveys[name] for name in FULL_SIZE if name in surveys}
    if options.golden:
        GOLDEN.write_text(_golden(surveys))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "models": surveys, "timing": timings}, indent=1) + "\n")
    TABLE.write_text(markdown(surveys, versions, timings))


if __name__ == "__main__":
    main()
