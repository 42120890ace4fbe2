"""The table of state by shapes: traced without values, split as the budget asks."""

import torch

from benchmarks import memory, models_zoo
from chipmunk_compile.budget import LINKS


def test_a_budget_splits_the_state_of_all_streams():
    subject = models_zoo.tiny(models_zoo.SUBJECTS["wan-14b-720p"]).with_layers(4)
    model = models_zoo._construct(subject, memory.META, torch.bfloat16).eval().requires_grad_(False)
    whole = memory.report(model, subject, None)
    assert whole.host_bytes == 0 and whole.device_bytes == whole.state_bytes > 0
    budget = int(1.5 * whole.state_bytes)  # of two streams
    # A ring of two slots leaves room for a part of what is left.
    split = memory.report(model, subject, str(budget / 1e3) + "KB")
    assert split.host_bytes > 0
    assert 2 * (split.state_bytes - split.host_bytes) + split.ring_bytes <= budget + 1000
    cells = dict(zip(memory.HEAD, memory.row(subject, "some", split, 1e6)))
    assert cells["streams"] == "2" and cells["left dense"] == "0"
    assert cells["copies"] == f"{2 * split.host_bytes / 1e6:.2f} s"
    work = 2 * sum(graph.delta_flops for graph in split.graphs)
    assert cells["compute"] == f"{work / LINKS['cuda'].flops_per_s:.2f} s"
    assert len(cells) == len(memory.HEAD)
