"""probe(): on the user's own model and prompt, how concentrated attention and MLPs are and how fast they change.

The model is run as it is, eagerly where it is compiled; a forward hook (torch's own, taken off at the end) then runs
what Dynamo captures of the same call: the canonical graph in which the backend finds its sites, node by node, with a
look at every site. Nothing is patched and no result changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from . import probe_report
from .clock import InferredClock, Tick
from .config import AttentionOptions, Config, MlpOptions
from .evidence import call_evidence, read_evidence
from .forecast import lagrange
from .passes.lower import dense_copy
from .passes.reasons import Reason
from .passes.sites import Declined
from .plan import Analysis, Plan, analyse, make_plan
from .schedule import Program, program_at
from .shapes import BySize, is_symbolic
from .watching import AttentionWatch, Memory, MlpWatch

# Outputs of the model that are kept: a line goes through two.
OUTPUTS = 2
OUTPUT_NAMES = ("change", "line")


class probe:
    """Looks at a model while it denoises, before anything is sped up.

    ```python
    with chipmunk_compile.probe(pipe.transformer) as seen:
        pipe(prompt)
    print(seen)
    seen.plot("probe.png")
    ```

    model: any module, compiled or not; what is compiled runs eagerly inside the block, and the model's own weights are
        used. A step takes about twice its eager time.
    options: as for `torch.compile(..., backend="chipmunk", options=...)`: sparsity, chunks and schedule say which
        columns "chosen at the last refresh" are. A sparsity of None counts as the default, `dense_layers` as 0.
    chunks: of each site, evenly spaced, are looked at. tokens: of each such chunk are remembered to the next step; what
        that costs is `state_bytes`.

    Raises OptionError for bad options, ValueError for chunks or tokens below 1.
    """

    def __init__(
        self, model: torch.nn.Module, *, options: Mapping[str, Any] | None = None, chunks: int = 6, tokens: int = 32
    ) -> None:
        for name, value in (("chunks", chunks), ("tokens", tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"probe({name}={value!r}): a positive integer")
        self.config = _without_switches(Config.from_options(options))
        self.chunks, self.tokens = chunks, tokens
        self.model = type(getattr(model, "_orig_mod", model)).__name__
        self.forwards = 0  # of the model
        self.captured = 0  # of those, the ones in which a site was seen
        self.state_bytes = 0  # most that was kept from step to step
        self.declined: dict[tuple, Declined] = {}
        self._module = getattr(model, "_orig_mod", model)
        self._pending: list[tuple[dict, tuple[str, ...], Tensor]] = []
        self._rows: list[dict[str, Any]] = []
        self._now: Moment | None = None
        self._clock: InferredClock | None = None
        self._streams: Counter[int] = Counter()
        self._open = contextlib.ExitStack()
        # A code object of its own: what Dynamo caches for it is nobody else's.
        call = types.FunctionType(_call.__code__.replace(co_name=f"probe_{id(self)}"), globals())
        self._capture = torch.compile(call, backend=self._backend)

    def __enter__(self) -> probe:
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        hook = self._module.register_forward_hook(self._after, with_kwargs=True)
        self._open.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._settle()
        if self._clock is not None:
            self._clock.release()
        self._clock = self._now = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was seen: one flat dict of names and numbers for each site, and for the model, at each step.

        `kind` ("attention", "mlp", "model"), `site`, `generation`, `stream`, `step`, `time`, `age` (steps since the
        refresh), then the numbers that `watching.AttentionWatch`, `watching.MlpWatch` and `look_at_output` explain;
        None where one has no meaning yet.
        """
        self._settle()
        return self._rows

    def report(self) -> str:
        """The same, as tables for people."""
        return probe_report.text(self)

    __str__ = report

    def plot(self, path: str | os.PathLike) -> None:
        """Draws concentration and change over layers and steps into a picture (any suffix that matplotlib knows).

        Raises ImportError where matplotlib is missing, ValueError where nothing was seen.
        """
        probe_report.plot(self, path)

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """The forward hook."""
        if torch.compiler.is_compiling():
            return
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        times, inputs = call_evidence(args, kwargs)
        if self._clock is None:
            latents = [p for p, t in enumerate(inputs) if outputs and t.shape == outputs[0].shape]
            self._clock = InferredClock(frozenset(latents))
        self._now = now = self._place(self._clock.tick(inputs, lambda wanted: read_evidence(times, inputs, wanted)))
        with torch.no_grad(), torch.compiler.set_stance("default"):
            if outputs:
                self._record("model", self.model, OUTPUT_NAMES, look_at_output(now, outputs[0]))
            self._capture(module.forward, args, kwargs)
        self.forwards += 1
        self.captured += now.seen
        self.state_bytes = max(self.state_bytes, self._clock.state_bytes)

    def _place(self, tick: Tick) -> Moment:
        memory = tick.stream.states.setdefault("probe", StreamMemory())
        if tick.fresh or not memory.filled:
            memory.clear()
            if tick.step == 0:
                memory.number = self._streams[tick.stream.generation]
                self._streams[tick.stream.generation] += 1
            memory.filled = True
        refresh = memory.refreshed is None or program_at(tick.step, self.config.schedule) is Program.REFRESH
        memory.refreshed = tick.step if refresh else memory.refreshed
        return Moment(tick, memory, refresh)

    def _record(self, kind: str, site: str, names: tuple[str, ...], numbers: Tensor, refresh: bool = False) -> None:
        now = self._now
        age = 0 if refresh else now.tick.step - now.memory.refreshed
        row = {
            "kind": kind, "site": site, "generation": now.tick.stream.generation, "stream": now.memory.number,
            "step": now.tick.step, "time": now.tick.time, "age": age,
        }  # fmt: skip
        self._pending.append((row, names, numbers))

    def _settle(self) -> None:
        """Reads what was seen from the device, at once."""
        if not self._pending:
            return
        device = self._pending[0][2].device  # the layers may lie on several
        values = iter(torch.cat([numbers.float().to(device) for _, _, numbers in self._pending]).tolist())
        for row, names, _ in self._pending:
            found = ((name, next(values)) for name in names)
            self._rows.append({**row, **{name: value if math.isfinite(value) else None for name, value in found}})
        self._pending = []

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        if any(map(is_symbolic, example_inputs)):
            return BySize(gm, example_inputs, lambda: gm.forward, self.config, self._look_into)
        return self._look_into(gm, example_inputs)

    def _look_into(self, gm: fx.GraphModule, inputs: Sequence[Any], dense: Callable | None = None) -> Callable:
        analysis = analyse(gm, inputs, self.config)
        self.declined.update({(d.kind, d.name, d.reason): d for d in analysis.declined})
        if analysis.reason is None:
            return _Looking(self, analysis)
        if analysis.reason is not Reason.NO_SITES:
            self.declined["graph", "", analysis.reason] = Declined("graph", "", analysis.reason)
        return dense or gm.forward

    def show(
        self, name: str, watch: AttentionWatch | MlpWatch, operands: Sequence[Tensor | None], value: Tensor
    ) -> None:
        """What a site was given, and made of it."""
        now = self._now
        occurrence = now.occurrences[watch]
        now.occurrences[watch] += 1
        now.seen = True
        memory = now.memory.sites.setdefault((watch, occurrence), Memory())
        refresh = now.refresh or not memory.tensors  # a graph captured anew in the middle begins with a refresh
        if watch.site.kind == "attention":
            numbers = watch.look(memory, refresh, *operands, value)
        else:
            numbers = watch.look(memory, *operands, value)
        again = f" ({occurrence + 1})" if occurrence else ""
        self._record(watch.site.kind, name + again, watch.names, numbers, refresh)


