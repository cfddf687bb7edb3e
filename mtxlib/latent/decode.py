"""From a latent to token ids, with a key-value cache, held to the grammar of the tokens.

Everything here is tokens and tensors; `run.py` makes scores of them. The clock of `SlotTable` tells where in the
window the next token stands, so decoding needs no tokenizer.
"""

import numpy as np
import torch
from torch import Tensor

from mtxlib.config import BOS, EOS, MASK, PAD
from mtxlib.data.store import Grammar, SlotTable
from mtxlib.data.tokens import Codec
from mtxlib.model.layers import without_onednn
from mtxlib.model.vae import MusicVAE

BATCH = 128  # windows encoded or decoded at once


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
    device, generator = z.device, torch.Generator(z.device).manual_seed(seed)
    is_live = torch.ones(z.shape[:2], dtype=torch.bool, device=device) if is_live is None else is_live
    begin = begin or [[BOS]] * len(z)
    given = np.array([len(ids) for ids in begin])
    if given.max() >= max_tokens:
        raise ValueError(f"begin: expected fewer ids than max_tokens = {max_tokens}, got {given.max()}")
    out, common = np.full((len(z), max_tokens), EOS), int(given.min())
    for row, ids in zip(out, begin, strict=True):
        row[:len(ids)] = ids
    rows, decoding, place = np.arange(len(z)), model.begin(z, is_live, max_tokens), Place(table, grammar, len(z))
    # What all begin with is read at once.
    ids, slots = out[:, :common], np.stack([place.read(column) for column in out[:, :common].T], 1)
    for t in range(common, max_tokens):
        logits = model.proceed(*torch.from_numpy(np.stack([ids, slots])).to(device), decoding).float()
        logits = logits.masked_fill(torch.from_numpy(place.forbids(logits.shape[1])).to(device), -torch.inf)
        chosen = choose(logits, temperature, top_p, generator).cpu().numpy()
        ids = np.where(t < given[rows], out[rows, t], np.where(place.previous == EOS, EOS, chosen))
        out[rows, t] = ids
        going = np.flatnonzero(ids != EOS)
        if len(going) == 0:
            break
        if len(going) <= 0.8 * len(rows):  # copying the caches pays when enough sequences leave
            rows, ids = rows[going], ids[going]
            place.keep(going)
            decoding.keep(torch.from_numpy(going).to(device))
        ids, slots = ids[:, None], place.read(ids)[:, None]
    return [cut_after_eos(ids) for ids in out.tolist()]


def decode_all(model: MusicVAE, codec: Codec, z: Tensor, is_live: Tensor | None = None, *, seed: int = 0,
               begin: list[list[int]] | None = None, **how) -> list[list[int]]:
    """`decode` of any number of latents, BATCH at once, held to the codec's grammar."""
    device = next(model.parameters()).device
    parts = [slice(i, i + BATCH) for i in range(0, len(z), BATCH)]
    return [ids for part in parts for ids in
            decode(model, codec.table, z[part].to(device), None if is_live is None else is_live[part].to(device),
                   seed=seed + part.start, grammar=codec.grammar, begin=begin and begin[part], **how)]


class Place:
    """Where each of B sequences stands: its last id, its clock, and the notes it has begun there."""

    def __init__(self, table: SlotTable, grammar: Grammar | None, batch: int):
        self.table, self.grammar, self.clock = table, grammar, table.start(batch)
        self.begun = grammar and grammar.start(batch)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """One id a sequence (B,) -> their slots (B,)."""
        self.previous, (self.clock, slots) = ids, self.table.advance(self.clock, ids)
        if self.grammar:
            self.grammar.read(self.begun, ids)
        return slots

    def forbids(self, n: int) -> np.ndarray:
        """Which of n ids may not follow: (B, n), or (1, n) without a grammar."""
        if self.grammar:
            return ~self.grammar.allows(self.previous, self.clock, self.begun)
        return np.isin(np.arange(n), (PAD, BOS, MASK))[None]

    def keep(self, rows: np.ndarray) -> None:
        """Go on with the sequences at `rows` only."""
        self.clock = self.clock[rows]
        if self.grammar:
            self.begun.keep(rows)


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
    """z from the model's own prior, (n, S, C). `n_tokens` sets S where the rows follow the tokens (conv, linear2d)."""
    rows = model.bottleneck.n_rows(n_tokens) if model.bottleneck else 0
    device = next(model.parameters()).device
    return model.sample_prior(n, rows, torch.Generator(device).manual_seed(seed))
