"""Attention against independent references, rotary positions by their properties, and the cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtxlib.model import layers
from mtxlib.model.layers import (
    Cache,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    SelfAttention,
    attend,
    rotary,
)

B, H, T, K, E = 3, 2, 5, 7, 8
D = H * E
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.03, "rtol": 0.03}}


def slow_attention(q, k, v, may_attend):
    """Query by query, in float64; may_attend (B, H, T, K)."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])):
        keys = may_attend[b, h, t].nonzero()[:, 0]
        weights = torch.tensor([math.exp(q[b, h, t] @ k[b, h, i] / math.sqrt(q.shape[-1])) for i in keys])
        y[b, h, t] = (weights / weights.sum()).double() @ v[b, h, keys]
    return y.transpose(1, 2).reshape(len(q), q.shape[2], -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["all", "padding", "causal", "rows"])
def test_attend_is_softmax_attention(kind, dtype):
    g = torch.Generator().manual_seed(1)
    keys = T if kind == "causal" else K
    q, k, v = (torch.randn(B, H, n, E, generator=g).to(dtype) for n in (T, keys, keys))
    may_attend = {"padding": (torch.arange(K) < torch.tensor([[7], [1], [4]]))[:, None, None],
                  "rows": F.pad(torch.rand(B, 1, T, K - 1, generator=g) < 0.5, (1, 0), value=True)}.get(kind)
    expected = torch.ones(T, keys).tril().bool() if kind == "causal" else torch.ones(T, keys, dtype=torch.bool)
    expected = (expected if may_attend is None else may_attend).expand(B, H, T, keys)
    ours = attend(q, k, v, may_attend, causal=kind == "causal")
    assert ours.shape == (B, T, D) and ours.dtype == dtype
    torch.testing.assert_close(ours.double(), slow_attention(q, k, v, expected), **TOLERANCE[dtype])
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=expected).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_gradients_of_the_bf16_path_are_those_of_fp32():
    g = torch.Generator().manual_seed(2)
    tensors = [torch.randn(B, H, T, E, generator=g).bfloat16() for _ in range(3)]
    grads = []
    for dtype in TOLERANCE:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        grads.append(torch.autograd.grad(attend(*leaves, causal=True).float().square().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b.float(), a, atol=0.1, rtol=0.1)


def reference(weight, out):
    mha = nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    mha.in_proj_weight.data, mha.out_proj.weight.data = weight.data, out.data
    return mha


def test_self_attention_without_positions_is_torchs(monkeypatch):
    monkeypatch.setattr(layers, "rotary", lambda x: x)
    ours, x = SelfAttention(D, H), torch.randn(B, T, D)
    theirs = reference(ours.qkv.weight, ours.out.weight)
    is_pad = torch.arange(T) >= torch.tensor([[5], [2], [3]])
    torch.testing.assert_close(ours(x, ~is_pad[:, None, None]), theirs(x, x, x, key_padding_mask=is_pad)[0])
    future = torch.ones(T, T).triu(1).bool()
    torch.testing.assert_close(ours(x, causal=True), theirs(x, x, x, attn_mask=future)[0])


def test_cross_attention_is_torchs():
    ours, x, memory = CrossAttention(D, H), torch.randn(B, T, D), torch.randn(B, K, D)
    theirs = reference(torch.cat([ours.q.weight, ours.kv.weight]), ours.out.weight)
    is_pad = torch.arange(K) >= torch.tensor([[7], [1], [3]])
    got = ours(x, ours.keys_values(memory), ~is_pad[:, None, None])
    torch.testing.assert_close(got, theirs(x, memory, memory, key_padding_mask=is_pad)[0])


# -- rotary positions -----------------------------------------------------------------------------------------------

def test_rotary_turns_pairs_of_channels_as_complex_numbers():
    x = torch.randn(B, H, T, E, dtype=torch.float64)
    z = torch.complex(x[..., :E // 2], x[..., E // 2:])
    for t in range(T):
        for i in range(E // 2):
            angle = t * 10_000 ** (-2 * i / E)
            z[:, :, t, i] *= complex(math.cos(angle), math.sin(angle))
    turned = rotary(x)
    torch.testing.assert_close(turned, torch.cat([z.real, z.imag], -1), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(E).expand(1, 1, 40, E), torch.randn(E).expand(1, 1, 40, E)
    scores = (rotary(q) @ rotary(k).transpose(-1, -2))[0, 0]
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores[0].std() > 0.1, "and they do depend on it"


def test_rotary_keeps_lengths_and_what_stands_first():
    x = torch.randn(B, H, T, E)
    turned = rotary(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


# -- the cache ------------------------------------------------------------------------------------------------------

def stack(cross):
    """Two blocks with weights unlike those of a new one, their memory, and the blocks one after the other."""
    blocks = nn.ModuleList(DecoderBlock(D, H, cross=cross) for _ in range(2)).eval()
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.3)
    memory = [b.cross.keys_values(torch.randn(B, K, D)) if cross else None for b in blocks]

    def full(x, added, rows, may_attend=None):
        for block, more, kv in zip(blocks, added, memory, strict=True):
            x = block(x + more, kv and (kv[0][rows], kv[1][rows]), may_attend)
        return x

    return blocks, memory, full


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("prefill", [1, 3])
def test_cached_steps_are_the_full_pass(prefill, cross):
    """With sequences leaving on the way."""
    blocks, memory, full = stack(cross)
    x, added, may_attend = torch.randn(B, T, D), torch.randn(2, B, T, D), torch.rand(B, 1, 1, K) < 0.7
    may_attend[..., 0] = True
    expected = full(x, added, slice(None), may_attend if cross else None)
    cache, rows, seen = Cache(blocks, B, T, memory, may_attend if cross else None), torch.arange(B), 0
    while seen < T:
        end = seen + (1 if seen else prefill)
        step = cache.read(x[rows, seen:end], [a[rows, seen:end].flatten(0, 1) for a in added])
        torch.testing.assert_close(step, expected[rows, seen:end], atol=1e-5, rtol=1e-4)
        seen = end
        if seen == T - 1:
            cache.keep(torch.tensor([2, 0]))
            rows = rows[[2, 0]]
    assert cache.length == T


def test_a_cache_that_is_full_or_fed_too_much_says_so():
    blocks, memory, _ = stack(cross=False)
    x = torch.randn(B, 4, D)
    with pytest.raises(ValueError, match="holds 3 positions .* got 4 after 0"):
        Cache(blocks, B, 3).read(x)
    cache = Cache(blocks, B, 4)
    cache.read(x[:, :1])
    with pytest.raises(ValueError, match="takes one at a time: got 2 after 1"):
        cache.read(x[:, 1:3])


# -- blocks ---------------------------------------------------------------------------------------------------------

def test_encoder_block_does_not_see_padding():
    block, x = EncoderBlock(D, H).eval(), torch.randn(B, T, D)
    is_real = torch.arange(T) < 3
    y = block(x, is_real.expand(B, 1, 1, T))
    torch.testing.assert_close(y[:, :3], block(x[:, :3], torch.ones(B, 1, 1, 3, dtype=torch.bool)))


@pytest.mark.parametrize("cross", [True, False])
def test_decoder_block_is_causal(cross):
    block, x, memory = DecoderBlock(D, H, cross=cross).eval(), torch.randn(B, T, D), torch.randn(B, K, D)
    kv = block.cross.keys_values(memory) if cross else None
    changed = x.clone()
    changed[:, 3:] += 1
    a, b = block(x, kv), block(changed, kv)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().min(-1).values.max() > 1e-4
    if cross:
        assert (block(x, block.cross.keys_values(memory + 1)) - a).abs().max() > 1e-4


def test_dropout_is_for_training_only():
    block, x = EncoderBlock(D, H, dropout=0.5), torch.randn(B, T, D)
    may_attend = torch.ones(B, 1, 1, T, dtype=torch.bool)
    assert not torch.equal(block(x, may_attend), block(x, may_attend))
    block.eval()
    assert torch.equal(block(x, may_attend), block(x, may_attend))
