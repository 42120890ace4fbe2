"""The attention ops on a GPU against their meaning in float64: ragged sizes, strides, dtypes, masks, poison."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.kernels import cuda, cuda_attention, reference
from chipmunk_compile.kernels.launch import runs_hopper
from tests.kernels.triton_cases import attention, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = {
    "whole chunks of 128": dict(segments=(512,), chunk=128, kept=96, head_dim=128),
    "whole chunks of 64": dict(segments=(512,), chunk=64, kept=96, head_dim=128),
    "segments, ragged, batch 2": dict(batch=2, segments=(300, 77), chunk=128, kept=129, head_dim=128),
    "ragged chunks of 64, batch 3": dict(batch=3, segments=(63, 100, 1), chunk=64, kept=33, head_dim=64),
    "chunks of 192": dict(segments=(500,), chunk=192, kept=200, head_dim=128),
    "chunks of 32": dict(segments=(101,), chunk=32, kept=20, head_dim=64),
    "grouped queries": dict(heads=4, kv_heads=2, segments=(257,), kv_len=1000, chunk=64, kept=70, head_dim=128),
    "everything": dict(segments=(163,), chunk=64, kept=163, head_dim=64),
    "one column": dict(segments=(130,), chunk=128, kept=1, head_dim=128),
    "overflow, chunks of 128": dict(segments=(400,), chunk=128, kept=150, head_dim=128, peaked=True),
    "overflow, chunks of 64": dict(segments=(400, 30), chunk=64, kept=150, head_dim=64, peaked=True),
    "head_dim 72": dict(segments=(200,), chunk=64, kept=64, head_dim=72),
    "head_dim 256": dict(segments=(130,), chunk=64, kept=40, head_dim=256),
    "boolean mask": dict(batch=2, segments=(400, 19), chunk=128, kept=64, head_dim=96, mask="bool"),
    "additive mask": dict(batch=2, segments=(400, 19), chunk=64, kept=200, head_dim=128, mask="additive"),
    "heads first": dict(segments=(256,), chunk=64, kept=48, head_dim=128, layout="heads first"),
    "fused projection": dict(segments=(256,), chunk=128, kept=48, head_dim=64, layout="fused"),
    "16 samples": dict(segments=(256,), chunk=64, kept=48, head_dim=64, samples=16),
    "float16": dict(dtype=FP16, batch=2, segments=(300, 77), chunk=128, kept=129, head_dim=128),
    "float32": dict(dtype=FP32, segments=(200,), chunk=64, kept=50, head_dim=64),
    "float32, masked": dict(dtype=FP32, segments=(200,), chunk=64, kept=50, head_dim=40, mask="bool"),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_equals_its_meaning(arguments):
    arguments = {"dtype": BF16, "samples": 8, **arguments}
    check(attention(device="cuda", **arguments), arguments["dtype"])


def test_the_warp_specialised_kernel_is_the_one_that_runs(monkeypatch):
    query = torch.randn(1, 256, 2, 128, device="cuda", dtype=BF16).transpose(1, 2)
    if not runs_hopper(query):
        pytest.skip("needs a Hopper GPU and Triton with Gluon")
    names = []
    monkeypatch.setattr(cuda_attention, "launch", lambda function, *args, **config: names.append(function.__name__))
    state = reference.attention_state(1, 2, 256, 256, 128, 32, 2, BF16, "cuda")
    starts = reference.chunk_table([256], 128).cuda()
    cuda.attention_delta(query, query, query, None, starts, *state, 1.0, 128)
    assert names == ["attention_delta_hopper"]
    open_keys = torch.ones(1, 1, 1, 256, dtype=torch.bool, device="cuda")
    cuda.attention_delta(query, query, query, open_keys, starts, *state, 1.0, 128)
    assert names == ["attention_delta_hopper", "attention_delta"]


def test_a_cuda_graph_replays_a_delta():
    tokens, chunk = 384, 64
    query, key, value = (torch.randn(1, tokens, 2, 128, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(3))
    starts = reference.chunk_table([tokens], chunk).cuda()
    o_cache, columns, counts = reference.attention_state(1, 2, tokens, tokens, 128, 40, 6, BF16, "cuda")
    o_cache.normal_()
    columns.copy_(torch.arange(40, device="cuda") * 9)
    counts.fill_(40)

    def run():
        return cuda.attention_delta(query, key, value, None, starts, o_cache, columns, counts, 0.1, chunk)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0, atol=0)
