"""What installing alone gives: the string works in a fresh process, and nothing heavy is imported early."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def fresh(code, **environment):
    import os

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def test_the_string_needs_no_import_of_ours():
    assert "chipmunk" in fresh("import torch; print(torch._dynamo.list_backends())")


def test_importing_the_package_imports_no_torch():
    assert fresh("import sys, chipmunk_compile; print('torch' in sys.modules)") == "False"


def test_the_log_artifacts_can_be_turned_on_from_outside():
    fresh("import torch, chipmunk_compile", TORCH_LOGS="+chipmunk_compile")


def test_passes_and_programs_leave_structured_artifacts(tmp_path):
    fresh(
        "import torch; from tests.toy_dit import Loop, SMALL, toy\n"
        "model = torch.compile(toy(layers=1), backend='chipmunk', options=SMALL)\n"
        "Loop(steps=4).run(model)",
        TORCH_TRACE=str(tmp_path),
    )
    (log,) = tmp_path.iterdir()
    names = set()
    for line in log.read_text().splitlines():
        if line.startswith("V") and '"artifact"' in line:
            names.add(json.loads(line[line.index("{") :])["artifact"]["name"])
    expected = {"canonical", "raise_attention", "split_linears", "refresh", "delta"}
    assert {f"chipmunk_{name}" for name in expected} <= names


def test_a_wheel_holds_what_kernels_are_made_from(tmp_path):
    """Templates, tables and C++ are data, which setuptools leaves out unless it is told."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    root, copy = Path(__file__).parents[1], tmp_path / "source"
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("chipmunk_compile", "passes", "kernels"):
        shutil.copytree(root / folder, copy / folder, symlinks=True, ignore=hidden)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(root / file, copy / file)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in (root / "kernels").rglob("*") if path.suffix in (".jinja", ".json", ".cpp")]
    assert len(data) > 15
    assert {f"chipmunk_compile/kernels/{path.relative_to(root / 'kernels')}" for path in data} <= held


def test_defining_the_ops_loads_nothing_that_only_a_gpu_needs():
    # torch itself may load Triton, where it is installed.
    before = "import sys, torch.utils.flop_counter; had = set(sys.modules); import chipmunk_compile.kernels.ops"
    loaded = "[m for m in {*sys.modules} - had if m in ('triton', 'jinja2') or 'cuda_' in m or m.endswith('.tuning')]"
    assert fresh(f"{before}; print({loaded})") == "[]"
