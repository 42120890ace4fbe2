"""The language of the token permutation: what one op lets one permute.

A *link* is a set of equally long spans of one op's inputs and outputs. It claims: permute every input span of
the link by one permutation, any permutation, and the op's outputs are the old ones with the output spans
permuted alike. A link of input spans alone says that the result does not care (a sum over tokens); a link of
a single output span says that the result is the same all along it (a fill). Spans in no link are rigid:
nothing is claimed about them. An op's links touch each position at most once, so any subset of them may be
used together.

A rule yields the links of one signature: op, shapes and arguments, never values, nodes or names. `rule`
registers it for overloads of ATen, and `call_of(node)` reads a node of a graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from .collectives import is_wait

# A link with more spans than this (a batch of that many copies) is not worth following.
MAX_COPIES = 64


class Operand(NamedTuple):
    """A tensor in one role of a call: input k has slot k, output k has slot ~k."""

    slot: int
    shape: tuple[int | None, ...]  # None: a symbolic size, which is never linked
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def at(self, dim: int) -> int:
        """`dim`, counted from the front."""
        return dim % self.ndim if self.ndim else 0


class Span(NamedTuple):
    """Positions start .. start + length of one dimension of one operand."""

    slot: int
    dim: int
    start: int
    length: int


class Link(NamedTuple):
    """Spans that must be permuted alike.

    A weak link reads one long axis as copies of a short one ([batch, tokens] viewed as [batch * tokens]). It
    is as true as any other, but following it everywhere would cut a video's token axis into rows, because a
    grid [t, h, w] flattens the same way.
    """

    spans: tuple[Span, ...]
    weak: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """An op with its arguments in the order of its schema; lists are tuples, tensors are operands."""

    target: torch._ops.OpOverload
    values: tuple[object, ...]
    inputs: tuple[Operand, ...]
    outs: tuple[Operand, ...]

    def __getitem__(self, name: str):
        """The argument of that name. Raises KeyError if the schema has none."""
        return self.values[_places(self.target)[name]]

    def get(self, name: str, default=None):
        place = _places(self.target).get(name)
        return default if place is None else self.values[place]

    @property
    def out(self) -> Operand:
        return self.outs[0]


class Call(NamedTuple):
    """A node of a graph that has a rule; `inputs[k]` is the node in slot k."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    signature: Signature
    links: tuple[Link, ...]


class Unreadable(Exception):
    """A call with arguments that only the run time knows; it has no links."""


Rule = Callable[[Signature], Iterable[Link]]
RULES: dict[object, Rule] = {}
# Of exchanges between ranks. What they claim is about all ranks together: each permutes its own values, all alike.
RANK_RULES: dict[object, Rule] = {}


def rule(*overloads: str) -> Callable[[Rule], Rule]:
    """Registers a rule for `aten` overloads, given as "name.overload" or "name" for "name.default".

    An overload that this torch does not have is skipped.
    """

    def register(function: Rule) -> Rule:
        for text in overloads:
            name, _, overload = text.partition(".")
            target = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
            if target is not None:
                RULES[target] = function
        return function

    return register


def call_of(node: fx.Node) -> Call | None:
    """A node's links, or None where its op has no rule or the rule cannot read it."""
    if node.op != "call_function" or rule_of(node.target) is None or "val" not in node.meta:
        return None
    nodes: list[fx.Node] = []
    operands: list[Operand] = []

    def bind(value):
        if isinstance(value, (list, tuple)):
            return tuple(map(bind, value))
        if not isinstance(value, fx.Node):
            return value
        if not is_tensor(value):
            raise Unreadable
        operands.append(_operand(len(nodes), value.meta["val"]))
        nodes.append(value)
        return operands[-1]

    try:
        given, schema = node.args, node.target._schema.arguments
        values = tuple(
            bind(given[k] if k < len(given) else node.kwargs.get(a.name, a.default_value)) for k, a in enumerate(schema)
        )
        value = node.meta["val"]
        outs = tuple(
            _operand(~k, out)
            for k, out in enumerate(value if isinstance(value, (tuple, list)) else (value,))
            if isinstance(out, torch.Tensor)
        )
        if not outs:
            return None
        return Call(node, tuple(nodes), *_links(Signature(node.target, values, tuple(operands), outs)))
    except Unreadable:
        return None


