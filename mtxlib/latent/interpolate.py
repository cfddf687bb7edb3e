"""Ways between latents. S latent rows, C latent channels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of latents of any shape, taken as one vector each (White 2016): angle and length go
    evenly from a, exact at alpha 0, to b, exact at 1. Latents without an angle between them are mixed linearly."""
    if alpha in (0, 1):
        return (b if alpha else a).clone()
    na, nb = a.norm(), b.norm()
    cos = (a * b).sum() / (na * nb).clamp(min=1e-12)
    if na < 1e-6 or nb < 1e-6 or cos.abs() > 0.9999:
        return (1 - alpha) * a + alpha * b
    theta = cos.acos()
    direction = ((1 - alpha) * theta).sin() / theta.sin() * a / na + (alpha * theta).sin() / theta.sin() * b / nb
    return ((1 - alpha) * na + alpha * nb) * direction


def mix(a: Tensor, b: Tensor, alpha: float | Sequence[float], n_bars: int) -> Tensor:
    """Between latents a and b (S, C) of a window: `slerp` of the matrix or, with `n_bars` alphas, of each bar's rows.
    Raises ValueError where the list has another length, or the rows do not follow the bars."""
    alphas, n = np.atleast_1d(alpha).tolist(), n_bars if np.ndim(alpha) else 1
    if len(alphas) != n or len(a) % n:
        raise ValueError(f"alpha: expected a number, or a list of {n_bars} (one a bar) for a latent with a multiple of "
                         f"{n_bars} rows, got {len(alphas)} for {len(a)} rows")
    return torch.cat([slerp(*bar) for bar in zip(a.chunk(n), b.chunk(n), alphas, strict=True)])
