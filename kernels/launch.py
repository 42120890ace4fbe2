"""What every call of a printed kernel needs: whether it can run, the launch itself, tensors as kernels take them."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

log = logging.getLogger("chipmunk_compile")

_refused: set[str] = set()  # kernels that the compiler or the GPU did not take
_compiled: dict[tuple, tuple] = {}  # (kernel, what follows its arguments), by all that they are compiled for
_local = threading.local()  # of the thread that rehearses: others launch


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether printed kernels take tensors like this one."""
    return why_no_triton(tensor.dtype, tensor.device) is None


@functools.cache
def why_no_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why printed kernels do not take tensors like these; None if they do.

    They take 16 and 32-bit floats on an NVIDIA GPU of compute capability 8.0 or up. On a CPU they run in Triton's
    interpreter (TRITON_INTERPRET=1), for tests.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype}; the kernels take bfloat16, float16 and float32"
    if not _has_triton():
        return "want of Triton: pip install triton"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "an AMD GPU: the kernels are written for NVIDIA's"
    if capability(device) < (8, 0):
        return f"a GPU of compute capability {'.'.join(map(str, capability(device)))}; the kernels need 8.0"
    return None


def runs_hopper(tensor: torch.Tensor) -> bool:
    """Whether warp-specialised kernels can be compiled and run where the tensor is."""
    return tensor.is_cuda and torch.version.hip is None and capability(tensor.device)[0] == 9 and _has_gluon()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def rehearsal() -> Iterator[list[Path]]:
    """Inside, nothing is launched, so tensors may be fake; the list holds the sources of what would have been."""
    before, _local.rehearsed = _rehearsed(), []
    try:
        yield _local.rehearsed
    finally:
        _local.rehearsed = before


def _rehearsed() -> list[Path] | None:
    return getattr(_local, "rehearsed", None)


def launch(function, grid: tuple[int, ...], *args, **config) -> None:
    """function[grid](*args, **config), on the device of the tensors. The config holds tiles, warps and stages."""
    rehearsed = _rehearsed()
    if rehearsed is not None:
        rehearsed.append(Path(function.fn.__code__.co_filename))
        return
    device = next(a for a in args if isinstance(a, torch.Tensor)).device
    if device.type != "cuda":
        function[grid](*args, **{k: v for k, v in config.items() if k not in ("num_warps", "num_stages")})
    elif device.index == torch.cuda.current_device():
        _launch_compiled(function, device.index, grid, args, config)
    else:
        with torch.cuda.device(device):
            _launch_compiled(function, device.index, grid, args, config)


def _launch_compiled(function, device: int, grid: tuple[int, ...], args: tuple, config: dict) -> None:
    """As function[grid](*args, **config), which looks at every argument anew to find what was compiled for it: for 40
    arguments that costs the host as much as ten launches. All that it may look at is in the key."""
    key = (function, device, tuple(config.values()), *map(_kind, args))
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = function[grid](*args, **config)
        if isinstance(compiled, _compiled_kernel()):
            constants = tuple(config[name] for name in function.arg_names[len(args) :])
            _compiled[key] = compiled, constants
        return
    kernel, constants = compiled
    kernel[(*grid, 1, 1)[:3]](*args, *constants)


def _kind(argument):
    """What a kernel may be compiled for: all of a number; of a tensor its type, and whether 16 divides its address."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument


@functools.cache
def _compiled_kernel() -> type:
    from triton.compiler import CompiledKernel

    return CompiledKernel


def attempt(function, grid: tuple[int, ...], *args, **config) -> bool:
    """launch(), or False where this Triton or this GPU does not take the kernel: said once, not tried again."""
    name = function.__name__
    if name in _refused:
        return False
    try:
        launch(function, grid, *args, **config)
    except Exception as error:
        if not is_refusal(error):
            raise
        _refused.add(name)
        log.warning("%s was not compiled; a portable kernel runs instead: %s", name, str(error)[:300])
        return False
    return True


def is_refusal(error: Exception) -> bool:
    """Whether nothing ran yet: the compiler failed, or the kernel asks for more than a multiprocessor has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    kinds = (CompilationError, errors.OutOfResources, getattr(errors, "PTXASError", CompilationError))
    return isinstance(error, kinds) or "PassManager" in str(error)


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
    fake = _rehearsed() is not None
    return all((fake or t.data_ptr() % 16 == 0) and not any(s % 16 for s in t.stride()[:-1]) for t in tensors)


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
