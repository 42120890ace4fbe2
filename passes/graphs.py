"""Graph modules that passes hand on (their Python code is generated when one is run or printed, and no earlier), and
what a graph does as a whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress

import torch
from torch import fx

try:
    from torch.fx._lazy_graph_module import _LazyGraphModule as _GraphModule
except ImportError:  # a private name: without it every pass pays for code that nobody runs
    _GraphModule = fx.GraphModule


def graph_module(root, graph: fx.Graph) -> fx.GraphModule:
    """`fx.GraphModule(root, graph)`, whose `recompile` is put off.

    Of the 7.0 s that the analysis of a FLUX with 57 blocks took, 2.8 s were code generated after every pass.
    """
    return _GraphModule(root, graph)


def only_computes(canonical: fx.GraphModule, which: Sequence[bool] | None = None) -> bool:
    """Whether a graph does nothing but return new floating-point tensors: then a step may go without it.

    which: the outputs that have to be such tensors, by position; all of them if not given.
    """
    outputs = _outputs(canonical)
    asked = [node for node, is_asked in zip(outputs, which or [True] * len(outputs)) if is_asked]
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in asked]
    return (
        all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)
        and not any(node.op == "placeholder" for node in asked)
        and not any(node.target is torch.ops.aten.copy_.default for node in canonical.graph.nodes)
    )


def outputs_from(canonical: fx.GraphModule, sources: Collection[fx.Node]) -> tuple[bool, ...]:
    """Which outputs of a graph are computed from any of the nodes `sources`."""
    reached = set(sources)
    for node in canonical.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return tuple(isinstance(node, fx.Node) and node in reached for node in _outputs(canonical))


def keep_outputs(gm: fx.GraphModule, which: Sequence[bool]) -> fx.GraphModule:
    """Leaves (in place) what computes some outputs of a graph without side effects, from the same inputs."""
    output = next(iter(reversed(gm.graph.nodes)))
    output.args = (list(compress(_outputs(gm), which)),)
    gm.graph.eliminate_dead_code()
    return gm


def copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy with the same parameters and metadata, and where the nodes are in it."""
    graph, env = fx.Graph(), {}
    graph.output(graph.graph_copy(gm.graph, env))
    copied = graph_module(gm, graph)
    copied.meta.update(gm.meta)
    return copied, env


def part_of(gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node], tuple[int, ...]]:
    """(graph, env, positions): the part of `gm` that the nodes `wanted` are computed from, behind all of its
    placeholders; where the nodes are in it; and which placeholders it reads. It has no output yet."""
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    graph, env = fx.Graph(), {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in (*placeholders, *(node for node in gm.graph.nodes if node in needed)):
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph, env, tuple(position for position, node in enumerate(placeholders) if node in needed)


def _outputs(canonical: fx.GraphModule) -> Sequence:
    return next(iter(reversed(canonical.graph.nodes))).args[0]
