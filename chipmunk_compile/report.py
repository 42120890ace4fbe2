"""explain(): what is accelerated, what is not, why, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .capture import Capture
from .config import Config
from .passes.reasons import Reason
from .schedule import Program, fewest_steps, pays, programs_of

# Steps of generations whose work is predicted where no number is given: distilled models, and others.
LENGTHS = (4, 12, 28, 50)
# What a person can do about a reason; no entry where nothing is to be done.
ADVICE = {
    Reason.TOO_FEW_TOKENS: "lower options['min_tokens'] if it should be tried all the same",
    Reason.DROPOUT: "call model.eval()",
    Reason.TRAINING: "call the model under torch.no_grad()",
    Reason.DISABLED_BY_OPTION: "give the option a number",
    Reason.NO_KERNELS: "an NVIDIA GPU of compute capability 8.0 or up, and Triton, are needed",
    Reason.UNFUSED_ADAPTER: "pipe.fuse_lora(), and pipe.unfuse_lora() to take it out again",
    Reason.WEIGHT_NOT_INPUT: "quantise all but the MLPs, where memory allows",
    Reason.KEYS_OF_RANKS: "spread heads, not keys: ContextParallelConfig(ulysses_degree=...)",
    Reason.PARTIAL_ATTENTION: "spread heads, not keys: ContextParallelConfig(ulysses_degree=...)",
    Reason.SHARDED_WEIGHTS: "spread the tokens (ContextParallelConfig) or the weights (FSDP2's fully_shard) instead",
    Reason.MIXED_DTYPE: "load the whole model in one dtype",
    Reason.UNSUPPORTED_DTYPE: "load the model in bfloat16, float16 or float32",
    Reason.TOO_MANY_SIZES: "pad texts to one length, or compile the model once per resolution",
    Reason.NO_CLOCK: "say where generations start: with chipmunk_compile.generation(model, steps=..., streams=...), "
    "or options={'steps': ..., 'streams': ...}",
    Reason.NO_LASTING_OWNER: "offload whole models or groups of blocks, whose parameters stay the same objects",
    Reason.FEW_STEPS: "take options={'schedule.warmup': 1}, or more steps",
    Reason.OVER_BUDGET: "raise options['memory_budget']",
    Reason.NO_OFFLOAD: "raise options['memory_budget'], or compile in another mode than 'reduce-overhead'",
}


@dataclass(frozen=True)
class SiteReport:
    """One attention or MLP of the model. FLOPs count matrix products, two per multiply-add, for one call."""

    kind: str  # "attention" | "mlp"
    name: str
    accelerated: bool
    reason: Reason | None
    detail: Mapping[str, Any]
    shapes: Mapping[str, int]
    dense_flops: int = 0
    delta_flops: int = 0
    state_bytes: int = 0
    host_bytes: int = 0  # of state_bytes, those in host memory between uses

    @property
    def work_saved(self) -> float:
        """Predicted share of the site's matrix work that a delta step leaves out."""
        return 1.0 - self.delta_flops / self.dense_flops if self.dense_flops else 0.0


@dataclass(frozen=True)
class GraphReport:
    """One captured graph."""

    nodes: int
    clock: bool  # whether it receives a timestep
    reason: Reason | None
    detail: str
    dense_flops: int
    delta_flops: int
    refresh_flops: int
    ranks: int = 1  # that run it together, exchanging tokens
    computes: bool = False  # and does nothing else: its outputs may be forecast
    has_layers: bool = False
    is_piece: bool = False  # may be forecast beside other graphs: what it hands on comes from its sites


@dataclass(frozen=True)
class GatherReport:
    """One place where tokens change their order."""

    value: str  # what is reordered: an op and the module it is in, or "input"
    shape: tuple[int, ...]
    direction: str  # "in" | "out"
    bytes: int  # read and written
    kept: bool  # done once and kept: it holds still over a generation

    def __str__(self) -> str:
        how = "once" if self.kept else "a step"
        return f"{self.direction:<4}{self.value} {list(self.shape)}: {_bytes(self.bytes)} {how}"


