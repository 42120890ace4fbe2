"""One model of the zoo through the backend for some steps: what was accelerated of what its eager forward calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import chipmunk_compile
from chipmunk_compile.config import Config
from chipmunk_compile.passes.naming import module_path
from chipmunk_compile.passes.permute_tokens import PermutationPlan
from chipmunk_compile.passes.sites import Declined
from chipmunk_compile.plan import Analysis, analyse
from chipmunk_compile.programs import compile_graph
from chipmunk_compile.runner import Runner
from chipmunk_compile.timekeeper import Timekeeper
from tests.zoo.census import CONSTANT, Call, census
from tests.zoo.entry import STEPS, Entry

MIN_TOKENS = 16  # below every main path of the zoo, above every text
OPTIONS = {
    "preset": "exact",
    "attention.chunk": 32,
    "mlp.chunk": 32,
    "min_tokens": MIN_TOKENS,
    "schedule.refresh_every": 4,
}
DELTA_OPS = {
    "attention": torch.ops.chipmunk.attention_delta.default,
    "mlp": torch.ops.chipmunk.mlp_delta.default,
}
KINDS = tuple(DELTA_OPS)
NOT_SEEN = "NOT_SEEN"  # no pass has said why
NOT_CAPTURED = "NOT_CAPTURED"  # it ran outside the graphs that Dynamo captured


@dataclass(frozen=True)
class Missed:
    """A main-path attention or MLP that stays dense."""

    kind: str
    module: str
    reason: str  # a Reason's name, NOT_CAPTURED or NOT_SEEN
    detail: str = ""


@dataclass(frozen=True)
class Coverage:
    """One model. Every count is of calls in one forward; `of` counts what eager calls, `accelerated` what is sparse."""

    name: str
    graphs: int
    accelerated: dict[str, int]
    of: dict[str, int]  # self-attention without mask or with a key mask; MLPs on tokens
    left_alone: dict[str, int]  # other attention and MLPs of eager, by what they are
    missed: tuple[Missed, ...]
    mistaken: tuple[str, ...]  # accelerated, though eager shows no main path there
    permutation: str
    clock: str  # what told the steps: "timestep", "generation()", or "" where nothing ran sparse
    error: float  # largest |difference| over the largest |value|, over all steps and outputs
    tolerance: float  # what the model's own rounding allows
    calls: dict[str, int]  # of programs, over all steps
    reasons: tuple[str, ...] = field(default=())  # of whole graphs that stay dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class InductorFails(Exception):
    """torch.compile(model) by itself raises: there is nothing to compare with."""


def cover(entry: Entry, inductor: bool = False) -> Coverage:
    """Runs `entry` for STEPS steps at sparsity 0 and compares with its dense self.

    inductor: programs are compiled, and the comparison is with torch.compile(model). Otherwise graphs run as they are,
    and the comparison is with the eager model: the same graphs and the same ops, in seconds.
    Raises InductorFails where Inductor cannot compile the model.
    """
    model, inputs = entry.tiny()
    latents, times = ({name: inputs(1)[name] for name in names} for names in (entry.latents, entry.times))
    calls = census(model, inputs(0), latents, times, MIN_TOKENS, entry.batch_of(latents))
    with torch.no_grad():
        expected = _plain(model, inputs, inductor)
        run = _Run(compile_graph if inductor else _as_it_is)
        clock, outputs, counts = "timestep", *run(model, inputs)
        if not counts["delta"] and any(a.sites for a in run.analyses):
            clock, outputs, counts = "generation()", *run(model, inputs, steps=STEPS)
    assert all(values[0].abs().max() > 1e-2 for values in expected), "an output that is zero proves nothing"
    return _compared(entry, calls, run, clock if counts["delta"] else "", _error(outputs, expected), counts)


def _plain(model: torch.nn.Module, inputs: Callable, inductor: bool) -> list[list[Tensor]]:
    if not inductor:
        return [_cloned(model(**inputs(step))) for step in range(STEPS)]
    torch._dynamo.reset()
    dense = torch.compile(model)
    try:
        return [_cloned(dense(**inputs(step))) for step in range(STEPS)]
    except torch._inductor.exc.InductorError as error:
        raise InductorFails(str(error).splitlines()[0]) from error


class _Run:
    """The backend, with everything it made kept: analyses, runners, and the delta programs that were really built."""

    def __init__(self, compiler: Callable) -> None:
        self.compiler = compiler
        self.config = Config.from_options(OPTIONS)
        self.analyses: list[Analysis] = []
        self.sparse: Counter[tuple[str, str]] = Counter()  # (kind, module) of the delta ops of the last delta step

    def __call__(self, model, inputs: Callable, steps: int | None = None) -> tuple[list[list[Tensor]], dict]:
        torch._dynamo.reset()
        chipmunk_compile.reset()
        self.analyses.clear()
        compiled = torch.compile(model, backend=self._backend)
        outputs = []
        with chipmunk_compile.generation(compiled, steps=steps) if steps else contextlib.nullcontext():
            for step in range(STEPS):
                self.sparse.clear()
                outputs.append(_cloned(compiled(**inputs(step))))
        counts = {name: n for name, n in chipmunk_compile.counters().items() if name in ("dense", "refresh", "delta")}
        torch._dynamo.reset()
        return outputs, counts

    def _backend(self, gm: fx.GraphModule, example_inputs: list, **_: Any) -> Callable:
        analysis = analyse(gm, example_inputs, self.config)
        self.analyses.append(analysis)
        if analysis.reason is None:
            return Runner(gm, analysis, self.config, self._compile)
        dense = gm.forward
        if self.compiler is compile_graph:
            dense = torch._inductor.compile(gm, example_inputs)
        tells_time = analysis.inputs.timesteps and analysis.inputs.parameters
        return Timekeeper(analysis.inputs, dense, self.config) if tells_time else dense

    def _compile(self, graph: fx.GraphModule, args: list, config: Config) -> Callable:
        ops = Counter(
            (kind, module_path(node) or module_path(next(iter(node.users))))
            for kind, op in DELTA_OPS.items()
            for node in graph.graph.nodes
            if node.target is op
        )
        compiled = self.compiler(graph, args, config)

        def counted(*args):
            self.sparse.update(ops)
            return compiled(*args)

        return counted


def _as_it_is(graph: fx.GraphModule, args: list, config: Config) -> Callable:
    return graph.forward


def _compared(entry: Entry, calls: list[Call], run: _Run, clock: str, error: float, counts: dict) -> Coverage:
    accelerated, of, missed, mistaken = {}, {}, [], []
    for kind in KINDS:
        main = Counter(call.module for call in calls if call.kind == kind and not call.left)
        sparse = Counter({module: n for (k, module), n in run.sparse.items() if k == kind})
        constant = Counter(call.module for call in calls if call.kind == kind and call.left == CONSTANT)
        dense, other = _unpaired(main, sparse)
        _, other = _unpaired(constant, Counter(other))  # tokens of text: work saved all the same
        of[kind], accelerated[kind] = main.total(), main.total() - len(dense)
        mistaken += [f"{kind} {module}" for module in other]
        missed += [_missed(kind, module, run.analyses, bool(clock)) for module in dense]
    left = Counter(f"{call.kind}: {call.left}" for call in calls if call.left)
    graph_reasons = [f"{a.reason.name} {a.detail}".strip() for a in run.analyses if a.reason is not None]
    return Coverage(
        name=entry.name,
        graphs=len(run.analyses),
        accelerated=accelerated,
        of=of,
        left_alone=dict(left),
        missed=tuple(missed),
        mistaken=tuple(mistaken),
        permutation=_permutation(run.analyses),
        clock=clock,
        error=error,
        tolerance=entry.tolerance,
        calls=counts,
        reasons=tuple(dict.fromkeys(graph_reasons)),
    )


def _unpaired(main: Counter[str], sparse: Counter[str]) -> tuple[list[str], list[str]]:
    """Modules of the main path without a sparse op, and sparse ops of no module of the main path.

    A graph of one block knows the path from the block on; a fused layer stands for what is inside it.
    """
    dense, other = list((main - sparse).elements()), []
    for module in (sparse - main).elements():
        pair = next((m for m in dense if m.endswith(f".{module}") or m.startswith(f"{module}.")), None)
        if pair is None:
            other.append(module)
        else:
            dense.remove(pair)
    return dense, other


def _missed(kind: str, module: str, analyses: list[Analysis], clock: bool) -> Missed:
    declined = [d for analysis in analyses for d in analysis.declined if d.kind == kind]
    for found in declined:
        if found.name and (
            f".{module}.".endswith(f".{found.name}.") or kind == "mlp" and f".{found.name}." in f".{module}."
        ):
            detail = ", ".join(f"{k} {v}" for k, v in found.detail.items())
            return Missed(kind, module, found.reason.name, detail)
    if not clock and any(analysis.reason is None for analysis in analyses):
        return Missed(kind, module, "NO_CLOCK")
    whole = next((a for a in analyses if a.reason is not None and a.canonical is None), None)
    if whole is not None:
        return Missed(kind, module, whole.reason.name, whole.detail)
    paths = {module_path(node) for a in analyses if a.canonical is not None for node in a.canonical.graph.nodes}
    return Missed(kind, module, NOT_SEEN if module in paths else NOT_CAPTURED)


def _permutation(analyses: list[Analysis]) -> str:
    """Of the first graph that has sites: its grid, or why its tokens keep their order."""
    for analysis in analyses:
        plan = analysis.permutation
        if isinstance(plan, PermutationPlan):
            grids = [("x".join(map(str, g)) for g in run.grids) if run.grids else ["read off ids"] for run in plan.runs]
            return ", ".join(part for run in grids for part in run)
        if isinstance(plan, Declined):
            return plan.reason.name
    return "-"


def _error(outputs: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    worst = 0.0
    for mine, theirs in zip(outputs, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            difference = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)
            worst = max(worst, difference.nan_to_num(float("inf")).item())
    return worst


def _cloned(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.clone()]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for part in result for t in _cloned(part)] if isinstance(result, (list, tuple)) else []
