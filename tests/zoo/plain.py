"""Diffusion transformers in plain PyTorch, as people write them: one frame, and ways to spell attention and MLP.

The frame is the first DiT's: a convolution makes patches, positions are added, every block is modulated by the
timestep and a pooled condition (adaLN). Latents [batch, 4, 16, 16] make 64 tokens; the condition is [batch, 20].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_parts import Random, Tiny, randomised, timestep
from tests.zoo.entry import Entry

DIM, HEADS, HIDDEN, TOKENS = 32, 2, 72, 64


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequencies: int = 20) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        args = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class PlainDiT(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, DIM, kernel_size=2, stride=2)
        self.t_embedder = TimestepEmbedder(DIM)
        self.y_embedder = nn.Linear(20, DIM)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, DIM))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(DIM, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.linear(self.norm(x)).reshape(-1, 8, 8, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 4, 16, 16)


# --- attention ---


class TimmAttention(nn.Module):
    """One linear for query, key and value, taken apart by reshape, permute and unbind."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.scale = (DIM // HEADS) ** -0.5
        self.fused = fused
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class EinsumAttention(nn.Module):
    """What einops code comes to: 'b n (h d) -> (b h) n d' by unflatten and flatten, products by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_kv = nn.Linear(DIM, 2 * DIM, bias=False)
        self.to_out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1) for t in (self.to_q(x), k, v))
        sim = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bij,bjd->bid", sim.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)
        return self.to_out(out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))


class GroupedAttention(nn.Module):
    """Grouped heads by `enable_gqa`, RMS norm of queries and keys, and a boolean key mask in full size."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM // 2, bias=False)
        self.v_proj = nn.Linear(DIM, DIM // 2, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, n, -1, 8)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, n, -1, 8)).transpose(1, 2)
        v = self.v_proj(x).view(b, n, -1, 8).transpose(1, 2)
        valid = torch.arange(n, device=x.device) < n - 3
        mask = valid[None, None, None, :].expand(b, 1, n, n)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


# --- MLP ---


class TimmMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, HIDDEN)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(HIDDEN, DIM)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12 = nn.Linear(DIM, 2 * HIDDEN)
        self.w3 = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class MatmulMlp(nn.Module):
    """Weights [in, out] as GPT-2 keeps them: x @ w, and addmm on flat tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(DIM, HIDDEN))
        self.b1 = nn.Parameter(torch.empty(HIDDEN))
        self.w2 = nn.Parameter(torch.empty(HIDDEN, DIM))
        self.b2 = nn.Parameter(torch.empty(DIM))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(x @ self.w1 + self.b1)
        return torch.addmm(self.b2, h.view(-1, HIDDEN), self.w2).view(x.shape)


class ConvMlp(nn.Module):
    """1x1 convolutions on [batch, channels, tokens]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(DIM, HIDDEN, 1), nn.GELU(), nn.Conv1d(HIDDEN, DIM, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2)).transpose(1, 2)


# --- blocks of another kind ---


class EncoderLayerBlock(nn.Module):
    """nn.TransformerEncoderLayer, the condition added in front."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.cond = nn.Linear(DIM, DIM)
        self.layer = nn.TransformerEncoderLayer(
            DIM, HEADS, HIDDEN, activation="gelu", batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layer(x + self.cond(c).unsqueeze(1))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side out of one linear, joined by one linear (ViT-22B, FLUX's single blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(DIM, 3 * DIM)
        self.linear1 = nn.Linear(DIM, 3 * DIM + HIDDEN)
        self.linear2 = nn.Linear(DIM + HIDDEN, DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        qkv, mlp = torch.split(self.linear1(modulate(self.norm(x), shift, scale)), [3 * DIM, HIDDEN], dim=-1)
        b, n, _ = x.shape
        q, k, v = qkv.view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attn = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + gate.unsqueeze(1) * self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), 2))


class AutocastBlock(DiTBlock):
    """Autocast inside the model: products in bfloat16, what adds up in float32."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = super().forward(x, c)
        return out.float()


def _tiny(block: Callable[[], nn.Module]) -> Callable[[], Tiny]:
    def build() -> Tiny:
        randn = Random()
        return randomised(PlainDiT(block)), dict(x=randn(2, 4, 16, 16), t=timestep(2), y=randn(2, 20))

    return build


def _entry(name: str, block: Callable[[], nn.Module], **fields) -> Entry:
    return Entry(name, _tiny(block), ("x",), ("t",), **fields)


ENTRIES = (
    _entry("plain: DiT, timm Attention and Mlp", lambda: DiTBlock(TimmAttention(), TimmMlp())),
    _entry("plain: explicit softmax, SwiGLU", lambda: DiTBlock(TimmAttention(fused=False), SwiGLU())),
    _entry("plain: nn.MultiheadAttention", lambda: DiTBlock(MultiheadAttention(), TimmMlp())),
    _entry("plain: nn.TransformerEncoderLayer", lambda: EncoderLayerBlock(norm_first=False)),
    _entry("plain: nn.TransformerEncoderLayer, norm first", lambda: EncoderLayerBlock(norm_first=True)),
    _entry("plain: einsum", lambda: DiTBlock(EinsumAttention(), SwiGLU())),
    _entry("plain: enable_gqa, boolean key mask", lambda: DiTBlock(GroupedAttention(), SwiGLU())),
    _entry("plain: matmul and addmm", lambda: DiTBlock(TimmAttention(), MatmulMlp())),
    _entry("plain: 1x1 convolutions", lambda: DiTBlock(TimmAttention(), ConvMlp())),
    _entry("plain: parallel block", ParallelBlock),
    _entry("plain: autocast inside", lambda: AutocastBlock(TimmAttention(), TimmMlp()), tolerance=2e-2),
)
