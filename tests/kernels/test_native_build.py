"""Which of the CPU's paths runs, and how the native kernels' libraries are built, found again and done without."""

from __future__ import annotations

import logging
import pathlib

import pytest
import torch

from chipmunk_compile.kernels import cpu, native_build
from tests.kernels.cases import NATIVE, Attention, Mlp, needs_native


def test_float32_runs_native_where_it_can_and_other_dtypes_in_torch(monkeypatch):
    ran = []
    for module in (cpu.blocked, cpu.reference):
        real = module.attention_delta
        name = module.__name__.rsplit(".")[-1]
        monkeypatch.setattr(module, "attention_delta", lambda *a, real=real, name=name: (ran.append(name), real(*a))[1])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        a = Attention(dtype=dtype)
        state = a.state()
        a.refresh(state)
        a.delta(state, a.query, a.key, a.value)
    assert ran == ([] if cpu.prepare() == "native" else ["blocked"]) + ["blocked", "reference"]


def test_forcing_a_path_is_strict():
    with pytest.raises(ValueError, match="choose one of"), cpu.force("fast"):
        pass
    a = Attention(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="native was forced"), cpu.force("native"):
        a.refresh(a.state())


@needs_native
def test_tables_that_do_not_cover_the_tokens_are_refused():
    a = Attention()
    a.starts[-1] -= 1
    with pytest.raises(ValueError, match="chunk_table"):
        a.refresh(a.state())
    mlp = Mlp()
    mlp.samples[0, 0] = 99  # a token of another chunk
    with pytest.raises(ValueError, match="sample_table"):
        mlp.delta(mlp.x)


@pytest.mark.parametrize("path", [NATIVE, "blocked"])
def test_state_that_no_refresh_has_filled_is_refused(path):
    a = Attention()
    o_cache, columns, counts = a.state()
    with cpu.force(path):
        for column, count in ((a.total, 3), (-1, 3)):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                a.delta((o_cache, columns.fill_(column), counts.fill_(count)), a.query, a.key, a.value)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache folder, and no library loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_libraries", {})
    return tmp_path / "chipmunk_compile" / "native"


@needs_native
def test_a_library_is_built_once_and_found_again(fresh_build, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "chipmunk_compile")
    assert cpu.prepare("silu(h0)") == "native"
    (library,) = fresh_build.glob("*.so")
    assert library.with_suffix(".cpp").read_text().count("fast::region") > 0
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"] and len(list(fresh_build.iterdir())) == 2
    monkeypatch.setattr(native_build, "_libraries", {})
    monkeypatch.setattr(native_build, "_run", lambda command: pytest.fail("compiled again"))
    assert cpu.prepare("silu(h0)") == "native"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_torch_does_the_work(fresh_build, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert cpu.prepare("gelu_tanh(h0)") == "blocked"
    assert cpu.prepare() == "blocked"
    mlp = Mlp()
    mlp.check(torch.randn_like(mlp.x))
    Attention().check()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2, "once for each library"


@needs_native
def test_the_library_shares_torch_s_openmp_and_keeps_denormals(fresh_build):
    """A second OpenMP runtime would fight over the cores; flush-to-zero would reach the whole process."""
    assert native_build.library(None)
    mapped = pathlib.Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in mapped if "libgomp" in line or "libomp" in line}) <= 1
    assert (torch.tensor([1e-39]) * 1.0).item() > 0
