"""The attention ops on a GPU against their meaning in float64: ragged sizes, strides, dtypes, masks, poison."""

from __future__ import annotations

import pytest
import torch

from chipmunk_compile.kernels import cuda, reference
from chipmunk_compile.kernels.launch import rehearsal, runs_hopper

pytest.importorskip("triton")
from tests.gpu import shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16 = torch.bfloat16


@pytest.mark.parametrize("arguments", shapes.ATTENTION.values(), ids=shapes.ATTENTION.keys())
def test_equals_its_meaning(arguments):
    shapes.run(arguments)


def test_the_warp_specialised_kernel_is_the_one_that_runs():
    query = torch.randn(1, 256, 2, 128, device="cuda", dtype=BF16).transpose(1, 2)
    if not runs_hopper(query):
        pytest.skip("needs a Hopper GPU and Triton with Gluon")
    state = reference.attention_state(1, 2, 256, 256, 128, 32, 2, BF16, "cuda")
    starts = reference.chunk_table([256], 128).cuda()
    open_keys = torch.ones(1, 1, 1, 256, dtype=torch.bool, device="cuda")
    for mask, kernel in ((None, "attention_delta_hopper"), (open_keys, "attention_delta")):
        with rehearsal() as sources:
            cuda.attention_delta(query, query, query, mask, starts, *state, 1.0, 128)
        assert [path.name.rpartition("_")[0] for path in sources] == [kernel]


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
