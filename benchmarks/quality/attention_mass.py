"""How much of a softmax's mass the best columns of a chunk hold, by layer: whether a sparse delta can pay at all."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chipmunk_compile.concentration import attention_logits, attention_weights, held_by_best, top_shares
from chipmunk_compile.passes.token_order import token_order

from .sampling import generate
from .subjects import Subject

KEPT = (0.07, 0.165, 0.30)  # shares of the columns
CHUNK = 64
CHUNKS = 12  # looked at in each head


class Watch(TorchFunctionMode):
    """Sees every self-attention over all tokens that runs inside, and adds up what its columns hold."""

    def __init__(self, subject: Subject) -> None:
        self.tokens = subject.tokens
        order, lengths = token_order(subject.grid, CHUNK)
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        chosen = torch.linspace(0, len(lengths) - 1, min(CHUNKS, len(lengths))).long().unique()
        self.chunks = [order[starts[i] : starts[i] + lengths[i]] for i in chosen.tolist()]
        self.layer = 0
        self.found: dict[int, list[Tensor]] = defaultdict(list)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = (
                kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key"))
            )
            if query.shape[2] == key.shape[2] == self.tokens:
                self.found[self.layer].append(column_mass(query, key, self.chunks))
                self.layer += 1
        return function(*args, **kwargs)


def column_mass(query: Tensor, key: Tensor, chunks: list[Tensor]) -> Tensor:
    """Mass that the best columns of each chunk hold, mean over batch, heads and chunks: [len(KEPT)], float64.

    query, key: [batch, heads, tokens, head_dim].
    """
    total = torch.zeros(len(KEPT), dtype=torch.float64)
    for chunk in chunks:
        logits = attention_logits(query[:, :, chunk.to(query.device)], key, query.shape[-1] ** -0.5)
        held = held_by_best(attention_weights(logits).mean(2))
        total += top_shares(held, KEPT).flatten(1).mean(1).double().cpu()
    return total / len(chunks)


def attention_mass(model, subject: Subject, noise: Tensor, text: Tensor, dtype: torch.dtype, steps: int = 12) -> dict:
    """A generation of the model as it is, watched at an early, a middle and a late step, with the caption.

    Returns {"kept": [...], "chunk", "layers": [[mass per kept share] per layer], "moments": {noise level: the same}}.
    """
    watched = {}
    level = {"k": 0}
    looked = {steps // 6: "early", steps // 2: "middle", steps - 2: "late"}

    def called(**inputs):
        k = level["k"]
        level["k"] += 1
        if k not in looked:
            return model(**inputs)
        with Watch(subject) as watch:
            output = model(**inputs)
        watched[looked[k]] = [watch.found[layer][0].tolist() for layer in sorted(watch.found)]
        return output

    generate(called, subject, noise, text, steps, dtype, guidance=1.0)
    layers = torch.tensor([watched[name] for name in looked.values()]).mean(0)
    return {"kept": list(KEPT), "chunk": CHUNK, "layers": layers.tolist(), "moments": watched}


def table(mass: dict) -> str:
    """Layers as lines, shares of the columns as columns."""
    head = "layer  " + "  ".join(f"{100 * kept:4.1f}%" for kept in mass["kept"])
    lines = [f"{i:5d}  " + "  ".join(f"{m:5.3f}" for m in row) for i, row in enumerate(mass["layers"])]
    return "\n".join([f"attention mass of the best columns, chunk {mass['chunk']}", head, *lines])
