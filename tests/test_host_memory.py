"""Host memory for state: on pages of its own, used again, and given back when another size is asked for."""

import math
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from chipmunk_compile import host_memory
from chipmunk_compile.kernels.transfer import PAGE
from chipmunk_compile.passes.lower import StateTensor


@pytest.fixture(autouse=True)
def nothing_waits():
    host_memory.free()
    yield
    host_memory.free()


def spec(*shape, stride=None, dtype=torch.bfloat16):
    stride = stride or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return StateTensor("cache", "stream", shape, stride, dtype, torch.device("cpu"))


def test_tensors_are_laid_out_as_asked_on_pages_that_nothing_else_lies_on():
    specs = [spec(2, 5, 63, stride=(400, 80, 1)), spec(1, 700, dtype=torch.int32), spec(3, dtype=torch.float32)]
    with torch.inference_mode():
        tensors, buffers = host_memory.take(specs)
    for wanted, tensor, buffer in zip(specs, tensors, buffers):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (wanted.shape, wanted.stride, wanted.dtype)
        assert tensor.data_ptr() == buffer.data_ptr() and tensor.data_ptr() % PAGE == 0
        assert buffer.nbytes % PAGE == 0 and wanted.bytes <= buffer.nbytes < wanted.bytes + PAGE
        whole = buffer.untyped_storage()
        assert buffer.data_ptr() + buffer.nbytes <= whole.data_ptr() + whole.nbytes()
        tensor.fill_(1)  # not bound to inference mode
    ends = sorted((b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers)
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:]))


def test_what_is_given_back_serves_the_next_of_its_size():
    _, first = host_memory.take([spec(5000), spec(5000)])
    addresses = {buffer.data_ptr() for buffer in first}
    host_memory.give_back(first)
    assert host_memory.waiting_bytes() == sum(buffer.nbytes for buffer in first)
    _, second = host_memory.take([spec(5000), spec(5000)])
    assert {buffer.data_ptr() for buffer in second} == addresses and host_memory.waiting_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_pages_are_there_before_they_are_touched_and_keep_what_they_hold():
    tensors, buffers = host_memory.take([spec(8 * 2**20)])
    tensors[0][:5] = 3
    before = _resident()
    host_memory.get_pages(buffers)
    for thread in threading.enumerate():
        if thread.name == "chipmunk host memory":
            thread.join()
    got = _resident() - before
    assert got > 12 * 2**20 or got < 2**20, "an old system gives none"
    assert tensors[0][:5].tolist() == [3] * 5


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_another_size_frees_what_waits():
    _, buffers = host_memory.take([spec(5000)])
    host_memory.give_back(buffers)
    assert host_memory.waiting_bytes() > 0
    host_memory.take([spec(50_000)])
    assert host_memory.waiting_bytes() == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="nothing tells")
def test_what_is_available_is_less_than_the_machine_has():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < host_memory.available_bytes() < total
