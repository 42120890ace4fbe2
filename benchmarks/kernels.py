"""The GPU kernels against the fastest dense ones on the same GPU, in the same run.

    python -m benchmarks.kernels [--sections attention refresh mlp ...] [--plot] [--output results.json]

Times are medians of CUDA graph replays, with a cold L2 cache, in milliseconds; the host's share is a row of its own.
Every result is checked against float64 on sampled chunks. A row's `ratio` is dense time over its own, `ideal_ratio`
what the kept columns alone allow. Inputs are bf16, [batch, tokens, heads, head_dim] as diffusers lays them out.

    equal      every chunk attends the same number of columns, at random places
    varying    from 30% to 100% of that, chunk by chunk
    selected   the columns that a refresh chooses, on inputs whose attention is local in a 3-D grid
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_compile.kernels import cuda, cuda_attention, cuda_mlp, cuda_permute, reference

log = logging.getLogger("kernels")
BF16 = torch.bfloat16
DEVICE = "cuda"
DRY = False  # everything once, untimed
SAMPLES = 8
RESULTS = Path(__file__).parent / "results"
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

# heads, tokens, kept columns (in 64s), chunks, what it stands for
ATTENTION = [
    (24, 4608, 768, (64, 128), "FLUX.1, 16.7%"),
    (24, 32768, 2304, (64, 128), "7%"),
    (24, 65536, 4608, (64, 128), "7%"),
    (40, 75600, 5312, (128,), "Wan2.1-14B, 720p, 7%"),
    (24, 119056, 8320, (128,), "HunyuanVideo, 720p, 7%"),
]
REFRESH = [(24, 4608, 768, 64), (24, 32768, 2304, 64), (24, 32768, 2304, 128), (24, 119056, 8320, 128)]
MLP = [(4096, 3072, 12288, 3712), (32768, 3072, 12288, 3712)]  # tokens, width, hidden, kept (30.2%)


# --- measuring ---


def milliseconds(run: Callable[[], object]) -> float:
    """The median of graph replays, the L2 cache flushed before each."""
    run()
    torch.cuda.synchronize()
    if DRY:
        return 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median")


def temporary_bytes(run: Callable[[], torch.Tensor]) -> int:
    """The most memory that a call holds beyond its arguments and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    return torch.cuda.max_memory_allocated() - before - (out.nbytes if isinstance(out, torch.Tensor) else 0)


