"""Where a graph may be cut in two, and what the compiler loses by it.

What crosses a cut is returned by one compiled piece and handed to another, so it must be a tensor, and one that nobody
writes to any more. A graph that does something not understood here may not be cut at all: `Uncuttable`.

What is lost is memory traffic. Between two matrix multiplications the compiler fuses all there is; a cut right behind
one of those loses nothing, for their outputs lie in memory in any case. A cut through what would have been one kernel
writes what that kernel kept to itself, and reads it again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .retrace import WRITING_OPERATORS, storages

_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
# In the names of what reads and writes whole matrices by itself: the compiler fuses nothing into it.
_APART = ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "einsum", "bilinear")
_APART_WORDS = ("conv", "attention")
_VIEWS = frozenset((
    "alias", "chunk", "contiguous", "detach", "diagonal", "dropout", "expand", "expand_as", "flatten", "getitem",
    "movedim", "narrow", "permute", "reshape", "reshape_as", "select", "slice", "split", "split_with_sizes", "squeeze",
    "swapaxes", "t", "tensor_split", "transpose", "unbind", "unflatten", "unsafe_chunk", "unsafe_split", "unsqueeze",
    "view", "view_as", "view_as_complex", "view_as_real",
))  # fmt: skip
_OFTEN = 4096  # bytes that a value of unknown size counts


class Uncuttable(Exception):
    """Why a graph is compiled as a whole."""


@dataclass(frozen=True)
class Cuts:
    """Of a cut before each op of a graph, by its position among the ops (`ops_of`), and of one behind the last."""

    allowed: list[bool]
    lost: list[int]  # bytes written and read that a kernel would have kept
    crossing: list[int]  # values


def ops_of(gm: fx.GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def name_of(node: Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[1]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def is_apart(node: Node) -> bool:
    """Whether an op's output lies in memory whatever comes behind it: matrix multiplications, attention, ops that the
    compiler does not know."""
    if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims"):
        return True
    name = name_of(node)
    return name.lstrip("_") in _APART or any(word in name for word in _APART_WORDS)


def value_of(node: Node) -> Any:
    """The example that a pass or Dynamo left of a node's value, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def is_tensor(node: Node) -> bool:
    """Whether a node's value is one tensor, as far as is known."""
    value = value_of(node)
    if value is None and isinstance(node.target, OpOverload):
        returns = node.target._schema.returns
        return len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
    return isinstance(value, torch.Tensor)


def find_cuts(gm: fx.GraphModule) -> Cuts:
    """Raises Uncuttable where something in the graph could be torn apart by a cut anywhere."""
    ops = ops_of(gm)
    place = {node: position for position, node in enumerate(ops)}
    for node in ops:
        _check(node)
    last = {node: max((place[user] for user in node.users if user in place), default=-1) for node in ops}
    output = next(iter(reversed(gm.graph.nodes)))
    for node in output.all_input_nodes:
        if node in place:
            last[node] = len(ops)
    torn, lost, crossing = ([0] * (len(ops) + 2) for _ in range(3))

    def add(counts: list[int], node: Node, until: int, by: int = 1) -> None:
        """To all cuts behind `node` as far as the one before the op at `until`."""
        if until > place[node]:
            counts[place[node] + 1] += by
            counts[until + 1] -= by

    tainted = _tainted(gm)
    for node in ops:
        add(crossing, node, last[node])
        if node in tainted or not is_tensor(node):
            add(torn, node, last[node])
    for first, until in _written(ops):
        add(torn, first, place[until])
    for node, until, size in _kept_in_kernels(ops, place):
        add(lost, node, until, size)
    torn, lost, crossing = (list(accumulate(counts))[:-1] for counts in (torn, lost, crossing))
    return Cuts([not count for count in torn], lost, crossing)


# --- what a graph may hold ----------------------------------------------------------------------------------


@cache
def _functions() -> frozenset:
    """Functions that make values of their arguments, and write to none but as their names say.

    Those that draw random numbers are among them: a piece that is called again draws again.
    """
    torch_c = (torch._C._nn, torch._C._VariableFunctions)
    spaces = (F, *torch_c, torch.functional, torch.special, torch.linalg, torch.fft, operator, math)
    found = (getattr(space, name) for space in spaces for name in dir(space))
    return frozenset(value for value in found if callable(value) and _is_hashable(value))


