"""Transformer layers; they know no music.

Pre-norm blocks, rotary positions on queries and keys (Su 2021, RoFormer), PyTorch's scaled dot product attention, and
a key-value cache for decoding. `may_attend` is boolean, True where a query may look at a key.

Shapes: B batch, T queries, K keys, D width, H heads, E = D / H.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def without_onednn():
    """Within it PyTorch uses its own kernels on a CPU: oneDNN's GELU of one token takes 40 microseconds, theirs one."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def angles(length: int, channels: int, device: torch.device) -> Tensor:
    """Of positions 0 … length - 1, for each pair of channels (Vaswani 2017), (length, channels / 2)."""
    half = channels // 2
    return torch.arange(length, device=device)[:, None] * 10_000.0 ** (-torch.arange(half, device=device) / half)


def rotary(x: Tensor) -> Tensor:
    """Turn each pair of channels i, i + E / 2 of x (B, H, T, E) by the angle of its position."""
    angle = angles(x.shape[2], x.shape[3], x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.addcmul(x * torch.cat([cos, cos], -1), x.roll(x.shape[3] // 2, -1), torch.cat([-sin, sin], -1))


def attend(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor | None = None, causal: bool = False,
           dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(E)) v of q (B, H, T, E), k and v (B, H, K, E) -> (B, T, H * E).

    PyTorch's fused kernel, except in bf16 on a CPU, where torch 2.13's is four to eight times slower than products.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            may_attend = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if may_attend is not None:
            scores = scores + torch.zeros_like(may_attend, dtype=q.dtype).masked_fill(~may_attend, -torch.inf)
        y = scores.softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, is_causal=causal, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, may_attend: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, T, D) -> (B, T, D). `may_attend` (B, 1, 1 or T, K)."""
        qk, v = split_heads(self.qkv(x), 3 * self.n_heads).split((2 * self.n_heads, self.n_heads), dim=1)
        q, k = rotary(qk).chunk(2, dim=1)
        return self.out(attend(q, k, v, may_attend, causal, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    """Attention over a memory (B, K, D) that has no order of its own: positions come with the memory."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.kv = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.kv(memory), 2 * self.n_heads).chunk(2, dim=1)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], may_attend: Tensor | None = None) -> Tensor:
        q = split_heads(self.q(x), self.n_heads)
        return self.out(attend(q, *keys_values, may_attend, dropout=self.dropout if self.training else 0.0))


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)  # (B, T, D) -> (B, H, T, D / H)


class MLP(nn.Module):
    def __init__(self, d_model: int, ratio: int = 4):
        super().__init__()
        self.up = nn.Linear(d_model, ratio * d_model, bias=False)
        self.down = nn.Linear(ratio * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class EncoderBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads, dropout)
        self.mlp = MLP(d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, may_attend: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), may_attend))
        return x + self.drop(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Causal self-attention, then (with `cross`) attention over the latent memory, then the MLP."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, cross: bool = True):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, n_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model) if cross else None
        self.cross = CrossAttention(d_model, n_heads, dropout) if cross else None
        self.mlp = MLP(d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None,
                may_attend: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), causal=True))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norm2(x), memory, may_attend))
        return x + self.drop(self.mlp(self.norm3(x)))


class Cache:
    """`DecoderBlock`s that read a few tokens at a time: their weights, and the keys and values of up to `size` tokens
    of `batch` sequences. `told`: what else the caller keeps of each. It computes what the blocks do, without dropout,
    in as few operations as there are: of one token, each costs more in being called than in computing. The channels of
    queries and keys are laid out so that a complex product turns them.
    """

    def __init__(self, blocks: nn.ModuleList, batch: int, size: int, memory: list | None = None,
                 may_attend: Tensor | None = None, told: Tensor | None = None):
        weight, H = blocks[0].attention.qkv.weight, blocks[0].attention.n_heads
        D, device = weight.shape[1], weight.device
        pairs = torch.arange(D, device=device).view(H, 2, -1).transpose(1, 2).flatten()
        order = torch.cat([pairs, pairs + D, torch.arange(2 * D, 3 * D, device=device)])
        self.layers = [(norm_of(block.norm1), block.attention.qkv.weight[order], block.attention.out.weight.t(),
                        block.cross and (norm_of(block.norm2), block.cross.q.weight, block.cross.out.weight.t()),
                        norm_of(block.norm3), block.mlp.up.weight, block.mlp.down.weight.t()) for block in blocks]
        self.size, self.length = size, 0
        self.memory, self.may_attend, self.told = memory or [None] * len(blocks), may_attend, told
        self.kept = torch.zeros(len(blocks), batch, 2, H, size, D // H, device=device, dtype=weight.dtype)
        angle = angles(size, D // H, device)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        self.turn = torch.stack([turn, turn, torch.ones_like(turn)], 1)  # of queries, keys, values: (size, 3, 1, E / 2)

    def read(self, x: Tensor, added: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D), which follows what was read, and what each layer adds to it -> (B, T, D). Several tokens can be
        read at once at the beginning only. Raises ValueError when there is no room for them, or at another time."""
        (B, T, D), start, end = x.shape, self.length, self.length + x.shape[1]
        if end > self.size or start and T > 1:
            raise ValueError(f"the cache holds {self.size} positions and, when filled, takes one at a time: got {T} "
                             f"after {start}")
        self.length, H, x = end, self.kept.shape[3], x.flatten(0, 1)
        for i, (norm1, qkv, out, cross, norm3, up, down) in enumerate(self.layers):
            if added is not None:
                x = x + added[i]
            q_k_v = F.linear(torch.layer_norm(x, *norm1), qkv).view(B, T, 3, H, -1, 2)
            q_k_v = torch.view_as_real(torch.view_as_complex(q_k_v) * self.turn[start:end]).flatten(-2).transpose(1, 3)
            self.kept[i, :, :, :, start:end] = q_k_v[:, :, 1:].transpose(1, 2)
            k, v = self.kept[i, :, :, :, :end].unbind(1)
            y = F.scaled_dot_product_attention(q_k_v[:, :, 0], k, v, is_causal=T > 1)
            x = torch.addmm(x, y.transpose(1, 2).reshape(B * T, D), out)
            if cross is not None:
                norm2, to_q, out = cross
                q = F.linear(torch.layer_norm(x, *norm2), to_q).view(B, T, H, -1).transpose(1, 2)
                y = F.scaled_dot_product_attention(q, *self.memory[i], self.may_attend)
                x = torch.addmm(x, y.transpose(1, 2).reshape(B * T, D), out)
            x = torch.addmm(x, F.gelu(F.linear(torch.layer_norm(x, *norm3), up)), down)
        return x.view(B, T, D)

    def keep(self, rows: Tensor) -> "Cache":
        """Go on with the sequences at `rows` (indices into the batch) only."""
        self.kept = self.kept[:, rows]
        self.memory = [m and (m[0][rows], m[1][rows]) for m in self.memory]
        self.may_attend, self.told = (x if x is None else x[rows] for x in (self.may_attend, self.told))
        return self


def norm_of(norm: nn.LayerNorm) -> tuple:
    """What `torch.layer_norm` wants after x."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps
