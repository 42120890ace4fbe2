"""The pointwise region of an MLP, as text that every backend can print: `mul(silu(h0), h1)`.

The matcher writes it, the ops carry it (op schemas know strings, not graphs), and each kernel family prints
it in its own language. `h0`, `h1`, ... are the outputs of the up projections; the rest are numbers and the
names in OPERATIONS. All arithmetic is float32: the result is rounded once, to the dtype of the activation, as
Inductor's fused pointwise code does.

    evaluate(text, [h0, h1])               the meaning, in torch
    print_cpp(text, ["a", "b"])            one C++ float expression, free of side effects
    print_triton(text, ["a", "b"])         one Triton float32 expression
    lines_cpp(text, ["a", "b"], "out[i]")  the same as statements, the last of which is `out[i] = ...;`
    lines_triton(text, ["a", "b"], "act")  likewise in Triton; the last is `act = ...`

The text is a tree, so what a graph shares is spelled out twice; `parse` finds it again (equal subtrees become
one step), and neither statements nor torch compute it twice. In `print_triton`'s form Triton merges it.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Operation:
    """How one operation is spelled: a torch function, and templates with {0}, {1}, ... for operands.

    Operands are put in as names, numbers or in parentheses. C++ is written for auto-vectorisation: no
    branch, and `expf`, `tanhf`, `erff` and `logf` stand unqualified, so that the scope they are printed into
    may offer vectorised ones. Triton uses `tl` alone (libdevice has no interpreter), and a function `sigmoid` that
    the kernel defines.
    """

    arity: int
    torch: Callable
    cpp: str
    triton: str


OPERATIONS: dict[str, Operation] = {
    "add": Operation(2, operator.add, "({0} + {1})", "({0} + {1})"),
    "sub": Operation(2, operator.sub, "({0} - {1})", "({0} - {1})"),
    "mul": Operation(2, operator.mul, "({0} * {1})", "({0} * {1})"),
    "div": Operation(2, operator.truediv, "({0} / {1})", "({0} / {1})"),
    "neg": Operation(1, torch.neg, "(-{0})", "(-{0})"),
    "abs": Operation(1, torch.abs, "std::fabs({0})", "tl.abs({0})"),
    "exp": Operation(1, torch.exp, "expf({0})", "tl.exp({0})"),
    "log": Operation(1, torch.log, "logf({0})", "tl.log({0})"),
    "sqrt": Operation(1, torch.sqrt, "sqrtf({0})", "tl.sqrt({0})"),
    "square": Operation(1, torch.square, "({0} * {0})", "({0} * {0})"),
    "maximum": Operation(2, torch.maximum, "std::max({0}, {1})", "tl.maximum({0}, {1})"),
    "minimum": Operation(2, torch.minimum, "std::min({0}, {1})", "tl.minimum({0}, {1})"),
    "gt": Operation(2, operator.gt, "({0} > {1})", "({0} > {1})"),
    "ge": Operation(2, operator.ge, "({0} >= {1})", "({0} >= {1})"),
    "lt": Operation(2, operator.lt, "({0} < {1})", "({0} < {1})"),
    "le": Operation(2, operator.le, "({0} <= {1})", "({0} <= {1})"),
    "where": Operation(3, torch.where, "({0} ? {1} : {2})", "tl.where({0}, {1}, {2})"),
    "relu": Operation(1, torch.relu, "std::max({0}, 0.0f)", "tl.maximum({0}, 0.0)"),
    "sigmoid": Operation(1, torch.sigmoid, "(1.0f / (1.0f + expf(-{0})))", "sigmoid({0})"),
    "silu": Operation(1, F.silu, "({0} / (1.0f + expf(-{0})))", "({0} * sigmoid({0}))"),
    "tanh": Operation(1, torch.tanh, "tanhf({0})", "(2.0 * sigmoid(2.0 * {0}) - 1.0)"),
    "erf": Operation(1, torch.erf, "erff({0})", "tl.erf({0})"),
    "gelu": Operation(
        1,
        F.gelu,
        "(0.5f * {0} * (1.0f + erff({0} * 0.70710678f)))",
        "(0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476)))",
    ),
    # 0.5 x (1 + tanh(u)) = x sigmoid(2u): one exponential.
    "gelu_tanh": Operation(
        1,
        functools.partial(F.gelu, approximate="tanh"),
        "({0} / (1.0f + expf(-1.5957691216f * {0} * (1.0f + 0.044715f * {0} * {0}))))",
        "({0} * sigmoid(1.5957691216057308 * {0} * (1.0 + 0.044715 * {0} * {0})))",
    ),
    # Both terms are at most |x| + log 2, so nothing overflows. torch's default threshold, 20, is float32's.
    "softplus": Operation(
        1,
        functools.partial(F.softplus, threshold=40),
        "(std::max({0}, 0.0f) + logf(1.0f + expf(-std::fabs({0}))))",
        "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))",
    ),
}

_TENSORS_ONLY = {"maximum", "minimum", "where"}  # their torch functions take no Python number, or round it
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Hidden:
    """The output of up projection number `index`."""

    index: int


@dataclass(frozen=True)
class Step:
    """The value of an earlier step."""

    index: int


Operand = Hidden | Step | float


@dataclass(frozen=True)
class Program:
    """A region in steps: step i is (name of the operation, its operands); `result` is the last, if any."""

    steps: tuple[tuple[str, tuple[Operand, ...]], ...]
    result: Hidden | Step


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The region as steps, equal subtrees once.

    Raises ValueError, naming the part at fault, for anything but operations with the right number of
    operands, h<i>, and numbers that float32 can hold.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"not a pointwise region: {text!r}") from error
    steps: dict[tuple[str, tuple[Operand, ...]], Step] = {}

    def operand(node: ast.expr) -> Operand:
        if isinstance(node, ast.Name) and node.id[0] == "h" and node.id[1:].isdigit():
            return Hidden(int(node.id[1:]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return call(node, node.func.id)
        return _number(node)

    def call(node: ast.Call, name: str) -> Step:
        if name not in OPERATIONS:
            raise ValueError(f"not an operation of a pointwise region: {name}")
        if len(node.args) != OPERATIONS[name].arity:
            raise ValueError(f"{name} takes {OPERATIONS[name].arity} operands: {ast.unparse(node)}")
        operands = tuple(operand(a) for a in node.args)
        if all(isinstance(o, float) for o in operands):
            raise ValueError(f"an operation on numbers alone: {ast.unparse(node)}")
        return steps.setdefault((name, operands), Step(len(steps)))

    result = operand(tree)
    if isinstance(result, float):
        raise ValueError(f"a region that reads no hidden value: {text!r}")
    return Program(tuple(steps), result)


def _number(node: ast.expr) -> float:
    try:
        number = ast.literal_eval(node)
    except ValueError:
        number = None
    if type(number) not in (int, float) or not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"not a number of float32's range: {ast.unparse(node)}")
    return float(number)


def operands(text: str) -> int:
    """How many hidden inputs the region reads: one more than the largest index."""
    program = parse(text)
    read = {program.result, *(o for _, args in program.steps for o in args)}
    return 1 + max(o.index for o in read if isinstance(o, Hidden))


def is_linear(text: str) -> bool:
    """Whether the region is an affine map of its hidden inputs: no activation and no gate."""
    return all(
        name in ("add", "sub", "neg")
        or (name == "mul" and any(isinstance(o, float) for o in args))
        or (name == "div" and isinstance(args[1], float))
        for name, args in parse(text).steps
    )


def evaluate(text: str, hidden: list[torch.Tensor]) -> torch.Tensor:
    """The region's meaning. hidden: same-shape tensors; computed and returned in float32 (float64 stays)."""
    program = parse(text)
    values: dict[Operand, torch.Tensor] = {
        Hidden(i): h if h.dtype == torch.float64 else h.float() for i, h in enumerate(hidden)
    }
    kind = {"dtype": values[Hidden(0)].dtype, "device": hidden[0].device}
    last_use = {o: i for i, (_, args) in enumerate(program.steps) for o in args}
    for i, (name, args) in enumerate(program.steps):
        arguments = [values.get(o, o) for o in args]
        if name in _TENSORS_ONLY:
            arguments = [torch.tensor(a, **kind) if isinstance(a, float) else a for a in arguments]
        values[Step(i)] = OPERATIONS[name].torch(*arguments)
        for o in args:
            if last_use[o] == i:
                values.pop(o, None)  # intermediates are large: none outlives its last use
    return values[program.result]


