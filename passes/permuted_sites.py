"""What the sites of a graph read once tokens are permuted: a gather may stand right before them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Node

from .nodes import aten
from .sdpa import read_sdpa
from .sites import AttentionSite, MlpSite


def permuted_sites(sites: Iterable[AttentionSite | MlpSite]) -> list[AttentionSite | MlpSite]:
    """The sites of a graph that `permute_tokens` has changed since they were found.

    linear(x)  ->  linear(x[order]): the input of the MLP that begins there is x[order]
    """
    found = []
    for site in sites:
        if isinstance(site, AttentionSite):
            attention = read_sdpa(site.node)
            operands = dict(query=attention.query, key=attention.key, value=attention.value, key_mask=attention.mask)
            found.append(replace(site, **operands))
        else:
            (read,) = _inputs(site)  # all of an MLP is inside the permuted region, or none
            found.append(replace(site, input=read))
    return found


def _inputs(site: MlpSite) -> set[Node]:
    """What an MLP begins with: its input, or a gather of it, whatever one comes to first from its end."""
    reached, seen, stack = set(), set(), [site.node]
    while stack:
        node = stack.pop()
        if ungathered(node) is site.input:
            reached.add(node)
        elif node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return reached


def ungathered(node: Node) -> Node:
    """What a gather that `permute_tokens` made was made of; any other node itself."""
    while node.target is aten.index_select.default and node.args[2].name.startswith("token_order"):
        node = node.args[0]
    return node
