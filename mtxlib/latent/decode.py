"""From a latent to token ids, with a key-value cache, held to the grammar of the tokens.

Everything here is tokens and tensors; `run.py` makes scores of them. The clock of `SlotTable` tells where in the
window the next token stands, so decoding needs no tokenizer.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mtxlib.config import BOS, EOS, N_SPECIAL
from mtxlib.data.store import Grammar, SlotTable
from mtxlib.model.vae import MusicVAE


@contextmanager
def without_onednn():
    """Within it PyTorch uses its own kernels on a CPU: oneDNN's GELU of one token takes 40 microseconds, theirs one."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@torch.inference_mode()
@without_onednn()
def decode(model: MusicVAE, table: SlotTable, z: Tensor, is_live: Tensor | None = None, *, max_tokens: int,
           temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
           grammar: Grammar | None = None, begin: list[list[int]] | None = None) -> list[list[int]]:
    """Decode each z from itself alone: z (B, S, C) -> B lists of ids, from BOS to EOS (or cut at max_tokens).

    temperature 0 is greedy; top_p keeps the most likely tokens of so much mass (Holtzman 2020). A grammar rules out
    ids that cannot follow. `begin` gives each the ids it goes on from, BOS first. A sequence that has ended leaves the
    batch, so the longest does not pay for all.
    """
    device = z.device
    generator = torch.Generator(device).manual_seed(seed)
    is_live = torch.ones(z.shape[:2], dtype=torch.bool, device=device) if is_live is None else is_live
    decoding = model.begin(z, is_live, max_tokens)
    begin = begin or [[BOS]] * len(z)
    out = torch.full((len(z), max_tokens), EOS, device=device)
    given = torch.tensor([len(ids) for ids in begin], device=device)
    for i, ids in enumerate(begin):
        out[i, :len(ids)] = torch.as_tensor(ids)
    never = torch.tensor([i for i in range(N_SPECIAL) if i != EOS], device=device)
    rows, clock, common = torch.arange(len(z), device=device), table.start(len(z)), int(given.min())
    if common > 1:  # what all begin with is read at once
        slots = []
        for column in out[:, :common - 1].cpu().numpy().T:
            clock, slot = table.advance(clock, column)
            slots.append(slot)
        model.proceed(out[:, :common - 1], torch.from_numpy(np.stack(slots, 1)).to(device), decoding)
    ids = out[:, common - 1]
    for t in range(common, max_tokens):
        previous = ids.cpu().numpy()
        clock, slots = table.advance(clock, previous)
        logits = model.proceed(ids[:, None], torch.from_numpy(slots[:, None]).to(device), decoding)[:, -1].float()
        logits.index_fill_(1, never, -torch.inf)
        if grammar:
            allowed = torch.from_numpy(grammar.allows(previous, clock)).to(device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        chosen = choose(logits, temperature, top_p, generator).masked_fill(ids == EOS, EOS)
        ids = torch.where(t < given[rows], out[rows, t], chosen)
        out[rows, t] = ids
        going = (ids != EOS).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= 0.8 * len(rows):  # copying the caches pays when enough sequences leave
            rows, ids, clock = rows[going], ids[going], clock[going.cpu().numpy()]
            decoding.keep(going)
    return [cut_after_eos(ids) for ids in out.tolist()]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next ids (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def cut_after_eos(ids: list[int]) -> list[int]:
    return ids[:ids.index(EOS) + 1] if EOS in ids else ids


def prior_latents(model: MusicVAE, n: int, n_tokens: int, seed: int = 0) -> Tensor:
    """z ~ N(0, 1), (n, S, C). `n_tokens` sets S for bottlenecks whose rows follow the tokens (conv, linear2d)."""
    rows = model.bottleneck.n_rows(n_tokens) if model.bottleneck else 0
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(n, rows, model.config.latent_channels, generator=generator, device=device)
