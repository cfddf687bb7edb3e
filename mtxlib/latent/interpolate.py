"""Ways between latents, and measured ways between pieces.

Windows are compared as piano rolls (`score.roll`), drums and chords with the rest.

S latent rows, C latent channels; V voices, T steps (`score.STEPS` a quarter).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from symusic import Note, Score, Track
from torch import Tensor

from mtxlib.config import PAD
from mtxlib.model.losses import kl_per_dim, reconstruction
from mtxlib.music.metrics import in_key
from mtxlib.music.score import SIXTEENTH, STEPS, TPQ, VELOCITY, bar_lines, note_f1, roll, voices_of

COSTED = 10  # pairs whose crossfades are measured in nats: they have thrice the tokens, and differ from slerp tenfold


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of latents of any shape, taken as one vector each (White 2016).

    The angle is turned evenly, and the length goes evenly from one to the other: alpha 0 gives a, alpha 1 gives b,
    exactly. Latents without an angle between them are mixed linearly.
    """
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
    """Between latents a and b (S, C) of one window: `slerp` of the whole matrix or, with `n_bars` alphas, of
    each bar's rows by themselves.

    Raises ValueError where the list has another length, or the rows do not follow the bars.
    """
    alpha = np.asarray(alpha).tolist()
    if not isinstance(alpha, list):
        return slerp(a, b, alpha)
    if len(alpha) != n_bars or len(a) % n_bars:
        raise ValueError(f"alpha: expected a number, or a list of {n_bars} (one a bar) for a latent with a multiple of "
                         f"{n_bars} rows, got {len(alpha)} for {len(a)} rows")
    bars = zip(a.chunk(n_bars), b.chunk(n_bars), alpha, strict=True)
    return torch.cat([slerp(*bar) for bar in bars])


def pairs_of(run, n: int = 100, split: str = "test", seed: int = 0) -> list[tuple[Score, Score]]:
    """n pairs of windows, each from two pieces and of one metre, drawn at random; fewer where there are too few.

    Raises ValueError where there is none.
    """
    windows = [(i, [(m.time, m.numerator, m.denominator) for m in window.time_signatures], window)
               for i, piece in enumerate(run.pieces(split)) for window in run.windows(piece)[2]
               if window.note_num()]
    drawn = np.random.default_rng(seed).integers(len(windows), size=(20 * n, 2)).tolist()
    pairs = [(windows[i][2], windows[j][2]) for i, j in drawn
             if windows[i][0] != windows[j][0] and windows[i][1] == windows[j][1]]
    if not pairs:
        raise ValueError(f"split: expected two pieces with windows of one metre, found none in {split!r}")
    return pairs[:n]


