"""The native kernels of a CPU: built once by the machine's C++ compiler, kept on disk, loaded with ctypes.

`attention()` and `mlp(region)` give a loaded library, or None where there is no compiler, no BLAS to call, or
the build failed (said once, in the log). The source of each library lies beside it in the cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import torch

from .expression import operands, print_cpp

log = logging.getLogger("chipmunk_compile")

# Compiling and linking are two commands. A link that is told -ffast-math sets flush-to-zero for the whole process
# when the library loads (gcc before 13), and one that is told -fopenmp may bring a second OpenMP runtime beside
# torch's: without it the GOMP symbols resolve to the runtime that torch has already loaded for everyone.
# NaN and infinity must pass through as they do in the dense model, hence -fno-finite-math-only.
COMPILE = "-O3 -march=native -ffast-math -fno-finite-math-only -fopenmp -std=c++17 -fPIC".split()
X86_COMPILE = ["-mprefer-vector-width=512"]
BUILD_SECONDS = 300

_lock = threading.Lock()
_folder = pathlib.Path(__file__).parent


def attention() -> ctypes.CDLL | None:
    """The library with attention_refresh and attention_delta."""
    return _library("attention", "")


def mlp(region: str) -> ctypes.CDLL | None:
    """The library with mlp_delta for one pointwise region (the text that kernels/expression.py defines)."""
    return _library("mlp", region)


@functools.lru_cache(maxsize=None)
def sgemm() -> int | None:
    """The address of the Fortran SGEMM that torch itself calls, or None."""
    path = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if sys.byteorder != "little" or not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    for name in ("sgemm_", "SGEMM", "mkl_blas__sgemm"):
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    return None


def source(kind: str, region: str = "") -> str:
    """The C++ text of one library. kind: "attention" or "mlp"."""
    parts = [(_folder / "native_common.cpp").read_text()]
    if kind == "mlp":
        parts.append(_print_region(region))
    parts.append((_folder / f"native_{kind}.cpp").read_text())
    return "\n".join(parts)


def _print_region(region: str) -> str:
    names = [f"h{j}" for j in range(operands(region))]
    values = "\n".join(f"  const float {name} = h[{j}][i];" for j, name in enumerate(names))
    return f"""// {region}
namespace {{

constexpr int kInputs = {len(names)};

namespace fast {{

inline float region(const float* const* h, int64_t i) {{
{values}
  return {print_cpp(region, names)};
}}

}}  // namespace fast
}}  // namespace
"""


# Plain dictionary, filled under the lock: None is remembered too, so that a failure is tried and said once.
_libraries: dict[tuple[str, str], ctypes.CDLL | None] = {}


def _library(kind: str, region: str) -> ctypes.CDLL | None:
    key = (kind, region)
    if key not in _libraries:
        with _lock:
            if key not in _libraries:
                _libraries[key] = _load(kind, region)
    return _libraries[key]


def _load(kind: str, region: str) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None or sgemm() is None:
        missing = "no C++ compiler ($CXX, g++)" if compiler is None else "no SGEMM in libtorch_cpu.so"
        log.warning("%s: sparse ops on the CPU run in torch, at about 2/3 of the native speed", missing)
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler, kind, source(kind, region))))
        library.check_sgemm.argtypes = [ctypes.c_void_p]
        if library.check_sgemm(sgemm()):
            raise OSError("SGEMM does not multiply as expected")
        return library
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("native %s kernels could not be built, the torch path is used instead: %s", kind, detail[-2000:])
        return None


def _compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if command and shutil.which(command[0]) else None


def _flags() -> list[str]:
    return COMPILE + (X86_COMPILE if platform.machine() in ("x86_64", "AMD64") else [])


@functools.lru_cache(maxsize=None)
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        return platform.processor()


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(root) / "chipmunk_compile" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return pathlib.Path(tempfile.mkdtemp(prefix="chipmunk_compile-"))


def _build(compiler: list[str], kind: str, text: str) -> pathlib.Path:
    """The path of the shared library for `text`: compiled unless the cache has it."""
    content = "\0".join([text, *compiler, *_flags(), _processor(), torch.__version__])
    name = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    folder = _cache_folder()
    target = folder / f"{name}.so"
    if target.exists():
        return target
    log.info("building the native %s kernels (once, some seconds)", kind)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written, built, linked = (pathlib.Path(scratch) / f"{name}{end}" for end in (".cpp", ".o", ".so"))
        written.write_text(text)
        _run([*compiler, *_flags(), "-c", str(written), "-o", str(built)])
        _run([*compiler, "-shared", str(built), "-o", str(linked), "-lm"])
        # Renaming is atomic: another process sees no library or a whole one.
        os.replace(written, folder / f"{name}.cpp")
        os.replace(linked, target)
    log.info("built %s in %.1f s", target, time.perf_counter() - began)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