@dataclass(eq=False)
class StreamMemory:
    """What is kept from step to step of one stream. The clock clears `filled` where the stream begins again."""

    filled: bool = False
    number: int = 0  # of the stream, in its generation
    refreshed: int | None = None  # the step of the last refresh
    sites: dict[tuple, Memory] = field(default_factory=dict)
    outputs: list[tuple[float, Tensor]] = field(default_factory=list)  # of the model, with their times

    @property
    def bytes(self) -> int:
        return sum(m.bytes for m in self.sites.values()) + sum(output.nbytes for _, output in self.outputs)

    def clear(self) -> None:
        self.refreshed, self.sites, self.outputs = None, {}, []


@dataclass(eq=False)
class Moment:
    """One forward of the model."""

    tick: Tick
    memory: StreamMemory
    refresh: bool
    occurrences: Counter = field(default_factory=Counter)  # of each site in this forward
    seen: bool = False  # a site was


def look_at_output(now: Moment, output: Tensor) -> Tensor:
    """[change, line]: how far the model's output is from that of the step before, and from the line through those of
    the two steps before, in the step's own time. Relative L2 over the whole output."""
    kept, time = now.memory.outputs, now.tick.time
    size = _norm(output)
    found = torch.full((2,), math.nan, device=output.device)
    if kept:
        found[0] = _norm(output.float() - kept[-1][1]) / size
    moments = [moment for moment, _ in kept]
    if len({*moments, time}) == OUTPUTS + 1:
        line = sum(weight * known.float() for weight, (_, known) in zip(lagrange(moments, time), kept))
        found[1] = _norm(output.float() - line) / size
    kept.append((time, output.detach().clone()))
    del kept[:-OUTPUTS]
    return found


