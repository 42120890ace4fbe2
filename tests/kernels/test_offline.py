"""Every form of the Hopper kernels that the tuner may choose compiles, and fits a multiprocessor; no GPU needed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 232_448  # bytes that a block of threads may have on compute capability 9.0
STACK = 512  # bytes a thread: the MLP's path for chunks that are not aligned spills, its loops do not


def compiled(folder: Path, *names: str) -> list[dict]:
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError:
        pytest.skip("needs Triton with Gluon")
    tool = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton comes without cuobjdump")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "CHIPMUNK_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.offline", str(folder / "out.json"), *names]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def check(result: dict) -> None:
    assert result["shared"] <= SHARED_MEMORY, result
    assert result["registers"] * 512 <= 65536, result
    assert result["stack"] <= STACK, result


def test_a_kernel_compiles_for_hopper(tmp_path):
    (result,) = compiled(tmp_path, "mlp_hopper")
    check(result)


@pytest.mark.slow
def test_every_form_compiles_for_hopper(tmp_path):
    results = compiled(tmp_path)
    assert {r["template"] for r in results} == {"attention_delta_hopper", "mlp_hopper"}
    assert len(results) > 15
    for result in results:
        check(result)
