"""Gathers of what holds still over a generation (position ids, RoPE tables, learned positions): made once.

    f(x, rope(ids)[order])   ->   keep:             kept.copy_(rope(ids)[order])
                                  refresh, delta:   f(x, kept)

The keep program is the small part of a permuted graph that such gathers are computed from. What it writes is state,
so the programs neither gather nor compute any of it. `permute_tokens` says which gathers these are.
"""

from __future__ import annotations

import torch
from torch import fx

from .canonical import clean
from .graphs import graph_module, part_of

aten = torch.ops.aten


def kept_gathers(gm: fx.GraphModule) -> list[fx.Node]:
    """The token gathers of a permuted canonical graph whose result holds still, in graph order."""
    return [node for node in gm.graph.nodes if node.meta.get("kept")]


def keep_program(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """(program, positions): `program(*inputs, *kept)` computes the kept gathers of `gm` and writes each into its
    tensor of `kept`; of `inputs`, those of `gm`, it reads the ones at `positions`.
    """
    wanted = kept_gathers(gm)
    graph, env, positions = part_of(gm, wanted)
    for k, node in enumerate(wanted):
        graph.call_function(aten.copy_.default, (graph.placeholder(f"kept_{k}"), env[node]))
    graph.output(())
    return clean(graph_module(gm, graph)), positions


def use_kept(gm: fx.GraphModule, env: dict[fx.Node, fx.Node], kept: list[fx.Node]) -> None:
    """Puts `kept`, one value for each of `kept_gathers(gm)`, in their place in a copy of `gm`. `env` maps nodes of
    `gm` to those of the copy, and is brought up to date."""
    for node, value in zip(kept_gathers(gm), kept, strict=True):
        env[node].replace_all_uses_with(value)
        env[node] = value
