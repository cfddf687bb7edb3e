"""How a step is computed: the optimizers, and the precision, which is the one that is fast on this machine."""

import timeit
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from itertools import groupby

import torch
from torch import Tensor, nn

from mtxlib.config import TrainConfig

CASTS = 1.25  # how much faster a matmul in bf16 must be to pay for the casts around it


class Muon(torch.optim.Muon):
    """torch's, but it iterates in the precision that is fast here, not in bf16 always, and over all matrices of a
    shape together; it adjusts the learning rate as "match_rms_adamw" does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for shape, alike in groupby(params, key=lambda p: p.shape):
                alike = list(alike)
                grads = [p.grad for p in alike]
                means = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in alike]
                torch._foreach_lerp_(means, grads, 1 - momentum)
                update = torch.stack(torch._foreach_lerp(grads, means, momentum))  # Nesterov's
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(alike, 1 - lr * group["weight_decay"])
                torch._foreach_add_(alike, update.unbind(), alpha=-0.2 * lr * max(shape) ** 0.5)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (N, A, B) with their singular values brought near 1 by Newton and Schulz's iteration (Jordan 2024)."""
    is_tall, (a, b, c) = matrices.shape[1] > matrices.shape[2], coefficients
    x = (matrices.mT if is_tall else matrices).to(fast_dtype(matrices.device.type)).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def make_optimizers(model: nn.Module, c: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for the rest; or AdamW for all. Muon's update is
    scaled to the size of Adam's (Liu 2025), so one learning rate serves both. Only matrices are decayed.
    """
    inner, outer, free = [], [], []
    for name, p in model.named_parameters():
        is_inner = c.optimizer == "muon" and p.ndim == 2 and ".blocks." in f".{name}"
        (inner if is_inner else outer if p.ndim >= 2 else free).append(p)
    groups = [{"params": outer, "weight_decay": c.weight_decay}, {"params": free, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.98), fused=True)
    return [adamw, Muon(inner, lr=c.lr, weight_decay=c.weight_decay)] if inner else [adamw]


def matmul_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """FLOP/s of a product of two square matrices on `device`, the best of `repeats`."""
    x = torch.ones(size, size, device=device, dtype=dtype)  # no random numbers: a run repeats itself
    wait = torch.cuda.synchronize if device == "cuda" else int
    seconds = timeit.repeat(lambda: (x @ x, wait()), setup=wait, number=1, repeat=1 + repeats)
    return 2 * size**3 / min(seconds[1:])  # the first one warms up


@cache
def fast_rates(device: str) -> tuple[float, float]:
    """FLOP/s of bf16 and fp32 here, measured once a process: a CPU without units for bf16, and an older GPU, computes
    with it all the same, but many times slower."""
    size = 4096 if device == "cuda" else 512
    return matmul_rate(device, torch.bfloat16, size), matmul_rate(device, torch.float32, size)


def fast_dtype(device: str) -> torch.dtype:
    """bf16 where it is enough faster than fp32."""
    bf16, fp32 = fast_rates(device)
    return torch.bfloat16 if bf16 > CASTS * fp32 else torch.float32


def explain(precision: str, device: torch.device) -> str:
    """What `precision` comes to on a device, and why."""
    if precision != "auto":
        return f"{precision}, as asked for"
    chosen = "bf16" if fast_dtype(device.type) == torch.bfloat16 else "fp32"
    bf16, fp32 = (rate / 1e9 for rate in fast_rates(device.type))
    return f"{chosen}: matmuls run at {bf16:.3g} GFLOP/s in bf16, {fp32:.3g} in fp32"


def autocast_for(precision: str, device: torch.device) -> Callable:
    """A context: bf16 autocast where asked for, or where `auto` finds it faster."""
    is_bf16 = precision == "bf16" or precision == "auto" and fast_dtype(device.type) == torch.bfloat16
    return partial(torch.autocast, device.type, torch.bfloat16) if is_bf16 else nullcontext
