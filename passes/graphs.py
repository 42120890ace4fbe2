"""Graph modules that passes hand on: their Python code is generated when one is run or printed, and no earlier."""

from __future__ import annotations

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