def host_microseconds(run: Callable[[], object]) -> float:
    """What a call costs the host, for calls so small that the GPU is always done first."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 200 * 1e6


def distance(pairs) -> float:
    """||actual - expected|| / ||expected|| over pairs of tensors."""
    off, norm = 0.0, 0.0
    for actual, expected in pairs:
        off += (actual.double() - expected).square().sum().item()
        norm += expected.square().sum().item()
    return math.sqrt(off / norm)


# --- inputs ---


def queries_keys_values(heads: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, tokens, heads, 128, device=DEVICE, dtype=BF16).transpose(1, 2) for _ in range(3)]


def local_queries_and_keys(heads: int, tokens: int, grid: tuple[int, int, int]) -> list[torch.Tensor]:
    """Queries and keys whose product falls off with distance in a grid, a scale for each head: [1, H, N, 128]."""
    axes = [torch.arange(n, device=DEVICE, dtype=torch.float32) / n for n in grid]
    place = torch.cartesian_prod(*axes)[:tokens]  # [N, 3]
    both = []
    for head in range(heads):
        waves = torch.randn(3, 64, device=DEVICE) * (2 + 14 * head / heads)
        angles = place @ waves * math.tau / 4
        both.append(torch.cat([angles.cos(), angles.sin()], -1) * 1.2)
    shared = torch.stack(both, 1)[None]  # [1, N, H, 128]
    return [(shared + 0.35 * torch.randn_like(shared)).to(BF16).transpose(1, 2) for _ in range(2)]


def tables(tokens: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = reference.chunk_table([tokens], chunk)
    return starts.to(DEVICE), reference.sample_table(starts, SAMPLES).to(DEVICE)


def spread_columns(heads: int, chunks: int, tokens: int, kept: int) -> torch.Tensor:
    """Random ascending columns, one in each of `kept` equal stretches: int32 [1, H, C, kept]."""
    stretch = torch.arange(kept, device=DEVICE, dtype=torch.float64) * (tokens / kept)
    columns = torch.empty(1, heads, chunks, kept, dtype=torch.int32, device=DEVICE)
    for head in range(heads):
        columns[0, head] = (stretch + torch.rand(chunks, kept, device=DEVICE) * (tokens / kept - 1)).int()
    return columns


# --- sections ---


def ceilings() -> list[dict]:
    source = torch.randint(256, (1 << 32,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=BF16)
    product = milliseconds(lambda: a @ b)
    return [
        dict(kernel="device copy", shape="4 GiB", ms=copy, bytes_per_s=2 * source.nbytes / copy * 1e3),
        dict(kernel="matrix product", shape="8192^3", ms=product, tflops=2 * 8192**3 / product / 1e9),
        dict(kernel="gather through L2", shape="256-byte rows of K and V, 24 x 32768", **_gather_rate()),
    ]


def _gather_rate() -> dict:
    """How fast rows of K and V come from L2 when nothing is done with them: the roof of a chunk of 64."""
    tokens, kept, chunks = 32768, 2304, 512
    _, key, value = queries_keys_values(24, tokens)
    columns = spread_columns(1, chunks, tokens, kept)
    out = torch.empty(chunks * 128, device=DEVICE)
    ms = milliseconds(
        lambda: gather[(chunks,)](key, value, columns, out, kept, key.stride(2), BN=32, num_warps=2, num_stages=4)
    )
    return dict(ms=ms, bytes_per_s=chunks * kept * 512 / ms * 1e3)


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


def attention() -> list[dict]:
    rows = []
    for heads, tokens, kept, chunks, what in ATTENTION:
        query, key, value = queries_keys_values(heads, tokens)
        dense = _dense_attention(query, key, value)
        for chunk in chunks:
            starts, sampled = tables(tokens, chunk)
            number = len(starts) - 1
            columns = spread_columns(heads, number, tokens, kept)
            o_cache = torch.randn_like(query)
            full = torch.full((1, heads, number), kept, dtype=torch.int32, device=DEVICE)
            some = (kept * (0.3 + 0.7 * torch.rand(full.shape, device=DEVICE))).int()
            shape = f"{heads}x{tokens}x128 ({what})"
            for counts, name in ((full, "equal"), (some, "varying")):
                rows.append(_delta_row(query, key, value, starts, o_cache, columns, counts, chunk, shape, name, dense))
            if tokens == 32768:
                local = local_queries_and_keys(heads, tokens, (8, 64, 64))
                state = reference.attention_state(1, heads, tokens, tokens, 128, kept, number, BF16, DEVICE)
                cuda.attention_refresh(*local, value, None, starts, sampled, *state, 128**-0.5, chunk)
                rows.append(_delta_row(*local, value, starts, *state, chunk, shape, "selected", dense))
    return rows


def _delta_row(query, key, value, starts, o_cache, columns, counts, chunk, shape, name, dense) -> dict:
    scale, tokens = 128**-0.5, query.shape[2]

    def run():
        return cuda.attention_delta(query, key, value, None, starts, o_cache, columns, counts, scale, chunk)

    error = distance(_delta_pairs(query, key, value, starts, o_cache, columns, counts, run(), scale, 1.0))
    ms = milliseconds(run)
    share = counts.float().mean().item() / tokens
    return dict(
        kernel="attention_delta", shape=shape, counts=name, sparsity=round(1 - share, 4), chunk=chunk, ms=ms,
        tflops=_attention_flops(query) * share / ms / 1e9, **_against(dense, ms), ideal_ratio=1 / share,
        rel_error=error, peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _delta_pairs(query, key, value, starts, base, columns, counts, out, scale, sign, picks: int = 12):
    """(result, base + sign * sparse attention in float64) for some chunks, the last one among them."""
    heads, chunks = counts.shape[1:]
    for pick in range(picks):
        h, c = (heads - 1, chunks - 1) if pick == 0 else (torch.randint(n, ()).item() for n in (heads, chunks))
        rows = slice(starts[c].item(), starts[c + 1].item())
        chosen = columns[0, h, c, : counts[0, h, c]].long()
        logits = query[0, h, rows].double() @ key[0, h].index_select(0, chosen).double().T * scale
        sparse = logits.softmax(-1) @ value[0, h].index_select(0, chosen).double()
        yield out[0, h, rows], base[0, h, rows].double() + sign * sparse


def refresh() -> list[dict]:
    return [_refresh_row(*shape) for shape in REFRESH]


def _refresh_row(heads: int, tokens: int, kept: int, chunk: int) -> dict:
    query, key, value = queries_keys_values(heads, tokens)
    starts, sampled = tables(tokens, chunk)
    state = reference.attention_state(1, heads, tokens, tokens, 128, kept, len(starts) - 1, BF16, DEVICE)
    dense = _dense_attention(query, key, value)

    def run():
        return cuda.attention_refresh(query, key, value, None, starts, sampled, *state, 128**-0.5, chunk)

    o = run()
    pairs = _delta_pairs(query, key, value, starts, o, *state[1:], state[0], 128**-0.5, -1.0)
    error, ms = distance(pairs), milliseconds(run)
    with torch.no_grad():
        lse = cuda_attention._dense(query, key, value, None, 128**-0.5)[1]
    choose = milliseconds(lambda: cuda_attention._choose_columns(query, key, None, sampled, lse, *state[1:], 128**-0.5))
    return dict(
        kernel="attention_refresh", shape=f"{heads}x{tokens}x128", counts="equal", chunk=chunk,
        sparsity=round(1 - kept / tokens, 4), ms=ms, tflops=_attention_flops(query) / ms / 1e9, **_against(dense, ms),
        ideal_ratio=1.0, cost=ms / dense[1], choose_ms=choose, rel_error=error,
        mass_lacking=_mass_lacking(query, key, sampled, *state[1:]), peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _mass_lacking(query, key, sampled, columns, counts, picks: int = 12) -> float:
    """The part of the best columns' attention mass, at the sampled queries, that the chosen ones miss; the mean."""
    heads, chunks = counts.shape[1:]
    lacking = 0.0
    for _ in range(picks):
        h, c = (torch.randint(n, ()).item() for n in (heads, chunks))
        mass = (query[0, h, sampled[c].long()].double() @ key[0, h].double().T * 128**-0.5).softmax(-1).sum(0)
        chosen = columns[0, h, c, : counts[0, h, c]].long()
        lacking += 1 - (mass[chosen].sum() / mass.topk(len(chosen)).values.sum()).item()
    return lacking / picks