@dataclass(frozen=True)
class PermutationReport:
    """The order of tokens inside the model, or why it is the caller's."""

    order: str = ""  # "patch" | "hilbert"
    grids: tuple = ()  # (frames, rows, columns) of each run of tokens; empty where none was found
    patch: tuple[int, ...] = ()  # the box of tokens that is a chunk
    gathers: tuple[GatherReport, ...] = ()
    bytes: int = 0  # moved by a step, what is kept left out
    walls: tuple[str, ...] = ()  # ops at which the permuted region ends
    reason: Reason | None = None
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"tokens keep their order: {self.reason.name}, {self.reason.value}{_numbers(self.detail)}"
        if not self.gathers:
            return "tokens keep their order"
        grids = ", ".join("x".join(map(str, grid)) for grid in self.grids)
        boxes = f"chunks are boxes of {'x'.join(map(str, self.patch))} tokens"
        what = "as given" if not self.grids else boxes if self.order == "patch" else "chunks lie along a Hilbert curve"
        kept = sum(gather.kept for gather in self.gathers)
        moved = f"{len(self.gathers) - kept} gathers move {_bytes(self.bytes)} a step, {kept} kept"
        return f"{what} (grid {grids or 'not readable'}); {moved}"

    def lines(self) -> list[str]:
        """Where tokens change their order, and the ops that the permuted region ends at."""
        walls = [f"ends at {', '.join(self.walls)}"] if self.walls else []
        return [str(gather) for gather in self.gathers] + walls


