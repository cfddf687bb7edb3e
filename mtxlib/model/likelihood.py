"""What a model does with a set of windows, teacher-forced: one pass, used in training and in the diagnosis.

N windows, S latent rows (the most of any window), C latent channels; nats throughout.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mtxlib.config import PAD
from mtxlib.data.store import Windows
from mtxlib.model.losses import entropy, kl_per_dim, reconstruction
from mtxlib.model.vae import MusicVAE, Posterior


@dataclass
class Measured:
    n_tokens: Tensor  # (N,) tokens that are predicted
    recon: Tensor  # (N,) nats, z sampled from the window's own posterior
    recon_shuffled: Tensor  # (N,) nats, z sampled from the posterior of a window of another piece
    recon_prior: Tensor  # (N,) nats, z from the prior
    mu: Tensor  # (N, S, C)
    logvar: Tensor  # (N, S, C)
    is_live: Tensor  # (N, S)
    to_joint: Tensor | None = None  # (N,) nats, KL to a joint prior by one sample each; None where there is none

    @property
    def rate(self) -> Tensor:
        """(N,) nats, KL to the prior that the model was trained with."""
        return self.kl.sum((1, 2)) if self.to_joint is None else self.to_joint

    @property
    def kl(self) -> Tensor:
        """(N, S, C) nats, 0 in rows that are not live."""
        return kl_per_dim(self.mu, self.logvar, self.is_live)

    def per_token(self, nats: Tensor) -> float:
        return float(nats.sum() / self.n_tokens.sum())

    def active_units(self, threshold: float = 0.01) -> float:
        """Share of latent dimensions whose posterior mean varies by more than `threshold` (Burda 2016, sec. 4.2)."""
        return float((self.mean_variance() > threshold).float().mean()) if self.mu.numel() else 0.0

    def mean_variance(self) -> Tensor:
        """Variance over the windows of the posterior mean of each dimension, (S, C); live rows only."""
        live = self.is_live[..., None].float()
        n = live.sum(0).clamp(min=1)
        mean = (self.mu * live).sum(0) / n
        return ((self.mu - mean).square() * live).sum(0) / n

    def summary(self) -> dict[str, float]:
        return {"recon": float(self.recon.mean()), "kl": float(self.rate.mean()),
                "recon_per_token": self.per_token(self.recon),
                "delta_nll_shuffled": self.per_token(self.recon_shuffled - self.recon),
                "active_units": self.active_units()}


def other_pieces(pieces: np.ndarray) -> np.ndarray:
    """For each window the index of a window of another piece, half the set away; its own where there is one piece."""
    n = len(pieces)
    partner = (np.arange(n) + n // 2) % n
    for i in np.flatnonzero(pieces[partner] == pieces):
        others = np.flatnonzero(pieces != pieces[i])
        partner[i] = others[i % len(others)] if len(others) else i
    return partner


@torch.no_grad()
def measure(model: MusicVAE, store: Windows, indices: np.ndarray, *, batch_size: int = 128, seed: int = 0,
            autocast=nullcontext) -> Measured:
    """Encode all windows, then decode each under three latents. Deterministic in `seed`; leaves `model.training` be."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    order = np.argsort(store.lengths[indices], kind="stable")
    indices = np.asarray(indices)[order]
    batches = [store.batch(indices[i:i + batch_size]).to(device) for i in range(0, len(indices), batch_size)]
    with autocast():
        posterior = stack([model.encode(*batch) for batch in batches])
    z = model.reparameterize(posterior, generator)
    partner = torch.from_numpy(other_pieces(store.windows["piece"][indices])).to(device)
    latents = ((z, posterior.is_live), (z[partner], posterior.is_live[partner]),
               (model.sample_prior(*z.shape[:2], generator), posterior.is_live))
    tensors = [torch.from_numpy(store.lengths[indices] - 1).to(device)]
    for told in latents:
        nats = []
        for (ids, slots), *part in zip(batches, *(x.split(batch_size) for x in told), strict=True):
            with autocast():
                logits = model.decode(ids[:, :-1], slots[:, :-1], *part)
            nats.append(reconstruction(logits, ids[:, 1:], ids[:, 1:] == PAD))
        tensors.append(torch.cat(nats))
    tensors += posterior
    if model.prior is not None:
        tensors.append((model.prior.window_nats(z) - entropy(posterior.logvar)).sum(1))
    model.train(was_training)
    back = torch.from_numpy(np.argsort(order)).to(device)
    return Measured(*(x[back].cpu() for x in tensors))


def stack(posteriors: list[Posterior]) -> Posterior:
    """Posteriors of batches with different numbers of rows -> one, filled up with rows that are not live."""
    return Posterior(*(pad_sequence([window for batch in batches for window in batch], batch_first=True)
                       for batches in zip(*posteriors, strict=True)))
