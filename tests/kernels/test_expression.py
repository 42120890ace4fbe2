"""Every operation and every activation of real models, in each language, against float64."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from chipmunk_compile.kernels.expression import (
    OPERATIONS,
    evaluate,
    is_linear,
    lines_cpp,
    lines_triton,
    operands,
    parse,
    print_cpp,
    print_triton,
)

# text -> the same in float64, spelled without the functions that `evaluate` calls where there is a choice.
OPERATION_CASES = {
    "add(h0, h1)": lambda a, b: a + b,
    "sub(h0, h1)": lambda a, b: a - b,
    "sub(1.5, h0)": lambda a, b: 1.5 - a,
    "sub(h0, -2.5)": lambda a, b: a + 2.5,
    "mul(h0, h1)": lambda a, b: a * b,
    "mul(-1e-06, h0)": lambda a, b: a * -1e-6,
    "div(h0, 3)": lambda a, b: a / 3,
    "div(1.0, add(1.0, square(h0)))": lambda a, b: 1 / (1 + a * a),
    "neg(h0)": lambda a, b: -a,
    "abs(h0)": lambda a, b: a.abs(),
    "exp(mul(0.5, h0))": lambda a, b: math.e ** (a / 2),
    "log(add(1.0, abs(h0)))": lambda a, b: torch.log1p(a.abs()),
    "sqrt(abs(h0))": lambda a, b: a.abs() ** 0.5,
    "square(h0)": lambda a, b: a**2,
    "maximum(h0, h1)": lambda a, b: torch.where(a > b, a, b),
    "maximum(-0.5, h0)": lambda a, b: a.clamp(min=-0.5),
    "minimum(h0, h1)": lambda a, b: torch.where(a < b, a, b),
    "minimum(h0, 0.5)": lambda a, b: a.clamp(max=0.5),
    "where(gt(h0, 0.25), h0, h1)": lambda a, b: torch.where(a > 0.25, a, b),
    "where(ge(h0, h1), 1.0, -0.1)": lambda a, b: 1.1 * (a >= b).double() - 0.1,
    "where(lt(h0, h1), h0, 2.0)": lambda a, b: torch.where(a < b, a, torch.full_like(a, 2.0)),
    "where(le(h1, 0.0), 3.0, h0)": lambda a, b: torch.where(b <= 0, torch.full_like(a, 3.0), a),
    "relu(h0)": lambda a, b: a.clamp(min=0),
    "sigmoid(h0)": lambda a, b: 1 / (1 + torch.exp(-a)),
    "silu(h0)": lambda a, b: a / (1 + torch.exp(-a)),
    "tanh(h0)": lambda a, b: torch.sinh(a) / torch.cosh(a),
    "erf(h0)": lambda a, b: 1 - torch.erfc(a),
    "gelu(h0)": lambda a, b: a * torch.erfc(-a / math.sqrt(2)) / 2,
    "gelu_tanh(h0)": lambda a, b: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "softplus(h0)": lambda a, b: torch.logaddexp(a, torch.zeros_like(a)),
}
ACTIVATION_CASES = {
    "h0": lambda a, b: a,
    "mul(silu(h0), h1)": lambda a, b: a * torch.sigmoid(a) * b,  # SwiGLU
    "mul(h0, gelu(h1))": lambda a, b: a * 0.5 * b * (1 + torch.erf(b / math.sqrt(2))),  # GEGLU
    "square(relu(h0))": lambda a, b: a.clamp(min=0) ** 2,
    "mul(h0, sigmoid(mul(1.702, h0)))": lambda a, b: a * torch.sigmoid(1.702 * a),
    "mul(h0, tanh(softplus(h0)))": lambda a, b: a * torch.tanh(torch.log1p(torch.exp(a))),  # mish
    "add(maximum(h0, 0.0), mul(0.01, minimum(h0, 0.0)))": lambda a, b: torch.where(a > 0, a, a * 0.01),
    "mul(h0, div(minimum(maximum(add(h0, 3.0), 0.0), 6.0), 6.0))": lambda a, b: a * (a + 3).clamp(0, 6) / 6,
    "add(maximum(h0, 0.0), sub(exp(minimum(h0, 0.0)), 1.0))": lambda a, b: torch.where(
        a > 0, a, torch.expm1(a.clamp(max=0))
    ),
    "mul(mul(0.5, h0), add(1.0, tanh(mul(0.7978845608, add(h0, mul(0.044715, mul(h0, square(h0))))))))": (
        lambda a, b: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    ),
}
CASES = {**OPERATION_CASES, **ACTIVATION_CASES}


def _inputs(count: int = 4099) -> list[torch.Tensor]:
    """Fresh float32 inputs: normal ones, large ones, and the edges of every branch."""
    normal = torch.randn(2, count) * torch.tensor([[1.0], [2.0]])
    wide = torch.empty(2, 501).uniform_(-60, 60)
    edges = torch.tensor([0.0, -0.0, 0.25, 0.5, -0.5, 6.0, -3.0, 1e-6, -1e-6]).expand(2, 9)
    return list(torch.cat([normal, wide, edges], dim=1).contiguous().unbind())


def _assert_close(result: torch.Tensor, text: str, hidden: list[torch.Tensor]) -> None:
    """Within a few roundings of float32, relative to the largest of the value, its inputs and one."""
    truth = _truth(text, hidden)
    scale = torch.stack([truth.abs(), *(h.double().abs() for h in hidden)]).amax(0).clamp(min=1)
    error = ((result.double() - truth).abs() / scale).max().item()
    assert error < 1e-6, (text, error)


def _truth(text: str, hidden: list[torch.Tensor]) -> torch.Tensor:
    return CASES[text](*(h.double() for h in hidden))


def test_the_cases_cover_every_operation():
    used = {name for text in OPERATION_CASES for name, _ in parse(text).steps}
    assert used == set(OPERATIONS)


@pytest.mark.parametrize("text", CASES)
def test_evaluate(text):
    hidden = _inputs()
    result = evaluate(text, hidden)
    assert result.dtype == torch.float32
    _assert_close(result, text, hidden)
    exact = evaluate(text, [h.double() for h in hidden])
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, _truth(text, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evaluate_computes_half_precision_in_float32(dtype):
    hidden = [h.clamp(-30, 30).to(dtype) for h in _inputs()]
    result = evaluate("mul(silu(h0), h1)", hidden)
    assert result.dtype == torch.float32
    _assert_close(result, "mul(silu(h0), h1)", hidden)


def test_evaluate_computes_a_shared_subtree_once_and_leaves_inputs_alone(monkeypatch):
    calls = []
    tanh = OPERATIONS["tanh"]
    counted = type(tanh)(1, lambda x: calls.append(1) or torch.tanh(x), tanh.cpp, tanh.triton)
    monkeypatch.setitem(OPERATIONS, "tanh", counted)
    hidden = _inputs()
    before = [h.clone() for h in hidden]
    result = evaluate("mul(tanh(add(h0, h1)), add(tanh(add(h0, h1)), h0))", hidden)
    t = torch.tanh(hidden[0] + hidden[1])
    torch.testing.assert_close(result, t * (t + hidden[0]))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(hidden, before))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("flags", [[], ["-ffast-math", "-fno-finite-math-only", "-march=native"]])
def test_cpp(tmp_path, flags):
    bodies = []
    for i, text in enumerate(CASES):
        names = ["a[i]", "b[i]"]
        lines = "\n".join(lines_cpp(text, names, "statements[i]"))
        bodies.append(
            f'extern "C" void case_{i}(const float* a, const float* b, float* one, float* statements, long n)'
            f" {{\nfor (long i = 0; i < n; ++i) {{\none[i] = {print_cpp(text, names)};\n{lines}\n}}\n}}"
        )
    source, library = tmp_path / "cases.cpp", tmp_path / "cases.so"
    source.write_text("#include <algorithm>\n#include <cmath>\n" + "\n".join(bodies))
    compiled = tmp_path / "cases.o"
    subprocess.run(
        ["g++", "-O2", "-Wall", "-Werror", *flags, "-fPIC", "-c", str(source), "-o", str(compiled)], check=True
    )
    # A link that is told -ffast-math would set flush-to-zero for this whole process (gcc before 13).
    subprocess.run(["g++", "-shared", str(compiled), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    hidden = _inputs()
    for i, text in enumerate(CASES):
        one, statements = torch.full((2, hidden[0].numel()), math.nan)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*hidden, one, statements)]
        getattr(loaded, f"case_{i}")(*pointers, ctypes.c_long(hidden[0].numel()))
        _assert_close(one, text, hidden)
        _assert_close(statements, text, hidden)


def _triton_source() -> str:
    """One kernel that writes both forms of every case: out[2 i] and out[2 i + 1], each of n elements."""
    lines = ["import triton", "import triton.language as tl", "", ""]
    lines += ["@triton.jit", "def sigmoid(x):", "    return tl.sigmoid(x)", "", "", "@triton.jit"]
    lines.append("def cases(a, b, out, n, BLOCK: tl.constexpr):")
    body = ["at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"]
    body += ["x = tl.load(a + at, mask=at < n)", "y = tl.load(b + at, mask=at < n)"]
    for i, text in enumerate(CASES):
        body.append(f"tl.store(out + {2 * i} * n + at, {print_triton(text, ['x', 'y'])}, mask=at < n)")
        body += lines_triton(text, ["x", "y"], "act")
        body.append(f"tl.store(out + {2 * i + 1} * n + at, act, mask=at < n)")
    return "\n".join(lines + [textwrap.indent(line, "    ") for line in body]) + "\n"


def test_triton_interpreted(tmp_path):
    """Under TRITON_INTERPRET=1, in a process of its own, since the switch is read at import."""
    pytest.importorskip("triton")
    (tmp_path / "generated.py").write_text(_triton_source())
    (tmp_path / "main.py").write_text(f"""