def _is_hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def _check(node: Node) -> None:
    if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in tree_leaves(value_of(node))):
        raise Uncuttable(f"{node} is symbolic")
    if isinstance(value_of(node), FakeTensor) and not all(type(size) is int for size in value_of(node).shape):
        raise Uncuttable(f"{node} has symbolic sizes")
    # These write to what they read without their names or schemas saying so, the first two when they train.
    if any(word in name_of(node) for word in ("batch_norm", "instance_norm", "embedding_bag", "_fused_", "_amp_")):
        raise Uncuttable(f"{node.target} may write to its inputs")
    if node.op == "call_method" and hasattr(torch.Tensor, node.target) and not node.target.startswith("__i"):
        return
    if node.op != "call_function":
        raise Uncuttable(f"{node.op} {node.target}")
    if isinstance(node.target, OpOverload):
        if "c10d" in node.target.namespace or "c10d" in node.target._schema.name:
            raise Uncuttable("a collective, which pieces would wait for where the whole need not")
        return
    # Of autocast the start is a value that its end reads: no cut goes through.
    if node.target in _AUTOCAST or node.target in WRITING_OPERATORS:
        return
    if not _is_hashable(node.target) or node.target not in _functions():
        raise Uncuttable(f"{node.target} is unknown")
    if name_of(node) == "embedding" and any(
        value is not None for value in (*node.args[3:4], node.kwargs.get("max_norm"))
    ):
        raise Uncuttable("an embedding that renorms its table")


def writes(node: Node) -> Iterator[Node]:
    """The nodes whose values an op writes to."""
    if isinstance(node.target, OpOverload):
        arguments = node.target._schema.arguments
        for number, argument in enumerate(arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Node))
        return
    name = name_of(node)
    by_name = name.endswith("_") and not name.endswith("__")
    written = [node.kwargs.get("out")]
    if by_name or node.target in WRITING_OPERATORS or _is_inplace(node):
        written.append(node.args[0] if node.args else node.all_input_nodes)
    yield from (leaf for leaf in tree_leaves(written) if isinstance(leaf, Node))


def _is_inplace(node: Node) -> bool:
    """Whether a function of `torch.nn.functional` is asked to write to its input: `relu(x, inplace=True)`."""
    if node.op != "call_function" or node.target in _AUTOCAST:
        return False
    if node.kwargs.get("inplace"):
        return True
    position = _position_of_inplace(node.target)
    return position is not None and position < len(node.args) and node.args[position] is not False


@cache
def _position_of_inplace(function: Any) -> int | None:
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return names.index("inplace") if "inplace" in names else None


def _written(ops: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """For memory that is written to: what makes it, and the last that writes. Only inputs may be written to by an op
    of ours, or at a graph's end: those are every piece's own."""
    last: dict[int, Node] = {}
    for node in ops:
        for written in writes(node):
            if written.op == "placeholder" and isinstance(node.target, OpOverload):
                continue
            found = storages(written) if "example_value" in written.meta else ()
            if not found or written.op == "placeholder":
                raise Uncuttable(f"{node} writes to {written}")
            last.update(dict.fromkeys(found, node))
    if not last:
        return
    made: dict[int, Node] = {}
    for node in ops[0].graph.nodes:
        for storage in last.keys() & storages(node):
            made.setdefault(storage, node)
    for storage, write in last.items():
        if made[storage].op in ("placeholder", "get_attr"):
            raise Uncuttable(f"{write} writes to an input")
        yield made[storage], write


def _tainted(gm: fx.GraphModule) -> set[Node]:
    """What may be a view of an input that is written to: a piece must get such an input itself."""
    nodes = list(gm.graph.nodes)
    inputs = {written for node in nodes for written in writes(node) if written.op == "placeholder"}
    reached = set(inputs)
    for node in nodes:
        if node.op != "output" and not reached.isdisjoint(node.all_input_nodes) and _may_alias(node):
            reached.add(node)
    return reached - inputs


def _may_alias(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return True
    if any(returned.alias_info is not None for returned in target._schema.returns):
        return True
    # One that is made of others may return its input without saying so, as dropout does; a kernel may not.
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


# --- what is lost -------------------------------------------------------------------------------------------


def _kept_in_kernels(ops: Sequence[Node], place: dict[Node, int]) -> Iterator[tuple[Node, int, int]]:
    """Values whose readers a compiler would put into the kernel that makes them: the value, the place of the last such
    reader, and the bytes that a cut between the two moves.

    Taken as one kernel is what has the same number of ops `apart` above it.
    """
    stage: dict[Node, int] = {}
    apart = {node: is_apart(node) for node in ops}
    views = {node: name_of(node) in _VIEWS for node in ops}
    readers: dict[Node, list[Node]] = {}  # behind views
    for node in reversed(ops):
        users = [user for user in node.users if user in place]
        readers[node] = [reader for user in users for reader in (readers[user] if views[user] else [user])]
    for node in ops:
        above = max((stage.get(source, 0) for source in node.all_input_nodes), default=0)
        stage[node] = above + apart[node]
    for node in ops:
        if apart[node] or views[node]:
            continue
        same = [place[reader] for reader in readers[node] if not apart[reader] and stage[reader] == stage[node]]
        if same:
            written = len(same) < len(readers[node])
            yield node, max(same), _bytes(node) * (1 if written else 2)


def _bytes(node: Node) -> int:
    value = value_of(node)
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else _OFTEN
