"""The generator: what it prints, where it puts it, what it refuses."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys

import jinja2
import pytest
import torch

from chipmunk_compile.kernels import codegen, cuda_mlp, tuning
from chipmunk_compile.kernels.expression import OPERATIONS

ATTENTION = dict(sign="+", fixed=True, wide=False, head_dim=64, parts=codegen.parts(64), mask=None, precision="")
CPU = torch.device("cpu")
HOPPER = dict(sign="-", wide=False, head_dim=128)
ALL = {
    "attention_delta": [
        {**ATTENTION, "head_dim": d, "parts": codegen.parts(d), "mask": mask, "fixed": fixed, "wide": wide}
        for d, mask, fixed, wide in itertools.product((64, 72), (None, "bool", "float"), (True, False), (True, False))
    ],
    "attention_scores": [{k: v for k, v in ATTENTION.items() if k not in ("sign", "fixed")}],
    "attention_lse": [{k: v for k, v in ATTENTION.items() if k not in ("sign", "fixed")} | {"mask": "bool"}],
    "attention_select": [{}],
    "attention_delta_hopper": [
        {**HOPPER, **tuning.attention_delta_hopper(128, chunk, 768, CPU)[0]} for chunk in (64, 128, 192)
    ],
    "mlp_up": [{**cuda_mlp._facts("mul(silu(h0), h1)", 2, n), "even": n > 0, "precision": ""} for n in (0, 2)],
    "mlp_down": [{"even": even, "precision": ""} for even in (True, False)],
    "mlp_scores": [cuda_mlp._facts("gelu(h0)", 1, 0)],
    "mlp_select": [{}],
    "mlp_samples": [{}],
    "mlp_weights": [{}],
    "mlp_hopper": [
        {**cuda_mlp._facts(region, n, biases), "wide": biases > 0, "even": even}
        for region, n in (("gelu_tanh(h0)", 1), ("mul(silu(h0), h1)", 2))
        for biases in (0, n)
        for even in (True, False)
    ],
    "gather_tokens": [{"count": n} for n in (1, 3)],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPMUNK_CACHE_DIR", str(tmp_path))
    codegen.kernel.cache_clear()
    yield tmp_path
    codegen.kernel.cache_clear()


def test_every_template_is_tried_here():
    assert set(ALL) == {path.name.partition(".")[0] for path in codegen.TEMPLATES.glob("*.py.jinja")}


@pytest.mark.parametrize("template", ALL)
def test_prints_python_that_defines_the_kernel(template):
    for facts in ALL[template]:
        source = codegen.render(template, **facts)
        functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        assert functions[-1] == template
        assert "{{" not in source and "#%" not in source
        assert f"templates/{template}.py.jinja" in source.splitlines()[0]


def test_a_missing_fact_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        codegen.render("mlp_down", even=True)


def test_a_printed_kernel_has_no_dead_branch():
    plain = codegen.render("attention_delta", **ATTENTION)
    masked = codegen.render("attention_delta", **{**ATTENTION, "mask": "float"})
    online = codegen.render("attention_delta", **{**ATTENTION, "fixed": False})
    assert "bias" not in plain and "bias" in masked
    assert "rescale" not in plain and "rescale" in online
    assert "LIMIT" in plain and "LIMIT" not in online
    assert "if mask" not in masked


def test_the_region_is_printed_into_the_kernel():
    source = codegen.render("mlp_up", **cuda_mlp._facts("mul(silu(h0), h1)", 2, 0), even=True, precision="")
    assert "(h0 * sigmoid(h0))" in source and "h1" in source and "bias0" not in source


def test_the_same_facts_give_the_same_function_and_one_file(folder):
    first = codegen.kernel("mlp_down", even=True, precision="")
    assert codegen.kernel("mlp_down", even=True, precision="") is first
    other = codegen.kernel("mlp_down", even=False, precision="")
    assert other is not first
    files = sorted(folder.iterdir())
    assert len(files) == 2 and all(f.name.startswith("mlp_down_") and f.suffix == ".py" for f in files)


def test_names_are_hashes_of_content(folder):
    codegen.kernel("mlp_samples")
    (path,) = folder.iterdir()
    assert path.read_text() == codegen.render("mlp_samples")
    assert path in codegen.printed()


def test_a_damaged_file_is_written_again(folder):
    source = codegen.render("mlp_select")
    path = codegen._write("mlp_select_x.py", source)
    path.write_text("half of")
    assert codegen._write("mlp_select_x.py", source) == path
    assert path.read_text() == source
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch):
    monkeypatch.setenv("CHIPMUNK_CACHE_DIR", "/proc/self/no-such-folder")
    path = codegen._write("mlp_samples_y.py", "# nothing\n")
    assert path.read_text() == "# nothing\n" and "/proc/" not in str(path)


@pytest.mark.parametrize("template", ["attention_delta", "attention_delta_hopper", "mlp_hopper"])
def test_a_printed_kernel_imports_alone(folder, template):
    pytest.importorskip("triton")
    codegen.kernel(template, **ALL[template][-1])
    (path,) = folder.iterdir()
    code = f"import runpy; assert '{template}' in runpy.run_path({str(path)!r})"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)


@pytest.mark.parametrize("head_dim", [*range(1, 20), 40, 64, 72, 80, 96, 112, 128, 160, 200, 256])
def test_parts_cover_the_head_without_much_waste(head_dim):
    parts = codegen.parts(head_dim)
    assert len(parts) <= 2
    assert all(width >= 16 and width & (width - 1) == 0 for _, width in parts)
    assert parts[0][0] == 0 and all(a + width == b for (a, width), (b, _) in zip(parts, parts[1:]))
    covered = parts[-1][0] + parts[-1][1]
    assert head_dim <= covered <= max(head_dim + 15, head_dim * 4 / 3)


def test_parts_refuses_what_is_no_width():
    with pytest.raises(ValueError):
        codegen.parts(0)


def test_every_operation_of_a_region_exists_where_it_is_printed():
    """The Hopper kernels print the same text with Gluon's language under the name `tl`."""
    triton = pytest.importorskip("triton")
    gluon = pytest.importorskip("triton.experimental.gluon.language")
    for operation in OPERATIONS.values():
        for name in re.findall(r"\btl\.(\w+)", operation.triton):
            assert hasattr(triton.language, name) and hasattr(gluon, name), name


@pytest.mark.parametrize("template", ["mlp_up", "mlp_hopper", "mlp_scores"])
def test_a_sigmoid_is_defined_where_it_is_used(template):
    facts = ALL[template][0]
    for region, used in (("silu(h0)", True), ("gelu_tanh(h0)", True), ("tanh(h0)", True), ("relu(h0)", False)):
        source = codegen.render(template, **{**facts, **cuda_mlp._facts(region, 1, 0)})
        assert ("def sigmoid(x)" in source) == used == (source.count("sigmoid(") > 0)
