"""Casts that autocast makes at run time are written into the graph: then every value has the dtype that it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from .canonical import clean
from .nodes import aten, emit

_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def resolve_autocast(gm: fx.GraphModule) -> fx.GraphModule:
    """In place; the same values.

    with autocast(bfloat16): linear(x, w, b)  ->  linear(x.to(bfloat16), w.to(bfloat16), b.to(bfloat16))

    Which inputs an op casts, PyTorch says itself: each op is called on fake tensors, in the state of autocast that
    it stands in (the caller's, where it is no region of the graph), and the casts are watched.
    """
    graph = gm.graph
    regions = any(node.target is _ENTER for node in graph.nodes)
    if not regions and not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return gm
    valued = [node for node in graph.nodes if node.op != "output" and node.target not in (_ENTER, _EXIT)]
    mode = detect_fake_mode([node.meta.get("val") for node in valued])
    if mode is None or any("val" not in node.meta for node in valued):
        return gm
    open_regions: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad(), mode:
            for node in list(graph.nodes):
                if node.target is _ENTER:
                    open_regions[node] = _ENTER(*node.args)
                elif node.target is _EXIT:
                    _EXIT(open_regions.pop(node.args[0]))
                elif node.op == "call_function":
                    _resolve(node)
    finally:
        for region in reversed(open_regions.values()):
            _EXIT(region)
    for node in reversed(list(graph.nodes)):
        if node.target in (_ENTER, _EXIT):
            graph.erase_node(node)
    return clean(gm)


def _resolve(node: fx.Node) -> None:
    """Runs the node on fake tensors, notes its value, and writes the casts of its inputs before it."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with _Casts(args, kwargs) as watched:
        node.meta["val"] = node.target(*args, **kwargs)
    for source in node.all_input_nodes:
        dtype = watched.casts.get(id(source.meta["val"]))
        if dtype is not None:
            with node.graph.inserting_before(node):
                cast = emit(node.graph, aten._to_copy.default, source, like=node, dtype=dtype)
            node.replace_input_with(source, cast)


class _Casts(TorchDispatchMode):
    """What an op casts its own inputs to before it does anything else, by their id."""

    def __init__(self, args: Sequence, kwargs: dict) -> None:
        super().__init__()
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self._inputs = {id(value) for value in leaves if isinstance(value, torch.Tensor)}
        self._begun = False
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_cast = func is aten._to_copy.default and set(kwargs) == {"dtype"} and id(args[0]) in self._inputs
        if is_cast and not self._begun:
            self.casts[id(args[0])] = kwargs["dtype"]
        elif func.namespace != "prim":  # which asks for a device
            self._begun = True
        return func(*args, **kwargs)