def _dense_attention(query, key, value) -> tuple[str, float]:
    """The fastest dense attention there is: its name and milliseconds."""
    times = {}
    for name, backend in SDPA.items():
        if DRY:
            return "none", 1.0
        if query.shape[2] > 50_000 and times:  # seconds a call, and never the fastest where cuDNN runs
            continue
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            times[name] = milliseconds(lambda: F.scaled_dot_product_attention(query, key, value))
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func

        heads_last = [t.transpose(1, 2) for t in (query, key, value)]
        times["FlashAttention-3"] = milliseconds(lambda: flash_attn_func(*heads_last))
    name = min(times, key=times.get)
    return name, times[name]


def _attention_flops(query) -> float:
    return 4 * query.shape[0] * query.shape[1] * query.shape[2] ** 2 * query.shape[3]


def mlp() -> list[dict]:
    return [_mlp_row(*shape, chunk=128, inputs=inputs) for shape in MLP for inputs in (1, 2)]


def _mlp_row(tokens: int, width: int, hidden: int, kept: int, chunk: int, inputs: int) -> dict:
    region = "gelu_tanh(h0)" if inputs == 1 else "mul(silu(h0), h1)"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=BF16)

    x, down = normal(1, tokens, width), normal(width, hidden) * hidden**-0.5
    weights = [normal(hidden, width) * width**-0.5 for _ in range(inputs)]
    biases, down_bias = ([normal(hidden)], normal(width)) if inputs == 1 else ([], None)

    def dense(x):
        if inputs == 1:
            act = F.gelu(F.linear(x, weights[0], biases[0]), approximate="tanh")
        else:
            act = F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])
        return F.linear(act, down, down_bias)

    compiled = torch.compile(dense, dynamic=False)
    compiled(x)
    baseline = ("torch.compile", milliseconds(lambda: compiled(x)))
    starts, sampled = tables(tokens, chunk)
    act, sample, out_cache = reference.mlp_state(1, tokens, hidden, width, SAMPLES, len(starts) - 1, BF16, DEVICE)
    for state in (act, sample, out_cache):
        state.normal_()
    down_t = down.t().contiguous()
    arguments = (x, weights, biases, down_t, down.float().norm(dim=0), starts, sampled, act, sample, out_cache)

    def run():
        return cuda.mlp_delta(*arguments, region, chunk, kept)

    error = _mlp_error(run, x, weights, biases, down_t, act, out_cache, region, kept, chunk)
    ms = milliseconds(run)
    flops = 2 * tokens * kept * width * (inputs + 1)
    return dict(
        kernel="mlp_delta", shape=f"{tokens}x{width}x{hidden}, {region}", counts="equal", chunk=chunk,
        sparsity=round(1 - kept / hidden, 4), ms=ms, tflops=flops / ms / 1e9, **_against(baseline, ms),
        ideal_ratio=hidden / kept, parts_ms=_mlp_parts(arguments, region, chunk, kept), rel_error=error,
        peak_temp_bytes=temporary_bytes(run),
    )  # fmt: skip


