"""Where in the model a node comes from, as a person would write it: `transformer_blocks.3.attn`."""

from __future__ import annotations

import re

from torch.fx import Node

# What Dynamo puts into a path besides module names: dictionaries of modules, wrappers.
_NOISE = {"__dict__", "_modules", "_orig_mod", "_forward_module", "__self__"}
_SCOPE = re.compile(r"""\b[LG]\[(['"]).*?\1\]|\bgetattr\(""")  # L['self'], G['model'], getattr(
_SLICE = re.compile(r"slice\([^()]*\)")  # a loop over blocks[:2] leaves its slice in the path
_TOKEN = re.compile(r"""(['"])(.*?)\1|([^.\[\]()'",]+)""")


def module_path(node: Node) -> str:
    """The path of the innermost module whose forward made `node`, from the root: `blocks.0.attn`; "" if unknown.

    The root itself has the empty path. Read from `meta["nn_module_stack"]`, which Dynamo fills and export keeps.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(list(stack.values())[-1][0])


def clean_path(source: str) -> str:
    """`L['self']._modules['blocks']._modules['0'].attn` -> `blocks.0.attn`."""
    text = _SLICE.sub("", _SCOPE.sub("", source))
    parts = [(quoted or plain).strip() for _, quoted, plain in _TOKEN.findall(text)]
    return ".".join(part for part in parts if part and part not in _NOISE)
