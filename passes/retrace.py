"""Dynamo graph -> ATen by tracing one node of each kind: a transformer's blocks are made of the same few ops.

Tracing costs about 1 ms an op, most of it in the dispatcher's Python modes. Of the 5,900 ops in the graph of a FLUX
with 57 blocks some 200 differ: they are traced as one graph of loose ops, and every node of Dynamo's graph becomes a
copy of what came of its kind (10.2 s of CPU time before, 0.9 s now). The layouts of its inputs stand in Dynamo's own
notes, so nothing is propagated. A tensor that is written to is taken from its making to the last write as one.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from .graphs import graph_module

# What a node of Dynamo's graph hands on to those that it becomes.
_HANDED_ON = ("nn_module_stack", "stack_trace", "source_fn_stack")
WRITING_OPERATORS = (
    operator.setitem,
    operator.delitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.imatmul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.iconcat,
)


class Unlike(Exception):
    """Why a graph cannot be traced one kind of node at a time."""


@dataclass(frozen=True)
class _Group:
    """One node of Dynamo's graph; or, in their order, those from the making of a tensor to the last write to it."""

    nodes: tuple[Node, ...]
    read: tuple[Node, ...]  # of these, by nodes of other groups

    @staticmethod
    def of(nodes: Sequence[Node]) -> _Group:
        within = set(nodes)
        return _Group(tuple(nodes), tuple(node for node in nodes if not within.issuperset(node.users)))


@dataclass
class _Kind:
    """Groups alike: the same ops on inputs of the same layout."""

    inputs: list[Node]  # placeholders: of the loose graph, and when that is exported, of the exported one
    made: list[Node]  # in the loose graph: what other nodes read
    expected: list[list[torch.Tensor]]  # Dynamo's examples of those, each a list where an op returns a tuple
    body: list[tuple[Node, int]] = field(default_factory=list)  # in the exported graph, and of which node of the group
    outputs: list[list[Node]] = field(default_factory=list)  # as `expected`


def retrace(gm: fx.GraphModule, inputs: Sequence[Any], export: Callable) -> fx.GraphModule:
    """What `export` makes of Dynamo's graph `gm`, from an export of its kinds of nodes alone.

    export: as `aot_export_module`: (graph module, fake inputs) -> functional graph module, signature.
    Raises Unlike where nodes may not be taken one by one: one writes to an input or changes what the interpreter
    does (autocast, gradient mode), makes something else than tensors, or has symbolic sizes.
    """
    # The mode in which an export at this place would trace: Dynamo's examples are of another one.
    layouts = _Layouts(detect_fake_mode(inputs) or FakeTensorMode())
    _check_inputs(gm, inputs, layouts)
    loose, kinds, groups = _Loose(layouts), {}, {}
    for group in _groups(gm):
        key, arguments = _key(group, layouts)
        if key not in kinds:
            kinds[key] = _loosen(group, arguments, loose)
        groups[group.nodes[-1]] = group, kinds[key], arguments
    if not kinds:
        raise Unlike("no ops")
    exported = _export_loose(loose, list(kinds.values()), export)
    return graph_module(exported, _assemble(gm, groups, layouts))


def _check_inputs(gm: fx.GraphModule, inputs: Sequence[Any], layouts: _Layouts) -> None:
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise Unlike("autocast is on")
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        if not isinstance(value, torch.Tensor) or layouts.of(node) != layouts.number(value):
            raise Unlike(f"{node} is not what Dynamo saw")


