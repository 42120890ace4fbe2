"""From a template and the facts of a site to a Triton kernel, printed to disk.

    kernel("attention_delta", head_dim=72, mask="bool", ...)  ->  the compiled-on-first-launch function

Templates are Jinja files under templates/ whose directives stand in comments, `#% if mask %#`, so that they read as
the Python they print. A printed kernel has no dead branch: what a site lacks (a mask, a bias, a second up projection)
is not in it. It lies in the user's cache folder under a name that ends in the hash of its text, needs nothing but
triton to be imported, and says in its first lines what it was printed from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"

_printed: dict[Path, None] = {}  # every source this process has loaded, in order


def cache_folder() -> Path:
    """Where printed kernels lie: $CHIPMUNK_CACHE_DIR, else chipmunk_compile in the user's cache folder."""
    if chosen := os.environ.get("CHIPMUNK_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chipmunk_compile"


def render(template: str, **facts: Any) -> str:
    """The source of one kernel. facts: all that the template names; a missing one raises jinja2.UndefinedError."""
    spelled = ", ".join(f"{name}={value!r}" for name, value in sorted(facts.items()))
    body = _environment().get_template(f"{template}.py.jinja").render(**facts)
    return f"# Printed by chipmunk_compile from templates/{template}.py.jinja\n# with {spelled}\n\n{body}"


@functools.cache
def kernel(template: str, **facts: Any) -> Any:
    """The jitted function that `template` defines under its own name. Facts are hashable values."""
    return getattr(_load(template, render(template, **facts)), template)


def printed() -> tuple[Path, ...]:
    """The sources of all kernels that this process has loaded, in the order of their first use."""
    return tuple(_printed)


def parts(head_dim: int) -> tuple[tuple[int, int], ...]:
    """head_dim as one or two (start, width) pieces, each width a power of two, 16 or more.

    Tiles need powers of two, and padding 80 to 128 would waste 37%: 80 is 64 + 16, 96 is 64 + 32, 72 is 64 + 16.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    first = max(1 << (head_dim.bit_length() - 1), 16)
    if head_dim <= first:
        return ((0, first),)
    second = max(1 << (head_dim - first - 1).bit_length(), 16)
    return ((0, first), (first, second)) if second < first else ((0, 2 * first),)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        block_start_string="#%",
        block_end_string="%#",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["each"] = _each
    return environment


def _each(stem: str, parts: tuple[tuple[int, int], ...]) -> str:
    """One name for each piece of the head dimension: `q0, q64`."""
    return ", ".join(f"{stem}{start}" for start, _ in parts)


def _load(name: str, source: str) -> ModuleType:
    """Imports `source` from the cache folder, writing it there first if it is not."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = _write(f"{name}_{digest}.py", source)
    module_name = f"chipmunk_compile_printed.{path.stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
        _printed[path] = None
    return sys.modules[module_name]


def _write(file: str, source: str) -> Path:
    """Writes atomically, so that processes which print the same kernel at once never read half of it."""
    try:
        return _write_into(cache_folder(), file, source)
    except OSError:  # a home that cannot be written is no reason to stay slow
        return _write_into(_private_folder(), file, source)


def _write_into(folder: Path, file: str, source: str) -> Path:
    path = folder / file
    if path.is_file() and path.read_text() == source:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w") as stream:
        stream.write(source)
    os.replace(temporary, path)
    return path


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="chipmunk_compile_"))
