"""explain(kernels_dir=...): the sources of the kernels that a model's programs run."""

from __future__ import annotations

import ast

import pytest
import torch

import chipmunk_compile
from chipmunk_compile import printing
from chipmunk_compile.config import Config
from chipmunk_compile.kernels import cuda_mlp
from chipmunk_compile.plan import analyse, make_plan
from tests.toy_dit import SMALL, Loop, toy


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from chipmunk_compile.kernels import codegen

    monkeypatch.setenv("CHIPMUNK_CACHE_DIR", str(tmp_path / "cache"))
    codegen.kernel.cache_clear()
    yield tmp_path
    codegen.kernel.cache_clear()


def plan(**kwargs):
    """The plan of a small model, as its first call makes it."""
    config, found = Config.from_options(SMALL), []

    def collect(gm, inputs):
        analysis = analyse(gm, inputs, config)
        found.append(make_plan(analysis, analysis.grids(inputs), config))
        return gm.forward

    with torch.no_grad():
        torch.compile(toy(**kwargs), backend=collect)(*next(iter(Loop())))
    return found[0]


def test_on_a_cpu_the_native_kernels_are_written(tmp_path):
    inputs = next(iter(Loop()))
    chipmunk_compile.explain(toy(activation="swiglu"), *inputs, options=SMALL, kernels_dir=tmp_path / "new" / "folder")
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert len(files) == 2 and "attention.cpp" in files
    (mlp,) = (text for name, text in files.items() if name.startswith("mlp_"))
    assert "// mul(silu(h0), h1)" in mlp


def test_nothing_is_written_without_being_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chipmunk_compile.explain(toy(), *next(iter(Loop())), options=SMALL)
    assert not list(tmp_path.iterdir())


def test_kernels_of_a_program_are_printed_without_running_it(cache):
    """On fake tensors: the same code that launches them on a GPU says which."""
    pytest.importorskip("triton")
    sources = printing.triton_sources(plan(activation="gelu"))
    names = [path.name.rpartition("_")[0] for path in sources]
    refresh = ["attention_lse", "attention_scores", "attention_select", "attention_delta"]
    delta = ["attention_delta", "mlp_scores", "mlp_select", "mlp_samples", "mlp_up", "mlp_down"]
    assert names == refresh + delta  # the sites are alike; a refresh subtracts where a delta adds
    texts = dict(zip(names, (path.read_text() for path in sources)))
    for text in texts.values():
        ast.parse(text)
    line = cuda_mlp._facts("gelu(h0)", 1, 1)["lines"][-1]
    assert line in texts["mlp_up"]
