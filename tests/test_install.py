"""What installing alone gives: the string works in a fresh process, and nothing heavy is imported early."""

import json
import subprocess
import sys


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
