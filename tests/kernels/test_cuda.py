"""What runs on a GPU, as far as it can be seen without one: dispatch, fallbacks, what is planned for the kernels."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from chipmunk_compile.kernels import cuda, cuda_attention, cuda_mlp, launch, ops, reference, tuning
from chipmunk_compile.plan import _kept, _takes_equal_chunks

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, of capability 9.0 unless set otherwise."""
    present = {"capability": (9, 0)}
    for module in (launch, tuning):
        monkeypatch.setattr(module, "capability", lambda device: present["capability"])
    for module in (cuda_attention, cuda_mlp):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that is not there")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # so that nothing is measured
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


def test_sites_on_an_old_gpu_stay_dense(gpu):
    """The graph is captured for a GPU that is not there."""
    from chipmunk_compile import Reason
    from chipmunk_compile.config import Config
    from chipmunk_compile.passes.sites import Declined
    from chipmunk_compile.plan import _switch

    class Site:
        kind, name = "attention", "blocks.0"

        def __init__(self, device):
            with FakeTensorMode(allow_non_fake_inputs=True):
                self.node = torch.fx.Graph().placeholder("out")
                self.node.meta["val"] = torch.empty(2, device=device, dtype=BF16)

    pytest.importorskip("triton")
    old, new = Site(GPU), Site(CPU)
    assert _switch([old, new], Config()) == ([old, new], [])
    gpu["capability"] = (7, 5)
    launch.why_no_triton.cache_clear()
    on, (declined,) = _switch([old, new], Config())
    assert on == [new] and isinstance(declined, Declined) and declined.reason is Reason.NO_KERNELS
    assert "7.5" in declined.detail["why"]


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


class Compiled:
    def __init__(self, log: list) -> None:
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("again", grid, args))


