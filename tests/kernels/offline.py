"""Compiles Hopper kernels to machine code, without a GPU: python -m tests.kernels.offline out.json [NAME]

In a process of its own: what Triton is told through the environment is read when it is imported. Written for each
form of each kernel (of the one named NAME, its last): registers a thread, bytes of stack (what is spilled lies there)
and bytes of shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from chipmunk_compile.kernels import codegen, cuda_mlp, tuner, tuning

CPU = torch.device("cpu")
TARGET = GPUTarget("cuda", 90, 32)
INT32 = ("chunk_starts", "columns", "counts", "redo", "ready")
FLOATS = {"out_cache": "*fp32", "scale": "fp32"}
REGIONS = {1: "gelu_tanh(h0)", 2: "mul(silu(h0), h1)"}


def forms() -> Iterator[tuple[str, dict, dict]]:
    """(template, what is printed, tiles) of every form that the tuner may choose."""
    for key, default in tuner.classes(CPU):
        words = key.split(" ")
        if not words[0].endswith("_hopper") or words[-1] == "many":
            continue
        for choice in tuner.candidates(words, default):
            facts, tiles = tuning.split(choice)
            if words[0] == "attention_delta_hopper":
                yield words[0], {**facts, "head_dim": 128, "wide": False, "sign": "+"}, tiles
            else:
                inputs = int(words[2])
                region = cuda_mlp._facts(REGIONS[inputs], inputs, 2 - inputs)
                yield words[0], {**region, "even": True, "wide": False}, tiles


def compile_one(template: str, facts: dict, tiles: dict) -> dict[str, int]:
    function = codegen.kernel(template, **facts)
    constants = {name: value for name, value in tiles.items() if name not in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, (name, parameter) in enumerate(zip(function.arg_names, function.params)):
        if name in constants:
            signature[name] = "constexpr"
        elif re.fullmatch(r"query|key|value|base|out|x|weight\d|bias\d|act_cache|change|down_t", name):
            signature[name] = "*bf16"
        else:
            signature[name] = FLOATS.get(name, "*i32" if name in INT32 else "i32")
        if signature[name][0] == "*" or signature[name] == "i32" and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(
        source,
        target=TARGET,
        options={"num_warps": tiles["num_warps"], "launch_cooperative_grid": template == "mlp_hopper"},
    )
    return {"shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    """As cuobjdump, which comes with Triton, reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
    return {"registers": int(registers), "stack": int(stack)}


def main(path: str, name: str | None = None) -> None:
    results, wanted = [], [form for form in forms() if name in (None, form[0])]
    for template, facts, tiles in wanted if name is None else wanted[-1:]:
        shown = {k: v for k, v in {**facts, **tiles}.items() if isinstance(v, (bool, int))}
        results.append({"template": template, **shown, **compile_one(template, facts, tiles)})
    Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
