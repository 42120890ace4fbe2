"""A graph whose layers repeat, compiled piece by piece: each distinct layer once, called as often as it stands there.

Inductor takes as long for a layer as for the one before it, so a FLUX of 57 blocks took it 60 s a program. Pieces are
compiled in the first call, as it comes to them, on the very tensors that they get: what one compiled piece makes is
laid out as that piece chose. A repeat whose inputs are laid out otherwise than those before it is compiled again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.fx.node import map_arg

from .passes.cuts import Uncuttable, writes
from .passes.graphs import graph_module
from .passes.repeats import Call, find_repeats

log = logging.getLogger(__name__)
Compile = Callable[[fx.GraphModule, list], Callable]  # a graph, the arguments of its first call
# Of an address: what Inductor may take for granted of the inputs that it was shown.
_ALIGNMENT = 64
STATE_MOVES = "state_moves"
MOVING = ("stream", "home")  # the scopes of such state


@dataclass(frozen=True)
class _Step:
    """One call of a piece, in slots of the list that holds all values of a run."""

    compiled: Callable[[list], Sequence]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    frees: tuple[int, ...]  # nothing behind it reads these


class _Piece:
    """A region that stands in the graph once or several times. call: one of those."""

    def __init__(self, gm: fx.GraphModule, call: Call) -> None:
        self._gm, self._call = gm, call
        written = {node for op in call.ops for node in writes(op)}
        moving = state_moves(gm)
        scopes = [node.meta["lifted"].scope if "lifted" in node.meta else None for node in call.inputs]
        # Nothing is taken for granted of state that may move but its layout, and that is the same for all of a kind.
        self._seen = [n for n, scope in enumerate(scopes) if not (moving and scope in MOVING)]
        self._written = [n for n in self._seen if call.inputs[n] in written]
        self.compiled: dict[tuple, Callable[[list], Sequence]] = {}

    def graph(self) -> fx.GraphModule:
        """A fresh copy, for a compiler to take over. What it is told of inputs is as `programs` has it."""
        from torch._dynamo.source import SyntheticLocalSource

        graph, env, call = fx.Graph(), {}, self._call
        for number, node in enumerate(call.inputs):
            placeholder = env[node] = graph.placeholder(f"input_{number}")
            if node.op == "placeholder":
                placeholder.meta.update({key: node.meta[key] for key in ("lifted", "tensor_dict") if key in node.meta})
            # The names of weights are one layer's own.
            placeholder._dynamo_source = SyntheticLocalSource(f"chipmunk_{placeholder.name}")
        for node in call.ops:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[call.ops[place]] for place in call.made))
        piece = graph_module({}, graph)
        if hasattr(self._gm, "_param_name_to_source"):
            piece._param_name_to_source = {}
            piece.meta["dynamo_compile_id"] = self._gm.meta.get("dynamo_compile_id")
        piece.meta[STATE_MOVES] = state_moves(self._gm)
        return piece

    def layouts(self, inputs: Sequence) -> tuple:
        """All that a compiled piece may take for granted of its inputs; which share memory, where one is written to."""
        storages = [inputs[n].untyped_storage().data_ptr() for n in self._seen] if self._written else []
        shared = [
            (n, m) for n in self._written for m, other in enumerate(storages) if other == storages[self._seen.index(n)]
        ]
        return tuple(shared), tuple(_layout(inputs[n]) for n in self._seen)


class Repeated:
    """The callable. It counts on the arguments of every call to be laid out as those of the first."""

    def __init__(self, gm: fx.GraphModule, calls: Sequence[Call], compile: Compile) -> None:
        """calls: as `find_repeats` gives them. compile: Inductor on one piece."""
        self._compile = compile
        self._lock = threading.Lock()
        self._steps: list[_Step] | None = None
        self._slots = _Slots(gm, calls)
        first = {call.kind: call for call in reversed(calls)}
        self._pieces = {kind: _Piece(gm, call) for kind, call in first.items()}

    def __call__(self, *args):
        if self._steps is None:
            # Threads that come while the first one compiles wait for it.
            with self._lock:
                if self._steps is None:
                    return self._run_first(args)
        values = self._slots.values(args)
        for step in self._steps:
            inputs = [values[slot] for slot in step.reads]
            for slot in step.frees:
                values[slot] = None
            for slot, made in zip(step.makes, step.compiled(inputs)):
                values[slot] = made
        return self._slots.outputs(values)

    def _run_first(self, args: Sequence):
        began, values, steps = time.perf_counter(), self._slots.values(args), []
        for kind, reads, makes, frees in self._slots.calls:
            inputs = [values[slot] for slot in reads]
            for slot in frees:
                values[slot] = None
            compiled = self._compiled(self._pieces[kind], inputs)
            for slot, made in zip(makes, compiled(inputs)):
                values[slot] = made
            steps.append(_Step(compiled, reads, makes, frees))
        count = sum(len(piece.compiled) for piece in self._pieces.values())
        log.info("the first call compiled %d pieces for %d: %.1f s", count, len(steps), time.perf_counter() - began)
        self._steps = steps
        self._pieces = {}  # nothing is compiled any more: the graph goes
        return self._slots.outputs(values)

    def _compiled(self, piece: _Piece, inputs: list) -> Callable[[list], Sequence]:
        layouts = piece.layouts(inputs)
        if layouts not in piece.compiled:
            piece.compiled[layouts] = _boxed(self._compile(piece.graph(), inputs))
        return piece.compiled[layouts]


def repeated(gm: fx.GraphModule, compile: Compile) -> Repeated | None:
    """None for a graph that is better compiled as a whole, or must be."""
    try:
        calls = find_repeats(gm)
        return Repeated(gm, calls, compile) if calls else None
    except Uncuttable as why:
        log.debug("compiled as a whole: %s", why)
        return None


class _Slots:
    """Where the values of a run lie: the arguments, the graph's own tensors, then what pieces make."""

    def __init__(self, gm: fx.GraphModule, calls: Sequence[Call]) -> None:
        nodes = list(gm.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        held = [node for node in nodes if node.op == "get_attr"]
        self._held = [_attribute(gm, node) for node in held]
        of = {node: slot for slot, node in enumerate([*inputs, *held])}
        output = nodes[-1].args[0]
        if not isinstance(output, tuple | list):
            raise Uncuttable("an output that is no list")
        first = len(of)
        for call in calls:
            for place in call.made:
                of[call.ops[place]] = len(of)
        self._made = [None] * (len(of) - first + 1)
        waste = len(of)  # for what nobody behind reads, though the like of it is read elsewhere
        self._returned: list[tuple[bool, Any]] = [(True, of[v]) if isinstance(v, Node) else (False, v) for v in output]
        if any(isinstance(leaf, Node) for is_slot, v in self._returned if not is_slot for leaf in _leaves(v)):
            raise Uncuttable("outputs in lists")
        kept = {value for is_slot, value in self._returned if is_slot}
        found = []
        for call in reversed(calls):
            reads = tuple(of[node] for node in call.inputs)
            made = (of[call.ops[place]] for place in call.made)
            makes = tuple(slot if slot in kept else waste for slot in made)
            # An argument lies in the caller's hands too; its slot is emptied all the same.
            frees = tuple(slot for slot in reads if slot not in kept)
            kept.update(reads)
            found.append((call.kind, reads, makes, frees))
        self.calls = found[::-1]  # of each its kind, and the slots that it reads, makes, and empties

    def values(self, args: Sequence) -> list:
        return [*args, *self._held, *self._made]

    def outputs(self, values: list) -> list:
        return [values[value] if is_slot else value for is_slot, value in self._returned]


def _leaves(value: Any) -> list:
    found: list = []
    map_arg(value, found.append)
    return found


def _attribute(gm: fx.GraphModule, node: Node) -> torch.Tensor:
    value = gm
    for name in node.target.split("."):
        value = getattr(value, name)
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise Uncuttable(f"{node.target} is no tensor")
    return value


def state_moves(gm: fx.GraphModule) -> bool:
    """Whether some of a program's state may lie in host memory: then caches are one tensor at one call, and two at
    another."""
    if STATE_MOVES not in gm.meta:
        lifted = (node.meta.get("lifted") for node in gm.graph.nodes if node.op == "placeholder")
        gm.meta[STATE_MOVES] = any(spec is not None and spec.scope == "home" for spec in lifted)
    return gm.meta[STATE_MOVES]


def _layout(value: torch.Tensor) -> tuple:
    return (
        type(value), value.shape, value.stride(), value.storage_offset(), value.dtype, value.device,
        value.requires_grad, value.is_conj(), value.is_neg(), value.data_ptr() % _ALIGNMENT,
    )  # fmt: skip


def _boxed(compiled: Callable) -> Callable[[list], Sequence]:
    """A callable that takes a list and empties it: inputs that nobody else holds are freed as soon as they are read.

    What Inductor returns takes arguments and holds them until it is done; within is one that does not.
    """
    function = compiled
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        if "params_buffers_flat" in getattr(getattr(function, "__code__", None), "co_freevars", ()):
            return inner if getattr(inner, "_boxed_call", False) else lambda inputs: compiled(*inputs)
        function = inner
    return lambda inputs: compiled(*inputs)