class Function:
    """What Triton makes of a kernel, with one argument that is printed into it."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self) -> None:
        self.log: list = []

    def __getitem__(self, grid):
        def run(*args, **config):
            self.log.append(("looked up", grid, args, config))
            return Compiled(self.log)

        return run


def test_a_kernel_is_looked_up_once_for_what_it_is_compiled_for(monkeypatch):
    monkeypatch.setattr(launch, "_compiled_kernel", lambda: Compiled)
    monkeypatch.setattr(launch, "_compiled", {})
    function, x = Function(), torch.zeros(64, dtype=BF16)

    def run(x, n=3, grid=(5,), **config) -> str:
        launch._launch_compiled(function, 0, grid, (x, n, 0.5), {"BLOCK": 16, "num_warps": 4, **config})
        return function.log[-1][0]

    assert run(x) == "looked up" and function.log[-1][3] == {"BLOCK": 16, "num_warps": 4}
    assert run(x) == run(torch.ones(2, 64, dtype=BF16), grid=(7, 2)) == "again"
    assert function.log[-1][1] == (7, 2, 1) and function.log[-1][2][1:] == (3, 0.5, 16)
    others = [run(x[1:]), run(x.half()), run(x, n=16), run(x, BLOCK=32), run(x, num_warps=8)]
    assert others == ["looked up"] * 5, "begins elsewhere, is of another type, other numbers, other tiles"
    assert run(x[8:]) == run(x[1:]) == run(x, n=16) == "again"


def test_what_is_no_compiled_kernel_is_not_kept(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "_compiled", {})
    function = Function()
    for _ in range(2):
        launch._launch_compiled(function, 0, (1,), (torch.zeros(1), 1, 0.5), {"BLOCK": 16})
    assert [entry[0] for entry in function.log] == ["looked up"] * 2


def launched(op, *args) -> list[str]:
    """The kernels that an op would launch for fake tensors on the GPU."""
    with launch.rehearsal() as sources:
        op(*args)
    return [source.name.rpartition("_")[0] for source in sources]


def empty(*shape: int, dtype=BF16, stride=None) -> torch.Tensor:
    return torch.empty_strided(shape, stride or torch.empty(shape, device="meta").stride(), dtype=dtype, device=GPU)


def delta(chunk=64, head_dim=128, dtype=BF16, stride=None, kv_heads=4) -> list[str]:
    tokens, chunks = 2 * chunk, 2
    query, o_cache = (empty(1, tokens, 4, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    key, value = (empty(1, tokens, kv_heads, head_dim, dtype=dtype, stride=stride).transpose(1, 2) for _ in range(2))
    columns = empty(1, 4, chunks, 64, dtype=torch.int32)
    tables = empty(chunks + 1, dtype=torch.int32), o_cache, columns, empty(1, 4, chunks, dtype=torch.int32)
    return launched(cuda.attention_delta, query, key, value, None, *tables, 0.1, chunk)


def mlp(chunk=128, inputs=1, width=64, dtype=BF16) -> list[str]:
    tokens, hidden = 2 * chunk, 256
    region = "gelu_tanh(h0)" if inputs == 1 else "mul(silu(h0), h1)"
    weights, biases = ([empty(*s, dtype=dtype) for _ in range(inputs)] for s in ((hidden, width), (hidden,)))
    down_t, norm = empty(hidden, width, dtype=dtype), empty(hidden, dtype=torch.float32)
    tables = empty(3, dtype=torch.int32), empty(2, 8, dtype=torch.int32)
    row = -(-tokens // 16) * 16
    act_cache = empty(1, hidden, tokens, dtype=dtype, stride=(hidden * row, row, 1))
    caches = act_cache, empty(1, 2, 8, hidden, dtype=dtype)
    out_cache = empty(1, tokens, width, dtype=torch.float32)
    x = empty(1, tokens, width, dtype=dtype)
    return launched(cuda.mlp_delta, x, weights, biases, down_t, norm, *tables, *caches, out_cache, region, chunk, 128)


HOPPER, PORTABLE = ["attention_delta_hopper"], ["attention_delta"]


@pytest.fixture
def fake(gpu, tmp_path, monkeypatch):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    monkeypatch.setenv("CHIPMUNK_CACHE_DIR", str(tmp_path))
    tuning.forget()
    with FakeTensorMode():
        yield gpu
    tuning.forget()


def test_while_one_thread_rehearses_others_launch():
    ran = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **config: ran.append(grid)

    with launch.rehearsal():
        thread = threading.Thread(target=launch.launch, args=(Kernel(), (3,), torch.empty(1)))
        thread.start(), thread.join()
    assert ran == [(3,)]


@pytest.mark.parametrize("chunk", [32, 60, 64, 100, 126, 128, 192])
def test_on_hopper_its_kernel_takes_chunks_of_any_length(fake, chunk):
    assert delta(chunk) == HOPPER
    assert delta(chunk, head_dim=64, kv_heads=2) == HOPPER


def test_what_the_hopper_kernel_does_not_take_the_portable_one_does(fake):
    assert delta(head_dim=72) == delta(head_dim=256) == PORTABLE
    assert delta(dtype=torch.float16) == delta(dtype=torch.float32) == PORTABLE
    assert delta(stride=(128 * 4 * 129, 4 * 129, 129, 1)) == PORTABLE  # rows that are not multiples of 16 bytes
    fake["capability"] = (8, 9)
    assert delta() == PORTABLE


@pytest.mark.parametrize(
    "chunk, suits", [(64, False), (100, True), (120, True), (128, True), (192, False), (256, True)]
)
def test_on_hopper_an_mlp_takes_blocks_of_128_tokens(fake, chunk, suits):
    for inputs in (1, 2):
        assert mlp(chunk, inputs)[-2:] == (["mlp_samples", "mlp_hopper"] if suits else ["mlp_up", "mlp_down"])
    assert mlp(chunk, width=72)[-2:] == mlp(chunk, dtype=torch.float32)[-2:] == ["mlp_up", "mlp_down"]


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


def test_only_an_mlp_on_a_gpu_takes_chunks_across_patches():
    taken = [(kind, d.type) for kind in ("attention", "mlp") for d in (CPU, GPU) if _takes_equal_chunks(kind, d)]
    assert taken == [("mlp", "cuda")]
