"""Reads the pointwise region in front of a node, as the text that kernels/expression.py defines.

    linear ──► split ─► silu ─► mul ─► dropout ─► linear       is read as  mul(silu(h0), h1)
                     └─────────►                               with hidden = (getitem_0, getitem_1)

Inside, values are float32: casts to types no narrower than the result's, copies, and dropout that is off
vanish. So do views, which list the same elements in the same order; operands of one op have one shape.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from .nodes import dtype, is_cast, is_identity, is_tensor, known_scalar, shape

aten = torch.ops.aten

# What is larger is no activation; and a region's text, a tree, could be exponentially larger than its graph.
_MOST_NODES = 48
_MOST_CHARACTERS = 4000
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Region:
    """The pointwise ops between hidden values and a node.

    text: an expression over h0, h1, ...; empty when `unsupported` is not.
    hidden: the nodes that h0, h1, ... stand for, in the order in which the expression reads them.
    inside: every node between, the region's last one included; none of the hidden ones.
    unsupported: pointwise ops that the expression has no word for, by name; "dropout" for dropout that is on.
    """

    text: str
    hidden: tuple[Node, ...]
    inside: frozenset[Node]
    unsupported: tuple[str, ...]


class _NotPointwise(Exception):
    """Something else than hidden values and numbers flows in, or an op mixes elements."""


class _NoWord(Exception):
    """Pointwise, but the expression cannot say it."""


def read_region(node: Node, is_hidden: Callable[[Node], bool]) -> Region | None:
    """The region from values that `is_hidden` accepts to `node`; None if a tensor flows in besides."""
    reader = _Reader(is_hidden, dtype(node))
    try:
        text = reader.read(node)
    except _NotPointwise:
        return None
    if not reader.hidden or any(shape(h)[-1] != shape(node)[-1] for h in reader.hidden):
        return None
    unsupported = tuple(dict.fromkeys(reader.unsupported))
    inside = frozenset(reader.texts) - set(reader.hidden)
    return Region("" if unsupported else text, tuple(reader.hidden), inside, unsupported)


def source(node: Node) -> Node:
    """`node`, looked up through copies and casts to its own type."""
    while is_identity(node) or (is_cast(node) and dtype(node) == dtype(node.args[0])):
        node = node.args[0]
    return node


class _Reader:
    def __init__(self, is_hidden: Callable[[Node], bool], result: torch.dtype) -> None:
        self.is_hidden, self.result = is_hidden, result
        self.hidden: list[Node] = []
        self.texts: dict[Node, str] = {}
        self.unsupported: list[str] = []

    def read(self, node: Node) -> str:
        if node not in self.texts:
            if len(self.texts) >= _MOST_NODES:
                raise _NotPointwise
            self.texts[node] = ""  # counts while its operands are read
            self.texts[node] = self._text(node)
        return self.texts[node]

    def _text(self, node: Node) -> str:
        if self.is_hidden(node):
            self.hidden.append(node)
            return f"h{len(self.hidden) - 1}"
        if node.op != "call_function" or not is_tensor(node):
            raise _NotPointwise
        if node.target is aten.dropout.default and not is_identity(node):
            self.unsupported.append("dropout")
            return self.read(node.args[0])
        if is_cast(node) and dtype(node) != self.result and dtype(node).itemsize <= self.result.itemsize:
            self.unsupported.append(f"cast to {dtype(node)}")  # it rounds more than the result does
            return self.read(node.args[0])
        if is_identity(node) or is_cast(node) or node.target in _VIEWS:
            return self.read(node.args[0])
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _NotPointwise
        arguments = _Arguments(self, node)
        try:
            text = self._spell(node, arguments)
        except _NoWord:
            # Reading on tells a candidate with an unknown activation from what is no MLP at all.
            for value in node.all_input_nodes:
                if not _is_weight(value):
                    arguments.operand(value)
            self.unsupported.append(node.target._schema.name.removeprefix("aten::"))
            return ""
        if len(text) > _MOST_CHARACTERS:
            raise _NotPointwise
        return text

    def _spell(self, node: Node, arguments: _Arguments) -> str:
        rule = _RULES.get(node.target.overloadpacket)
        text = rule(arguments) if rule else None
        if text is not None:
            return text
        raise _NoWord if torch.Tag.pointwise in node.target.tags else _NotPointwise

    def operand(self, value: object, size: tuple[int, ...]) -> str:
        """The text of an operand: a tensor of the region's size, or a number."""
        if isinstance(value, Node):
            number = known_scalar(value)
            if number is None:
                if _is_weight(value):
                    raise _NoWord
                if not is_tensor(value) or shape(value) != size:
                    raise _NotPointwise
                return self.read(value)
            value = number
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) <= _FLOAT32_MAX:
            raise _NoWord
        return repr(float(value))


def _is_weight(node: Node) -> bool:
    """A number or one number a neuron that comes in from outside: a learned slope, a scale."""
    return node.op in ("placeholder", "get_attr") and is_tensor(node) and len(shape(node)) <= 1


class _Arguments:
    """The arguments of a call by their names in the schema: as text `a.self`, as they are `a["alpha"]`."""

    def __init__(self, reader: _Reader, node: Node) -> None:
        self._reader, self._size = reader, shape(node)
        self._values = {}
        for i, argument in enumerate(node.target._schema.arguments):
            value = argument.default_value if argument.has_default_value() else None
            if i < len(node.args):
                value = node.args[i]
            self._values[argument.name] = node.kwargs.get(argument.name, value)

    def __getitem__(self, name: str):
        return self._values.get(name)

    def __getattr__(self, name: str) -> str:
        if name not in self._values:
            raise _NotPointwise  # another op of the same name, such as max over a dimension
        value = self._values[name]
        if is_tensor(value) and dtype(value).is_floating_point == (name == "condition"):
            raise _NoWord  # arithmetic with a comparison's result
        return self.operand(value)

    def operand(self, value: object) -> str:
        return self._reader.operand(value, self._size)


