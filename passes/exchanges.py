"""Exchanges of whole parts between ranks, seen by the axes that they move: how Ulysses trades tokens for heads.

    flat = all_to_all_single(x.flatten(), [n / W, ...]); flat.view(x.shape)     x [W, S / W, B, H / W, D]
    ->  all_to_all_single(x, [1, ...])

Flattened, no axis can be followed; as [W, ...] all but the first go through untouched. Programs get the flattened form
again: kernels behind collectives want plain contiguous memory.
"""

from __future__ import annotations

import math

from torch import fx
from torch.fx import Node

from .canonical import clean
from .collectives import exchanged, is_exchange, is_wait
from .nodes import VIEWS, emit, shape, substitute


def raise_exchanges(gm: fx.GraphModule) -> fx.GraphModule:
    """view(wait(all_to_all(view(x, [n]))), x.shape)  ->  wait(all_to_all(x)), where x.shape[0] counts the ranks."""
    flat = [node for node in gm.graph.nodes if is_exchange(node) and len(shape(node)) == 1]
    for node in flat:
        source = _unflattened(node)
        if source is None:
            continue
        views = _readers(node)
        with gm.graph.inserting_before(next(iter(node.users))):
            parts = [1] * exchanged(node)
            sent = emit(gm.graph, node.target, source, parts, parts, node.args[3], like=node)
            came = emit(gm.graph, next(iter(node.users)).target, sent, like=node)
        for view in views:
            substitute(view, came)
    return clean(gm) if flat else gm


def _unflattened(node: Node) -> Node | None:
    """What was flattened to be exchanged, if every reader gives it its shape back."""
    flat = node.args[0]
    if flat.target not in VIEWS or not all(map(is_wait, node.users)):
        return None
    source, views = flat.args[0], _readers(node)
    same = views and all(view.target in VIEWS and shape(view) == shape(source) for view in views)
    return source if same and shape(source)[0] == exchanged(node) else None


def _readers(node: Node) -> list[Node]:
    """Of what an exchange brought, behind the wait for it; some wait twice."""
    return [reader for user in node.users for reader in (_readers(user) if is_wait(user) else [user])]


def flatten_exchanges(gm: fx.GraphModule) -> None:
    """The reverse of `raise_exchanges`, in place, for a graph that is about to be compiled."""
    graph = gm.graph
    for node in list(graph.nodes):
        if not is_exchange(node) or len(shape(node)) == 1:
            continue
        size, world = math.prod(shape(node)), exchanged(node)
        parts = [size // world] * world
        with graph.inserting_before(node):
            flat = graph.call_function(VIEWS[2], (node.args[0], [size]))
            sent = graph.call_function(node.target, (flat, parts, parts, node.args[3]))
        for wait in list(node.users):
            with graph.inserting_after(wait):
                came = graph.call_function(wait.target, (sent,))
            with graph.inserting_after(came):
                back = graph.call_function(VIEWS[0], (came, list(shape(node))))
            back.meta.update(wait.meta)
            wait.replace_all_uses_with(back)
            graph.erase_node(wait)
        graph.erase_node(node)
