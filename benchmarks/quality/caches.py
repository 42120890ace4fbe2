"""Rivals that skip the blocks by what goes into them, for WanTransformer3DModel, written for comparison alone.

The model is cut where these methods cut it and each part is compiled, so that what they skip costs nothing else:
`enter` (embeddings and the first block's modulated input), `first` (block 0), `rest` (the other blocks), `leave`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PerStream:
    """One callable for a loop with guidance: each prompt's calls go to a state of their own, made by `make()`."""

    def __init__(self, make: Callable[[], Callable]) -> None:
        self.make, self.streams = make, {}

    def __call__(self, **inputs):
        key = id(inputs["encoder_hidden_states"])  # the same tensor at every step of a generation
        if key not in self.streams:
            self.streams[key] = self.make()
        return self.streams[key](**inputs)


class Parts:
    """The model in four compiled parts; `compiled` False leaves them as they are."""

    def __init__(self, model: torch.nn.Module, compiled: bool = True) -> None:
        self.model = model
        parts = {"enter": self._enter, "first": self._first, "rest": self._rest, "leave": self._leave}
        for name, part in parts.items():
            setattr(self, name, torch.compile(part, dynamic=False) if compiled else part)

    def _enter(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor):
        model = self.model
        rotary = model.rope(hidden_states)
        tokens = model.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        time, modulation, text, _ = model.condition_embedder(timestep, encoder_hidden_states, None)
        modulation = modulation.unflatten(1, (6, -1))
        block = model.blocks[0]
        shift, scale = (block.scale_shift_table + modulation.float()).chunk(6, dim=1)[:2]
        signal = block.norm1(tokens.float()) * (1 + scale) + shift
        return tokens, text, modulation, time, rotary, signal

    def _first(self, tokens: Tensor, text: Tensor, modulation: Tensor, rotary) -> Tensor:
        return self.model.blocks[0](tokens, text, modulation, rotary)

    def _rest(self, tokens: Tensor, text: Tensor, modulation: Tensor, rotary) -> Tensor:
        for block in self.model.blocks[1:]:
            tokens = block(tokens, text, modulation, rotary)
        return tokens

    def _leave(self, tokens: Tensor, time: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        model = self.model
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        p_t, p_h, p_w = model.config.patch_size
        grid = (len(tokens), frames // p_t, rows // p_h, columns // p_w, p_t, p_h, p_w, -1)
        patches = model.proj_out(tokens).reshape(grid).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    return (now.float() - before.float()).abs().mean() / before.float().abs().mean()


class TeaCache:
    """TeaCache (arXiv 2411.19108): while the first block's modulated input has changed little since the last computed
    step, summed over steps and rescaled by a polynomial fitted to this model, the blocks' last residual stands in."""

    def __init__(self, parts: Parts, threshold: float, coefficients: list[float]) -> None:
        self.parts, self.threshold, self.coefficients = parts, threshold, coefficients
        self.before = self.residual = None
        self.sum = 0.0

    def __call__(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict=False):
        parts = self.parts
        tokens, text, modulation, time, rotary, signal = parts.enter(hidden_states, timestep, encoder_hidden_states)
        if self.residual is not None:
            change = relative_change(signal, self.before).item()
            self.sum += max(0.0, sum(c * change**power for power, c in enumerate(self.coefficients)))
        self.before = signal
        if self.residual is None or self.sum >= self.threshold:
            after = parts.rest(parts.first(tokens, text, modulation, rotary), text, modulation, rotary)
            self.residual, self.sum = after - tokens, 0.0
        else:
            after = tokens + self.residual
        return (parts.leave(after, time, *hidden_states.shape[2:]),)


class FirstBlock:
    """First-block cache (ParaAttention): while block 0's residual is nearly what it was at the last computed step, the
    other blocks' residual of then stands in."""

    def __init__(self, parts: Parts, threshold: float) -> None:
        self.parts, self.threshold = parts, threshold
        self.before = self.residual = None

    def __call__(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict=False):
        parts = self.parts
        tokens, text, modulation, time, rotary, _ = parts.enter(hidden_states, timestep, encoder_hidden_states)
        first = parts.first(tokens, text, modulation, rotary)
        change = first - tokens
        if self.before is None or relative_change(change, self.before).item() >= self.threshold:
            after = parts.rest(first, text, modulation, rotary)
            self.before, self.residual = change, after - first
        else:
            after = first + self.residual
        return (parts.leave(after, time, *hidden_states.shape[2:]),)


def fit_teacache(parts: Parts, generate: Callable[[Callable], object], degree: int = 4) -> list[float]:
    """Coefficients (lowest power first) of the change of the blocks' output in the change of their input, over one
    dense generation, as TeaCache's authors fit them. generate(called) runs it."""
    points: list[tuple[float, float]] = []

    class Recorder(TeaCache):
        after = None

        def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
            tokens, text, modulation, time, rotary, signal = parts.enter(hidden_states, timestep, encoder_hidden_states)
            after = parts.rest(parts.first(tokens, text, modulation, rotary), text, modulation, rotary)
            if self.after is not None:
                points.append((
                    relative_change(signal, self.before).item(), relative_change(after, self.after).item()
                ))  # fmt: skip
            self.before, self.after = signal, after
            return (parts.leave(after, time, *hidden_states.shape[2:]),)

    generate(PerStream(lambda: Recorder(parts, 0.0, [])))
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    powers = x[:, None] ** torch.arange(min(degree, len(x) - 1) + 1)
    return torch.linalg.lstsq(powers, y[:, None]).solution.flatten().tolist()