def _mlp_error(run, x, weights, biases, down_t, act, out_cache, region, kept: int, chunk: int) -> float:
    """The larger of the errors of new activations and of the output, in float64, over the first and last chunk."""
    from chipmunk_compile.kernels.expression import evaluate

    old, old_out = act.clone(), out_cache.clone()
    out = run()
    worst = 0.0
    for rows in (slice(0, chunk), slice(x.shape[1] - chunk, x.shape[1])):
        padded = biases or [None] * len(weights)
        hidden = [
            F.linear(x[0, rows].double(), w.double(), None if b is None else b.double())
            for w, b in zip(weights, padded)
        ]
        fresh, new, before = evaluate(region, hidden).T, act[0, :, rows].double(), old[0, :, rows].double()
        moved = (new != before).any(1, keepdim=True)
        assert moved.sum() <= kept
        change = old_out[0, rows].double() + (new - before).T @ down_t.double()
        worst = max(worst, distance([(new, torch.where(moved, fresh, before))]), distance([(out[0, rows], change)]))
    return worst


def _mlp_parts(arguments, region: str, chunk: int, kept: int) -> dict[str, float]:
    """Milliseconds of choosing neurons, of the up and of the down product alone."""
    x, weights, biases, down_t, down_norm, starts, sampled, act, sample, out_cache = arguments
    chosen = spread_columns(1, len(starts) - 1, down_t.shape[0], kept)[0, 0]
    hopper = cuda_mlp._suits_hopper(x, weights, down_t, act, out_cache, chunk)
    change = cuda_mlp._up(x, weights, biases, starts, chosen, act, region, chunk, hopper)
    return {
        "choose": milliseconds(
            lambda: cuda_mlp._choose_neurons(x, weights, biases, down_norm, sampled, sample, chosen, region)
        ),
        "up": milliseconds(lambda: cuda_mlp._up(x, weights, biases, starts, chosen, act, region, chunk, hopper)),
        "down": milliseconds(lambda: cuda_mlp._down(change, down_t, starts, chosen, out_cache, chunk, hopper)),
    }


def permute() -> list[dict]:
    """Queries' tokens and two rotary tables of a video model, gathered in one launch and one after the other."""
    tensors = [
        torch.randn(1, 32768, n, device=DEVICE, dtype=d)
        for n, d in ((3072, BF16), (128, torch.float32), (128, torch.float32))
    ]
    order = torch.randperm(32768, device=DEVICE)
    ms = milliseconds(lambda: cuda_permute.gather_tokens(tensors, order))
    baseline = ("index_select", milliseconds(lambda: [t.index_select(1, order) for t in tensors]))
    same = all(a.equal(t.index_select(1, order)) for a, t in zip(cuda_permute.gather_tokens(tensors, order), tensors))
    moved = 2 * sum(t.nbytes for t in tensors)
    return [dict(
        kernel="gather_tokens", shape="32768 x (3072 bf16, 128 fp32, 128 fp32)", ms=ms, **_against(baseline, ms),
        bytes_per_s=moved / ms * 1e3, rel_error=0.0 if same else math.inf,
    )]  # fmt: skip


