"""What an eager model really calls: its attention and its MLPs, found by watching functions, not by the matchers.

Every function that a forward calls is seen (TorchFunctionMode; nothing is patched). Attention is each call of
scaled_dot_product_attention, of PyTorch's fused layers, and each softmax of a product that is multiplied again. An MLP
is a linear map whose input comes through elementwise functions alone, not all of them affine, from linear maps of one
input. Whether a call belongs to the main path is told by running again with other latents, all else the same: the keys
of self-attention, and what an MLP reads, change; text, pooled conditions and timesteps do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """One attention or MLP that an eager forward ran. `left`: why it is none of the main path, "" where it is."""

    kind: str  # "attention" | "mlp"
    module: str  # path of the innermost module that ran it; of an MLP, the one of its last linear
    tokens: int  # queries of attention, rows for one sample of an MLP
    of: int  # keys of attention, hidden neurons of an MLP
    form: str  # attention: what was called; MLP: "two-layer", "gated", "fused"
    left: str = ""


CONSTANT = "constant: the same at every step"


def census(
    model: nn.Module,
    inputs: dict[str, Any],
    latents: dict[str, Any],
    times: dict[str, Any],
    min_tokens: int,
    batch: int,
) -> list[Call]:
    """The attention and MLPs of one forward. `latents`, `times`: those inputs at another step."""
    runs = [_watch(model, inputs | changed) for changed in ({}, latents, times)]
    assert len({len(run) for run in runs}) == 1, "another control flow for other latents"
    calls = []
    for seen, other_latents, other_times in zip(*runs):
        call = seen.call
        if call.kind == "mlp":
            call = replace(call, tokens=call.tokens // batch)
        if not seen.moves(other_latents):
            left = "conditioning: the same for other latents" if seen.moves(other_times) else CONSTANT
        elif len({run.evidence.shape for run in (seen, other_latents, other_times)}) > 1:
            left = "experts: tokens chosen by value"
        elif call.kind == "attention" and call.of < call.tokens:
            left = "cross-attention: fewer keys than queries"
        elif call.tokens < min_tokens:
            left = f"fewer than {min_tokens} tokens"
        else:
            left = call.left
        calls.append(replace(call, left=left))
    return calls


@dataclass(frozen=True)
class _Seen:
    call: Call
    evidence: Tensor  # the keys, or what the MLP reads

    def moves(self, other: _Seen) -> bool:
        return self.evidence.shape != other.evidence.shape or not torch.equal(self.evidence, other.evidence)


def _watch(model: nn.Module, kwargs: dict[str, Any]) -> list[_Seen]:
    watcher = _Watcher()
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: watcher.enter(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: watcher.leave(), always_call=True).remove)
        stack.enter_context(watcher)
        model(**kwargs)
    return watcher.seen


@dataclass(frozen=True)
class _Flow:
    """A value that is a function, element by element, of linear maps of one input."""

    source: Tensor  # that input
    form: str = "two-layer"  # or "gated", where two of them are multiplied, "fused" beside columns of something else
    activated: bool = False  # through something that is not affine


@dataclass(frozen=True)
class _Scores:
    """A product of activations; once through a softmax, attention weights [..., queries, keys]."""

    keys: Tensor
    size: torch.Size | None = None  # None before the softmax


ACTIVATIONS = {"gelu", "silu", "relu", "relu_", "sigmoid", "tanh", "square", "pow", "leaky_relu", "elu", "mish", "erf"}
ACTIVATIONS |= {"softplus", "hardswish", "relu6", "exp", "__pow__", "sigmoid_", "silu_"}
MULTIPLICATIONS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
ARITHMETIC = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "neg", "__neg__"}
ARITHMETIC |= {"div", "__truediv__", "__itruediv__", "clamp", "masked_fill", "masked_fill_", *MULTIPLICATIONS}
REARRANGEMENTS = {"view", "reshape", "transpose", "permute", "contiguous", "chunk", "split", "unbind", "__getitem__"}
REARRANGEMENTS |= {"flatten", "unflatten", "squeeze", "unsqueeze", "dropout", "to", "float", "type_as", "clone"}
REARRANGEMENTS |= {"expand", "narrow", "select", "__get__", "bfloat16", "half"}
# Where the operands that are multiplied lie: [.., i, k] and [.., k, j].
PRODUCTS = {"matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "einsum": 1, "baddbmm": 1, "addmm": 1}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.seen: list[_Seen] = []
        # What is known of a value, by its id; the value is kept, so that no id comes back.
        self._known: dict[int, tuple[Tensor, _Flow | _Scores]] = {}

    def enter(self, name: str) -> None:
        self.path.append(name)

    def leave(self) -> None:
        self.path.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operands = list(_tensors((args, kwargs)))
        known = [self._known.get(id(t), (t, None))[1] for t in operands]  # before: an op may write in place
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._attention(*args, **kwargs)
        elif name in ("multi_head_attention_forward", "_native_multi_head_attention"):
            # The first is called with the batch second.
            tokens = 0 if name == "multi_head_attention_forward" else 1
            self._note("attention", operands[0].shape[tokens], operands[1].shape[tokens], name, operands[1])
        elif name == "_transformer_encoder_layer_fwd":
            self._note("attention", operands[0].shape[1], operands[0].shape[1], name, operands[0])
            self._note("mlp", operands[0].shape[:2].numel(), args[15].shape[0], name, operands[0])
        elif name == "linear" or name in CONVOLUTIONS:
            self._map(operands[0], known[0], operands[1], result, name)
        elif name in PRODUCTS and len(operands) > 1:
            first = PRODUCTS[name] if name != "einsum" else 0
            self._product(name, operands[first:], known[first:], result)
        else:
            self._follow(name, operands, known, result)
        return result

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_) -> None:
        left = ""
        if is_causal:
            left = "causal"
        elif attn_mask is not None and not _is_key_mask(attn_mask):
            left = "a mask or bias that differs from query to query"
        self._note("attention", query.shape[-2], key.shape[-2], "sdpa", key, left)

    def _map(self, x: Tensor, flow: _Flow | _Scores | None, weight: Tensor, result: Tensor, name: str) -> None:
        """A linear map of the features of `x`: [batch, features, ...] for convolutions, else [..., features]."""
        if name in CONVOLUTIONS and any(size > 1 for size in weight.shape[2:]):
            return
        if isinstance(flow, _Flow) and flow.activated:
            source = flow.source
            hidden = x.shape[1 if name in CONVOLUTIONS else -1]
            self._note(
                "mlp", source.numel() // source.shape[1 if name in CONVOLUTIONS else -1], hidden, flow.form, source
            )
        self._learn(result, _Flow(x))

    def _product(self, name: str, operands: list[Tensor], known: list, result: Tensor) -> None:
        if isinstance(operands[1], nn.Parameter) and operands[1].dim() == 2:
            self._map(operands[0], known[0], operands[1], result, name)
            return
        weights = next((k for k in known if isinstance(k, _Scores) and k.size is not None), None)
        if weights is not None:
            self._note("attention", *weights.size[-2:], "softmax", weights.keys)
        elif result.dim() >= 3:
            self._learn(result, _Scores(operands[1]))

    def _follow(self, name: str, operands: list[Tensor], known: list, result: Any) -> None:
        if name in REARRANGEMENTS:
            known = known[:1]  # another operand lends its size or its dtype
        scores = next((k for k in known if isinstance(k, _Scores)), None)
        flows = [k for k in known if isinstance(k, _Flow)]
        if scores is not None:
            if name in ("softmax", "_softmax"):
                scores = replace(scores, size=operands[0].shape)
            if name in ARITHMETIC or name in REARRANGEMENTS or "softmax" in name:
                for value in _tensors(result):
                    self._learn(value, scores)
        elif not flows:
            return
        elif name in ACTIVATIONS:
            self._learn(result, replace(flows[0], activated=True))
        elif name in REARRANGEMENTS:
            for value in _tensors(result):
                self._learn(value, flows[0])
        elif name in ARITHMETIC:
            per_neuron = [t for t, k in zip(operands, known) if k is None and t.numel() <= operands[0].shape[-1]]
            if len(flows) + len(per_neuron) < len(operands) or any(f.source is not flows[0].source for f in flows):
                self._known.pop(id(result), None)  # something else flows in
            elif name in MULTIPLICATIONS and len(flows) == 2:
                self._learn(result, _Flow(flows[0].source, "gated", activated=True))
            else:
                self._learn(result, replace(flows[0], activated=any(f.activated for f in flows)))
        elif name in ("cat", "concat", "concatenate") and len({t.shape[:-1] for t in operands}) == 1:
            for flow in flows:
                if flow.activated:
                    self._learn(result, replace(flow, form="fused"))

    def _note(self, kind: str, tokens: int, of: int, form: str, evidence: Tensor, left: str = "") -> None:
        call = Call(kind, self.path[-1] if self.path else "", tokens, of, form, left)
        self.seen.append(_Seen(call, evidence.detach().clone()))

    def _learn(self, value: Tensor, what: _Flow | _Scores) -> None:
        self._known[id(value)] = (value, what)


def _is_key_mask(mask: Tensor) -> bool:
    """One row for all queries, but for queries (padding) that attend to nothing at all."""
    if mask.dtype != torch.bool:
        return bool((mask == mask[..., :1, :]).all())
    rows = mask.any(-2, keepdim=True)
    return bool(((mask == rows) | ~mask.any(-1, keepdim=True)).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
