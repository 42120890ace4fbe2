"""Python numbers that change from call to call (a timestep in a hand-written loop) become tensors of no dimension.

Dynamo makes a symbol of an integer that it saw change, and reads a float that it saw change out of a tensor. Both tie a
program to the host and hide the timestep. Where a number is only a value, never a size, a tensor does as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping

import torch
from torch import fx

from .graphs import graph_module
from .nodes import aten

_ARITHMETIC = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.true_divide,
}
_CONSTRUCTORS = (torch.full, torch.tensor, torch.as_tensor, torch._refs.tensor)

# The nodes that are Python numbers, and the dtype that holds each exactly: int64, or float64 as Python's own.
Numbers = dict[fx.Node, torch.dtype]


def lift_numbers(gm: fx.GraphModule, integers: Collection[int] = ()) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Dynamo's graph without numbers, and which of `integers` are int64 tensors in it; `gm` itself if nothing changes.

    integers: positions of inputs that are Python integers. A number of which one use is not known stays as it is.

    full([n], t), tensor([t])   ->  expand(to(t, float32), [n])
    x * t, t / 1000             ->  the same, of tensors
    item(t)                     ->  to(t, float64)
    """
    if not integers and not _reads(gm.graph):
        return gm, ()
    result = _copied(gm)
    graph, placeholders = result.graph, _placeholders(result)
    lifted = tuple(i for i in integers if _lift(placeholders[i], torch.int64))
    read = [n for n in _reads(graph) if _lift(n, _dtype_of_number(_example(n.args[0])))]
    for node in read:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_to(graph, node.args[0], _dtype_of_number(_example(node.args[0]))))
        graph.erase_node(node)
    if not lifted and not read:
        return gm, ()
    result.recompile()
    return result, lifted


def numbers_read(gm: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs that Dynamo's graph reads a number out of, where that lies on the host."""
    read = {node.args[0] for node in _reads(gm.graph)}
    return tuple(i for i, n in enumerate(_placeholders(gm)) if n in read and _example(n).device.type == "cpu")


def bind_numbers(gm: fx.GraphModule, numbers: Mapping[int, float]) -> fx.GraphModule:
    """A copy in which those that are read out of the inputs at these positions are constants.

    item(t)  ->  1e-06
    """
    result = _copied(gm)
    values = {node: numbers[i] for i, node in enumerate(_placeholders(result)) if i in numbers}
    for node in _reads(result.graph):
        if node.args[0] in values:
            for user in list(node.users):
                user.replace_input_with(node, values[node.args[0]])
            result.graph.erase_node(node)
    result.recompile()
    return result


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    result = graph_module(gm, graph)
    result.meta.update(gm.meta)
    for new, old in zip(_placeholders(result), _placeholders(gm)):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    result._param_name_to_source = getattr(gm, "_param_name_to_source", None)
    return result


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _reads(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_method" and node.target == "item"]


def _lift(source: fx.Node, dtype: torch.dtype) -> bool:
    """Rewrites everything that is computed from one number; nothing if a use is not known."""
    numbers: Numbers = {source: dtype}
    rewrites = []
    for node in source.graph.nodes:
        if not numbers.keys().isdisjoint(node.all_input_nodes):
            rewrite = _rewrite(node, numbers)
            if rewrite is None:
                return False
            rewrites.append((node, rewrite))
    for node, rewrite in rewrites:
        with source.graph.inserting_before(node):
            new = rewrite()
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        source.graph.erase_node(node)
    return True


def _rewrite(node: fx.Node, numbers: Numbers) -> Callable[[], fx.Node] | None:
    """What makes `node` anew with tensors for numbers; None where that is not known. Notes the number it may be."""
    if node.op != "call_function":
        return None
    if node.target is torch.sym_float:
        numbers[node] = torch.float64
        return lambda: _to(node.graph, node.args[0], torch.float64)
    if node.target in _CONSTRUCTORS:
        return _constructor(node, numbers)
    if node.target in _ARITHMETIC:
        return _arithmetic(node, numbers)
    return None


def _constructor(node: fx.Node, numbers: Numbers) -> Callable[[], fx.Node] | None:
    made, number = _example(node), _only(node.args[-1])
    if not isinstance(number, fx.Node) or number not in numbers or len(node.all_input_nodes) > 1:
        return None
    return lambda: node.graph.call_function(
        aten.expand.default, (_to(node.graph, _only(node.args[-1]), made.dtype, made.device), list(made.shape))
    )


def _only(data: object) -> object:
    while isinstance(data, (tuple, list)) and len(data) == 1:
        (data,) = data
    return data


def _arithmetic(node: fx.Node, numbers: Numbers) -> Callable[[], fx.Node] | None:
    target = _ARITHMETIC[node.target]
    tensors = [_example(a) for a in node.args if isinstance(a, fx.Node) and a not in numbers]
    if tensors:
        # Beside such a tensor one of no dimension weighs as little as a number: the result has the tensor's dtype.
        safe = all(isinstance(t, torch.Tensor) and t.dim() > 0 and t.is_floating_point() for t in tensors)
        return (lambda: node.graph.call_function(target, node.args)) if safe else None
    floats = target is torch.true_divide or any(
        numbers[a].is_floating_point if isinstance(a, fx.Node) else isinstance(a, float) for a in node.args
    )
    dtype = numbers[node] = torch.float64 if floats else torch.int64
    return lambda: node.graph.call_function(
        target, tuple(_to(node.graph, a, dtype) if isinstance(a, fx.Node) else a for a in node.args)
    )


def _to(graph: fx.Graph, number: fx.Node, dtype: torch.dtype, device: torch.device | None = None) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (number,), {"dtype": dtype, "device": device})


def _dtype_of_number(example: torch.Tensor) -> torch.dtype:
    return torch.float64 if example.is_floating_point() else torch.int64


def _example(node: fx.Node):
    return node.meta["example_value"]