class _Layouts:
    """Small numbers for the layouts of values: all that the trace of an op may depend on."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._numbers: dict[tuple, int] = {}
        self._known: dict[Node, int] = {}

    def of(self, node: Node) -> int:
        if node not in self._known:
            value = node.meta.get("example_value")
            if not isinstance(value, FakeTensor):
                raise Unlike(f"{node} is no tensor")
            self._known[node] = self.number(value)
        return self._known[node]

    def number(self, value: torch.Tensor) -> int:
        if value.layout is not torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
            raise Unlike("a tensor that is not plain")
        shape, stride = tuple(value.shape), value.stride()
        if not all(type(size) is int for size in (*shape, *stride)):
            raise Unlike("symbolic sizes")
        return self._numbers.setdefault((shape, stride, value.dtype, value.device), len(self._numbers))

    def fakes(self, numbers: Iterable[int]) -> list[torch.Tensor]:
        """A fake tensor for each of some layouts, all of them apart in memory."""
        layouts = list(self._numbers)
        with self._mode:
            wanted = (layouts[number] for number in numbers)
            return [torch.empty_strided(*sizes, dtype=dtype, device=device) for *sizes, dtype, device in wanted]


# --- groups -------------------------------------------------------------------------------------------------


def _groups(gm: fx.GraphModule) -> Iterable[_Group]:
    """What is traced together, in the order of the last node of each."""
    written = _written(gm)
    for node in gm.graph.nodes:
        if node in written:
            if written[node].nodes[-1] is node:
                yield written[node]
        elif node.op not in ("placeholder", "output") and not _takes_one_of_many(node):
            yield _Group((node,), (node,))


def _takes_one_of_many(node: Node) -> bool:
    """Whether a node picks from what an op returned as a tuple."""
    return node.target is operator.getitem and isinstance(node.args[0].meta.get("example_value"), (tuple, list))


def _written(gm: fx.GraphModule) -> dict[Node, _Group]:
    """For each node whose value is written to or follows from such a one: all that make, view, write and read it up to
    the last write.

    Names tell writes. One that they do not tell is seen in the export: its op writes to its input.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    last: dict[int, Node] = {}  # write, by storage
    for node in position:
        by_name = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        if by_name or node.target in WRITING_OPERATORS:
            last.update(dict.fromkeys(storages(node.args[0]), node))
    if not last:
        return {}
    members: dict[int, list[Node]] = {}
    for node in position:
        for storage in last.keys() & storages(node):
            members.setdefault(storage, []).append(node)
    found: dict[Node, _Group] = {}
    for storage, write in last.items():
        within: set[Node] = set()
        stack = members[storage]
        while stack:
            node = stack.pop()
            if position[node] <= position[write] and node not in within:
                within.add(node)
                stack += node.users
        if any(node.op == "placeholder" or node in found for node in within):
            raise Unlike(f"{write} writes to an input, or to what other writes are to")
        found.update(dict.fromkeys(within, _Group.of(sorted(within, key=position.__getitem__))))
    return found


