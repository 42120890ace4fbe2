"""Several GPUs, as two processes over gloo: each rank computes what one rank alone would, or says what stays dense."""

import pytest
import torch

from tests import parallel_cases
from tests.parallel_cases import CASES, COUNTED, Outcome
from tests.two_ranks import run_cases

gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not gloo, reason="torch was built without gloo")
BOTH = ["attention", "mlp"]


@pytest.fixture(scope="module")
def results():
    """Of all cases on both ranks: one start of two processes serves them all."""
    return run_cases(CASES, [Outcome])


def of(results, name: str) -> list:
    assert name in results, "a case before it failed"
    for result in results[name]:
        assert not isinstance(result, str), result
    return results[name]


@pytest.mark.parametrize("name", ["ulysses", "wan_sparse"])
def test_sparse_steps_under_ulysses_are_those_of_one_rank(results, name):
    """Whole chunks lie on a rank, so each holds the tokens that it held: heads choose what they chose, to rounding."""
    for result in of(results, name):
        assert result.error < 1e-5
        assert set(result.accelerated) == set(BOTH)
        assert result.counts["delta"] == result.counts["refresh"] == 3 or name == "wan_sparse"
        assert result.counts["delta"] > 0 and result.counts["overruled"] == 0


def test_a_rank_keeps_state_for_its_heads_and_its_tokens(results):
    for result in of(results, "ulysses"):
        # Half of what one rank holds for all, and what is derived from weights, which every rank holds whole.
        assert result.alone / 2 <= result.counts["state_bytes"] < 0.6 * result.alone


@pytest.mark.parametrize("name", ["flux", "wan_in_boxes", "qwen_in_boxes", "flux_in_blocks"])
def test_models_of_diffusers_at_sparsity_0_equal_one_rank(results, name):
    for result in of(results, name):
        assert result.error < 1e-5
        assert set(result.accelerated) == set(BOTH)
        assert result.counts["delta"] >= 3 and result.counts["overruled"] == 0


@pytest.mark.parametrize("name", ["flux", "wan_in_boxes", "qwen_in_boxes"])
def test_chunks_are_boxes_of_each_rank_s_share(results, name):
    """Ids say the grid of a share, or the option `grid` that of the whole."""
    for result in of(results, name):
        assert result.reordered and not result.order


def test_shares_of_unlike_grids_keep_their_order_on_all_ranks(results):
    """Each rank's ids are a grid, but another one: that shows at the first call, which is dense."""
    for result in of(results, "flux_with_unlike_halves"):
        assert result.error < 1e-5 and not result.reordered
        assert (result.counts["dense"], result.counts["refresh"], result.counts["delta"]) == (1, 1, 3)


@pytest.mark.parametrize("name, reason", [("gathered_keys", "KEYS_OF_RANKS"), ("ring", "PARTIAL_ATTENTION")])
def test_other_context_parallelism_leaves_attention_dense(results, name, reason):
    for result in of(results, name):
        assert result.error < 1e-5
        assert result.accelerated == ["mlp"] and set(result.reasons) == {reason}
        assert result.counts["delta"] == 3


def test_all_ranks_refresh_where_one_has_another_prompt(results):
    ours, theirs = of(results, "unlike_streams")
    refresh, delta = (0, 1, 0, 0), (0, 0, 1, 0)
    expected = [refresh, refresh, delta, delta, refresh, refresh, delta, delta]
    assert [step[:-1] for step in ours] == [step[:-1] for step in theirs] == expected
    assert ours[4][COUNTED.index("overruled")] == 1 and theirs[4][COUNTED.index("overruled")] == 0


def test_all_ranks_are_dense_where_one_is_switched_off(results):
    ours, theirs = of(results, "unlike_switches")
    assert ours[4] == (1, 0, 0, 0, 1) and theirs[4] == (1, 0, 0, 0, 0)
    assert ours[5][:2] == theirs[5][:2] == (0, 1), "state from before the dense step is not built on"


def test_no_rank_forecasts_while_another_computes(results):
    ours, theirs = of(results, "unlike_forecasts")
    assert [step[:-1] for step in ours] == [step[:-1] for step in theirs]
    forecasts = [step[COUNTED.index("forecast")] for step in ours]
    assert forecasts[4] == 0 and ours[4][COUNTED.index("overruled")] == 1
    assert any(forecasts), "they do forecast where both want to"


def test_a_delta_runs_beside_a_refresh_on_all_ranks_or_on_none(results):
    ours, theirs = of(results, "unlike_corrections")
    assert [step[:-1] for step in ours] == [step[:-1] for step in theirs]
    assert any(step[1:3] == (1, 1) for step in ours), "they do correct where both want to"


@pytest.mark.parametrize("name", ["fsdp", "fsdp_in_blocks"])
def test_weights_sharded_by_fsdp_name_their_owner(results, name):
    """Parameters are gathered anew for each block, into the same objects; each rank has pictures of its own."""
    ours, theirs = of(results, name)
    for result in (ours, theirs):
        assert result.error < 1e-5
        assert result.accelerated == BOTH, "one graph for both blocks"
        assert (result.counts["refresh"], result.counts["delta"]) == (6, 6)
    assert ours.counts["state_bytes"] == theirs.counts["state_bytes"] == ours.alone


def test_tensor_parallel_weights_stay_dense(results):
    for result, reasons in of(results, "tensor_parallel"):
        assert result.error < 1e-5 and not result.accelerated
        assert "SHARDED_WEIGHTS" in reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by_inductor", "by_inductor_in_boxes"])
def test_collectives_compiled_by_inductor(name):
    for result in of(run_cases({name: getattr(parallel_cases, name)}, [Outcome]), name):
        assert result.error < 1e-5 and result.counts["delta"] == 3
        assert result.reordered == (name == "by_inductor_in_boxes")