import torch, triton, generated
a, b = torch.load("inputs.pt")
out = torch.full(({2 * len(CASES)}, a.numel()), float("nan"))
generated.cases[(triton.cdiv(a.numel(), 1024),)](a, b, out, a.numel(), BLOCK=1024)
torch.save(out, "out.pt")
""")
    hidden = _inputs()
    torch.save(hidden, tmp_path / "inputs.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, check=True)
    out = torch.load(tmp_path / "out.pt")
    for i, text in enumerate(CASES):
        _assert_close(out[2 * i], text, hidden)
        _assert_close(out[2 * i + 1], text, hidden)


def test_triton_compiles_for_a_gpu(tmp_path, monkeypatch):
    """To machine code for Hopper, which needs no GPU."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "generated.py").write_text(_triton_source())
    spec = importlib.util.spec_from_file_location("generated", tmp_path / "generated.py")
    generated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generated)
    signature = {"a": "*fp32", "b": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=generated.cases, signature=signature, constexprs={"BLOCK": 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"].count("st.global") >= 2 * len(CASES)


def test_a_compound_operand_is_printed_once():
    text = "gelu_tanh(add(h0, mul(3.0, h1)))"
    assert print_cpp(text, ["a", "b"]).count("a + ") == 1
    assert lines_cpp(text, ["a", "b"], "out") == [
        "const auto region_0 = (3.0f * b);",
        "const auto region_1 = (a + region_0);",
        f"out = {OPERATIONS['gelu_tanh'].cpp.format('region_1')};",
    ]
    written = [line.split(" = ")[0] for line in lines_triton(text, ["a", "b"], "out")]
    assert written == ["region_0", "region_1", "out"]


def test_statements_stay_few_where_the_text_doubles():
    text = "h0"
    for _ in range(8):
        text = f"mul({text}, {text})"
    assert len(parse(text).steps) == len(lines_cpp(text, ["x"], "y")) == 8
    result = evaluate(text, [torch.tensor([1.01])])
    torch.testing.assert_close(result, torch.tensor([1.01**256]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("text, count", [("h0", 1), ("mul(silu(h0), h1)", 2), ("add(h2, 1.0)", 3), ("h1", 2)])
def test_operands(text, count):
    assert operands(text) == count


@pytest.mark.parametrize(
    "text, linear",
    [
        ("h0", True),
        ("add(mul(0.5, h0), neg(sub(h1, 2.0)))", True),
        ("div(h0, 2.0)", True),
        ("div(2.0, h0)", False),
        ("mul(h0, h1)", False),
        ("mul(h0, h0)", False),
        ("relu(h0)", False),
        ("maximum(h0, 0.0)", False),
        ("add(h0, silu(h0))", False),
    ],
)
def test_is_linear(text, linear):
    assert is_linear(text) is linear


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h0 +",
        "h0 + h1",
        "-h0",
        "x",
        "h",
        "hx",
        "unknown(h0)",
        "mul(h0)",
        "silu(h0, h1)",
        "silu(x=h0)",
        "mul(h0, inf)",
        "mul(h0, 1e39)",
        "mul(h0, 1e999)",
        "mul(h0, True)",
        "mul(h0, 'a')",
        "mul(h0, None)",
        "mul(2.0, 3.0)",
        "mul(h0, exp(1.0))",
        "1.0",
        "__import__('os').system('true')",
        "silu",
        "h0\0",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)
