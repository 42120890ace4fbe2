import pytest
import torch

import chipmunk_compile


@pytest.fixture(autouse=True)
def clean_slate():
    """No test sees another's compiled graphs, cached state or counters."""
    yield
    torch._dynamo.reset()
    chipmunk_compile.reset()


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs run as they are, without Inductor: for tests of which program runs when, on what state."""
    monkeypatch.setattr("chipmunk_compile.programs.compile_graph", lambda graph, args, config: graph)
