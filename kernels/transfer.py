"""State that lives in host memory between its uses: the operators that bring it to the device and take it back.

    fetch     begins to copy a site's caches from their home to the device
    arrive    whatever comes after it finds the last copy from or into these caches done
    store     begins to copy them from the device to their home
    keep      writes a value into a cache, right here: `aten.copy_` may be put off to the end of a program

Copies run on a stream of their own, one after the other, beside what computes. `fetch` begins once all that was
launched before it is done, so it may overwrite what an earlier op read; `arrive` makes the computing stream wait, not
the host. A home that is the cache itself is on the device already: then nothing is done. So one program serves state
that lies here or there. On a CPU the same ops are plain copies.

Every op claims to write `order`, a tensor that nobody reads or writes: a compiler must then keep them in the order in
which they stand. `after` is only waited for: it holds an op behind the op that makes it. Importing this module defines
the operators, beside those of kernels/ops.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Sequence

import torch

from .ops import library

log = logging.getLogger("chipmunk_compile")

PAGE = 4096  # bytes; what the host memory of a copy is locked by

Tensors = Sequence[torch.Tensor]


class Plain:
    """Copies on a CPU: done when they return.

    `fetched` knows what a slot holds, by address: the home that it is equal to. A site fetched ahead of its program is
    then not fetched again.
    """

    def __init__(self) -> None:
        self.fetched: dict[int, int] = {}

    def forget(self, cache: torch.Tensor) -> None:
        """The slot's content changes."""
        self.fetched.pop(cache.data_ptr(), None)

    def fetch(self, caches: Tensors, home: Tensors) -> None:
        _copy(caches, home)

    def store(self, caches: Tensors, home: Tensors) -> None:
        _copy(home, caches)

    def arrive(self, caches: Tensors) -> None:
        pass


class Lane(Plain):
    """Copies between one CUDA device and the host, beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._stream = torch.cuda.Stream(device)
        # By the address of a cache: after the last copy from or into it. Addresses are few: a ring's, used again.
        self._copied: dict[int, torch.cuda.Event] = {}

    def fetch(self, caches: Tensors, home: Tensors) -> None:
        self._copy(caches, home, caches)

    def store(self, caches: Tensors, home: Tensors) -> None:
        for tensor in home:
            pin(tensor, caches[0].device)
        self._copy(home, caches, caches)

    def arrive(self, caches: Tensors) -> None:
        event = self._copied.get(caches[0].data_ptr())
        if event is not None:
            torch.cuda.current_stream(caches[0].device).wait_event(event)

    def _copy(self, targets: Tensors, sources: Tensors, caches: Tensors) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(caches[0].device))
        with torch.cuda.stream(self._stream):
            _copy(targets, sources)
            event = self._copied.setdefault(caches[0].data_ptr(), torch.cuda.Event())
            event.record(self._stream)
        for cache in caches:  # freed while it is copied, its memory must not be given away
            cache.record_stream(self._stream)


_plain = Plain()
_lock = threading.Lock()
_lanes: dict[int, Lane] = {}  # by the index of the device


def lane(device: torch.device) -> Plain | Lane:
    """What copies between `device` and the host."""
    if device.type != "cuda":
        return _plain
    with _lock:
        if device.index not in _lanes:
            _lanes[device.index] = Lane(device)
        return _lanes[device.index]


def fetch(caches: Tensors, home: Tensors, order: torch.Tensor, after: torch.Tensor | None) -> None:
    """Begins to fill `caches`, on the device, from their `home`."""
    begin(caches, home)


def begin(caches: Tensors, home: Tensors) -> None:
    """As `fetch`, for a caller that needs no order; nothing is done where the caches were fetched already."""
    copies, slot, source = lane(caches[0].device), caches[0].data_ptr(), home[0].data_ptr()
    if source not in (slot, copies.fetched.get(slot)):
        copies.forget(caches[0])
        copies.fetch(caches, home)
        copies.fetched[slot] = source


def arrive(caches: Tensors, order: torch.Tensor, after: torch.Tensor | None, written: bool) -> None:
    """What is launched from here on reads what was fetched into `caches`, and may write what was stored from them.

    written: by what follows.
    """
    copies = lane(caches[0].device)
    copies.arrive(caches)
    if written:
        copies.forget(caches[0])


def store(caches: Tensors, home: Tensors, order: torch.Tensor) -> None:
    """Begins to write `caches` to their `home`."""
    slot, target = caches[0].data_ptr(), home[0].data_ptr()
    if slot != target:
        copies = lane(caches[0].device)
        copies.store(caches, home)
        copies.fetched[slot] = target


def keep(cache: torch.Tensor, value: torch.Tensor) -> None:
    """cache.copy_(value)."""
    cache.copy_(value)


def _copy(targets: Tensors, sources: Tensors) -> None:
    """As the bytes lie: padding between rows comes along, so that each tensor is one copy."""
    for target, source in zip(targets, sources):
        _flat(target).copy_(_flat(source), non_blocking=True)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((extent,), (1,))


# --- host memory that a device copies from and to by itself ---


# By address: whether it could be locked. torch's own pinned memory comes in powers of two, 1.07 GB for 0.73 GB.
_tried: dict[int, bool] = {}


def pin(home: torch.Tensor, device: torch.device) -> None:
    """Locks the pages of `home` into memory, unless that was done: when it is first stored, a tensor at a time.

    Meanwhile the device computes the layers before. `home` begins on a page, and has its pages for itself. Memory that
    cannot be locked is copied all the same, but the host waits for each copy.
    """
    address = home.data_ptr()
    if address in _tried:
        return
    nbytes = -(-_flat(home).nbytes // PAGE) * PAGE
    error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    _tried[address] = not int(error)
    if int(error):
        _forget_error(device)
        _say_unpinned(str(error))


def unpin(address: int) -> None:
    """Before the memory at `address` is freed: what `pin` did. No copy from or to it may be under way."""
    if _tried.pop(address, False):
        torch.cuda.cudart().cudaHostUnregister(address)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a call that failed, and the next kernel launch raises it: this one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


@functools.cache
def _say_unpinned(error: str) -> None:
    log.warning(
        "host memory for state could not be locked (%s), so each copy makes the host wait: raise the option "
        "memory_budget, or leave more host memory free",
        error,
    )


# --- definitions ---

# Caches come first: a compiler takes an op to run on the device of its first tensor.
_SCHEMAS = (
    "fetch(Tensor(a!)[] caches, Tensor[] home, Tensor(b!) order, Tensor? after) -> ()",
    "arrive(Tensor(a!)[] caches, Tensor(b!) order, Tensor? after, bool written) -> ()",
    "store(Tensor[] caches, Tensor(a!)[] home, Tensor(b!) order) -> ()",
    "keep(Tensor(a!) cache, Tensor value) -> ()",
)


def _nothing(*args) -> None:
    pass


for _schema in _SCHEMAS:
    _name = library.define(_schema, tags=(torch.Tag.flexible_layout,))
    library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"chipmunk::{_name}", _nothing, lib=library)
