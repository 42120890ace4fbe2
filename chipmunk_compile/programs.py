"""A graph's programs, compiled when first needed, and the callable that Dynamo runs in place of the graph."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from . import telemetry
from .clock import Tick
from .config import Config
from .evidence import read_evidence
from .kept import Keeper
from .kernels import cpu
from .models import Owners, Root
from .passes.lower import StateTensor, kept_state, lift_state, lower
from .plan import Analysis, Inputs, Plan, make_plan
from .schedule import Program, program_at
from .state import Owner, State, allocate

log = logging.getLogger(__name__)
_local = threading.local()
Compiler = Callable[[fx.GraphModule, list, Config], Callable]  # a graph, the arguments of its first call
# Picture sizes of as many tokens for which programs are compiled.
MOST_ORDERS = 4


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Everything dense inside, no recompile: to compare the two by eye. Cached state goes stale, and is redone."""
    before = getattr(_local, "disabled", False)
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before


class Programs:
    """The dense, refresh and delta program of one graph. Each is compiled when first called."""

    def __init__(
        self, dynamo: fx.GraphModule, plan: Plan, config: Config, compiler: Compiler, dense: Callable | None = None
    ) -> None:
        self._dynamo, self.plan, self._config, self._compiler = dynamo, plan, config, compiler
        self._compiled: dict[Program, Callable] = {Program.DENSE: dense} if dense is not None else {}
        self._tables: list[torch.Tensor] | None = None
        self._lock = threading.RLock()
        self.state = [*lift_state(plan.treatments), *kept_state(plan.canonical)]
        self._keeper = Keeper(plan.canonical)

    def run(self, program: Program, args: Sequence, state: State | None = None):
        lifted = self._lifted(state) if state is not None else []
        if program is Program.REFRESH:
            state.kept_from = None
        elif program is Program.DELTA:
            self._keeper.update(state, [*args, *self._orders])
        compiled = self._compiled.get(program)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(program) or self._compile(program, [*args, *lifted])
                self._compiled[program] = compiled
        telemetry.count(program.value)
        return compiled(*args, *lifted)

    def scope(self, scope: str) -> list[StateTensor]:
        return [tensor for tensor in self.state if tensor.scope == scope]

    def graph(self, program: Program) -> fx.GraphModule:
        """A fresh copy of the program's graph, as Inductor gets it."""
        if program is Program.DENSE:
            return _copy(self._dynamo)
        return _with_dynamo_metadata(lower(self.plan.canonical, self.plan.treatments, program.value), self._dynamo)

    def _lifted(self, state: State) -> list[torch.Tensor]:
        """All lifted tensors in the order in which the programs take them: token orders first."""
        if self._tables is None:
            device = self.state[0].device
            self._orders = [order.to(device) for order in self.plan.orders]
            self._tables = [tensor.empty() for tensor in self.scope("table")]
        scopes = {"table": iter(self._tables), "weights": iter(state.weights.tensors), "stream": iter(state.tensors)}
        return [*self._orders, *(next(scopes[tensor.scope]) for tensor in self.state)]

    def _compile(self, program: Program, args: list) -> Callable:
        if program is not Program.DENSE and self.state[0].device.type == "cpu":
            for treatment in self.plan.treatments:  # the C++ ops, built here rather than within a step
                cpu.prepare(getattr(treatment.site, "region", None))
        graph = self.graph(program)
        telemetry.trace_artifact(program.value, lambda: graph.print_readable(print_output=False))
        started = time.perf_counter()
        compiled = self._compiler(graph, args, self._config)
        log.info("compiled the %s program in %.1f s", program.value, time.perf_counter() - started)
        return compiled


def compile_graph(graph: fx.GraphModule, args: list, config: Config) -> Callable:
    """Inductor on one graph (which it takes over), outside Dynamo, for the shapes of `args`."""
    from torch._inductor.compile_fx import compile_fx

    telemetry.count("compiles")
    fake_mode = torch._subclasses.FakeTensorMode(shape_env=None)
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
        return compile_fx(graph, args, config_patches=config.inductor_options())


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo keeps its own graph: changing that one breaks its guards."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return _with_dynamo_metadata(copied, gm)


def _with_dynamo_metadata(gm: fx.GraphModule, dynamo: fx.GraphModule) -> fx.GraphModule:
    """What tells Inductor which inputs keep their address: parameters, and lifted state.

    Without it CUDA graphs copy weights, and refuse to replay a program that mutates its inputs.
    """
    from torch._dynamo.source import SyntheticLocalSource

    sources = getattr(dynamo, "_param_name_to_source", None)
    if sources is None or any(True for _ in gm.buffers()) or any(True for _ in gm.parameters()):
        return gm
    originals = [n for n in dynamo.graph.nodes if n.op == "placeholder"]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, original in zip(placeholders, originals):
        node._dynamo_source = getattr(original, "_dynamo_source", None)
        if "tensor_dict" in original.meta:
            node.meta["tensor_dict"] = original.meta["tensor_dict"]
    for node in placeholders[len(originals) :]:
        node._dynamo_source = SyntheticLocalSource(f"chipmunk_{node.name}")
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    gm._param_name_to_source = sources
    gm.meta["dynamo_compile_id"] = dynamo.meta.get("dynamo_compile_id")
    return gm