@functools.lru_cache(maxsize=8192)
def _links(signature: Signature) -> tuple[Signature, tuple[Link, ...]]:
    """A signature and its links, equal ones shared: a model of thousands of ops has some hundred of them."""
    return signature, tuple(rule_of(signature.target)(signature))


@functools.cache
def rule_of(target) -> Rule | None:
    """The rule of an op: its own, or that of all ops which torch itself tags as pointwise."""
    if target in RANK_RULES:
        return RANK_RULES[target]
    if target in RULES or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return RULES.get(target)
    random = torch.Tag.nondeterministic_seeded in target.tags
    return pointwise if torch.Tag.pointwise in target.tags and not random and not target._schema.is_mutable else None


@functools.cache
def _places(target) -> dict[str, int]:
    return {argument.name: k for k, argument in enumerate(target._schema.arguments)}


def _operand(slot: int, value: torch.Tensor) -> Operand:
    return Operand(slot, shape_of(value), value.dtype)


def shape_of(value: torch.Tensor) -> tuple[int | None, ...]:
    """The shape as ints, None where a size is symbolic."""
    shape = tuple(value.shape)
    return shape if all(type(size) is int for size in shape) else tuple(s if type(s) is int else None for s in shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_element(node: fx.Node) -> bool:
    """Whether `node` takes one output of an op that has several, or waits for that of a collective: until then nothing
    may read it."""
    return node.op == "call_function" and (node.target is operator.getitem or is_wait(node))


def element_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The op, and which of its outputs an element is."""
    return node.args if node.target is operator.getitem else (node.args[0], 0)


# --- building links -----------------------------------------------------------------------------------------


def whole(operand: Operand, dim: int) -> Span:
    """All of one dimension."""
    return Span(operand.slot, dim, 0, operand.shape[dim])


def together(*spans: Span, weak: bool = False) -> Iterator[Link]:
    """One link of parts of dimensions, unless there is nothing to permute in them."""
    if spans[0].length > 1:
        yield Link(spans, weak)


def alike(*ends: tuple[Operand, int]) -> Iterator[Link]:
    """One link of whole dims. Sizes of one drop out (they broadcast); unequal ones leave all rigid."""
    spans = tuple(whole(operand, dim) for operand, dim in ends if operand.shape[dim] != 1)
    if spans and spans[0].length and all(span.length == spans[0].length for span in spans):
        yield Link(spans)


def free(operand: Operand) -> Iterator[Link]:
    """Each dim by itself: an input whose values are not read, or an output that is constant."""
    for dim in range(operand.ndim):
        yield from alike((operand, dim))


def trailing(operands: Iterable[Operand], out: Operand) -> Iterator[Link]:
    """Dims that correspond counted from the right, as in broadcasting."""
    for dim in range(out.ndim):
        ends = [(x, dim - out.ndim + x.ndim) for x in operands if dim - out.ndim + x.ndim >= 0]
        yield from alike(*ends, (out, dim))


def pointwise(call: Signature) -> Iterator[Link]:
    """Element by element, with broadcasting."""
    return trailing(call.inputs, call.out)


def lettered(pattern: str, operands: Iterable[Operand | None], outs: Iterable[Operand]) -> Iterator[Link]:
    """Links in the manner of einsum: every lower-case letter is one link, "..." are broadcast dims.

    Upper-case letters are rigid: "mK, Kn -> mn" links rows and columns but not what is summed. An operand in
    brackets may have fewer dims than letters, and then has the last ones. Operands that are None are left
    out.
    """
    ends: dict[object, list[tuple[Operand, int]]] = {}
    inputs, _, outputs = pattern.replace(" ", "").replace("...", ".").partition("->")
    for letters, operand in zip((*inputs.split(","), *outputs.split(",")), (*operands, *outs)):
        if operand is None:
            continue
        for dim, letter in enumerate(_named(letters, operand)):
            ends.setdefault(letter, []).append((operand, dim))
    for letter, places in ends.items():
        if isinstance(letter, int) or letter.islower():
            yield from alike(*places)


def _named(letters: str, operand: Operand) -> list[object]:
    """The letter of each dim; broadcast dims are named by their place from the right: ..., -2, -1."""
    if letters.startswith("("):
        letters = letters[1:-1]
        letters = letters[max(0, len(letters) - operand.ndim) :]
    before, dots, after = letters.partition(".")
    extra = operand.ndim - len(before) - len(after)
    if extra < 0 or (extra and not dots):
        raise Unreadable
    return [*before, *range(-extra, 0), *after]
