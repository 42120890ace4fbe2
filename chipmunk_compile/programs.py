"""A graph's programs, compiled when first needed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from . import telemetry
from .config import Config
from .kept import Keeper, gathers_keeper, marks, unchanged
from .kernels import cpu, ops
from .offloading import Offload
from .passes.collector import collector_paused
from .passes.graphs import copy_graph
from .passes.key_masks import mask_inputs
from .passes.lower import StateTensor, kept_state, lift_state, lower, weights_program
from .passes.offload import offload, offload_state
from .plan import Plan, is_held_by_module
from .repeated import MOVING, repeated, state_moves
from .replay import Lane, Replayed, refusal
from .schedule import Program
from .state import State

log = logging.getLogger(__name__)
_local = threading.local()
Compiler = Callable[[fx.GraphModule, list, Config], Callable]  # a graph, the arguments of its first call


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Everything dense inside, no recompile: to compare the two by eye. Cached state goes stale, and is redone."""
    before = getattr(_local, "disabled", False)
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before


def is_disabled() -> bool:
    return getattr(_local, "disabled", False)


class Programs:
    """The dense, refresh and delta program of one graph. Each is compiled when first called."""

    def __init__(
        self,
        dynamo: fx.GraphModule,
        plan: Plan,
        config: Config,
        compiler: Compiler | None = None,
        dense: Callable | None = None,
    ) -> None:
        """compiler: Inductor when not given; a test may run graphs as they are. dense: compiled already."""
        self._dynamo, self.plan, self._config = dynamo, plan, config
        self._compiler = compiler or compile_graph
        self._compiled: dict[tuple[Program, bool], Callable] = {}
        self._dense_counts = dense is not None  # one that was compiled elsewhere counts its calls itself
        if dense is not None:
            self._compiled[Program.DENSE, False] = dense
        self._tables: list[torch.Tensor] | None = None
        self._lock = threading.RLock()
        moved = offload_state(plan.treatments, plan.movable)
        self.state = [*lift_state(plan.treatments), *kept_state(plan.canonical), *moved]
        self.offload = Offload(plan, config.memory_budget, config.streams)
        self._gathers = gathers_keeper(plan.canonical)
        self._weights = Keeper(*weights_program(plan.canonical, plan.treatments), len(self.scope("weights")))
        self._mask_inputs = mask_inputs(plan.canonical, [treatment.site for treatment in plan.treatments])

    def run(self, program: Program, args: Sequence, state: State | None = None, begins: bool = True):
        """begins: a generation does, or its state was lost; what it holds still may have been written to in ways that
        nothing shows (a LoRA fused)."""
        lifted = self._lifted(state) if state is not None else []
        masks_hold = False
        if state is not None:
            inputs = [*args, *self._orders]
            # What the boolean key masks are made from: as long as that stays, a delta does without them.
            masks = [inputs[position] for position in self._mask_inputs]
            if begins:
                state.kept_from = state.weights.kept_from = None
            self._gathers.update(state, inputs)
        if program is Program.REFRESH:
            self._weights.update(state.weights, inputs)
            state.masks_from = marks(masks)
        elif program is Program.DELTA:
            masks_hold = bool(masks) and unchanged(state.masks_from, masks)
        compiled = self._compiled.get((program, masks_hold))
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get((program, masks_hold))
                compiled = compiled or self._compile(program, masks_hold, [*args, *lifted])
                self._compiled[program, masks_hold] = compiled
        if program is not Program.DENSE or not self._dense_counts:
            telemetry.count(program.value)
        return compiled(*args, *lifted)

    def scope(self, scope: str) -> list[StateTensor]:
        return [tensor for tensor in self.state if tensor.scope == scope]

    @collector_paused()
    def graph(self, program: Program, masks_hold: bool = False) -> fx.GraphModule:
        """A fresh copy of the program's graph, as Inductor gets it. masks_hold: of `lower`."""
        if program is Program.DENSE:
            return _copy(self._dynamo)
        plan = self.plan
        lowered = lower(plan.canonical, plan.treatments, program.value, masks_hold)
        if plan.movable:
            lowered = offload(lowered, plan.treatments, plan.movable, program.value)
        return _with_dynamo_metadata(lowered, self._dynamo)

    def _lifted(self, state: State) -> list[torch.Tensor]:
        """All lifted tensors in the order in which the programs take them: token orders first."""
        if self._tables is None:
            device = self.state[0].device
            self._orders = [order.to(device) for order in self.plan.orders]
            self._tables = [tensor.empty() for tensor in self.scope("table")]
        if state.ring is not None:
            state.ring.follow()
        if state.lifted is not None:
            return state.lifted
        scopes = {"table": iter(self._tables), "weights": iter(state.weights.tensors), "stream": iter(state.tensors)}
        scopes["home"] = iter(state.homes)
        state.lifted = [*self._orders, *(next(scopes[tensor.scope]) for tensor in self.state)]
        return state.lifted

    def _compile(self, program: Program, masks_hold: bool, args: list) -> Callable:
        if program is not Program.DENSE and self.state[0].device.type == "cpu":
            for treatment in self.plan.treatments:  # the C++ ops, built here rather than within a step
                cpu.prepare(getattr(treatment.site, "region", None))
        graph = self.graph(program, masks_hold)
        telemetry.trace_artifact(program.value, lambda: graph.print_readable(print_output=False))
        started = time.perf_counter()
        compiled = self._compiler(graph, args, self._config)
        log.info("compiled the %s program in %.1f s", program.value, time.perf_counter() - started)
        return compiled


