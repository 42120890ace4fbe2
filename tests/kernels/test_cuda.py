"""What runs on a GPU, as far as it can be seen without one: dispatch, fallbacks, what is planned for the kernels."""

from __future__ import annotations

import logging

import pytest
import torch

from chipmunk_compile.kernels import cuda, cuda_attention, cuda_mlp, launch, ops, reference
from chipmunk_compile.plan import _fit, _kept

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, of capability 9.0 unless set otherwise."""
    present = {"capability": (9, 0)}
    monkeypatch.setattr(launch, "capability", lambda device: present["capability"])
    launch.why_no_triton.cache_clear(), cuda._meaning.cache_clear()
    yield present
    launch.why_no_triton.cache_clear(), cuda._meaning.cache_clear()


@pytest.mark.parametrize("name", ["attention_refresh", "attention_delta", "mlp_delta"])
def test_the_ops_have_kernels_for_a_gpu(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"chipmunk::{name}", "CUDA")
    assert ops.IMPLEMENTATIONS["CUDA"] is cuda and callable(getattr(cuda, name))


def test_what_the_kernels_take(gpu):
    pytest.importorskip("triton")
    for dtype in (BF16, torch.float16, torch.float32):
        assert launch.why_no_triton(dtype, GPU) is None
    assert "float64" in launch.why_no_triton(torch.float64, GPU)


def test_an_old_gpu_runs_the_meaning_and_the_log_says_so_once(gpu, caplog):
    pytest.importorskip("triton")
    gpu["capability"] = (7, 5)
    query = torch.empty(1, 1, 8, 16, dtype=BF16)
    with caplog.at_level(logging.WARNING, logger="chipmunk_compile"):
        for _ in range(2):
            why = launch.why_no_triton(query.dtype, GPU)
            assert cuda._meaning(why) is reference
    (record,) = caplog.records
    assert "7.5" in record.message and "8.0" in record.message


def test_without_triton_the_meaning_runs(gpu, monkeypatch):
    monkeypatch.setattr(launch, "_has_triton", lambda: False)
    assert "pip install triton" in launch.why_no_triton(BF16, GPU)


@pytest.mark.parametrize("head_dim, module", [(256, cuda_attention), (257, reference)])
def test_head_dimensions_that_the_kernels_take(head_dim, module, gpu):
    pytest.importorskip("triton")
    assert cuda._attention(torch.empty(1, 1, 8, head_dim, dtype=BF16)) is module
    assert cuda._kernels("cuda_mlp", torch.empty(1, dtype=BF16)) is cuda_mlp


def test_a_kernel_that_does_not_compile_gives_way_once(monkeypatch, caplog):
    errors = pytest.importorskip("triton.runtime.errors")
    calls = []

    class Kernel:
        __name__ = "some_kernel"

        def __getitem__(self, grid):
            def run(*args, **config):
                calls.append(grid)
                raise errors.OutOfResources(300_000, 232_448, "shared memory")

            return run

    monkeypatch.setattr(launch, "_refused", set())
    with caplog.at_level(logging.WARNING, logger="chipmunk_compile"):
        assert [launch.attempt(Kernel(), (1,), torch.empty(1)) for _ in range(2)] == [False, False]
    assert len(calls) == 1 and len(caplog.records) == 1


def test_an_error_of_a_kernel_that_runs_is_not_swallowed():
    pytest.importorskip("triton")

    class Kernel:
        __name__ = "some_other_kernel"

        def __getitem__(self, grid):
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        launch.attempt(Kernel(), (1,), torch.empty(1))


@pytest.mark.parametrize(
    "columns, sparsity, on_gpu, on_cpu",
    [
        (4608, 0.835, 768, 760),
        (32768, 0.93, 2304, 2294),
        (1000, 0.0, 1000, 1000),
        (1000, 1.0, 0, 0),
        (1000, 0.99, 64, 10),
        (40, 0.9, 40, 4),
    ],
)
def test_columns_are_planned_in_multiples_of_what_kernels_compute(columns, sparsity, on_gpu, on_cpu):
    assert _kept(columns, sparsity, GPU) == on_gpu
    assert _kept(columns, sparsity, CPU) == on_cpu


def test_an_mlp_on_a_gpu_takes_equal_chunks_along_the_patches():
    patches = (60, 60, 48, 60, 60)
    assert _fit(patches, 128) == (120, 108, 60)
    assert _fit(patches, 128, keep_patches=False) == (128, 128, 32)
