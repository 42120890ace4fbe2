"""Host memory for state: taken when a stream is laid out, locked when it is first written, kept for the next stream.

Getting pages from the system takes most of the time that locking them does, so a thread begins with that at once,
while the device computes the first refresh. Buffers that a generation gave back wait for the next one. What waits is
freed by `reset()`, and when a size is asked for that nothing waits for: another resolution then, or another model.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

import torch

from .kernels.transfer import PAGE, unpin
from .passes.lower import StateTensor

_MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14: takes pages as if they were written to, and leaves what they hold
_lock = threading.Lock()
_waiting: dict[int, list[torch.Tensor]] = defaultdict(list)  # by bytes; uint8, on pages of their own
# Given back and not yet sorted in: state dies whenever the garbage collector runs, maybe while the lock is held.
_returned: deque[torch.Tensor] = deque()


def take(specs: Sequence[StateTensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(one host tensor laid out like each spec, the buffers that they lie in, for `give_back`). Neither is filled."""
    buffers = [_buffer(-(-spec.bytes // PAGE) * PAGE) for spec in specs]
    with torch.inference_mode(False):
        tensors = [b.view(spec.dtype).as_strided(spec.shape, spec.stride) for spec, b in zip(specs, buffers)]
    return tensors, buffers


def get_pages(buffers: Sequence[torch.Tensor]) -> None:
    """Begins to, beside what computes; who touches a page before that gets it then. What buffers hold stays."""
    if buffers and sys.platform == "linux":
        threading.Thread(target=_populate, args=(buffers,), name="chipmunk host memory", daemon=True).start()


def _populate(buffers: Sequence[torch.Tensor]) -> None:
    # An older system knows no such advice, and a full one has no page to give: locking says so later.
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for buffer in buffers:
            advise(buffer.data_ptr(), buffer.nbytes, _MADV_POPULATE_WRITE)


def give_back(buffers: Sequence[torch.Tensor]) -> None:
    _returned.extend(buffers)


def waiting_bytes() -> int:
    """Bytes that no state holds."""
    with _lock:
        _sort_in()
        return sum(nbytes * len(buffers) for nbytes, buffers in _waiting.items())


def available_bytes() -> float:
    """What may be taken: what waits, and three quarters of what the system would give away without swapping."""
    return waiting_bytes() + 0.75 * min(_of_system(), _of_group())


def _of_system() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def _of_group() -> float:
    """Of a container, by its control group."""
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used
    except (OSError, ValueError):  # none, or "max"
        return math.inf


def free() -> None:
    """Gives all that waits back to the system."""
    with _lock:
        _free()


def _buffer(nbytes: int) -> torch.Tensor:
    with _lock:
        _sort_in()
        if _waiting[nbytes]:
            return _waiting[nbytes].pop()
        _free()
    with torch.inference_mode(False):
        raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
        return raw[-raw.data_ptr() % PAGE :][:nbytes]


def _sort_in() -> None:
    while _returned:
        buffer = _returned.popleft()
        _waiting[buffer.nbytes].append(buffer)


def _free() -> None:
    _sort_in()
    buffers = [buffer for some in _waiting.values() for buffer in some]
    _waiting.clear()
    if buffers and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):  # copies may still be under way
            torch.cuda.synchronize(device)
    for buffer in buffers:
        unpin(buffer.data_ptr())
