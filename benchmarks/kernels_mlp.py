"""MLP rows of the kernel benchmarks, and the rows around them: ceilings of the machine, gathers of tokens, the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks.kernels_inputs import (
    BF16,
    DEVICE,
    GELU,
    SAMPLES,
    MlpShape,
    mlp_weights,
    normal,
    spread_columns,
    tables,
)
from benchmarks.kernels_report import Case
from benchmarks.kernels_timing import against, distance, host_microseconds, milliseconds, temporary_bytes
from chipmunk_compile.kernels import cuda, cuda_mlp, cuda_permute, reference
from chipmunk_compile.kernels.expression import evaluate


def mlps(*shapes: MlpShape) -> Iterator[Case]:
    """random: each chunk's neurons are drawn alone; selected: some neurons move most in all chunks, as in models."""
    for shape in shapes:
        for choice in ("random", "selected"):
            yield Case("mlp_delta", shape.name, choice, shape.chunk, functools.partial(_mlp, shape, choice))


@functools.lru_cache(maxsize=8)
def _dense(shape: MlpShape) -> tuple[str, float]:
    weights, biases, down, down_bias = mlp_weights(shape)

    def dense(x):
        if shape.region == GELU:
            act = F.gelu(F.linear(x, weights[0], biases[0]), approximate="tanh")
        else:
            act = F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])
        return F.linear(act, down, down_bias)

    compiled = torch.compile(dense, dynamic=False)
    x = normal(1, shape.tokens, shape.width)
    return "torch.compile", milliseconds(lambda: compiled(x))


def _mlp(shape: MlpShape, choice: str) -> dict:
    dense = _dense(shape)
    weights, biases, down, _ = mlp_weights(shape)
    x = normal(1, shape.tokens, shape.width)
    starts, sampled = tables([shape.tokens], shape.chunk)
    act, sample, out_cache = reference.mlp_state(
        1, shape.tokens, shape.hidden, shape.width, SAMPLES, len(starts) - 1, BF16, DEVICE
    )
    for state in (act, sample, out_cache):
        state.normal_()
    down_t, down_norm = down.t().contiguous(), down.float().norm(dim=0)
    if choice == "selected":
        down_norm *= normal(shape.hidden, dtype=torch.float32).exp()
    # A second call with the same x would find nothing moved: the first neurons for every chunk, and zeros to multiply.
    before = sample.clone()
    arguments = (x, weights, biases, down_t, down_norm, starts, sampled, act, sample, out_cache)

    def run():
        return cuda.mlp_delta(*arguments, shape.region, shape.chunk, shape.kept)

    def prepare():
        x.normal_()
        sample.copy_(before)

    error = _error(run, shape, x, weights, biases, down_t, act, out_cache)
    ms = milliseconds(run, prepare)
    flops = 2 * shape.tokens * shape.kept * shape.width * (shape.inputs + 1)
    return dict(
        sparsity=1 - shape.kept / shape.hidden, ms=ms, tflops=flops / ms / 1e9, **against(dense, ms),
        ideal_ratio=shape.hidden / shape.kept, parts_ms=_parts(arguments, shape, prepare), rel_error=error,
        peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _error(run, shape: MlpShape, x, weights, biases, down_t, act, out_cache) -> float:
    """The larger of the errors of new activations and of the output, in float64, over the first and last chunk."""
    old, old_out = act.clone(), out_cache.clone()
    out = run()
    worst = 0.0
    for rows in (slice(0, shape.chunk), slice(shape.tokens - shape.chunk, shape.tokens)):
        padded = biases or [None] * len(weights)
        hidden = [
            F.linear(x[0, rows].double(), w.double(), None if b is None else b.double())
            for w, b in zip(weights, padded)
        ]
        fresh, new, before = evaluate(shape.region, hidden).T, act[0, :, rows].double(), old[0, :, rows].double()
        moved = (new != before).any(1, keepdim=True)
        assert moved.sum() <= shape.kept
        change = old_out[0, rows].double() + (new - before).T @ down_t.double()
        worst = max(worst, distance([(new, torch.where(moved, fresh, before))]), distance([(out[0, rows], change)]))
    return worst


def _parts(arguments, shape: MlpShape, prepare) -> dict[str, float]:
    """Milliseconds of choosing neurons, and of both products at random neurons."""
    x, weights, biases, down_t, down_norm, starts, sampled, act, sample, out_cache = arguments
    chosen = spread_columns(1, len(starts) - 1, shape.hidden, shape.kept)[0, 0]
    hopper = cuda_mlp._suits_hopper(x, weights, down_t, act, out_cache, shape.chunk)
    multiply = cuda_mlp._multiply_hopper if hopper else cuda_mlp._multiply
    site = (x, weights, biases, down_t, starts, chosen, act, out_cache, shape.region, shape.chunk)
    choose = (x, weights, biases, down_norm, sampled, sample, torch.empty_like(chosen), shape.region)
    return {
        "choose": milliseconds(lambda: cuda_mlp._choose_neurons(*choose), prepare),
        "multiply": milliseconds(lambda: multiply(*site)),
    }


def ceilings() -> Iterator[Case]:
    """What the machine gives: no kernel can be faster."""
    yield Case("device copy", "4 GiB", "", 0, _copy)
    yield Case("matrix product", "8192^3", "", 0, _product)
    yield Case("gather through L2", "256-byte rows of K and V of one head, 24 x 32768", "", 0, _gather)


def _copy() -> dict:
    source = torch.randint(256, (1 << 32,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source))
    return dict(ms=ms, bytes_per_s=2 * source.nbytes / ms * 1e3)


def _product() -> dict:
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=BF16)
    ms = milliseconds(lambda: a @ b)
    return dict(ms=ms, tflops=2 * 8192**3 / ms / 1e9)


