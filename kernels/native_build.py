"""The native kernels' libraries: compiled once by the machine's C++ compiler, kept on disk, loaded by ctypes.

The source of each library lies beside it in the cache folder ($XDG_CACHE_HOME or ~/.cache, then
chipmunk_compile/native), under a name that is the hash of all that the build depends on.
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

from .expression import lines_cpp, operands

log = logging.getLogger("chipmunk_compile")

# Compiling and linking are two commands. A link that is told -ffast-math sets flush-to-zero for the whole
# process when the library loads (gcc before 13), and one that is told -fopenmp may bring a second OpenMP
# runtime beside torch's: without it the GOMP symbols resolve to the one that torch has loaded for everyone.
# NaN and infinity must pass through as they do in the dense model, hence -fno-finite-math-only.
COMPILE = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-std=c++17", "-fPIC"]
COMPILE_X86 = ["-mprefer-vector-width=512"]
BUILD_SECONDS = 300

_folder = pathlib.Path(__file__).parent
_lock = threading.Lock()
# By region; None is attention's library. A failure is remembered too, so that it is tried and said once.
_libraries: dict[str | None, ctypes.CDLL | None] = {}


def library(region: str | None) -> ctypes.CDLL | None:
    """The library with mlp_delta for one region (a text of kernels/expression.py); for None, with attention.

    None where there is no compiler, no BLAS to call, or the build failed: said once, in the log.
    """
    if region not in _libraries:
        with _lock:
            if region not in _libraries:
                _libraries[region] = _load(region)
    return _libraries[region]


@functools.cache
def sgemm() -> int | None:
    """The address of the Fortran SGEMM that torch itself calls, or None."""
    path = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if sys.byteorder != "little" or not path.exists():
        return None
    torch_cpu = ctypes.CDLL(str(path))
    for name in ("sgemm_", "SGEMM"):
        if hasattr(torch_cpu, name):
            return ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value
    return None


def source(region: str | None) -> str:
    """The C++ text of one library."""
    names = ["native_common.cpp", "native_attention.cpp" if region is None else "native_mlp.cpp"]
    common, kernel = ((_folder / name).read_text() for name in names)
    return "\n".join([common, kernel] if region is None else [common, _print_region(region), kernel])


def _print_region(region: str) -> str:
    names = [f"h{j}" for j in range(operands(region))]
    lines = [f"const float {name} = h[{j}][i];" for j, name in enumerate(names)]
    lines += ["float result;", *lines_cpp(region, names, "result"), "return result;"]
    body = "\n".join(f"  {line}" for line in lines)
    return f"""// {region}
namespace {{

constexpr int kInputs = {len(names)};

namespace fast {{

inline float region(const float* const* h, int64_t i) {{
{body}
}}

}}  // namespace fast
}}  // namespace
"""


def _load(region: str | None) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None or sgemm() is None:
        missing = "no C++ compiler ($CXX or g++)" if compiler is None else "no SGEMM in libtorch_cpu.so"
        log.warning("%s: float32 ops on the CPU run in torch instead, slower than they could", missing)
        return None
    try:
        loaded = ctypes.CDLL(str(_build(compiler, region)))
        loaded.check_sgemm.argtypes = [ctypes.c_void_p]
        if loaded.check_sgemm(sgemm()):
            raise OSError("SGEMM does not multiply as expected")
        return loaded
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("the native kernels could not be built; torch runs instead, slower:\n%s", detail[-2000:])
        return None


def _build(compiler: list[str], region: str | None) -> pathlib.Path:
    """The path of a library: compiled, unless the cache holds it."""
    kind, text = "attention" if region is None else "mlp", source(region)
    content = "\0".join([text, *compiler, *_flags(), _processor(), torch.__version__])
    name = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    folder = _cache_folder()
    target = folder / f"{name}.so"
    if target.exists():
        return target
    log.info("building the native %s kernels%s (once)", kind, "" if region is None else f" for {region}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written, compiled, linked = (pathlib.Path(scratch) / f"{name}{end}" for end in (".cpp", ".o", ".so"))
        written.write_text(text)
        _run([*compiler, *_flags(), "-c", str(written), "-o", str(compiled)])
        _run([*compiler, "-shared", str(compiled), "-o", str(linked), "-lm"])
        # Renaming is atomic: another process sees no library, or a whole one.
        os.replace(written, folder / f"{name}.cpp")
        os.replace(linked, target)
    log.info("built %s in %.1f s", target, time.perf_counter() - began)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)


def _compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if command and shutil.which(command[0]) else None


def _flags() -> list[str]:
    return COMPILE + (COMPILE_X86 if platform.machine() in ("x86_64", "AMD64") else [])


@functools.cache
def _processor() -> str:
    """What -march=native reads."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    except OSError:
        return platform.processor()


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(root) / "chipmunk_compile" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        log.info("no cache folder for native kernels (%s): they are built for this process alone", error)
    return pathlib.Path(tempfile.mkdtemp(prefix="chipmunk_compile-"))
