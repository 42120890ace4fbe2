"""The token permutation where more than latents carries tokens: residuals, a timestep for each token."""

import math

import pytest
import torch

from chipmunk_compile.passes.permute_tokens import index_inputs, permute_tokens, plan_permutation
from tests.tiny_conditions import WITH_CONDITIONS
from tests.token_graphs import attention_sites, captured, difference, gathers_of, in_double, without

# Graph inputs that carry image tokens and so must be permuted: latents, positions, residuals, times.
GATHERED = {
    "flux_with_residuals": 4,
    "sd3_with_residuals": 1,
    "flux_with_picture": 2,
    "wan_with_a_time_per_token": 1,
    "ltx_with_a_time_per_token": 1,
}


@pytest.mark.parametrize("name", WITH_CONDITIONS)
def test_permuted_equals_plain_and_every_gather_is_needed(name):
    layers = 2 if name == "sd3_with_residuals" else 1  # its last block takes no residual
    ((gm, inputs),) = captured(*WITH_CONDITIONS[name](layers=layers))
    sites = attention_sites(gm)
    plan = plan_permutation(gm, sites, share=math.inf)
    assert plan.sites == {site.node for site in sites if site.q_len >= 60}
    plain = in_double(gm, *inputs)
    permute_tokens(gm, plan)
    indices = index_inputs(plan, [torch.randperm(run.length) for run in plan.runs])
    assert difference(in_double(gm, *inputs, *indices), plain) < 5e-15
    gathers = gathers_of(gm)
    assert all(difference(in_double(without(gm, g), *inputs, *indices), plain) > 1e-6 for g in gathers)
    assert sum(_reads_an_input(g) for g in gathers) >= GATHERED[name], gathers


def _reads_an_input(gather: torch.fx.Node) -> bool:
    """Whether a gather stands at an input, views and casts aside."""
    source = gather.args[0]
    while source.op == "call_function" and len(source.all_input_nodes) == 1:
        source = source.args[0]
    return source.op == "placeholder"
