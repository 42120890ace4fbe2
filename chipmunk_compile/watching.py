"""What one attention or MLP shows of itself at one step: how concentrated it is, and how it changed since.

A few chunks stand for all of them. Concentration of attention is measured over whole chunks; what has to be kept to the
next step (outputs, activations) is kept for a few of their tokens. Nothing is read from the device: every look returns
a small tensor of numbers, named by `names`, NaN where a number has no meaning yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from .concentration import attention_logits, attention_weights, columns_holding, head_blocks, held_by_best, top_shares
from .kernels.reference import MASKED, choose, key_bias, sample_table, wide
from .passes.lower import Treatment

SHARES = (0.05, 0.1, 0.2, 0.3)  # of the columns
PARTS = (0.9, 0.95)  # of the mass


@dataclass(eq=False)
class Memory:
    """What one site keeps in one stream from step to step."""

    tensors: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for kept in self.tensors.values() for tensor in kept)

    def put(self, name: str, chunk: int, tensor: Tensor) -> None:
        """Chunks are put in their order the first time."""
        kept = self.tensors.setdefault(name, [])
        kept[chunk : chunk + 1] = [tensor]


@dataclass(frozen=True)
class Chunk:
    """One chunk that is looked at."""

    start: int
    length: int
    kept: Tensor  # tokens of it that are remembered, evenly spaced, counted from its start; int64
    choosing: Tensor  # tokens whose rows choose its columns, by the rule of the programs


def sample_chunks(treatment: Treatment, chunks: int, tokens: int) -> tuple[Chunk, ...]:
    """At most `chunks` of a site's chunks, evenly spaced, with at most `tokens` tokens of each to remember."""
    starts = torch.tensor([0, *accumulate(treatment.chunks)])
    choosing = sample_table(starts, treatment.samples).long()
    device = treatment.site.node.meta["val"].device
    found = []
    for c in _evenly(len(treatment.chunks), chunks).tolist():
        start, length = int(starts[c]), treatment.chunks[c]
        kept, choose = _evenly(length, tokens), choosing[c] - start
        found.append(Chunk(start, length, kept.to(device), choose.to(device)))
    return tuple(found)


def _evenly(count: int, most: int) -> Tensor:
    """At most `most` of `count` positions, each the middle of an equal stretch."""
    taken = min(count, most)
    return ((torch.arange(taken, dtype=torch.float64) + 0.5) * count / taken).long()


