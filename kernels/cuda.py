"""The ops on a GPU, by printed Triton kernels; what these cannot take runs as its meaning, and the log says why, once.

    attention_delta     kernels/cuda_attention.py
    attention_refresh   kernels/cuda_attention.py
    mlp_delta           kernels/cuda_mlp.py

Functions take and return what their namesakes in kernels/reference.py do. Nothing is read back to the host, so all of
it can be captured into a CUDA graph. Importing this module imports neither Triton nor the kernels.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch

from . import reference
from .launch import why_no_triton

log = logging.getLogger("chipmunk_compile")

MOST_HEAD_DIM = 256
MOST_HIDDEN = 65536  # what one program can select from

# Lists of columns are planned in multiples of this: kernels read them 16 bytes and multiply them 64 at a time.
COLUMN_STEP = 64


def attention_delta(query, *rest) -> torch.Tensor:
    """As reference.attention_delta."""
    return _attention(query).attention_delta(query, *rest)


def attention_refresh(query, *rest) -> torch.Tensor:
    """As reference.attention_refresh, with columns chosen by levels of attention mass (cuda_attention says which)."""
    return _attention(query).attention_refresh(query, *rest)


def mlp_delta(x, *rest) -> torch.Tensor:
    """As reference.mlp_delta, with neurons chosen by scores that count as equal within 0.8%."""
    down_t = rest[2]
    hidden = down_t.shape[0]
    if hidden > MOST_HIDDEN:
        return _meaning(f"an MLP of {hidden} hidden neurons; the kernels take {MOST_HIDDEN}").mlp_delta(x, *rest)
    return _kernels("cuda_mlp", x).mlp_delta(x, *rest)


def mlp_weights(weight, *rest) -> None:
    """As reference.mlp_weights."""
    _kernels("cuda_mlp", weight).mlp_weights(weight, *rest)


def _attention(query: torch.Tensor) -> ModuleType:
    if query.shape[3] > MOST_HEAD_DIM:
        return _meaning(f"attention of head dimension {query.shape[3]}; the kernels take {MOST_HEAD_DIM}")
    return _kernels("cuda_attention", query)


def _kernels(name: str, tensor: torch.Tensor) -> ModuleType:
    why = why_no_triton(tensor.dtype, tensor.device)
    return _module(name) if why is None else _meaning(why)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


@functools.cache
def _meaning(why: str) -> ModuleType:
    log.warning("sparse steps run in plain torch, slower than dense ones, for %s", why)
    return reference