def steps_of(run, a: Score, b: Score) -> int:
    """How many steps a pair of windows lasts, without what rings on beyond its last bar."""
    return max(bar_lines(score)[:run.n_bars + 1][-1] for score in (a, b))


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far two piano rolls (V, T, 128) are apart in each voice and step, (V, T): the share of the notes that sound
    in either and not in both. Of single notes it is 1 where they differ, so that the mean is the Hamming distance."""
    a, b = (np.packbits(x, axis=-1).view(np.uint64) for x in (a, b))  # sets of pitches, as bits
    both, either = (np.bitwise_count(x).sum(-1) for x in (a & b, a | b))
    return 1 - (both + (either == 0)) / either.clip(1)


def score_of(sounds: np.ndarray, begins: np.ndarray, voices: list[int]) -> Score:
    """The notes of a piano roll (see `roll`); one that sounds without having begun begins where it is first heard."""
    before = np.pad(sounds, ((0, 0), (1, 1), (0, 0)))
    now, before = before[:, 1:], before[:, :-1]
    begins = now & (np.pad(begins, ((0, 0), (0, 1), (0, 0))) | ~before)
    ends = before & (begins | ~now)
    voice, pitch, start = np.nonzero(begins.transpose(0, 2, 1))
    length = np.nonzero(ends.transpose(0, 2, 1))[2] - start
    score, tick = Score(TPQ), TPQ // STEPS
    for i, program in enumerate(voices):
        own = np.flatnonzero(voice == i)
        own = own[np.argsort(start[own], kind="stable")]
        track = Track("Drums" if program < 0 else "", max(program, 0), program < 0)
        track.notes = Note.from_numpy(start[own] * tick, length[own] * tick, pitch[own], np.full(len(own), VELOCITY))
        score.tracks.append(track)
    return score


def crossfade(a: Score, b: Score, alphas: np.ndarray, draws: np.ndarray) -> list[Score]:
    """Between two windows without a latent, a mix for each alpha: each sixteenth, in all voices, is b's with
    probability alpha and else a's, the baseline of MusicVAE (Roberts 2018). draws (T / 6,): numbers in [0, 1) that
    decide it; as they are the same for every alpha, what has become b's stays b's."""
    voices, draws, mixes = voices_of([a, b]), np.repeat(draws, SIXTEENTH), []
    rolls = [roll(score, voices, len(draws)) for score in (a, b)]
    for alpha in alphas:
        mixes.append(score_of(*(np.where(draws[:, None] < alpha, y, x) for x, y in zip(*rolls, strict=True)), voices))
        mixes[-1].time_signatures.extend(a.time_signatures)
    return mixes


def interpolation(run, pairs: list[tuple[Score, Score]], steps: int = 11, seed: int = 0) -> pd.DataFrame:
    """From a to b in `steps` steps, for each pair of windows: by slerp between the posterior means, decoded greedily,
    and by `crossfade`. One row for each way, pair and alpha:

    - `to_a`, `to_b`: distance to the windows themselves, see `apart`, in the voices that these have.
    - `moved`: the same to the step before; `onward`: whether neither `to_a` has fallen nor `to_b` risen since then.
    - `in_key`: the largest share of the sounding notes that one diatonic scale holds.
    - `nats`: what the step costs this model, reconstruction and KL, a window; nan where it has too many tokens for it,
      and in all crossfades but those of the first COSTED pairs.
    - `note_f1`: at the two ends, of the notes of a and of b; nan between.
    """
    alphas, rng = np.linspace(0, 1, steps), np.random.default_rng(seed)
    z = run.encode_windows([window for pair in pairs for window in pair]).unflatten(0, (-1, 2))
    lengths = [steps_of(run, *pair) for pair in pairs]
    ways = {"slerp": run.decode(torch.stack([slerp(a, b, float(alpha)) for a, b in z for alpha in alphas])),
            "crossfade": [mix for pair, length in zip(pairs, lengths, strict=True)
                          for mix in crossfade(*pair, alphas, rng.random(length // SIXTEENTH))]}
    frames = []
    for way, scores in ways.items():
        nats = cost(run, scores[:COSTED * steps] if way == "crossfade" else scores, seed)
        nats = np.pad(nats, (0, len(scores) - len(nats)), constant_values=np.nan)
        for i, (a, b) in enumerate(pairs):
            mixes, voices = scores[i * steps:(i + 1) * steps], voices_of([a, b])
            on_a, on_b, *on = (roll(score, voices, lengths[i])[0] for score in (a, b, *mixes))
            to_a, to_b = (np.array([apart(x, end).mean() for x in on]) for end in (on_a, on_b))
            melodic = np.array(voices) >= 0
            frames.append(pd.DataFrame({
                "way": way, "pair": i, "alpha": alphas, "to_a": to_a, "to_b": to_b,
                "moved": [np.nan, *(apart(x, y).mean() for x, y in pairwise(on))],
                "onward": [np.nan, *((np.diff(to_a) >= 0) & (np.diff(to_b) <= 0))],
                "in_key": [in_key(x[melodic]) for x in on], "nats": nats[i * steps:(i + 1) * steps],
                "note_f1": [note_f1(mixes[0], a), *[np.nan] * (steps - 2), note_f1(mixes[-1], b)]}))
    return pd.concat(frames, ignore_index=True)


def rowwise(run, pairs: list[tuple[Score, Score]], alpha: list[float]) -> pd.DataFrame:
    """Bar by bar from a to b: each bar of a pair's window is mixed by its own `alpha` (see `mix`) and decoded
    greedily. One row for each pair and bar, with the distances `to_a` and `to_b` of that bar, as in `interpolation`.

    Raises ValueError where the latent's rows do not follow the bars.
    """
    z = run.encode_windows([window for pair in pairs for window in pair]).unflatten(0, (-1, 2))
    mixes, rows = run.decode(torch.stack([mix(a, b, alpha, run.n_bars) for a, b in z])), []
    for i, (score, (a, b)) in enumerate(zip(mixes, pairs, strict=True)):
        lines, voices = bar_lines(a)[:run.n_bars + 1], voices_of([a, b])
        on, on_a, on_b = (roll(x, voices, lines[-1])[0] for x in (score, a, b))
        rows += [{"pair": i, "bar": k + 1, "alpha": alpha[k], "to_a": to_a.mean(), "to_b": to_b.mean()}
                 for k, (to_a, to_b) in enumerate(zip(*(np.split(apart(on, x), lines[1:-1], axis=1)
                                                        for x in (on_a, on_b)), strict=True))]
    return pd.DataFrame(rows)


@torch.no_grad()
def cost(run, scores: list[Score], seed: int = 0) -> np.ndarray:
    """Negative ELBO of windows in nats (N,), one sample of the posterior each; nan where one exceeds `max_tokens`."""
    windows, nats = run.pack(scores), np.full(len(scores), np.nan)
    generator = torch.Generator(run.device).manual_seed(seed)
    order = np.argsort(windows.lengths, kind="stable")
    order = order[windows.lengths[order] <= run.config.model.max_tokens]
    for part in (order[i:i + 64] for i in range(0, len(order), 64)):
        ids, slots = windows.batch(part).to(run.device)
        posterior = run.model.encode(ids, slots)
        z = run.model.reparameterize(posterior, generator)
        logits = run.model.decode(ids[:, :-1], slots[:, :-1], z, posterior.is_live)
        recon = reconstruction(logits, ids[:, 1:], ids[:, 1:] == PAD)
        nats[part] = (recon + kl_per_dim(*posterior).sum((1, 2))).cpu()
    return nats