class AttentionWatch:
    """Looks at one self-attention.

    mass_<n>      part of a chunk's attention mass that its best n% of the columns hold
    columns_<n>   share of the columns that hold n% of the mass
    mass_chosen   part of the mass in the columns chosen at the last refresh
    change        of the output since the step before, relative L2
    caught        part of the output's change since the last refresh (squared L2) that a delta step would follow: what
                  it leaves out is 1 - caught. Negative where the delta would be worse than the output of the refresh.
    """

    names = (
        *(f"mass_{share * 100:g}" for share in SHARES),
        *(f"columns_{part * 100:g}" for part in PARTS),
        "mass_chosen",
        "change",
        "caught",
    )

    def __init__(self, treatment: Treatment, chunks: int, tokens: int) -> None:
        self.site, self.kept = treatment.site, max(1, treatment.kept)
        self.chunks = sample_chunks(treatment, chunks, tokens)

    def look(
        self, memory: Memory, refresh: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor
    ) -> Tensor:
        """query, out: [B, H, N, D]; key, value: [B, Hkv, M, D]; mask: [B or 1, 1, 1, M] or None.

        refresh: columns are chosen here; else those of the last refresh count. Returns [len(names)], float32.
        """
        bias = key_bias(mask, wide(query.dtype))
        first = "out" not in memory.tensors
        held, before, since = [], _Ratio(out.device), _Ratio(out.device)
        for c, chunk in enumerate(self.chunks):
            rows = slice(chunk.start, chunk.start + chunk.length)
            now = out[:, :, rows].index_select(2, chunk.kept)  # [B, H, r, D]
            columns = [] if refresh else memory.tensors["columns"][c].split(self._block(chunk, query, key), 1)
            sparse, shares = [], []
            for block, heads in head_blocks(query, key, chunk.length):
                logits = attention_logits(query[:, block, rows], key.index_select(1, heads), self.site.scale, bias)
                weights = attention_weights(logits, bias)  # [B, h, L, M]
                if refresh:
                    columns.append(self._choose(weights.index_select(2, chunk.choosing).sum(2), bias))
                chosen = columns[len(sparse)]
                mass = weights.mean(2)  # [B, h, M]
                used = _used(chosen)
                in_chosen = mass.gather(-1, chosen.clamp_min(0).long()).masked_fill(~used, 0.0).sum(-1)
                best = held_by_best(mass)
                numbers = [*top_shares(best, SHARES), *columns_holding(best, PARTS), in_chosen]
                shares.append(torch.stack([number.float() for number in numbers]))
                sparse.append(_over_columns(logits.index_select(2, chunk.kept), value.index_select(1, heads), chosen))
            sparse = torch.cat(sparse, 1)
            held.append(torch.cat(shares, 2).flatten(1).mean(1))
            if not first:
                before.add(now.float() - memory.tensors["out"][c], now)
            if refresh:
                memory.put("columns", c, torch.cat(columns, 1))
                memory.put("o_cache", c, now - sparse.to(now.dtype))
                memory.put("refreshed", c, now)
            else:
                delta = memory.tensors["o_cache"][c] + sparse
                since.add(now.float() - delta, now.float() - memory.tensors["refreshed"][c])
            memory.put("out", c, now)
        changes = torch.stack([before.squared().sqrt(), 1 - since.squared()])
        return torch.cat([torch.stack(held).mean(0), changes])

    def _block(self, chunk: Chunk, query: Tensor, key: Tensor) -> int:
        block, _ = next(head_blocks(query, key, chunk.length))
        return block.stop - block.start

    def _choose(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Columns int32 [B, h, K]; -1 where the mask leaves fewer."""
        valid = None if bias is None else (bias > 0.5 * MASKED)[:, None].expand_as(scores)
        columns, counts = choose(scores, valid, min(self.kept, scores.shape[-1]))
        position = torch.arange(columns.shape[-1], device=columns.device)
        return columns.masked_fill(position >= counts[..., None], -1)


class MlpWatch:
    """Looks at one MLP. Its neurons' change is weighted by the norm of their column of the down projection.

    energy_<n>    part of the energy (squared L2) of a chunk's change since the step before that its best n% of the
                  neurons hold
    caught        part of that energy in the neurons that a delta step would choose
    act_change    of the hidden activation since the step before, relative L2
    change        of the output, relative L2
    """

    names = (*(f"energy_{share * 100:g}" for share in SHARES[1:]), "caught", "act_change", "change")

    def __init__(self, treatment: Treatment, chunks: int, tokens: int) -> None:
        self.site, self.kept = treatment.site, max(1, treatment.kept)
        self.chunks = sample_chunks(treatment, chunks, tokens)

    def look(self, memory: Memory, activation: Tensor, down: Tensor, out: Tensor) -> Tensor:
        """activation: [..., N, F]; down: [O, F], the down projection; out: [..., N, O].

        Returns [len(names)], float32.
        """
        batch = self.site.batch
        activation, out = (t.reshape(batch, self.site.tokens, t.shape[-1]) for t in (activation, out))
        norm = torch.linalg.vector_norm(down, dim=0, dtype=wide(activation.dtype))  # [F]
        first = "activation" not in memory.tensors
        held, act_change, change = [], _Ratio(out.device), _Ratio(out.device)
        for c, chunk in enumerate(self.chunks):
            # What chooses is kept apart from what measures: else the choice would be judged by itself.
            tokens = chunk.start + torch.cat([chunk.choosing, chunk.kept])
            now, now_out = activation.index_select(1, tokens), out.index_select(1, tokens[len(chunk.choosing) :])
            if not first:
                moved = now.to(norm.dtype) - memory.tensors["activation"][c]
                choosing, measured = moved.split([len(chunk.choosing), len(chunk.kept)], 1)
                energy = measured.square().sum(1) * norm.square()  # [B, F]
                best = (choosing.abs().sum(1) * norm).topk(min(self.kept, energy.shape[-1])).indices
                total = energy.sum(-1)
                numbers = torch.stack(
                    [*top_shares(held_by_best(energy), SHARES[1:]), energy.gather(-1, best).sum(-1) / total]
                )
                held.append(numbers.float().masked_fill(total == 0, torch.nan))  # what holds still has no energy
                act_change.add(measured, now[:, len(chunk.choosing) :])
                change.add(now_out.float() - memory.tensors["out"][c], now_out)
            memory.put("activation", c, now)
            memory.put("out", c, now_out)
        if first:
            return norm.new_full((len(self.names),), torch.nan, dtype=torch.float32)
        changes = torch.stack([act_change.squared().sqrt(), change.squared().sqrt()])
        return torch.cat([torch.cat(held, 1).nanmean(1), changes])


class _Ratio:
    """Squared L2 of one thing as a share of another's, over all that was added. NaN where nothing was."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: list[Tensor] = []

    def add(self, part: Tensor, whole: Tensor) -> None:
        self.parts.append(torch.stack([_energy(part), _energy(whole)]))

    def squared(self) -> Tensor:
        if not self.parts:
            return torch.tensor(torch.nan, device=self.device)
        part, whole = torch.stack(self.parts).sum(0)
        return part / whole


def _energy(tensor: Tensor) -> Tensor:
    return tensor.float().square().sum()


def _used(columns: Tensor) -> Tensor:
    return columns >= 0


def _over_columns(logits: Tensor, value: Tensor, columns: Tensor) -> Tensor:
    """Softmax over each chunk's columns alone @ V: [B, h, r, D] of logits [B, h, r, M] and columns [B, h, K]."""
    index = columns.clamp_min(0).long()
    picked = logits.gather(-1, index[:, :, None].expand(-1, -1, logits.shape[2], -1))
    weights = picked.masked_fill(~_used(columns)[:, :, None], MASKED).softmax(-1)
    values = value.gather(2, index[..., None].expand(-1, -1, -1, value.shape[-1]))
    return weights @ values.to(weights.dtype)
