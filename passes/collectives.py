"""What passes know of collectives: exchanges with the other ranks of a model that runs on several GPUs.

Context parallelism by Ulysses, as diffusers and others write it, for every attention:

    q [B, S/W, H, D] -> [W, S/W, B, H/W, D] -> all_to_all -> [B, S, H/W, D]: all tokens, heads of this rank alone
    o [B, S, H/W, D] -> [W, H/W, B, S/W, D] -> all_to_all -> [B, S/W, H, D]: tokens of this rank, all heads

Every rank runs the same code on its own share, so what is proven here of this rank's tokens (position p of the queries
and position p of the keys are the same token) holds on all of them; a label may therefore stand for "the token at p of
whichever rank".
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator

import torch
from torch import fx
from torch.fx import Node

from .nodes import aten, is_cast, is_identity, shape
from .origin_moves import MOVES, Labels, Rule
from .origins import Label, constant, pinned, regroup, root

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")
_CUTS = (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind)


def is_collective(target: object) -> bool:
    """Whether a node's target is an op that all ranks of a group must call, or the wait for one."""
    if not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    packet = getattr(target, "overloadpacket", target)
    return packet._qualified_op_name.partition("::")[0] in _NAMESPACES


def is_sharded(value: object) -> bool:
    """Whether an input is a DTensor: its collectives show in no graph of Dynamo's."""
    tensors = sys.modules.get("torch.distributed.tensor")  # slow to import, and imported where there is one
    return tensors is not None and isinstance(value, tensors.DTensor)


def collectives(gm: fx.GraphModule) -> Iterator[Node]:
    """The collectives of a graph in their order, those within its inner graphs (checkpoints, branches) too."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            inner = operator.attrgetter(node.target)(gm)
            if isinstance(inner, fx.GraphModule):
                yield from collectives(inner)
        elif node.op == "call_function" and is_collective(node.target):
            yield node


def groups(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the process groups that a graph's collectives run over, each once, in the order of first use."""
    return tuple(dict.fromkeys(name for name in map(_group, collectives(gm)) if name is not None))


def knows_groups(gm: fx.GraphModule) -> bool:
    """Whether every collective of a graph names the group it runs over."""
    return all(_group(node) is not None or _packet(node) in _packets("wait_tensor") for node in collectives(gm))


def _group(node: Node) -> str | None:
    packet = _packet(node)
    arguments = getattr(packet, packet.overloads()[0])._schema.arguments
    given = dict(zip([argument.name for argument in arguments], node.args)) | dict(node.kwargs)
    group = given.get("group_name")  # the group itself, in some graphs
    name = getattr(group, "group_name", group)
    return name if isinstance(name, str) else None


def _packet(node: Node) -> object:
    return getattr(node.target, "overloadpacket", node.target)


def _packets(name: str) -> list[object]:
    """The op of that name of every namespace that has one; none where torch was built without them."""
    namespaces = [getattr(torch.ops, namespace) for namespace in _NAMESPACES]
    return [getattr(space, name) for space in namespaces if hasattr(space, name)]


@functools.cache
def packet_defaults(name: str) -> frozenset[object]:
    return frozenset(packet.default for packet in _packets(name))


def is_wait(node: Node) -> bool:
    return node.target in packet_defaults("wait_tensor")


def is_exchange(node: Node) -> bool:
    """Whether a node sends part w of the first axis to rank w, in equal parts, and gets as much from each."""
    return node.target in packet_defaults("all_to_all_single") and exchanged(node) > 1


def exchanged(node: Node) -> int:
    """How many equal parts an exchange has, one a rank; 0 where they are not."""
    source, received, sent = node.args[:3]
    world = len(sent)
    known = all(isinstance(part, int) for part in (*received, *sent))
    return world if known and len({*received, *sent}) == 1 and sent[0] * world == shape(source)[0] else 0


# --- where tokens come from (see origins) -------------------------------------------------------------------------


def _wait(node: Node, known: dict[Node, Labels]) -> Labels:
    return known[node.args[0]]


def _all_to_all(node: Node, known: dict[Node, Labels]) -> Labels | None:
    """Dim 0 in W equal parts: part w of the result is this rank's part of rank w's operand.

    What was split over ranks (heads, on the way to attention) is this rank's share of it from here on. Where tokens of
    all ranks were, sorted by rank, each rank gets its own back: they are those that it had.
    """
    source, group = node.args[0], node.args[3]
    world, size = exchanged(node), shape(source)[0]
    if world < 2:
        return known[source] if world else None
    ranks = ranks_label(group, world)
    parts, within = _split_first(known[source][0], world, size)
    rest = [within, *known[source][1:]]
    if parts != ranks:
        rest = pinned(rest, [parts])
    (merged,) = regroup([ranks, rest[0]], [world, size // world], [size])
    return (merged, *rest[1:])


def ranks_label(group: object, world: int) -> Label:
    """The axis of the ranks of a group, outermost where their shares lie one behind the other."""
    return root("ranks", (group, world), world)


def _split_first(label: Label, world: int, size: int) -> list[Label]:
    if size == world:
        return [label, constant(1)]
    return regroup([label], [size], [world, size // world])


ORIGIN_RULES: dict[object, Rule] = {
    **dict.fromkeys(_packets("all_to_all_single"), _all_to_all),
    **dict.fromkeys(_packets("wait_tensor"), _wait),
}


# --- what a candidate that stays dense has to do with other ranks -------------------------------------------------


def comes_from_ranks(node: Node) -> bool:
    """Whether `node` is what a collective returned, or parts of it put together."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if is_collective(current.target):
            return True
        packet = getattr(current.target, "overloadpacket", None)
        moves = packet in MOVES or packet in _CUTS or current.target is operator.getitem
        if current not in seen and (moves or is_identity(current) or is_cast(current)):
            seen.add(current)
            stack += current.all_input_nodes
    return False
