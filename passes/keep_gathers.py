"""Gathers of what holds still over a generation (position ids, RoPE tables, learned positions): made once.

    delta:  f(x, rope(ids)[order])   ->   keep:   kept.copy_(rope(ids)[order])
                                          delta:  f(x, kept)

The keep program is the small part of a permuted graph that such gathers are computed from. What it writes is state,
so the delta program neither gathers nor computes any of it. `permute_tokens` says which gathers these are.
"""

from __future__ import annotations

import torch
from torch import fx

from .canonical import clean
from .graphs import graph_module

aten = torch.ops.aten


def kept_gathers(gm: fx.GraphModule) -> list[fx.Node]:
    """The token gathers of a permuted canonical graph whose result holds still, in graph order."""
    return [node for node in gm.graph.nodes if node.meta.get("kept")]


def keep_program(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """(program, positions): `program(*inputs, *kept)` computes the kept gathers of `gm` and writes each into its
    tensor of `kept`; of `inputs`, those of `gm`, it reads the ones at `positions`.
    """
    wanted = kept_gathers(gm)
    needed = _upstream(wanted)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    positions = []
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for position, node in enumerate(inputs):
        env[node] = graph.node_copy(node, env.__getitem__)
        if node in needed:
            positions.append(position)
    targets = [graph.placeholder(f"kept_{k}") for k in range(len(wanted))]
    for node in gm.graph.nodes:
        if node in needed and node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    for target, node in zip(targets, wanted):
        graph.call_function(aten.copy_.default, (target, env[node]))
    graph.output(())
    return clean(graph_module(gm, graph)), tuple(positions)


def use_kept(gm: fx.GraphModule, env: dict[fx.Node, fx.Node], kept: list[fx.Node]) -> None:
    """Puts `kept`, one value for each of `kept_gathers(gm)`, in their place in a copy of `gm`. `env` maps nodes of
    `gm` to those of the copy, and is brought up to date."""
    for node, value in zip(kept_gathers(gm), kept, strict=True):
        env[node].replace_all_uses_with(value)
        env[node] = value


def _upstream(nodes: list[fx.Node]) -> set[fx.Node]:
    """`nodes` and all that they are computed from."""
    out: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in out:
            out.add(node)
            stack += node.all_input_nodes
    return out
