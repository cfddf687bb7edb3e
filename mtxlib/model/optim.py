"""How a step is computed: the optimizers, and the precision."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from mtxlib.config import TrainConfig


def make_optimizers(model: nn.Module, c: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for embeddings, biases, norms and the rest; or AdamW
    for all. Muon's update is scaled to the size of Adam's (Liu 2025), so one learning rate serves both. Only matrices
    are decayed.
    """
    inner = [p for name, p in model.named_parameters()
             if p.ndim == 2 and c.optimizer == "muon" and ".blocks." in f".{name}"]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.98), fused=True)
    if not inner:
        return [adamw]
    return [adamw, torch.optim.Muon(inner, lr=c.lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")]


def autocast_for(precision: str, device: torch.device) -> Callable:
    """A context: bf16 autocast where asked for, or where `auto` finds hardware for it."""
    if precision == "auto":
        has_bf16 = (torch.cuda.is_bf16_supported() if device.type == "cuda"
                    else torch.ops.mkldnn._is_mkldnn_bf16_supported())
        precision = "bf16" if has_bf16 else "fp32"
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext
