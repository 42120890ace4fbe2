"""Programs replayed as CUDA graphs do what the same programs do kernel by kernel, on diffusers' FLUX."""

from __future__ import annotations

import pytest
import torch

import chipmunk_compile
from chipmunk_compile.backend import chipmunk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GRID, TEXT, STEPS = 32, 77, 7
DELTAS = {"attention.sparsity": 0.8, "mlp.sparsity": 0.7, "schedule.refresh_at": [0, 1, 5], "min_tokens": 256}


@pytest.fixture(scope="module")
def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, num_attention_heads=4, attention_head_dim=128, joint_attention_dim=64,
        pooled_projection_dim=32, guidance_embeds=True,
    )  # fmt: skip
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def generation(model, seed: int, streams: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    ids = torch.zeros(GRID, GRID, 3, device="cuda")
    ids[..., 1], ids[..., 2] = torch.arange(GRID, device="cuda")[:, None], torch.arange(GRID, device="cuda")
    noise, target = randn(1, GRID * GRID, 64), randn(1, GRID * GRID, 64)
    prompts = [(randn(1, TEXT, 64), randn(1, 32)) for _ in range(streams)]
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            for text, pooled in prompts:
                (made,) = model(
                    hidden_states=torch.lerp(noise, target, step / 50), encoder_hidden_states=text,
                    pooled_projections=pooled, timestep=torch.full((1,), 1 - step / 50, device="cuda"),
                    guidance=torch.full((1,), 3.5, device="cuda"), img_ids=ids.view(-1, 3),
                    txt_ids=torch.zeros(TEXT, 3, device="cuda"), return_dict=False,
                )  # fmt: skip
                outputs.append(made)
    return outputs


@pytest.mark.parametrize("streams", [1, 2])
def test_replays_are_what_the_kernels_make_one_by_one(flux, streams):
    def run(**options):
        torch._dynamo.reset()
        chipmunk_compile.reset()
        compiled = torch.compile(flux, backend=chipmunk, options={**DELTAS, **options})
        made = [generation(compiled, seed, streams) for seed in range(3)]
        counted = chipmunk_compile.counters()
        assert counted["delta"] >= 3 * 4 * streams and counted["refresh"] >= 3 * 3 * streams
        return made

    expected, replayed = run(), run(mode="reduce-overhead")
    apart = [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for ours, theirs in zip(replayed, expected)
        for a, b in zip(ours, theirs)
    ]
    print(f"{streams} streams: replays lie {max(apart):.2e} from the kernels one by one")
    assert max(apart) < 1e-2
    assert len({made.data_ptr() for made in replayed[0]}) == len(replayed[0]), "outputs are the caller's own"
