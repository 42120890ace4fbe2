"""Dynamo graph -> canonical graph: functional, pre-dispatch ATen, one spelling for every later pass."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module

from .graphs import graph_module
from .retrace import Unlike, retrace

log = logging.getLogger(__name__)
aten = torch.ops.aten
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def canonicalise(gm: fx.GraphModule, inputs: list) -> fx.GraphModule:
    """Re-traces `gm` (Dynamo's graph, left untouched) to functional pre-dispatch ATen.

    Placeholders keep `gm`'s order and number; every node has `meta["val"]`. Inputs that `gm` mutates get
    their new value by an `aten.copy_` at the end of the graph; all before it is functional.
    Shapes are those of `inputs` (real or fake tensors, Python ints for symbolic sizes).

    Raises whatever the export raises (block masks of flex_attention, for one): the caller leaves the graph dense.
    """
    try:
        return clean(retrace(gm, inputs, export))
    except Unlike as why:
        log.debug("the graph is traced as a whole: %s", why)
        return clean(_whole(gm, inputs))


def export(gm: fx.GraphModule, inputs: list) -> tuple[fx.GraphModule, Any]:
    """`aot_export_module` as every graph here is traced: (functional pre-dispatch ATen, its signature)."""
    with _functorch_stack_kept():
        exported, signature = aot_export_module(gm, inputs, trace_joint=False, pre_dispatch=True)
    for node in list(exported.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # holds by the meta values; hides dead code
            exported.graph.erase_node(node)
    return exported, signature


def _whole(gm: fx.GraphModule, inputs: list) -> fx.GraphModule:
    with _real_autocast(gm) as traced:
        exported, signature = export(traced, list(inputs))
    graph = exported.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]

    # Tensors that gm holds itself (constants, or weights when Dynamo does not lift them) come first as inputs:
    # make them attributes again, so that placeholders are gm's own.
    held = [*signature.parameters, *signature.buffers]
    for node, name in zip(placeholders, held):
        target = name.replace(".", "_")
        exported.register_buffer(target, _attribute(gm, name), persistent=False)
        with graph.inserting_before(node):
            attribute = graph.get_attr(target)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    own = placeholders[len(held) :]

    _write_mutations_back(graph, signature, own, {name: n for n, name in zip(placeholders, held)})
    return graph_module(exported, graph)


@contextlib.contextmanager
def _real_autocast(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A copy of `gm` whose autocast regions hold while it is traced.

    The export records `_enter_autocast` but does not run it: every value would have the dtype that it has without
    autocast, and a cast that undoes autocast's would be left out of the graph as one to the same dtype.
    """
    if not any(node.target is _ENTER for node in gm.graph.nodes):
        yield copy.copy(gm)
        return
    regions: list[torch.autocast] = []

    def enter(*args) -> torch.autocast:
        regions.append(torch.autocast(*args))
        regions[-1].__enter__()
        return regions[-1]

    def leave(region: torch.autocast) -> None:
        regions.remove(region)
        region.__exit__(None, None, None)

    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.target = {_ENTER: enter, _EXIT: leave}.get(node.target, node.target)
    try:
        yield graph_module(gm, graph)
    finally:
        for region in reversed(regions):  # tracing failed inside
            region.__exit__(None, None, None)


@contextlib.contextmanager
def _functorch_stack_kept() -> Iterator[None]:
    """An export that fails inside a vmap of the graph (block masks) leaves its levels behind: Dynamo's guards, and
    every call after them, would find themselves inside that vmap."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _write_mutations_back(graph: fx.Graph, signature, own: list[fx.Node], held: dict[str, fx.Node]) -> None:
    """Export returns the new values of mutated inputs ahead of the outputs; make them `copy_` instead."""
    output = next(iter(reversed(graph.nodes)))
    values = list(output.args[0])
    by_name = {node.name: node for node in own}
    count = len(signature.buffers_to_mutate) + len(getattr(signature, "user_inputs_to_mutate", {}))
    targets = {**signature.buffers_to_mutate, **getattr(signature, "user_inputs_to_mutate", {})}
    for value in values[:count]:
        target = by_name.get(targets[value.name])
        if target is None:
            raise ValueError(f"the graph mutates a tensor of its own: {targets[value.name]}")
        with graph.inserting_before(output):
            written = graph.call_function(aten.copy_.default, (target, value))
        written.meta["val"] = target.meta["val"]
    output.args = (tuple(values[count:]),)


def _attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    return operator.attrgetter(path)(module)


def clean(gm: fx.GraphModule) -> fx.GraphModule:
    """What ends every pass: dead code out (never `copy_`, which writes an input), lint, recompile."""
    for node in reversed(gm.graph.nodes):  # fx's own elimination asks every node, used or not, whether it is impure
        # SDPA counts as random for its dropout; without dropout a dead one is as dead as any.
        used = node.users or node.op in ("placeholder", "output")
        if not used and not node.is_impure(impure_random=False) and not _writes(node):
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