_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}

Rule = Callable[[_Arguments], "str | None"]  # None: not in this form


def _scaled(text: str, factor: float) -> str:
    if factor == 1:
        return text
    try:
        return repr(float(text) * factor)
    except ValueError:
        return f"mul({float(factor)!r}, {text})"


def _unary(name: str) -> Rule:
    return lambda a: f"{name}({a.self})"


def _binary(name: str) -> Rule:
    def rule(a: _Arguments) -> str | None:
        if a["rounding_mode"] is not None:
            return None
        alpha = a["alpha"]
        return f"{name}({a.self}, {_scaled(a.other, 1 if alpha is None else alpha)})"

    return rule


def _clamp(a: _Arguments) -> str:
    text = a.self
    if a["min"] is not None:
        text = f"maximum({text}, {a.min})"
    if a["max"] is not None:
        text = f"minimum({text}, {a.max})"
    return text


def _power(a: _Arguments) -> str | None:
    """x^n for n = 2 to 16 by squaring, their reciprocals, and square roots."""
    n = a["exponent"]
    if n in (0.5, -0.5):
        text = f"sqrt({a.self})"
    elif isinstance(n, numbers.Real) and n == int(n) and 1 <= abs(n) <= 16:
        text = _integer_power(a.self, abs(int(n)))
    else:
        return None
    return text if n > 0 else f"div(1.0, {text})"


def _integer_power(x: str, n: int) -> str:
    if n == 1:
        return x
    text = f"square({_integer_power(x, n // 2)})"
    return f"mul({text}, {x})" if n % 2 else text


def _leaky(x: str, slope: float) -> str:
    return f"add(relu({x}), {_scaled(f'minimum({x}, 0.0)', slope)})"


def _elu(x: str, alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> str:
    below = f"sub(exp({_scaled(f'minimum({x}, 0.0)', input_scale)}), 1.0)"
    return _scaled(f"add(relu({x}), {_scaled(below, alpha)})", scale)


def _softplus(a: _Arguments) -> str:
    beta = a["beta"]
    return _scaled(f"softplus({_scaled(a.self, beta)})", 1 / beta)


_HARD_SIGMOID = "mul({:.17g}, minimum(maximum(add({}, 3.0), 0.0), 6.0))"

_RULES: dict[torch._ops.OpOverloadPacket, Rule] = {
    **{getattr(aten, name): _unary(name) for name in ("abs", "neg", "exp", "log", "sqrt", "square")},
    **{getattr(aten, name): _unary(name) for name in ("erf", "relu", "sigmoid", "silu", "tanh")},
    aten.absolute: _unary("abs"),
    aten.negative: _unary("neg"),
    aten.special_expit: _unary("sigmoid"),
    aten.special_erf: _unary("erf"),
    **{getattr(aten, name): _binary(name) for name in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{getattr(aten, name): _binary(name) for name in ("gt", "ge", "lt", "le")},
    aten.subtract: _binary("sub"),
    aten.multiply: _binary("mul"),
    aten.divide: _binary("div"),
    aten.true_divide: _binary("div"),
    aten.max: _binary("maximum"),
    aten.min: _binary("minimum"),
    aten.rsub: lambda a: f"sub({a.other}, {_scaled(a.self, a['alpha'])})",
    aten.reciprocal: lambda a: f"div(1.0, {a.self})",
    aten.rsqrt: lambda a: f"div(1.0, sqrt({a.self}))",
    aten.expm1: lambda a: f"sub(exp({a.self}), 1.0)",
    aten.log1p: lambda a: f"log(add(1.0, {a.self}))",
    aten.addcmul: lambda a: f"add({a.self}, {_scaled(f'mul({a.tensor1}, {a.tensor2})', a['value'])})",
    aten.pow: _power,
    aten.clamp: _clamp,
    aten.clip: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: _clamp,
    aten.where: lambda a: f"where({a.condition}, {a.self}, {a.other})",
    aten.gelu: lambda a: f"gelu_tanh({a.self})" if a["approximate"] == "tanh" else f"gelu({a.self})",
    aten.softplus: _softplus,
    aten.log_sigmoid: lambda a: f"neg(softplus(neg({a.self})))",
    aten.mish: lambda a: f"mul({a.self}, tanh(softplus({a.self})))",
    aten.leaky_relu: lambda a: _leaky(a.self, a["negative_slope"]),
    aten.elu: lambda a: _elu(a.self, a["alpha"], a["scale"], a["input_scale"]),
    aten.celu: lambda a: _elu(a.self, a["alpha"], 1.0, 1 / a["alpha"]),
    aten.selu: lambda a: _elu(a.self, 1.6732632423543772, 1.0507009873554805),
    aten.relu6: lambda a: f"minimum(relu({a.self}), 6.0)",
    aten.hardtanh: lambda a: f"minimum(maximum({a.self}, {a.min_val}), {a.max_val})",
    aten.hardsigmoid: lambda a: _HARD_SIGMOID.format(1 / 6, a.self),
    aten.hardswish: lambda a: f"mul({a.self}, {_HARD_SIGMOID.format(1 / 6, a.self)})",
    aten.threshold: lambda a: f"where(gt({a.self}, {a.threshold}), {a.self}, {a.value})",
}