class _Called:
    """What all graphs' callables share: whose call it is, and the evidence it shows."""

    def __init__(self, inputs: Inputs, config: Config) -> None:
        self._inputs = inputs
        self._owners = Owners(inputs.parameters, inputs.latents, bool(inputs.timesteps), config)

    def _tick(self, owner: Owner, args: Sequence) -> tuple[Tick, int] | None:
        user = [args[i] for i in self._inputs.user]
        times = [args[i] for i in self._inputs.timesteps]
        return owner.root.tick(owner, user, lambda positions: read_evidence(times, user, positions))


class Timekeeper(_Called):
    """A graph that stays dense and receives the timestep: it begins the forward of the graphs called after it."""

    # Forwards without any graph that uses the tick, until it is no longer taken.
    IDLE = 3

    def __init__(self, inputs: Inputs, dense: Callable, config: Config) -> None:
        super().__init__(inputs, config)
        self._dense = dense
        self._idle: Counter[Root] = Counter()

    def __call__(self, *args):
        owner = self._owners.of(args)
        root = owner.root
        with root.lock:
            before = root.forward
            self._idle[root] = self._idle[root] + 1 if before is not None and before.calls == 0 else 0
            if self._idle[root] < self.IDLE or root.wanted:
                self._tick(owner, args)
        return self._dense(*args)


class Runner(_Called):
    """The callable that Dynamo runs in place of one captured graph: finds state and step, runs a program.

    compiler: makes a program's graph a callable, Inductor when not given; a test may run graphs as they are.
    dense: that program, where it is compiled already.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        analysis: Analysis,
        config: Config,
        compiler: Compiler | None = None,
        dense: Callable | None = None,
    ) -> None:
        super().__init__(analysis.inputs, config)
        self._dynamo, self._analysis, self._config, self._dense = gm, analysis, config, dense
        self._compiler = compiler or compile_graph
        self._by_grid: dict[tuple, Programs] = {}
        self.programs: Programs | None = None

    def __call__(self, *args):
        owner = self._owners.of(args)
        # Threads that share a model take turns: two of them may share a stream, and so its state.
        with owner.root.lock:
            where = self._tick(owner, args)
            programs = self._programs_of(where, owner, args)
            if where is None:
                return programs.run(Program.DENSE, args)
            return self._run(programs, owner, *where, args)

    def _programs_of(self, where: tuple[Tick, int] | None, owner: Owner, args: Sequence) -> Programs:
        """The programs for the token order of this call's stream, chosen at its first step.

        Another picture size may be another order of as many tokens. Any order is right; one too many to compile for
        is merely not the best.
        """
        tick = where[0] if where is not None else None
        chosen = tick.stream.programs.get(self) if tick is not None else self.programs
        if chosen is not None and (tick is None or tick.step > 0 or not self._analysis.reads_grid):
            return chosen
        unread = self.programs is not None and (owner.root.counted is not None or not self._analysis.reads_grid)
        if not unread and len(self._by_grid) < MOST_ORDERS:
            grids = self._analysis.grids(args)
            if grids not in self._by_grid:
                plan = make_plan(self._analysis, grids, self._config)
                self._by_grid[grids] = Programs(self._dynamo, plan, self._config, self._compiler, self._dense)
            self.programs = self._by_grid[grids]
        if tick is not None:
            tick.stream.programs[self] = self.programs
        return self.programs

    def _run(self, programs: Programs, owner: Owner, tick: Tick, occurrence: int, args: Sequence):
        # A block may move to another graph of the same model (guards fail, frames are captured anew): the state
        # follows the block, and is made anew where the graph lays it out otherwise.
        key, fits = (owner.key, occurrence), (programs, owner)
        states = tick.stream.states
        if getattr(_local, "disabled", False):
            states.pop(key, None)
            return programs.run(Program.DENSE, args)
        state = states.get(key)
        if state is None or state.fits != fits:
            states.pop(key, None)
            state = states[key] = allocate(programs.scope("stream"), fits)
            state.weights = owner.weights(programs.scope("weights"))
        due = program_at(tick.step, self._config.schedule)
        program = due if state.filled and not tick.fresh else Program.REFRESH
        state.filled = False  # until the program has run: one that fails half way leaves nothing to build on
        outputs = programs.run(program, args, state)
        state.filled = True
        owner.root.end_call()
        return outputs


def callable_for(
    gm: fx.GraphModule,
    analysis: Analysis,
    config: Config,
    inductor: Callable[[], Callable],
    dense: Callable | None = None,
) -> Callable:
    """What Dynamo runs in place of the graph.

    inductor: compiles Dynamo's graph untouched, for a graph that stays dense. dense: that program for one that does
    not, where it is compiled already.
    """
    for declined in analysis.declined:
        log.debug("%s %s stays dense: %s %s", declined.kind, declined.name, declined.reason.value, declined.detail)
    if analysis.reason is None:
        return Runner(gm, analysis, config, dense=dense)
    log.info("the graph goes to Inductor untouched: %s %s", analysis.reason.value, analysis.detail)
    tells_time = analysis.inputs.timesteps and analysis.inputs.parameters
    return Timekeeper(analysis.inputs, inductor(), config) if tells_time else inductor()
