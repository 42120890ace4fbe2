"""Graph modules that passes hand on (their Python code is generated when one is run or printed, and no earlier), and
what a graph does as a whole."""

from __future__ import annotations

from collections.abc import Collection

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


def only_computes(canonical: fx.GraphModule) -> bool:
    """Whether a graph does nothing but return new floating-point tensors: then a step may go without it."""
    output = next(iter(reversed(canonical.graph.nodes)))
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in output.args[0]]
    return (
        all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)
        and not any(node.op == "placeholder" for node in output.all_input_nodes)
        and not any(node.target is torch.ops.aten.copy_.default for node in canonical.graph.nodes)
    )


def all_depend_on(canonical: fx.GraphModule, sources: Collection[fx.Node]) -> bool:
    """Whether every output of a graph is computed from one of the nodes `sources` at least."""
    reached = set(sources)
    for node in canonical.graph.nodes:
        if node.op != "output" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    output = next(iter(reversed(canonical.graph.nodes)))
    return reached.issuperset(node for node in output.args[0] if isinstance(node, fx.Node))