class _Looking:
    """Runs in place of one captured graph."""

    def __init__(self, seen: probe, analysis: Analysis) -> None:
        self._seen, self._analysis = seen, analysis
        self._by_grid: dict[tuple, _Interpreter] = {}

    def __call__(self, *args):
        grids = self._analysis.grids(args)
        if grids not in self._by_grid:
            self._by_grid[grids] = _Interpreter(make_plan(self._analysis, grids, self._seen.config), self._seen)
        interpreter = self._by_grid[grids]
        with torch.autocast(interpreter.device.type, enabled=False):  # the graph holds its casts
            return interpreter.run(*args, *interpreter.orders)


class _Interpreter(fx.Interpreter):
    """Runs the canonical graph node by node, values freed after their last use, and shows every site."""

    def __init__(self, plan: Plan, seen: probe) -> None:
        copied, env = dense_copy(plan.canonical)
        super().__init__(copied)
        self._seen = seen
        self.device = plan.treatments[0].site.node.meta["val"].device
        self.orders = [order.to(self.device) for order in plan.orders]
        self._watched: dict[fx.Node, tuple] = {}
        named: Counter[tuple[str, str]] = Counter()
        for treatment in plan.treatments:
            site, node = treatment.site, env[treatment.site.node]
            if site.kind == "attention":
                operands = (site.query, site.key, site.value, site.key_mask)
                operands = tuple(None if n is None else env[n] for n in operands)
                watch = AttentionWatch(treatment, seen.chunks, seen.tokens)
            else:
                operands = node.args[:2]  # the hidden activation, the down projection
                watch = MlpWatch(treatment, seen.chunks, seen.tokens)
            named[site.kind, site.name] += 1
            count = named[site.kind, site.name]
            name = site.name if count == 1 else f"{site.name} #{count}"  # a module that computes several
            self._watched[node] = name, watch, operands

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node in self._watched:
            name, watch, operands = self._watched[node]
            self._seen.show(name, watch, [None if n is None else self.env[n] for n in operands], value)
        return value


def _without_switches(config: Config) -> Config:
    """With every site that there is: switched off ones as the default would treat them."""
    attention, mlp = config.attention, config.mlp
    if attention.sparsity is None:
        attention = dataclasses.replace(attention, sparsity=AttentionOptions().sparsity)
    if mlp.sparsity is None:
        mlp = dataclasses.replace(mlp, sparsity=MlpOptions().sparsity)
    return dataclasses.replace(config, attention=attention, mlp=mlp, dense_layers=0)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)


def _call(function, args, kwargs):
    return function(*args, **kwargs)
