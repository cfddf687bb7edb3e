"""The objective, in one place and one unit: **nats per sequence**.

A reconstruction is summed over the tokens of a window and a KL over all of its latent dimensions; both are then
averaged over the batch. So `recon + kl` is the negative evidence lower bound (Kingma 2013, eq. 3) and beta = 1 means
what it says. The classic mistake, kept to be shown as `recon_scale="token"`, averages the cross-entropy over tokens
while it sums the KL: that multiplies beta by the length of the window.

Shapes: B batch, T tokens, V vocabulary, S latent rows, C latent channels.
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Terms(NamedTuple):
    loss: Tensor  # what is differentiated
    recon: Tensor  # nats per sequence
    kl: Tensor  # nats per sequence, raw
    kl_loss: Tensor  # nats per sequence, after free bits and target rate


def reconstruction(logits: Tensor, targets: Tensor, is_pad: Tensor) -> Tensor:
    """Cross-entropy of logits (B, T, V) against targets (B, T), summed over real tokens: (B,) nats."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view(targets.shape).masked_fill(is_pad, 0.0).sum(1)


def kl_per_dim(mu: Tensor, logvar: Tensor, is_live: Tensor) -> Tensor:
    """KL(N(mu, exp logvar) || N(0, 1)) of each dimension, (B, S, C) nats, 0 in rows that are not live (B, S)."""
    mu, logvar = mu.float(), logvar.float()
    kl = 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)
    return kl.masked_fill(~is_live[..., None], 0.0)


def entropy(logvar: Tensor) -> Tensor:
    """Of N(mu, exp logvar), summed over the channels of each row: logvar (B, S, C) -> (B, S) nats."""
    return 0.5 * (logvar.float() + 1 + math.log(2 * math.pi)).sum(-1)


def normal_share(step: int, warmup: int) -> float:
    """Share of the KL to N(0, I), beside that to a joint prior: from 1 to 0.1 over `warmup` steps, so that the latent
    keeps its size while the prior still learns where it lies."""
    return max(0.1, 1 - 0.9 * step / max(1, warmup))


def objective(recon: Tensor, kl: Tensor, beta: float | Tensor, *, free_bits: float = 0.0, target_rate: float = 0.0,
              recon_scale: str = "sequence", n_tokens: Tensor | None = None) -> Terms:
    """loss = recon + beta * kl_loss.

    recon (B,) and kl (B, S, C) in nats. kl_loss counts each dimension's batch mean, but never as less than `free_bits`
    nats (Kingma 2016, eq. 15 with one group a dimension), so a dimension may be cheap for one window and dear for
    another; or, with a target rate C, it is |KL - C| (Burgess 2018, eq. 8), which holds the rate at C nats.
    `recon_scale="token"` divides recon by each window's `n_tokens` (B,) and leaves the KL summed.
    """
    mean = kl.mean(0)
    raw = mean.sum()
    counted = (raw - target_rate).abs() if target_rate else mean.clamp(min=free_bits).sum()
    scaled = recon / n_tokens if recon_scale == "token" else recon
    return Terms(scaled.mean() + beta * counted, recon.mean(), raw, counted)


def beta_at(step: int, schedule: str, beta_max: float, warmup: int) -> float:
    """The weight of the KL at a step: from 0 to beta_max over `warmup` steps (linear, Bowman 2016), in each cycle of as
    many over its first half (cyclical, Fu 2019, R = 0.5), or beta_max from the start (constant). `rate` has no clock,
    see `steer`.
    """
    if schedule not in ("constant", "linear", "cyclical"):
        raise ValueError(f"beta_schedule: expected constant, linear or cyclical, got {schedule!r}")
    if schedule == "constant" or warmup == 0:
        return beta_max
    return beta_max * min(1.0, step / warmup if schedule == "linear" else 2 * (step % warmup) / warmup)


def steer(beta: Tensor, kl: Tensor, target_rate: float, beta_max: float, gain: float = 0.02) -> Tensor:
    """The next beta of schedule `rate`: more where the KL of a batch lies above the target, less where it lies below.
    An integral controller in log beta, after ControlVAE (Shao 2020): unlike |KL - C| it never rewards nats that the
    reconstruction has no use for. Over tensors, so that no GPU is waited for.
    """
    return (beta * (gain * (kl / target_rate - 1)).clamp(max=1.0).exp()).clamp(1e-4, beta_max)


def rate_at(step: int, target_rate: float, target_start: float, warmup: int) -> float:
    """The target rate at a step: from target_start (if given) down to target_rate over `warmup` steps."""
    if not target_start or step >= warmup:
        return target_rate
    return target_start + (target_rate - target_start) * step / warmup


def lr_at(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to `floor` (Loshchilov 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