def print_cpp(text: str, names: list[str]) -> str:
    """The region as one C++ float expression over `names`: variables or array elements of type float.

    Of more than one operation it is a lambda, called on the spot and inlined. Needs <cmath> and <algorithm>.
    """
    *first, last = _spell(text, names, "cpp")
    return f"[&] {{ {' '.join(_declare_cpp(first))} return {last}; }}()" if first else last


def print_triton(text: str, names: list[str]) -> str:
    """The region as one Triton float32 expression over `names`, which are variables. Needs `tl` and `sigmoid`."""
    return _spell(text, names, "triton", nested=True)[-1]


def lines_cpp(text: str, names: list[str], result: str) -> list[str]:
    """The region as C++ statements, the last of which assigns to `result`, which the caller has declared.

    The others declare constants region_0, region_1, ...: put braces around a second copy in one scope.
    """
    *first, last = _spell(text, names, "cpp")
    return [*_declare_cpp(first), f"{result} = {last};"]


def lines_triton(text: str, names: list[str], result: str) -> list[str]:
    """The region as Triton statements, unindented: `region_0 = ...`, ..., `result = ...`."""
    *first, last = _spell(text, names, "triton")
    return [*(f"region_{i} = {value}" for i, value in enumerate(first)), f"{result} = {last}"]


def _declare_cpp(values: list[str]) -> list[str]:
    # auto, because a comparison is a bool
    return [f"const auto region_{i} = {value};" for i, value in enumerate(values)]


def _spell(text: str, names: list[str], language: str, nested: bool = False) -> list[str]:
    """One expression for each step. An earlier step is `region_<i>` in it or, nested, its own expression."""
    program = parse(text)
    spelled: list[str] = []

    def operand(o: Operand) -> str:
        if isinstance(o, Hidden):
            return names[o.index]
        if isinstance(o, Step):
            return spelled[o.index] if nested else f"region_{o.index}"
        return f"{o!r}f" if language == "cpp" else repr(o)

    for name, args in program.steps:
        spelled.append(getattr(OPERATIONS[name], language).format(*map(operand, args)))
    return spelled or [operand(program.result)]
