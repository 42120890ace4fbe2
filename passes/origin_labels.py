"""The labels of a graph's values (see origins), made by the rules of each operation.

Operations without a rule make new roots. Only those between a sequence and the queries and keys made of it need one:
what lies above is the same node for both.
"""

from __future__ import annotations

from torch.fx import Node

from .nodes import is_static, is_tensor, shape
from .origin_moves import Labels, node_root
from .origin_rules import apply_rule
from .origins import too_large


class Origins:
    """The labels of a graph's values, made when asked for; nodes may be added in between."""

    def __init__(self) -> None:
        self._known: dict[Node, Labels] = {}

    def of(self, node: Node) -> Labels:
        """One label for each dimension of a tensor-valued node."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in self._known]
            if top in self._known or not missing:
                stack.pop()
                if top not in self._known:
                    self._known[top] = self._label(top)
            else:
                stack += missing
        return self._known[node]

    def _label(self, node: Node) -> Labels:
        if not is_tensor(node):
            return ()
        labels = None
        if node.op == "call_function" and 0 not in shape(node) and all(map(is_static, (node, *node.all_input_nodes))):
            labels = apply_rule(node, self._known)
        if labels is None:
            labels = _roots(node, self._known)
        return tuple(node_root(node, d) if too_large(label) else label for d, label in enumerate(labels))


def _roots(node: Node, known: dict[Node, Labels]) -> Labels:
    """Every axis a root: an input, or an operation without a rule."""
    flag = any(
        entry.projected for n in node.all_input_nodes for lb in known[n] for segment in lb for entry in segment.entries
    )
    return tuple(node_root(node, d, flag) for d in range(len(shape(node))))
