"""What every call of a printed kernel needs: whether it can run, the launch itself, tensors as kernels take them."""

from __future__ import annotations

import functools

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether printed kernels take tensors like this one: 16 or 32-bit floats on an NVIDIA GPU of capability 8.0 or up.

    On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1), for tests.
    """
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not _has_triton():
        return False
    if not tensor.is_cuda:
        return True
    return torch.version.hip is None and capability(tensor.device) >= (8, 0)


def runs_hopper(tensor: torch.Tensor) -> bool:
    """Whether warp-specialised kernels can be compiled and run where the tensor is."""
    return tensor.is_cuda and torch.version.hip is None and capability(tensor.device)[0] == 9 and _has_gluon()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(function, grid: tuple[int, ...], *args, **config) -> None:
    """function[grid](*args, **config), on the device of the tensors. The config holds tiles, warps and stages."""
    device = next(a for a in args if isinstance(a, torch.Tensor)).device
    if device.type != "cuda":
        function[grid](*args, **{k: v for k, v in config.items() if k not in ("num_warps", "num_stages")})
        return
    if device.index == torch.cuda.current_device():
        function[grid](*args, **config)
        return
    with torch.cuda.device(device):
        function[grid](*args, **config)


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """What to print into a product's arguments: float32 is multiplied as such, not as tf32."""
    return ', input_precision="ieee"' if dtype == torch.float32 else ""


def copies_16_bytes(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor can be copied 16 bytes at a time, as a compiled kernel finds out.

    It knows of a stride only whether 16 divides it, so strides of 8 elements do not do.
    """
    return all(t.data_ptr() % 16 == 0 and not any(s % 16 for s in t.stride()[:-1]) for t in tensors)


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _has_gluon() -> bool:
    try:
        from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma  # noqa: F401
    except ImportError:
        return False
    return True