def compile_graph(graph: fx.GraphModule, args: list, config: Config) -> Callable:
    """Inductor on one graph (which it takes over), outside Dynamo, for the shapes of `args`.

    Where layers repeat, each distinct one is compiled once, in the first call (`repeated`). CUDA graphs are recorded
    of the whole (`replay`), where Inductor would keep one of each piece, and all that passes between them. Inductor's
    caches on disk serve a second process. They want a shape environment; none of its sizes is a symbol.
    """
    telemetry.count("compiles")
    options, static, why = config.inductor_options(), None, None
    compile = functools.partial(_inductor, options=options)
    if config.replays_cuda_graphs:
        options["triton.cudagraphs"] = False
        static = [keeps_its_address(node) for node in graph.graph.nodes if node.op == "placeholder"]
        why = refusal(graph, static, args)
    program = repeated(graph, compile) or compile(graph, args)
    if why is not None:
        log.info("no CUDA graph: %s", why)
    return Replayed(program, static, Lane.of(args[0].device)) if static is not None and why is None else program


def keeps_its_address(node: fx.Node) -> bool:
    """Whether an input is a weight, or state."""
    return "lifted" in node.meta or is_held_by_module(node)


def _inductor(graph: fx.GraphModule, args: list, options: dict) -> Callable:
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for node in graph.graph.nodes:
        if node.op == "placeholder":  # inputs are what the arguments are: cpp_wrapper would take the notes on them
            node.meta.pop("val", None)
    fake_mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    caches = torch.compiler.config
    with (
        torch._guards.tracing(torch._guards.TracingContext(fake_mode)),
        caches.patch(cache_key_tag=f"{caches.cache_key_tag} chipmunk {_digest_of_ops()}"),
    ):
        inputs = _examples(graph, args, fake_mode)
        return compile_fx(graph, inputs, config_patches=options, ignore_shape_env=True)


def _examples(graph: fx.GraphModule, args: list, fake_mode) -> list:
    """`args`, but for state that may move: at one call two of those are the same tensor, at another they are not, and
    the compiler must not take either for granted."""
    if not state_moves(graph):
        return args
    lifted = [node.meta.get("lifted") for node in graph.graph.nodes if node.op == "placeholder"]
    with fake_mode:
        return [
            torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
            if spec is not None and spec.scope in MOVING
            else arg
            for spec, arg in zip(lifted, args, strict=True)
        ]


@functools.cache
def _digest_of_ops() -> str:
    """Of what a compiled program takes for granted of our ops, such as their outputs' strides: Inductor's caches know
    an op by its name alone."""
    return hashlib.sha256(inspect.getsource(ops).encode()).hexdigest()[:16]


def dense_program(gm: fx.GraphModule, args: Sequence, config: Config, compiler: Compiler | None = None) -> Callable:
    """What Inductor (or `compiler`) makes of Dynamo's graph, outside Dynamo, for the shapes of `args`."""
    compiled = (compiler or compile_graph)(_copy(gm), list(args), config)

    def dense(*args):
        telemetry.count("dense")
        return compiled(*args)

    return dense


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo keeps its own graph: changing that one breaks its guards."""
    return _with_dynamo_metadata(copy_graph(gm)[0], gm)


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
