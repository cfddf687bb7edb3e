"""Transformer layers; they know no music.

Pre-norm blocks, rotary positions on queries and keys (Su 2021, RoFormer), PyTorch's scaled dot product attention, and
a key-value cache that grows in place while decoding. Nothing is masked by adding numbers: `may_attend` is a boolean
tensor, True where a query may look at a key.

Shapes: B batch, T queries, K keys, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotation(start: int, end: int, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, E) each, by which `rotary` turns `channels` channels at the positions start … end - 1."""
    half = channels // 2
    freq = 10_000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
    angle = torch.arange(start, end, device=like.device, dtype=torch.float32)[:, None] * freq
    cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotary(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels of x (B, H, T, E) by an angle that grows with its position, `by` a `rotation`."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, may_attend: Tensor | None = None, causal: bool = False,
           dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(E)) v of q (B, H, T, E), k and v (B, H, K, E) -> (B, T, H * E).

    PyTorch's fused kernel, except in bf16 on a CPU, where torch 2.13's is four to eight times slower than three plain
    operations.
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


class Cache:
    """Keys and values of one attention layer, written in place: a step costs no copy of the past."""

    def __init__(self, batch: int, heads: int, size: int, channels: int, like: Tensor):
        self.k = torch.zeros(batch, heads, size, channels, device=like.device, dtype=like.dtype)
        self.v = torch.zeros_like(self.k)
        self.cos, self.sin = rotation(0, size, channels, like)
        self.length = 0

    def rotation(self, n: int) -> tuple[Tensor, Tensor]:
        """`rotation` of the next n positions. Raises ValueError when there is no room for them."""
        end = self.length + n
        if end > len(self.cos):
            raise ValueError(f"the cache holds {len(self.cos)} positions, got {end}: make a larger one")
        return self.cos[self.length:end], self.sin[self.length:end]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences that are finished: keep those at `rows` (indices into the batch)."""
        self.k, self.v = self.k[rows], self.v[rows]


class SelfAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, may_attend: Tensor | None = None, causal: bool = False,
                cache: Cache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). `may_attend` (B, 1, 1 or T, K). With a cache, x continues what it holds."""
        T, start = x.shape[1], cache.length if cache else 0
        qk, v = split_heads(self.qkv(x), 3 * self.n_heads).split((2 * self.n_heads, self.n_heads), dim=1)
        q, k = rotary(qk, cache.rotation(T) if cache else rotation(0, T, qk.shape[-1], qk)).chunk(2, dim=1)
        if cache:
            if start and T > 1:
                raise ValueError(f"a filled cache takes one position at a time, got {T}")
            k, v = cache.append(k, v)
            causal = causal and start == 0
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
        k, v = (split_heads(y, self.n_heads) for y in self.kv(memory).chunk(2, dim=-1))
        return k, v

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

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, may_attend: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), causal=True, cache=cache))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norm2(x), memory, may_attend))
        return x + self.drop(self.mlp(self.norm3(x)))
