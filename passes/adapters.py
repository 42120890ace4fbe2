"""Low-rank adapters (LoRA) that run beside a linear: W x + s B (A x), A narrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from .linears import Mlp, is_map
from .nodes import is_cast, is_identity, shape


def enters_adapter(linear: Node) -> bool:
    """Whether a linear is the narrow half A of an adapter: only B reads it, and something wider reads what it reads."""
    twice = 2 * shape(linear)[-1]
    behind = list(readers([linear]))
    beside = [other for other in readers([_origin(linear.args[0])]) if is_map(other)]
    return bool(behind) and all(map(is_map, behind)) and any(shape(other)[-1] > twice for other in beside)


def adapter_before(mlp: Mlp) -> int | None:
    """The rank of the adapters on the linears that an MLP begins with, where those are why its inputs differ."""
    inputs = [_origin(linear.args[0]) for linear in mlp.linears]
    halves = {n for n in inputs if is_map(n) and enters_adapter(n)}
    read = {n for n in inputs if n not in halves}
    if halves and len(read) == 1 and read.issuperset(_origin(half.args[0]) for half in halves):
        return max(shape(half)[-1] for half in halves)
    return None


def adapter_behind(outside: Iterable[Node]) -> int | None:
    """The rank of the adapters that read an MLP's hidden layer, where nothing else does but its own linear."""
    outside = list(outside)
    if not outside or not all(is_map(n) and enters_adapter(n) for n in outside):
        return None
    return max(shape(n)[-1] for n in outside)


def readers(values: Iterable[Node]) -> Iterator[Node]:
    """What uses any of `values`, looked for behind copies and casts: adapters compute in a dtype of their own."""
    for value in values:
        for user in value.users:
            if is_identity(user) or is_cast(user):
                yield from readers([user])
            else:
                yield user


def _origin(value: Node) -> Node:
    while is_identity(value) or is_cast(value):
        value = value.args[0]
    return value
