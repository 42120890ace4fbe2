"""What a start costs, by counts: programs come from Inductor's caches in a second process, and none is made in vain."""

import json
import os
import subprocess
import sys

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk
from tests.toy_dit import SMALL, toy

# Reaches a delta step, and prints what the caches were asked and one number of the output. Its argument stands for
# another release of the package, whose ops may lay their outputs out in another way.
PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
import chipmunk_compile
from chipmunk_compile import programs
from tests.toy_dit import SMALL, Loop, toy

if len(sys.argv) > 1:
    programs._digest_of_ops = lambda: sys.argv[1]
model = torch.compile(toy(layers=1), backend="chipmunk", options=SMALL)
outputs = Loop(steps=6).run(model)
ran = chipmunk_compile.counters()
assert ran["refresh"] and ran["delta"] and ran["compiles"] == 2, ran
cached = {name: n for kind in ("aot_autograd", "inductor") for name, n in counters[kind].items() if "cache_" in name}
print(json.dumps({"cached": cached, "sum": sum(o.double().sum().item() for o in outputs)}))
"""


def run(cache, *arguments) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path):
    first, second, other = run(tmp_path), run(tmp_path), run(tmp_path, "another release")
    assert first["cached"]["autograd_cache_miss"] == first["cached"]["autograd_cache_saved"] == 2
    assert second["cached"] == {"autograd_cache_hit": 2, "fxgraph_cache_hit": 2}
    assert second["sum"] == first["sum"]
    assert "autograd_cache_hit" not in other["cached"] and other["cached"]["fxgraph_cache_miss"] == 2
    assert not any("bypass" in name for ran in (first, second, other) for name in ran["cached"])


@pytest.mark.usefixtures("uncompiled")
def test_strides_of_one_sample_are_no_sizes():
    """A block is called with a whole stream, then with a part of one: Dynamo makes a symbol of the batch's stride,
    which one sample does not use. No symbolic program is compiled for it, and both calls share one of each kind."""
    block = toy().blocks[0]
    runners = []

    def spy(gm, inputs, **options):
        runners.append((gm, inputs, chipmunk(gm, inputs, **options)))
        return runners[-1][-1]

    options = {**SMALL, "attention.sparsity": 0.0, "mlp.sparsity": 0.0, "steps": 4, "streams": 1}
    compiled = torch.compile(block, backend=spy, options=options)
    condition = torch.randn(1, 32)
    with torch.no_grad():
        for longer in (0, 1, 2, 3):
            x = torch.randn(1, 40 + longer, 32)[:, longer:]
            torch.testing.assert_close(compiled(x, condition), block(x, condition), rtol=1e-4, atol=1e-4)
    (_, inputs, by_size) = runners[1]
    assert len(runners) == 2 and any(isinstance(value, torch.SymInt) for value in inputs), "Dynamo made a symbol"
    assert len(by_size._by_size) == 1
    counts = chipmunk_compile.counters()
    assert [counts[name] for name in ("compiles", "dense", "refresh", "delta")] == [0, 0, 2, 2]