def _gather() -> dict:
    """How fast rows of K and V come from L2 when nothing is done with them: the roof of a chunk of 64."""
    tokens, kept, chunks = 32768, 2304, 1536
    key, value = (torch.randn(1, tokens, 24, 128, device=DEVICE, dtype=BF16).transpose(1, 2) for _ in range(2))
    columns = spread_columns(1, chunks, tokens, kept)
    out = torch.empty(chunks * 128, device=DEVICE)
    times = []
    for rows, warps in ((32, 2), (32, 4), (64, 4)):
        config = dict(BN=rows, num_warps=warps, num_stages=4)
        times.append(
            milliseconds(lambda: gather[(chunks,)](key, value, columns, out, kept, key.stride(2), **config))  # noqa: B023
        )
    return dict(ms=min(times), bytes_per_s=chunks * kept * 512 / min(times) * 1e3)


@triton.jit
def gather(key, value, columns, out, kept, token_stride, BN: tl.constexpr):
    """Adds up a chunk's rows of K and V, so that they have to be read."""
    n, d = tl.arange(0, BN), tl.arange(0, 128)
    total = tl.zeros((BN, 128), tl.float32)
    for at in range(0, kept, BN):
        offset = tl.load(columns + tl.program_id(0) * kept + at + n)[:, None] * token_stride + d[None, :]
        total += tl.load(key + offset, cache_modifier=".cg").to(tl.float32)
        total += tl.load(value + offset, cache_modifier=".cg").to(tl.float32)
    tl.store(out + tl.program_id(0) * 128 + d, tl.sum(total, 0))


def permutes() -> Iterator[Case]:
    """Tokens of a video model and two rotary tables, gathered in one launch and one after the other."""
    yield Case("gather_tokens", "32768 x (3072 bf16, 128 fp32, 128 fp32)", "", 0, _permute)


def _permute() -> dict:
    kinds = ((3072, BF16), (128, torch.float32), (128, torch.float32))
    tensors = [torch.randn(1, 32768, width, device=DEVICE, dtype=dtype) for width, dtype in kinds]
    order = torch.randperm(32768, device=DEVICE)
    ms = milliseconds(lambda: cuda_permute.gather_tokens(tensors, order))
    baseline = ("index_select", milliseconds(lambda: [t.index_select(1, order) for t in tensors]))
    moved = 2 * sum(t.nbytes for t in tensors)
    pairs = [(a, t.index_select(1, order)) for a, t in zip(cuda_permute.gather_tokens(tensors, order), tensors)]
    return dict(ms=ms, **against(baseline, ms), bytes_per_s=moved / ms * 1e3, rel_error=distance(pairs))


def hosts() -> Iterator[Case]:
    """What calls cost the host."""
    yield Case("attention_delta on the host", "24x512x128", "", 64, _host_attention)
    yield Case("mlp_delta on the host", "512x128x512", "", 128, _host_mlp)


def _host_attention() -> dict:
    query, key, value = (normal(1, 512, 24, 128).transpose(1, 2) for _ in range(3))
    starts, _ = tables([512], 64)
    state = reference.attention_state(1, 24, 512, 512, 128, 64, len(starts) - 1, BF16, DEVICE)
    state[0].zero_(), state[2].fill_(64)
    call = (query, key, value, None, starts, *state, 0.1, 64)
    return dict(host_us=host_microseconds(lambda: cuda.attention_delta(*call)))


def _host_mlp() -> dict:
    x, weight, down_t = normal(1, 512, 128), normal(512, 128), normal(512, 128)
    starts, sampled = tables([512], 128)
    caches = reference.mlp_state(1, 512, 512, 128, SAMPLES, len(starts) - 1, BF16, DEVICE)
    for cache in caches:
        cache.zero_()
    call = (x, [weight], [], down_t, down_t.float().norm(dim=1), starts, sampled, *caches, GELU, 128, 160)
    return dict(host_us=host_microseconds(lambda: cuda.mlp_delta(*call)))
