"""Every form of the warp-specialised kernels that the tuner may choose, each in a process of its own.

Barriers that do not meet would hang a kernel for good: a form that is not done in time is stopped and fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from chipmunk_compile.kernels.launch import runs_hopper

pytest.importorskip("triton")
from tests.gpu.shapes import forms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SECONDS = 230


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All forms at once: compiling is most of the work, and is done on the host."""
    if not runs_hopper(torch.empty(1, device="cuda")):
        pytest.skip("needs a Hopper GPU and Triton with Gluon")
    folder, started = tmp_path_factory.mktemp("forms"), {}
    for i, form in enumerate(forms()):
        output = folder / f"{i}.json"
        command = [sys.executable, "-m", "tests.gpu.shapes", "--form", str(i), "--output", str(output)]
        log = (folder / f"{i}.log").open("w")
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=log, stderr=subprocess.STDOUT)
        started[form] = process, output, folder / f"{i}.log"
    yield started
    for process, *_ in started.values():
        process.kill()


@pytest.fixture(scope="module")
def deadline(runs):
    return time.monotonic() + SECONDS


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_a_form_equals_its_meaning(runs, deadline, form):
    process, output, log = runs[form]
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hangs, after:\n{log.read_text()[-1500:]}")
    assert output.exists(), log.read_text()[-1500:]
    wrong = {shape: why for shape, why in json.loads(output.read_text()).items() if why}
    assert not wrong