def storages(node: Any) -> set[int]:
    """Of the memory that a node's value lies in."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, FakeTensor)}


# --- kinds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Operand:
    """Stands for an operand in the key of a kind."""

    position: int  # among the different inputs of the group, or among its nodes
    layout: int = -1  # of an input


def _key(group: _Group, layouts: _Layouts) -> tuple[tuple, list[Node]]:
    """What is alike in groups of one kind, and the inputs of this one."""
    within = {node: number for number, node in enumerate(group.nodes)}
    inputs: dict[Node, int] = {}

    def stand_in(node: Node) -> _Operand:
        if node in within:
            return _Operand(within[node])
        return _Operand(inputs.setdefault(node, len(inputs)), layouts.of(node))

    called = []
    for node in group.nodes:
        if node.op not in ("call_function", "call_method"):
            raise Unlike(f"{node.op} {node.target}")
        operands = repr(map_arg((node.args, node.kwargs), stand_in))  # as text, for 1, 1.0 and True are equal
        called.append((node.op, node.target, operands))
    return (*called, *(within[node] for node in group.read)), list(inputs)


class _Loose:
    """A graph of loose groups, one of each kind. They share nothing: an op may return its input itself, and what reads
    that input later would then be traced as reading what the op returned."""

    def __init__(self, layouts: _Layouts) -> None:
        self.layouts, self.graph = layouts, fx.Graph()
        self.placeholders: dict[Node, int] = {}  # with their layouts
        self.first_op: Node | None = None

    def read(self, argument: Node) -> Node:
        """A placeholder for an input of a group."""
        with self.graph.inserting_before(self.first_op) if self.first_op else contextlib.nullcontext():
            placeholder = self.graph.placeholder(f"input_{len(self.placeholders)}")
        self.placeholders[placeholder] = self.layouts.of(argument)
        return placeholder

    def call(self, node: Node, env: dict[Node, Node], number: int) -> Node:
        """A copy of `node`, the `number`-th of its group."""
        called = self.graph.create_node(node.op, node.target, *map_arg((node.args, node.kwargs), env.__getitem__))
        self.first_op = self.first_op or called
        # The export hands these on: they tell what came of which node, and spare it looking for a stack trace.
        called.meta.update({"nn_module_stack": {"": (str(number), "")}, "stack_trace": "-"})
        return called


def _loosen(group: _Group, arguments: list[Node], loose: _Loose) -> _Kind:
    inputs = [loose.read(argument) for argument in arguments]
    env = dict(zip(arguments, inputs))
    for number, node in enumerate(group.nodes):
        env[node] = loose.call(node, env, number)
    expected = [tree_leaves(node.meta.get("example_value")) for node in group.read]
    for node, values in zip(group.read, expected):
        if not values or not all(isinstance(value, FakeTensor) for value in values):
            raise Unlike(f"{node.target} makes something else than tensors")
    return _Kind(inputs, [env[node] for node in group.read], expected)


# --- the export of the loose graph --------------------------------------------------------------------------


def _export_loose(loose: _Loose, kinds: list[_Kind], export: Callable) -> fx.GraphModule:
    loose.graph.output(tuple(node for kind in kinds for node in kind.made))
    fakes = loose.layouts.fakes(loose.placeholders.values())
    try:
        with fx.traceback.preserve_node_meta(), fx.traceback.set_current_meta(loose.first_op):
            exported, signature = export(graph_module({}, loose.graph), fakes)
    except Exception as error:  # an op that asks for a value, which the whole graph knows, or cannot be exported at all
        raise Unlike(f"the export failed: {type(error).__name__}") from error
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        raise Unlike("an op writes to its input")

    own = dict(
        zip(loose.placeholders, (node for node in exported.graph.nodes if node.op == "placeholder"), strict=True)
    )
    outputs = iter(exported.graph.output_node().args[0])
    order = {node: position for position, node in enumerate(exported.graph.nodes)}
    reached: set[Node] = set()
    for kind in kinds:
        kind.inputs = [own[node] for node in kind.inputs]
        kind.outputs = [[next(outputs) for _ in values] for values in kind.expected]
        body = sorted(_upstream(sum(kind.outputs, [])), key=order.__getitem__)
        kind.body = [(node, int(node.meta.get("nn_module_stack", {"": ("0", "")})[""][0])) for node in body]
        reached.update(body)
        for output, value in zip(sum(kind.outputs, []), sum(kind.expected, [])):
            if loose.layouts.number(output.meta["val"]) != loose.layouts.number(value):
                raise Unlike("an op makes another layout than in Dynamo")
    for node in exported.graph.nodes:
        if node.op == "call_function" and node not in reached and node.is_impure():
            raise Unlike(f"{node.target} does something beside its outputs")
    return exported


def _upstream(nodes: list[Node]) -> set[Node]:
    """Those that `nodes` are computed by, placeholders left out."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.op != "placeholder" and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


# --- copies -------------------------------------------------------------------------------------------------


def _assemble(gm: fx.GraphModule, groups: dict[Node, tuple[_Group, _Kind, list[Node]]], layouts: _Layouts) -> fx.Graph:
    """groups: by the last node of each; with its kind, and its inputs."""
    graph = fx.Graph()
    made: dict[Node, Any] = {}  # by node of `gm`: a node, or a list of them
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, fake in zip(placeholders, layouts.fakes(map(layouts.of, placeholders))):
        made[node] = graph.placeholder(node.name)
        made[node].meta["val"] = fake
    for node in gm.graph.nodes:
        if node in groups:
            _copy(*groups[node], made, graph)
        elif node.op == "output":
            graph.output(tuple(tree_leaves(map_arg(node.args, made.__getitem__))))
        elif node not in made and _takes_one_of_many(node) and node.args[0] in made:
            made[node] = made[node.args[0]][node.args[1]]
    return graph


def _copy(group: _Group, kind: _Kind, arguments: list[Node], made: dict[Node, Any], graph: fx.Graph) -> None:
    env = dict(zip(kind.inputs, (made[argument] for argument in arguments)))
    handed_on = [{key: node.meta[key] for key in _HANDED_ON if key in node.meta} for node in group.nodes]
    for part, number in kind.body:
        env[part] = graph.node_copy(part, env.__getitem__)
        env[part].meta = {"val": part.meta.get("val"), **handed_on[number]}
    for node, outputs in zip(group.read, kind.outputs):
        values = [env[output] for output in outputs]
        made[node] = values[0] if isinstance(node.meta["example_value"], torch.Tensor) else values
