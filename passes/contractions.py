"""Every way to write a matrix product, read as one form: two operands with named dimensions."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass

from torch.fx import Node

from .nodes import aten, is_tensor, shape


@dataclass(frozen=True)
class Contraction:
    """alpha * sum over the shared names (lhs * rhs) + beta * bias, one letter a dimension.

    matmul([b, i, d], [b, d, j]) has lhs_dims "bid", rhs_dims "bdj", out_dims "bij". A dimension of size one may
    stand against a larger one of the same name.
    """

    node: Node
    lhs: Node
    rhs: Node
    lhs_dims: str
    rhs_dims: str
    out_dims: str
    alpha: float = 1.0
    bias: Node | None = None
    beta: float = 1.0


def read_contraction(node: Node) -> Contraction | None:
    """matmul, bmm, mm, einsum of two operands, baddbmm, addmm; None for anything else."""
    if not is_tensor(node):
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _product(node, *node.args[:2])
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        bias, lhs, rhs = node.args
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        return _product(node, lhs, rhs, float(alpha), bias if beta else None, float(beta))
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _product(node: Node, lhs: Node, rhs: Node, *scaling) -> Contraction | None:
    """matmul's rule: the leading dimensions are a batch, aligned from the right."""
    ranks = len(shape(lhs)), len(shape(rhs))
    if min(ranks) < 2:
        return None
    batch = string.ascii_uppercase[: max(ranks) - 2]
    dims = [batch[len(batch) - rank + 2 :] for rank in ranks]
    return Contraction(node, lhs, rhs, dims[0] + "id", dims[1] + "dj", batch + "ij", *scaling)


def _einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2:
        return None
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    free = (letter for letter in string.ascii_letters if letter not in equation)
    ranks = [len(shape(n)) - len(t.replace("...", "")) if "..." in t else 0 for n, t in zip(operands, terms)]
    ellipsis = "".join(itertools.islice(free, max(ranks)))
    terms = [t.replace("...", ellipsis[len(ellipsis) - rank :]) for t, rank in zip(terms, ranks)]
    if not arrow:  # implicit form: names that occur once, in alphabetical order
        letters = "".join(terms)
        out = "..." + "".join(sorted(c for c in letters if letters.count(c) == 1 and c not in ellipsis))
    out = out.replace("...", ellipsis)
    if any(len(set(t)) != len(t) for t in (*terms, out)):  # diagonals
        return None
    return Contraction(node, *operands, *terms, out)
