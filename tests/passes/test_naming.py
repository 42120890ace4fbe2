"""Module paths, from what Dynamo writes to what a person reads."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from chipmunk_compile.passes.naming import clean_path, module_path
from tests.capture import capture


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'].3", "blocks.3"),
        ("L['self']._orig_mod.blocks.3.ff", "blocks.3.ff"),
        ('L["self"].blocks["0"]', "blocks.0"),
        ("G['model'].attn", "attn"),
        ("getattr(L['self'].blocks, '0').attn", "blocks.0.attn"),
        ("L['self'].blocks.slice(None, 2, None).1.attn", "blocks.1.attn"),
        ("L['s'].experts.of light", "experts.of light"),
        ("L['self'].L.G", "L.G"),
    ],
)
def test_clean_path(source, path):
    assert clean_path(source) == path


def test_innermost_module_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["proj"](x).exp()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x.cos()

    (gm,) = capture(Model(), torch.randn(3, 4))
    named = {(str(n.target), module_path(n)) for n in gm.graph.nodes if n.op == "call_function"}
    assert named == {
        ("aten.linear.default", "blocks.0.inner.proj"),
        ("aten.linear.default", "blocks.1.inner.proj"),
        ("aten.exp.default", "blocks.0"),
        ("aten.exp.default", "blocks.1"),
        ("aten.cos.default", ""),
    }


def test_node_without_a_module_has_no_path():
    graph = fx.Graph()
    assert module_path(graph.placeholder("x")) == ""