def host() -> list[dict]:
    """What calls cost the host."""
    query, key, value = queries_keys_values(24, 512)
    starts, _ = tables(512, 64)
    state = reference.attention_state(1, 24, 512, 512, 128, 64, len(starts) - 1, BF16, DEVICE)
    state[0].zero_(), state[2].fill_(64)
    x, weights, down_t = (torch.randn(*s, device=DEVICE, dtype=BF16) for s in ((1, 512, 128), (512, 128), (512, 128)))
    starts_mlp, sampled = tables(512, 128)
    caches = reference.mlp_state(1, 512, 512, 128, SAMPLES, len(starts_mlp) - 1, BF16, DEVICE)
    for cache in caches:
        cache.zero_()
    norm = down_t.float().norm(dim=1)
    calls = {
        "attention_delta": lambda: cuda.attention_delta(query, key, value, None, starts, *state, 0.1, 64),
        "mlp_delta": lambda: cuda.mlp_delta(
            x, [weights], [], down_t, norm, starts_mlp, sampled, *caches, "gelu_tanh(h0)", 128, 160
        ),
    }
    return [dict(kernel=f"{name}, host", shape="small", host_us=host_microseconds(run)) for name, run in calls.items()]


def _against(dense: tuple[str, float], ms: float) -> dict:
    return {"baseline": dense[0], "baseline_ms": dense[1], "ratio": dense[1] / ms}


SECTIONS = {f.__name__: f for f in (ceilings, attention, refresh, mlp, permute, host)}


# --- output ---


def report(sections: list[str]) -> dict:
    rows = [row for name in sections for row in SECTIONS[name]()]
    return {**provenance(), "rows": [{k: _rounded(v) for k, v in row.items()} for row in rows]}


def provenance() -> dict:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=RESULTS, capture_output=True, text=True).stdout.strip()

    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "../../kernels")),
        "date": time.strftime("%Y-%m-%d"),
    }


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        ratio = (
            f"{row['ratio']:6.2f}x of {row.get('ideal_ratio', 0):5.2f} vs {row['baseline']}" if "ratio" in row else ""
        )
        rate = f"{row['tflops']:5.0f} TF" if "tflops" in row else f"{row.get('bytes_per_s', 0) / 1e12:5.2f} TB/s"
        more = {
            k: row[k] for k in ("cost", "parts_ms", "choose_ms", "mass_lacking", "host_us", "rel_error") if k in row
        }
        name = f"{row['kernel']} {row['shape']} {row.get('counts', '')} chunk {row.get('chunk', '-')}"
        lines.append(f"{name}: {row.get('ms', 0):.4g} ms {rate} {ratio} {more}")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Speed-ups beside what the kept columns would allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if "ratio" in r and "ideal_ratio" in r and r["kernel"] != "attention_refresh"]
    names = [f"{r['kernel']} {r['shape']}\nchunk {r['chunk']}, {r['counts']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1))
    axes.barh(names, [r["ideal_ratio"] for r in rows], color="#dddddd", label="kept columns alone")
    axes.barh(names, [r["ratio"] for r in rows], color="#3366aa", label="measured")
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the fastest dense kernel, {result['device']}")
    axes.tick_params(axis="y", labelsize=6)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry", action="store_true", help="run everything once, for its compiled kernels; no times")
    parser.add_argument("--plot", action="store_true", help="an SVG beside the JSON; needs matplotlib")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    global DRY
    DRY = options.dry
    with torch.no_grad():
        result = report(options.sections)
    if DRY:
        return
    name = "-".join(result["device"].lower().split())
    output = options.output or RESULTS / f"kernels-{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, output.with_suffix(".svg"))
    log.info(table(result))


if __name__ == "__main__":
    main()
