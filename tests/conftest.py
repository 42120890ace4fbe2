import pytest
import torch

import chipmunk_compile


@pytest.fixture(autouse=True)
def clean_slate():
    """No test sees another's compiled graphs, cached state or counters."""
    yield
    torch._dynamo.reset()
    chipmunk_compile.reset()
