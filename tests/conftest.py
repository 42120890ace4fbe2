import os

import pytest
import torch

import chipmunk_compile

# Workers of pytest-xdist share the cores; a test that needs threads asks for them.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


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
