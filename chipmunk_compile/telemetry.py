"""Counters, and artifacts for torch's structured trace."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable

_COUNTED = ("dense", "refresh", "delta", "forecast", "generations", "streams", "misjudged", "overruled", "compiles")
_counts: Counter[str] = Counter()
_lock = threading.Lock()
# Everything that holds state; each has .state_bytes, .host_state_bytes and .release().
holders: weakref.WeakSet = weakref.WeakSet()


def count(what: str, by: int = 1) -> None:
    with _lock:
        _counts[what] += by


def counters() -> dict[str, int]:
    """What happened since `reset()`.

    Calls by program (`dense`, `refresh`, `delta`, `forecast`; one call of one captured graph counts one),
    `generations` and `streams` that began, `misjudged` (on a GPU: steps run before their timestep was read that were
    not the next of their stream, and were run again), `overruled` (on several GPUs: calls that computed more than this
    rank asked for, because another rank did), `compiles` (programs handed to Inductor), `state_bytes` held on the
    device now and `host_state_bytes` in host memory.
    """
    with _lock:
        counts = {name: _counts[name] for name in _COUNTED}
    now = list(holders)
    held = {name: sum(getattr(holder, name) for holder in now) for name in ("state_bytes", "host_state_bytes")}
    return {**counts, **held}


def reset() -> None:
    """Drops all cached state of every compiled model (programs stay compiled) and sets the counters to zero."""
    from . import host_memory

    for holder in list(holders):
        holder.release()
    host_memory.free()
    with _lock:
        _counts.clear()


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Lands in TORCH_TRACE logs as `chipmunk_<name>` (tlparse shows it); free when tracing is off."""
    import torch._logging

    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"chipmunk_{name}", "encoding": "string"},
        payload_fn=text,
    )
