"""Low-rank adapters beside the linears of an MLP: one candidate each, declined by their own reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_compile.passes.reasons import Reason
from tests.passes.test_mlp_sites import DIM, HIDDEN, OUT, Toy, find, tokens


class Adapted(Toy):
    """Toy with two adapters a linear; `wide`: they compute in float32 whatever the model does."""

    def __init__(self, body, rank: int, wide: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(body)
        self.to(dtype)
        adapted = dtype if not wide else torch.float32
        for name, linear in (("up", self.up), ("down", self.down), ("joined", self.joined)):
            into, out = linear.in_features, linear.out_features
            halves = [(nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=False)) for _ in range(2)]
            setattr(self, f"{name}_adapters", nn.ModuleList(map(nn.ModuleList, halves)).to(adapted))

    def adapted(self, name: str, x: torch.Tensor, count: int = 1) -> torch.Tensor:
        result = getattr(self, name)(x)
        for a, b in list(getattr(self, f"{name}_adapters"))[:count]:
            result = result + 0.5 * b(a(x.to(a.weight.dtype)))
        return result.to(x.dtype)


FORMS = {
    "the first linear": lambda m, x: m.down(F.gelu(m.adapted("up", x))),
    "the second linear": lambda m, x: m.adapted("down", F.gelu(m.up(x))),
    "both": lambda m, x: m.adapted("down", F.gelu(m.adapted("up", x))),
    "the second linear twice": lambda m, x: m.adapted("down", F.gelu(m.up(x)), 2),
    "a linear of attention and MLP": lambda m, x: m.adapted("joined", torch.cat([x.cumsum(1), F.silu(m.up(x))], -1)),
    "both, fused": lambda m, x: m.adapted("joined", torch.cat([x.cumsum(1), F.silu(m.adapted("up", x))], -1)),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_is_not_fused(form, rank, wide):
    dtype = torch.bfloat16 if wide else torch.float32
    sites, declined = find(Adapted(FORMS[form], rank, wide, dtype), tokens(2, 7, DIM, dtype=dtype))
    assert not sites
    assert [(d.reason, d.detail) for d in declined] == [(Reason.UNFUSED_ADAPTER, {"rank": rank})]
    assert "adapters" not in declined[0].name


@pytest.mark.parametrize("width", [2, OUT])
def test_a_second_head_on_the_hidden_layer_is_no_adapter(width):
    def body(m, x):
        h = F.gelu(m.up(x))
        return m.down(h), m.head(h)

    toy = Toy(body)
    toy.head = nn.Linear(HIDDEN, width)
    sites, declined = find(toy, tokens(2, 7, DIM))
    assert not sites and [d.reason for d in declined] == [Reason.SHARED_HIDDEN] * 2


def test_adapters_of_attention_leave_the_mlp_alone():
    def body(m, x):
        return m.down(F.gelu(m.up(x + m.b(m.a(x)))))

    toy = Toy(body)
    toy.a, toy.b = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)
    sites, declined = find(toy, tokens(2, 7, DIM))
    assert len(sites) == 1 and not declined
