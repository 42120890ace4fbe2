"""The ops on a CPU: which of three equal modules runs.

    native      float32, where the C++ kernels can be built: fastest
    blocked     float32, bfloat16 and float16, in torch
    reference   float64, for tests

Each has the functions of kernels/reference.py under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch

from . import blocked, native, native_build, reference

PATHS = {"native": native, "blocked": blocked, "reference": reference}

_forced: str | None = None


@contextlib.contextmanager
def force(path: str) -> Iterator[None]:
    """All CPU ops take `path`, a key of PATHS, inside the block. For tests and benchmarks.

    Raises ValueError for another name; an op inside raises RuntimeError if the native path cannot take it.
    """
    global _forced
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}: choose one of {', '.join(PATHS)}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def prepare(region: str | None = None) -> str:
    """Builds what float32 ops will need: the MLP's kernel for one region, or, for None, attention's.

    For the time of planning, so that no compiler runs inside a denoising step; an op builds what is missing.
    Returns the path that the ops will take: "native", or "blocked" if it was not built (the log says why).
    """
    return "native" if native_build.library(region) else "blocked"


def attention_refresh(query, *rest) -> torch.Tensor:
    """As reference.attention_refresh."""
    return _path(query.dtype, None).attention_refresh(query, *rest)


def attention_delta(query, *rest) -> torch.Tensor:
    """As reference.attention_delta."""
    return _path(query.dtype, None).attention_delta(query, *rest)


mlp_weights = reference.mlp_weights


def mlp_delta(x, *rest) -> torch.Tensor:
    """As reference.mlp_delta."""
    region = rest[-3]
    return _path(x.dtype, region).mlp_delta(x, *rest)


def _path(dtype: torch.dtype, region: str | None) -> ModuleType:
    if _forced in ("blocked", "reference"):
        return PATHS[_forced]
    if dtype == torch.float32 and native_build.library(region):
        return native
    if _forced == "native":
        raise RuntimeError(f"native was forced: it takes float32, not {dtype}, or was not built (see log)")
    return reference if dtype == torch.float64 else blocked