@dataclass(frozen=True)
class Report:
    """What the backend would do with a model, for the inputs that it was shown."""

    model: str
    config: Config
    sites: tuple[SiteReport, ...]
    graphs: tuple[GraphReport, ...]
    state_bytes: int  # of one stream
    permutation: PermutationReport
    capture: Capture
    host_bytes: int = 0  # of state_bytes, those in host memory, where streams come as foreseen (`memory_budget`)
    ring_bytes: int = 0  # on the device besides: what comes from the host passes through

    @property
    def device_bytes(self) -> int:
        """On the device, for one stream."""
        return self.state_bytes - self.host_bytes + self.ring_bytes

    @property
    def layer_bytes(self) -> float:
        """State of a layer: an attention and the MLPs behind it, on the average of those accelerated."""
        taken = [site for site in self.sites if site.accelerated]
        layers = sum(site.kind == "attention" for site in taken) or len(taken)
        return sum(site.state_bytes for site in taken) / layers if layers else 0.0

    @property
    def delta_share(self) -> float:
        """Predicted matrix work of a delta step, as a share of a dense step's."""
        return self._share("delta_flops")

    @property
    def refresh_share(self) -> float:
        """The same of a refresh: more than all."""
        return self._share("refresh_flops")

    def generation_share(self, steps: int) -> float:
        """The same of a generation of so many steps; 1 where it stays dense."""
        return generation_share(steps, self._way or self.config, self.refresh_share, self.delta_share)

    def _share(self, flops: str) -> float:
        dense = sum(g.dense_flops for g in self.graphs)
        return sum(getattr(g, flops) for g in self.graphs) / dense if dense else 1.0

    def to_text(self) -> str:
        return "\n".join(self._lines())

    __str__ = to_text

    def to_markdown(self) -> str:
        rows = ["| kind | site | shapes | a delta step | |", "|---|---|---|---|---|"]
        for site in self.sites:
            shapes = ", ".join(f"{k} {v}" for k, v in site.shapes.items())
            what = f"{site.work_saved:.0%} less work" if site.accelerated else "dense"
            why = "" if site.reason is None else f"{site.reason.name}: {site.reason.value}{_numbers(site.detail)}"
            rows.append(f"| {site.kind} | `{site.name}` | {shapes} | {what} | {why} |")
        return "\n".join([f"### {self.model}", "", *(f"- {line.strip()}" for line in self._summary()), "", *rows])

    def to_json(self) -> str:
        def plain(site: SiteReport) -> dict[str, Any]:
            fields = {**vars(site), "reason": site.reason.name if site.reason else None, "work_saved": site.work_saved}
            return {**fields, "detail": dict(site.detail), "shapes": dict(site.shapes)}

        graphs = [{**vars(g), "reason": g.reason.name if g.reason else None} for g in self.graphs]
        whole = {"model": self.model, "delta_share": self.delta_share}
        whole |= {name: getattr(self, name) for name in ("state_bytes", "device_bytes", "host_bytes", "layer_bytes")}
        order = {**vars(self.permutation), "reason": self.permutation.reason.name if self.permutation.reason else None}
        order["gathers"] = [vars(gather) for gather in self.permutation.gathers]
        whole["permutation"] = {**order, "detail": dict(self.permutation.detail)}
        whole["capture"] = {**vars(self.capture), "breaks": [vars(b) for b in self.capture.breaks]}
        return json.dumps({**whole, "graphs": graphs, "sites": [plain(s) for s in self.sites]}, indent=2, default=str)

    def _summary(self) -> list[str]:
        lines = []
        for kind, options in (("attention", self.config.attention), ("mlp", self.config.mlp)):
            sites = [s for s in self.sites if s.kind == kind]
            taken = sum(s.accelerated for s in sites)
            how = f", {options.sparsity:.1%} sparse, chunks of {options.chunk} tokens" if taken else ""
            what = "could run sparse" if self.runs_whole else f"accelerated{how}"
            lines.append(f"{kind:<10} {taken} of {len(sites)} {what}")
        lines += [f"forecast   {line}" for line in self._forecasts()]
        if self.runs_whole:
            always = self._way.schedule.warmup
            if self._way.forecast.tolerance is not None:  # the second tells how good reusing the first would have been
                always = max(always, 2)
            first = "first step is" if always == 1 else f"first {always} steps are"
            lines.append(f"           a generation's {first} always computed")
            lines.append("deltas     none beside such forecasts; {'schedule.refresh_every': 5} would run them instead")
        else:
            lines += self._deltas()
            lines.append(f"order      {self.permutation}")
            lines += [f"           {line}" for line in self.permutation.lines()]
        lines.append(f"clock      {self._clock()}")
        if (ranks := max((g.ranks for g in self.graphs), default=1)) > 1:
            lines.append(f"ranks      {ranks} exchange tokens; before each call they agree on its program")
        lines += [f"{'capture' if i == 0 else '':<10} {line}" for i, line in enumerate(self.capture.lines())]
        return [f"  {line}" for line in lines]

    def _deltas(self) -> list[str]:
        schedule = (self._way or self.config.where_computed()).schedule
        listed = ", ".join(map(str, schedule.refresh_at or ())) or "no other"
        further = f"every {schedule.refresh_every}th" if schedule.refresh_at is None else f"at {listed}"
        return [
            f"schedule   refresh at the first {schedule.warmup} steps and {further}; delta between",
            f"work       a delta step does {self.delta_share:.0%} of a dense step's matrix work (predicted)",
            *(f"           {line}" for line in self._lengths()),
            f"state      {self._state()}",
        ]

    @property
    def _way(self) -> Config | None:
        """The options that hold where steps can be forecast, in one graph or in pieces; None where they cannot be."""
        if not (self.config.steps or any(g.clock for g in self.graphs)):
            return None
        if len(self.graphs) == 1:
            return self.config.where_forecast() if self.graphs[0].computes else None
        pieces = [g for g in self.graphs if g.reason is None and g.has_layers]
        together = pieces and all(g.is_piece for g in pieces) and sum(g.clock for g in pieces) < 2
        return self.config.where_forecast(in_pieces=True) if together else None

    @property
    def runs_whole(self) -> bool:
        """Whether every step is forecast or computed whole: as the presets have it where steps can be forecast."""
        return self._way is not None and self._way.runs_whole

    def _forecasts(self) -> list[str]:
        """Which steps are not computed; nothing if all are."""
        way = self._way
        if not self.config.forecasts:
            return []
        if way is None:
            return ["none: that takes graphs that do nothing but compute, and one that receives the timestep"]
        if way.forecast.tolerance is not None:
            which = f"as many steps in a row as prove good to a tolerance of {way.forecast.tolerance:g}"
        elif way.schedule.forecast_at:
            which = f"steps {', '.join(map(str, way.schedule.forecast_at))}"
        else:
            which = f"all but one step in {way.schedule.compute_every} after the first ones"
        pieces = "piece by piece, " if len(self.graphs) > 1 else ""
        return [f"{pieces}{which}; " + ("the others run whole" if way.runs_whole else "refreshes count computed steps")]

    def _state(self) -> str:
        text = f"{_bytes(self.state_bytes)} per stream, {_bytes(self.layer_bytes)} a layer"
        if self.config.memory_budget is None:
            return text
        host = f", {_bytes(self.host_bytes)} in host memory" if self.host_bytes else ""
        ring = f" ({_bytes(self.ring_bytes)} for what comes and goes)" if self.host_bytes else ""
        budget = _bytes(self.config.memory_budget)
        return f"{text}: {_bytes(self.device_bytes)} on the device{ring}{host}; budget {budget}"

    def _lengths(self) -> list[str]:
        """What generations of several lengths, or of the one given, take of a dense one's work."""
        fewest, asked = fewest_steps(self.config.schedule), self.config.steps
        if fewest is None:
            return [f"{Reason.FEW_STEPS.name}: with this schedule every generation stays dense"]
        if asked is not None and asked < fewest:
            few = f"{Reason.FEW_STEPS.name}: {asked} steps stay dense; it pays from {fewest} steps on"
            return [few, f"-> {ADVICE[Reason.FEW_STEPS]}"]
        lengths = LENGTHS if asked is None else (asked,)
        shares = ", ".join(f"{n} steps {self.generation_share(n):.0%}" for n in lengths)
        return [f"a whole generation: {shares}; fewer than {fewest} steps stay dense"]

    def _clock(self) -> str:
        if self.config.steps:
            return f"counts calls: {self.config.steps} steps, {self.config.streams or 1} stream(s); nothing is read"
        if any(g.clock for g in self.graphs):
            return "the timestep input orders steps; inputs that stay the same object name the stream"
        return f"none found: without one everything stays dense ({Reason.NO_CLOCK.name}). {ADVICE[Reason.NO_CLOCK]}"

    def _lines(self) -> list[str]:
        graphs = f"{len(self.graphs)} graph" + ("s" if len(self.graphs) != 1 else "")
        lines = [f"chipmunk: {self.model}, {graphs}", *self._summary()]
        whole = [(g.reason, g.detail) for g in self.graphs if g.reason not in (None, Reason.NO_SITES)]
        dense = [s for s in self.sites if not s.accelerated]
        if dense or whole:
            lines += ["", "  left dense:"]
        for reason, detail in whole:
            lines.append(f"    {reason.name}, a whole graph: {reason.value} {detail}".rstrip())
            lines += [f"      -> {ADVICE[reason]}"] if reason in ADVICE else []
        for reason in dict.fromkeys(s.reason for s in dense):
            alike = [s for s in dense if s.reason is reason]
            lines.append(f"    {reason.name} x{len(alike)}: {reason.value}")
            lines += [f"      -> {ADVICE[reason]}"] if reason in ADVICE else []
            for site in alike[:3]:
                lines.append(f"      {site.kind} {site.name}{_numbers(site.detail)}")
            if len(alike) > 3:
                lines.append(f"      ... and {len(alike) - 3} more")
        return lines


def generation_share(steps: int, config: Config, refresh: float, delta: float) -> float:
    """Predicted work of a generation of so many steps, as a share of a dense one's, from that of its programs.

    config: what holds where steps can be forecast (`Config.where_forecast`), if they can be.
    """
    schedule = config.schedule
    if not pays(steps, schedule):
        return 1.0
    learns = delta if config.forecast.residual > 0 else 0.0  # a refresh then runs the delta too, after the warm-up
    total = 0.0
    for step, program in enumerate(programs_of(steps, schedule)):
        if program is Program.REFRESH:
            total += refresh + (learns if step >= schedule.warmup else 0.0)
        elif program is Program.DELTA:
            total += delta
    return total / steps


def _numbers(detail: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{k} {v}' for k, v in detail.items())})" if detail else ""


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
