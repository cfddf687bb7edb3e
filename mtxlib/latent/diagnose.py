"""Is the latent used? The collapse metrics, one after the other with their sources, and a verdict in plain words.

`diagnose` makes one teacher-forced pass over the windows (`measure`), decodes every posterior mean once, greedily and
from z alone, and decodes some samples of the prior. All likelihoods are nats; "per window" sums over a window's tokens.
"""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from mtxlib.config import EOS, Config
from mtxlib.data.store import Windows, pad_sequences
from mtxlib.data.tokens import Codec
from mtxlib.latent.decode import BATCH, decode, decode_all, prior_latents
from mtxlib.model.likelihood import Measured, measure
from mtxlib.model.vae import MusicVAE
from mtxlib.music.score import TPQ, bar_starts, durations, note_counts

ACTIVE = 0.01  # variance of the posterior mean above which a dimension is active (Burda 2016)
IDLE = 0.05  # nats below which a dimension carries next to nothing, active or not
HEALTHY = {"delta_nll_shuffled": 0.5, "active_units": 0.5}  # at least
COLLAPSED = {"delta_nll_shuffled": 0.05, "active_units": 0.05}  # one of them below


def diagnose(model: MusicVAE, codec: Codec, windows: Windows, config: Config, *, floor: float | None = None,
             n_prior: int = 200, seed: int = 0) -> dict:
    """All keys of diagnosis.json over all windows. `floor`: recon_per_token of the same decoder without a latent.

    Raises ValueError when there is no window to measure.
    """
    if not len(windows):
        raise ValueError("no window to diagnose: expected at least one, got 0; is the split empty?")
    m = measure(model, windows, np.arange(len(windows)), seed=seed)
    originals = [windows.ids[a:b].tolist() for a, b in zip(windows.offsets, windows.offsets[1:], strict=False)]
    max_tokens = int(1.5 * windows.lengths.max())  # a decoding that runs on beyond this has lost its way
    decoded = decode_all(model, codec, m.mu, m.is_live, max_tokens=max_tokens)
    recon, rate = float(m.recon.mean()), float(m.rate.mean())
    per_dim = m.kl.mean(0).flatten()
    result = {
        # Rate and distortion: the two halves of the negative ELBO (Kingma 2013; Alemi 2018, "Fixing a broken ELBO").
        "recon_nats": recon, "rate_nats": rate, "recon_per_token": m.per_token(m.recon),
        "nats_per_grid_note": (recon + rate) / (4 * mean_sixteenths(codec, originals)),
        "kl_per_dim": [round(x, 5) for x in per_dim.tolist()],
        # Use of the latent: active units (Burda 2016), mutual information (Hoffman & Johnson 2016), and what the
        # decoder loses with a wrong latent.
        "active_units": m.active_units(ACTIVE),
        "mutual_information": mutual_information(m, seed), "ln_n": math.log(len(windows)),
        "delta_nll_shuffled": m.per_token(m.recon_shuffled - m.recon),
        "delta_nll_prior": m.per_token(m.recon_prior - m.recon),
        "gain_over_floor": None if floor is None else floor - m.per_token(m.recon),
        # Free-running fidelity: the only test in which the decoder cannot copy what it was given.
        **fidelity(codec, originals, decoded),
        "retrieval_at_1": retrieval(model, codec, m, originals, decoded),
        **prior_quality(model, codec, n_prior, int(windows.lengths.mean()), max_tokens, seed),
        "n_windows": len(windows),
    }
    result["verdict"] = verdict(result)
    result["advice"] = advise(result, m, config)
    return result


def fidelity(codec: Codec, originals: list[list[int]], decoded: list[list[int]]) -> dict[str, float]:
    """note_f1 over all notes together, the share of found notes with the right length, of exact windows, and of decoded
    notes that double another of the same voice, onset and pitch."""
    found = wanted = given = right_length = exact = repeats = 0
    for original, ours in zip(originals, decoded, strict=True):
        a, b = codec.decode(original), codec.decode(ours)
        notes_a, notes_b = note_counts(a), note_counts(b)
        both = notes_a & notes_b
        found, wanted, given = found + both.total(), wanted + notes_a.total(), given + notes_b.total()
        lengths_a, lengths_b = durations(a), durations(b)
        right_length += sum(lengths_a[note] == lengths_b[note] for note in both)
        repeats += notes_b.total() - len(notes_b)
        exact += notes_a == notes_b and lengths_a == lengths_b
    return {"note_f1": 2 * found / max(1, wanted + given), "duration_accuracy": right_length / max(1, found),
            "exact_windows": exact / len(originals), "repeats": repeats / max(1, given)}


@torch.no_grad()
def retrieval(model: MusicVAE, codec: Codec, m: Measured, originals: list[list[int]],
              decoded: list[list[int]]) -> float:
    """Share of windows that are the nearest (Euclid, posterior means) to their own reconstruction, encoded again."""
    if not m.mu.numel():
        return 0.0
    device, hits = next(model.parameters()).device, 0
    flat = m.mu.flatten(1)
    for i in range(0, len(decoded), BATCH):
        ids = pad_sequences([np.array(x) for x in decoded[i:i + BATCH]])
        again = model.encode(ids.to(device), codec.table.slots(ids).to(device)).mu.cpu()
        again = torch.nn.functional.pad(again, (0, 0, 0, m.mu.shape[1] - again.shape[1])).flatten(1)
        nearest = torch.cdist(again, flat).argmin(1).tolist()
        hits += sum(originals[j] == originals[i + k] for k, j in enumerate(nearest))
    return hits / len(decoded)


