"""Where tokens change their order: a minimum cut between the ops that want them permuted and those that must
not.

Every op that touches the tokens lies inside (permuted) or outside. Sites want to be inside, for what token
order is worth to them; inputs, outputs and walls are outside. A value that crosses is gathered once for all
its users on the other side, at the bytes that the gather moves. The cut of least bytes is exact (Ford and
Fulkerson).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import networkx as nx
import torch
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from .collectives import is_collective
from .sites import AttentionSite, MlpSite
from .token_axis import Value
from .token_links import is_element, is_tensor
from .token_proof import Places, touches

# A value that stays the same over a generation is gathered once, or as good as: ids, RoPE tables, learned
# positions.
FIXED_DISCOUNT = 10**6
# What a memory transaction moves, in bytes. A gather of shorter runs reads the rest of it too, and again for
# other tokens, as far as caches do not help; neighbours of a patch share sectors, so they mostly do.
SECTOR, MOST_WASTE = 32, 2
# Arithmetic done in the time that one byte takes (600 TFLOP/s, 3 TB/s).
FLOPS_PER_BYTE = 200

# More than any graph moves, in bytes.
AT_ANY_PRICE = 1 << 60

_INSIDE, _OUTSIDE = "inside", "outside"


def owner(node: fx.Node) -> fx.Node:
    """The op that makes a value: elements of a tuple are made by the op of the tuple, what is waited for too."""
    while is_element(node):
        node = node.args[0]
    return node


def users(node: fx.Node) -> list[fx.Node]:
    """The ops that read a value."""
    return [user for user in node.users if not is_element(user)]


def gather_bytes(value: torch.Tensor, dims: Collection[int]) -> int:
    """Bytes read and written by a gather along each of `dims`; more where a token lies scattered."""
    size = value.numel() * value.element_size()
    total = 0
    for dim in dims:
        run = value.stride(dim) * value.element_size()
        total += size + size * min(MOST_WASTE, max(1, SECTOR // max(1, run)))
    return total


def site_bytes(site: AttentionSite | MlpSite, share: float) -> float:
    """What token order is worth to a site: `share` of its own time, in bytes of memory traffic."""
    if isinstance(site, AttentionSite):
        flops = 4 * site.batch * site.heads * site.q_len * site.kv_len * site.head_dim
    else:
        flops = 2 * site.batch * site.tokens * site.hidden * (len(site.up) * site.in_features + site.out_features)
    return share * flops / FLOPS_PER_BYTE


def minimum_cut(
    gm: fx.GraphModule,
    held: Mapping[Value, Places],
    walls: Collection[fx.Node],
    wanted: Mapping[fx.Node, float],
    whole: Collection[Collection[fx.Node]],
    fixed: Collection[fx.Node],
) -> frozenset[fx.Node]:
    """The ops inside, by the cheapest cut.

    wanted: ops that gain from being inside, and how many bytes that is worth to each. whole: sets of ops that
    must lie on one side. fixed: nodes that stay the same over a generation.
    """
    ops = {node for node in gm.graph.nodes if not is_element(node) and touches(node, held)}
    side = {op: _OUTSIDE if op.op != "call_function" or op in walls else op for op in ops}

    network = nx.DiGraph()
    network.add_nodes_from([_INSIDE, _OUTSIDE])
    for op, worth in wanted.items():
        _edge(network, _INSIDE, side.get(op, _OUTSIDE), min(worth, AT_ANY_PRICE))
    for members in whole:
        members = [side[op] for op in members if op in side]
        for a, b in zip(members, members[1:]):
            _edge(network, a, b, math.inf)
            _edge(network, b, a, math.inf)
    for node in gm.graph.nodes:
        if (node, 0) not in held or not is_tensor(node):
            continue
        source, targets = side[owner(node)], {side[user] for user in users(node)}
        price = gather_bytes(node.meta["val"], {dim for dim, _ in held[node, 0]})
        if node in fixed:
            price = 1 + price // FIXED_DISCOUNT
        _add_value(network, node, source, targets - {source}, price)
    _, (inside, _) = nx.minimum_cut(network, _INSIDE, _OUTSIDE, flow_func=boykov_kolmogorov)
    return frozenset(op for op in ops if side[op] in inside)


def _add_value(network: nx.DiGraph, node: fx.Node, source, targets: set, price: int) -> None:
    """One gather, at most, for all users on the other side: a hub each for leaving and for entering."""
    if len(targets) == 1:
        (target,) = targets
        _edge(network, source, target, price)
        _edge(network, target, source, price)
    elif targets:
        leaving, entering = (node, "leaving"), (node, "entering")
        _edge(network, source, leaving, price)
        _edge(network, entering, source, price)
        for target in targets:
            _edge(network, leaving, target, math.inf)
            _edge(network, target, entering, math.inf)


def _edge(network: nx.DiGraph, a, b, price: float) -> None:
    """Capacities are whole bytes and add up; an edge without capacity is never cut."""
    if a == b:
        return
    if network.has_edge(a, b):
        price += network[a][b].get("capacity", math.inf)
    if price == math.inf:
        network.add_edge(a, b)
        network[a][b].pop("capacity", None)
    else:
        network.add_edge(a, b, capacity=int(price))


def fixed_nodes(gm: fx.GraphModule, inputs: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes that stay the same as long as `inputs` do: computed from those and from constants alone.

    An input that the graph writes does not, and what other ranks send may be other than before.
    """
    out: set[fx.Node] = set()
    written = {n.args[0] for n in gm.graph.nodes if n.target is torch.ops.aten.copy_.default}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            held_still = node in inputs and node not in written
        elif node.op == "call_function":
            held_still = all(x in out for x in node.all_input_nodes) and not _varies(node.target)
        else:
            held_still = node.op == "get_attr"
        if held_still:
            out.add(node)
    return out


def _varies(target) -> bool:
    random = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return random or is_collective(target)
