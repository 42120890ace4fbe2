"""Tiles of the printed kernels, by device and class of shape.

Where they come from, first found first taken:

    override(...)            tests and the tuner
    tuning.json              measured on GPUs we had, by compute capability; `python -m chipmunk_compile.kernels.tuner`
    tuning-<device>.json     in the cache folder: measured here, once, on a GPU that tuning.json does not know
    the defaults below       tiles that fit every GPU from capability 8.0 on

Tiles are keyword arguments of a launch: block sizes, num_warps, num_stages. A kernel that no table names has one
choice, below. Set CHIPMUNK_AUTOTUNE=0 to stay with the defaults on an unknown GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .codegen import cache_folder
from .launch import capability

COMMITTED = Path(__file__).with_name("tuning.json")

_overrides: dict[str, dict] = {}


# --- the tuned kernels: one function each, from a shape to its class and default ---


def attention_delta(dtype: torch.dtype, head_dim: int, chunk: int, device: torch.device) -> dict:
    """BM queries by BN columns; BT columns at the ragged end of a list."""
    bits, wide = dtype.itemsize * 8, _power(head_dim)
    key = f"attention_delta {bits}-bit head_dim {wide} chunk {_class(chunk)}"
    block = min(64, _class(chunk))
    if bits == 32:
        small = wide > 128
        default = _tiles(4, 1, BM=min(block, 32 if small else 64), BN=16 if small else 32, BT=16 if small else 32)
    else:
        default = _tiles(4, 2, BM=block, BN=32 if wide > 128 else 64, BT=32)
    return _find(key, default, device)


def attention_scores(dtype: torch.dtype, head_dim: int, samples: int, device: torch.device) -> dict:
    """BM sampled queries by BN keys; TILES times BN keys to a program."""
    bits, wide = dtype.itemsize * 8, _power(head_dim)
    key = f"attention_scores {bits}-bit head_dim {wide} samples {samples}"
    tight = bits == 32 or wide > 128 or samples > 16
    default = _tiles(4, 1 if tight else 3, BM=max(64, 4 * samples), BN=32 if tight else 64, TILES=32)
    return _find(key, default, device)


def mlp_up(dtype: torch.dtype, chunk: int, inputs: int, device: torch.device) -> dict:
    """BF neurons by BM tokens, BK inputs at a time, GROUP chunks side by side; finished in PIECES."""
    bits = dtype.itemsize * 8
    key = f"mlp_up {bits}-bit chunk {_class(chunk)} inputs {inputs}"
    block = _block(chunk)
    if bits == 32 or inputs > 2:
        default = _tiles(4, 2, BM=min(block, 64), BF=32 if inputs > 1 else 64, BK=32, GROUP=32, PIECES=1)
    else:
        default = _tiles(8, 3, BM=block, BF=128 // inputs, BK=64, GROUP=32, PIECES=2 if block == 128 else 1)
    return _find(key, default, device)


def mlp_down(dtype: torch.dtype, chunk: int, device: torch.device) -> dict:
    """BM tokens by BO outputs, BK columns at a time, GROUP chunks side by side; finished in PIECES.

    BM divides the tokens that the change is packed for.
    """
    bits = dtype.itemsize * 8
    key = f"mlp_down {bits}-bit chunk {_class(chunk)}"
    block = _block(chunk)
    if bits == 32:
        default = _tiles(4, 2, BM=min(block, 64), BO=64, BK=32, GROUP=32, PIECES=1)
    else:
        default = _tiles(4, 3, BM=block, BO=128, BK=32, GROUP=32, PIECES=4 if block == 128 else 1)
    return _find(key, default, device)


# --- the warp-specialised kernels: of attention, what is printed is tuned too ---

# Of a choice these are printed; the others are passed at launch.
FACTS = {"shared", "turns", "producer_warps", "consumer_registers", "producer_registers"}
FEW_COLUMNS = 1024  # lists up to this long make tiles so short that their ends weigh
FEW_CHUNKS = 64


def attention_delta_hopper(head_dim: int, chunk: int, kept: int, device: torch.device) -> tuple[dict, dict]:
    """What to print, and the tiles: BN columns to a buffer, K_STAGES and V_STAGES buffers to a ring."""
    key = f"attention_delta_hopper head_dim {head_dim} chunk {_class(chunk)} columns {_few(kept, FEW_COLUMNS)}"
    if 64 < chunk <= 128:
        warps = dict(producer_warps=4, consumer_registers=200, producer_registers=56)
        return _choose(key, dict(shared=True, turns=True, **warps, **_rings(128, 3, 3)), device)
    warps = dict(producer_warps=2, consumer_registers=192, producer_registers=64)
    return _choose(key, dict(shared=False, turns=False, **warps, **_rings(64, 3, 3)), device)


def mlp_hopper(inputs: int, rows: int, device: torch.device) -> dict:
    """UP_GROUP and DOWN_GROUP chunks side by side, STAGES buffers in the ring. rows: chunks in all."""
    key = f"mlp_hopper inputs {inputs} chunks {_few(rows, FEW_CHUNKS)}"
    return _find(key, dict(UP_GROUP=16, DOWN_GROUP=16, STAGES=4, num_warps=4), device)


def _choose(key: str, default: dict, device: torch.device) -> tuple[dict, dict]:
    return split(_find(key, default, device))


def split(choice: Mapping[str, int]) -> tuple[dict, dict]:
    """What to print, and the tiles."""
    return {k: v for k, v in choice.items() if k in FACTS}, {k: v for k, v in choice.items() if k not in FACTS}


def _rings(columns: int, k_stages: int, v_stages: int) -> dict:
    return {"BN": columns, "K_STAGES": k_stages, "V_STAGES": v_stages, "num_warps": 4}


def _few(count: int, most: int) -> str:
    return "few" if count <= most else "many"


# --- kernels with one choice ---


def attention_lse(dtype: torch.dtype, head_dim: int) -> dict:
    """BM sampled queries by BN keys."""
    tight = dtype == torch.float32 or head_dim > 128
    return _tiles(4, 1 if tight else 2, BM=32 if tight else 64, BN=32 if tight else 64)


def attention_select() -> dict:
    """WORDS times four levels at once while searching, BLOCK while writing."""
    return _tiles(4, 2, WORDS=1024, BLOCK=2048)


def mlp_scores() -> dict:
    """BF neurons to a program."""
    return _tiles(4, 2, BF=512)


def mlp_select(width: int) -> dict:
    """One program for `width` neurons."""
    return _tiles(16 if width >= 8192 else 4, 2)


def mlp_samples() -> dict:
    """BF chosen neurons to a program."""
    return _tiles(4, 2, BF=1024)


def mlp_weights() -> dict:
    """BF neurons to a program, BO of their weights at a time."""
    return _tiles(4, 3, BO=128, BF=32)


# --- finding ---


@contextlib.contextmanager
def override(tiles: Mapping[str, dict]) -> Iterator[None]:
    """Inside the block, these classes of shape take these tiles."""
    before = dict(_overrides)
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def remember(device: torch.device, measured: Mapping[str, dict]) -> Path:
    """Adds tiles to those measured on this machine; they are used from now on."""
    path = _own_table(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**_read(path), **measured}, indent=1, sort_keys=True))
    os.replace(temporary, path)
    forget()
    return path


def forget() -> None:
    """The tables are read again."""
    _table.cache_clear(), _is_unknown.cache_clear()


def commit(capability: tuple[int, int], measured: Mapping[str, dict]) -> None:
    """Adds tiles to the committed table, a class to a line."""
    table = _read(COMMITTED)
    table[_name(capability)] = {**table.get(_name(capability), {}), **measured}
    blocks = []
    for name, tiles in sorted(table.items()):
        lines = [f'  "{key}": {json.dumps(choice, sort_keys=True)}' for key, choice in sorted(tiles.items())]
        blocks.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    COMMITTED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    forget()


def _find(key: str, default: dict, device: torch.device) -> dict:
    if key in _overrides:
        return dict(_overrides[key])
    if device.type != "cuda":
        return default
    table = _table(device)
    if key not in table and _may_measure(key, device):
        from . import tuner

        remember(device, tuner.measure(key, default, device))
        table = _table(device)
    return dict(table.get(key, default))


def _may_measure(key: str, device: torch.device) -> bool:
    """Only on a GPU that the committed table does not know, and never where a clock would stall or break something."""
    if (
        "16-bit" not in key
        or os.environ.get("CHIPMUNK_AUTOTUNE", "1") == "0"
        or torch.cuda.is_current_stream_capturing()
    ):
        return False
    return _is_unknown(device)


@functools.cache
def _is_unknown(device: torch.device) -> bool:
    return _name(capability(device)) not in _read(COMMITTED)


@functools.cache
def _table(device: torch.device) -> dict[str, dict]:
    return _read(_own_table(device)) if _is_unknown(device) else _read(COMMITTED)[_name(capability(device))]


def _own_table(device: torch.device) -> Path:
    name = "-".join(torch.cuda.get_device_name(device).lower().split())
    return cache_folder() / f"tuning-{name}.json"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _name(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _tiles(num_warps: int, num_stages: int, **blocks: int) -> dict:
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def fits_128(chunk: int) -> bool:
    """Whether blocks of 128 tokens waste less than half a block: 65 to 128, 193 to 256, ..."""
    return -chunk % 128 < 64


def _block(chunk: int) -> int:
    """Tokens of a tile: all of a chunk of up to 128; 64 of one of 192."""
    return 128 if fits_128(chunk) else min(64, _class(chunk))


def _class(chunk: int) -> int:
    """The chunk whose tiles serve: patches of a grid make longest chunks of 60 or 126 tokens, say."""
    return max(16, _power(chunk)) if chunk <= 128 else -(-chunk // 64) * 64


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