def mean_sixteenths(codec: Codec, originals: list[list[int]]) -> float:
    """Mean length of the windows in sixteenths, from their metres."""
    lines = [bar_starts(codec.decode(ids))[:codec.n_bars + 1] for ids in originals]
    return float(np.mean([starts[-1] * 4 / TPQ for starts in lines]))


def mutual_information(m: Measured, seed: int = 0) -> float:
    """I(x; z) under the encoder, nats: E log q(z|x) - log mean_j q(z|x_j), one sample a window (Hoffman & Johnson
    2016). It cannot exceed ln N; a value at that ceiling says only that every window is told from all others."""
    if not m.mu.numel():
        return 0.0
    live = m.is_live[..., None].expand_as(m.mu).flatten(1)
    mu, std = m.mu.flatten(1).double(), (0.5 * m.logvar).exp().flatten(1).double()
    mu, std = mu.masked_fill(~live, 0.0), std.masked_fill(~live, 1.0)
    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(seed), dtype=mu.dtype)
    z = mu + std * noise
    log_q = torch.stack([torch.distributions.Normal(mu, std).log_prob(row).sum(1) for row in z])  # (N, N)
    return float((log_q.diagonal() - (log_q.logsumexp(1) - math.log(len(mu)))).mean())


def prior_quality(model: MusicVAE, codec: Codec, n: int, n_tokens: int, max_tokens: int,
                  seed: int = 0) -> dict[str, float]:
    """Share of samples, z ~ N(0, 1) and tokens at temperature 1, that are whole (see `is_wellformed`): as they are
    decoded everywhere, held to the grammar, and `_free` without it, as a measure of what the model itself knows."""
    z = prior_latents(model, n, n_tokens, seed)
    return {name: float(np.mean([is_wellformed(codec, ids) for ids in
                                 decode(model, codec.table, z, max_tokens=max_tokens, temperature=1.0, seed=seed,
                                        grammar=grammar)]))
            for name, grammar in (("prior_wellformed", codec.grammar), ("prior_wellformed_free", None))}


def is_wellformed(codec: Codec, ids: list[int]) -> bool:
    """It ends by itself, has notes, each of its pitches becomes a note, and it opens no bar beyond the window's."""
    names = Counter(codec.names[i] for i in codec.expand(ids))
    n_pitches = sum(n for name, n in names.items() if name.startswith("Pitch"))
    return ids[-1] == EOS and 0 < n_pitches == codec.decode(ids).note_num() and names["Bar_None"] <= codec.n_bars


def verdict(d: dict) -> str:
    """healthy: used by most dimensions and dearly missed, and (where known) better than no latent at all."""
    if any(d[k] < least for k, least in COLLAPSED.items()):
        return "collapsed"
    gain = d["gain_over_floor"]
    is_healthy = all(d[k] >= least for k, least in HEALTHY.items()) and (gain is None or gain > 0)
    return "healthy" if is_healthy else "weak"


def advise(d: dict, m: Measured, config: Config) -> str:
    """What to turn next, from what was measured."""
    c, said = config.train, []
    if config.model.bottleneck == "none":
        return "There is no latent: this run is the floor the others are compared with."
    is_dead = m.mean_variance() <= ACTIVE
    is_idle = (m.kl.mean(0) < IDLE) & ~is_dead
    for what, which in (("dead", is_dead), (f"idle, below {IDLE} nats", is_idle)):
        if which.any():
            said.append(f"{int(which.sum())} of {which.numel()} latent dimensions are {what} ({places(which)}).")
    said = said or ["Every latent dimension is active and carries something."]
    if d["verdict"] == "collapsed":
        said.append(remedy(c, config.model))
    elif d["verdict"] == "weak":
        said.append("The decoder half listens: raise target_rate, lower beta_max or lengthen beta_warmup, or raise "
                    f"dec_token_dropout above {c.dec_token_dropout:g}.")
    elif d["note_f1"] < 0.9:
        said.append(f"The latent is used, yet greedy decoding finds {d['note_f1']:.0%} of the notes: train longer, or "
                    f"allow more than {d['rate_nats']:.0f} nats a window.")
    if d["gain_over_floor"] is not None and d["gain_over_floor"] <= 0:
        said.append("Against the decoder without a latent nothing is gained: a large delta_nll_shuffled then only says "
                    "that a wrong latent hurts.")
    if d["prior_wellformed"] < 0.98:
        said.append(f"{1 - d['prior_wellformed']:.0%} of the prior's samples are ill-formed: lower the rate or train "
                    "longer before sampling.")
    return " ".join(said)


def remedy(c, model) -> str:
    if c.recon_scale == "token":
        return "recon_scale = 'token' multiplies the KL by the window's length: set it to 'sequence'."
    if model.condition == "cross":
        return "Let the decoder hear z at every layer: condition = 'both'."
    if not c.target_rate and not c.free_bits:
        return f"Hold the rate instead of pressing with beta = {c.beta_max:g}: set target_rate, or free_bits."
    return f"Press later and less: lengthen beta_warmup ({c.beta_warmup}), raise target_rate or dec_token_dropout."


def places(which: Tensor) -> str:
    """Where the dimensions marked in (S, C) lie: whole rows, whole channels, or spread."""
    rows, channels = which.all(1).nonzero()[:, 0].tolist(), which.all(0).nonzero()[:, 0].tolist()
    if which.all():
        return "all of them"
    said = [f"{name} {', '.join(map(str, which[:8]))}{' …' if len(which) > 8 else ''}"
            for name, which in (("rows", rows), ("channels", channels)) if which]
    where = [f"row {r} channel {c}" for r, c in which.nonzero().tolist()]
    return "whole " + "; whole ".join(said) if said else ", ".join(where[:6]) + (" …" if len(where) > 6 else "")
