"""The printed Triton kernels against their meaning in float64, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import interpreted
from tests.kernels.triton_cases import check

pytest.importorskip("triton")

TABLES = {
    "attention": interpreted.ATTENTION,
    "mlp": interpreted.MLP,
    "weights": interpreted.WEIGHTS,
    "permute": interpreted.PERMUTE,
}
CASES = [(f"{kind}: {name}", arguments) for kind, table in TABLES.items() for name, arguments in table.items()]


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("interpreted")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CHIPMUNK_CACHE_DIR": str(folder / "printed"),
        "OMP_NUM_THREADS": "1",
    }
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted", str(folder / "errors.json")]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("name, arguments", CASES, ids=[name for name, _ in CASES])
def test_equals_its_meaning(errors, name, arguments):
    check(errors[name], arguments.get("dtype", torch.float32))
