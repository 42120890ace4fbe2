"""The pointwise region of an MLP, as text that every backend can print: `mul(silu(h0), h1)`.

The matcher writes it, the ops carry it (op schemas know strings, not graphs), and each kernel family prints it in
its own language. `h0`, `h1`, ... are the outputs of the up projections. All arithmetic is float32: the result is
rounded once, to the dtype of the activation, as Inductor's fused pointwise code does.
"""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Operation:
    """How one operation is spelled: a torch function, and templates with {0}, {1}, ... for operands."""

    torch: object
    cpp: str
    triton: str


# Every operation that a region may hold. C++ is written for auto-vectorisation (no branches).
OPERATIONS: dict[str, Operation] = {
    "add": Operation(torch.add, "({0} + {1})", "({0} + {1})"),
    "sub": Operation(torch.sub, "({0} - {1})", "({0} - {1})"),
    "mul": Operation(torch.mul, "({0} * {1})", "({0} * {1})"),
    "div": Operation(torch.div, "({0} / {1})", "({0} / {1})"),
    "neg": Operation(torch.neg, "(-{0})", "(-{0})"),
    "abs": Operation(torch.abs, "std::fabs({0})", "tl.abs({0})"),
    "exp": Operation(torch.exp, "expf({0})", "tl.exp({0})"),
    "sqrt": Operation(torch.sqrt, "sqrtf({0})", "tl.sqrt({0})"),
    "square": Operation(torch.square, "({0} * {0})", "({0} * {0})"),
    "maximum": Operation(torch.maximum, "std::max({0}, {1})", "tl.maximum({0}, {1})"),
    "minimum": Operation(torch.minimum, "std::min({0}, {1})", "tl.minimum({0}, {1})"),
    "relu": Operation(torch.relu, "std::max({0}, 0.0f)", "tl.maximum({0}, 0.0)"),
    "sigmoid": Operation(torch.sigmoid, "(1.0f / (1.0f + expf(-{0})))", "tl.sigmoid({0})"),
    "silu": Operation(F.silu, "({0} / (1.0f + expf(-{0})))", "({0} * tl.sigmoid({0}))"),
    "tanh": Operation(torch.tanh, "tanhf({0})", "(2.0 * tl.sigmoid(2.0 * {0}) - 1.0)"),
    "erf": Operation(torch.erf, "erff({0})", "tl.erf({0})"),
    "gelu": Operation(F.gelu, "(0.5f * {0} * (1.0f + erff({0} * 0.70710678f)))", "(0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476)))"),
    # 0.5 x (1 + tanh(u)) = x sigmoid(2u): one exponential.
    "gelu_tanh": Operation(
        functools.partial(F.gelu, approximate="tanh"),
        "({0} / (1.0f + expf(-1.5957691216f * {0} * (1.0f + 0.044715f * {0} * {0}))))",
        "({0} * tl.sigmoid(1.5957691216057308 * {0} * (1.0 + 0.044715 * {0} * {0})))",
    ),
    "softplus": Operation(F.softplus, "(std::max({0}, 0.0f) + log1pf(expf(-std::fabs({0}))))", "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))"),
}


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ast.expr:
    """The syntax tree of a region. Raises ValueError for anything but operations, h<i> and numbers."""
    tree = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in OPERATIONS or node.keywords:
                raise ValueError(f"not an operation of a pointwise region: {ast.unparse(node)}")
        elif isinstance(node, ast.Name):
            if node.id not in OPERATIONS and not (node.id[0] == "h" and node.id[1:].isdigit()):
                raise ValueError(f"not an operand of a pointwise region: {node.id}")
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float)) or not math.isfinite(node.value):
                raise ValueError(f"not a finite number: {node.value!r}")
        elif isinstance(node, ast.UnaryOp):
            if not isinstance(node.op, ast.USub) or not isinstance(node.operand, ast.Constant):
                raise ValueError(f"not a number: {ast.unparse(node)}")
        elif not isinstance(node, (ast.Load, ast.USub)):
            raise ValueError(f"not a pointwise region: {text}")
    return tree


def operands(text: str) -> int:
    """How many hidden inputs the region reads: one more than the largest index."""
    names = [n.id for n in ast.walk(parse(text)) if isinstance(n, ast.Name) and n.id not in OPERATIONS]
    return 1 + max(int(name[1:]) for name in names)


def evaluate(text: str, hidden: list[torch.Tensor]) -> torch.Tensor:
    """The region's meaning. hidden: same-shape tensors; computed and returned in float32 (float64 stays)."""
    wide = [h if h.dtype == torch.float64 else h.float() for h in hidden]

    def value(node: ast.expr) -> torch.Tensor:
        if isinstance(node, ast.Call):
            return OPERATIONS[node.func.id].torch(*(value(a) for a in node.args))
        if isinstance(node, ast.Name):
            return wide[int(node.id[1:])]
        return wide[0].new_tensor(float(ast.literal_eval(node)))

    return value(parse(text))


def print_cpp(text: str, names: list[str]) -> str:
    """The region as a C++ float expression over the variables `names`."""
    return _print(parse(text), names, "cpp", lambda number: f"{number!r}f")


def print_triton(text: str, names: list[str]) -> str:
    """The region as a Triton float32 expression over the variables `names`."""
    return _print(parse(text), names, "triton", repr)


def _print(node: ast.expr, names: list[str], language: str, literal) -> str:
    if isinstance(node, ast.Call):
        template = getattr(OPERATIONS[node.func.id], language)
        return template.format(*(_print(a, names, language, literal) for a in node.args))
    if isinstance(node, ast.Name):
        return names[int(node.id[1:])]
    return literal(float(ast.literal_eval(node)))
