"""Walks through the latent, measured on what the decoder makes of them: towards an attribute, and from piece to piece.

A *direction* is what is added to a latent to change one attribute of the music and leave the others. Windows are
compared on their grid: voices by sixteenths, the pitch that sounds or none.

N windows, S latent rows, C latent channels, A attributes; V voices, T sixteenths.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from symusic import Note, Score, Track
from torch import Tensor

from .config import PAD
from .corpus import GRID, KEYS, TPQ, VELOCITY, key_fits, key_of
from .diagnose import note_counts
from .files import atomic
from .generate import mix, slerp
from .judge import grid
from .losses import kl_per_dim, reconstruction
from .prior import digest
from .tokens import bar_starts

DISSONANT = (1, 2, 6)  # interval classes: seconds, sevenths and the tritone, the dissonant ones of Huron 1994
MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)  # semitones above the tonic
PARALLEL = {"major": {4: -1, 9: -1}, "minor": {3: 1, 8: 1, 10: 1}}  # what to add to a degree to change the mode
POSITIONS = (-3, -2, -1, 0, 1, 2, 3)  # of a slider, see `Directions.move`


# -- attributes of a window -------------------------------------------------------------------------------------------

def voices_of(*scores: Score) -> list[int]:
    """Programs of the tracks but drums, in the order of the tracks, which is that of the tokens."""
    return list(dict.fromkeys(t.program for score in scores for t in score.tracks if not t.is_drum))


def sounding(score: Score) -> np.ndarray:
    return grid(score, voices_of(score))[0]


def note_density(score: Score) -> float:
    """Onsets a quarter, all voices together, until the last note ends."""
    return score.note_num() * score.tpq / max(1, score.end())


def register(score: Score) -> float:
    """Mean MIDI pitch, weighted by duration."""
    pitch = sounding(score)
    return float(pitch[pitch > 0].mean()) if pitch.any() else np.nan


def voice_spread(score: Score) -> float:
    """Semitones from the lowest to the highest voice, mean of the sixteenths in which two voices or more sound."""
    pitch = sounding(score)
    pitch = pitch[:, (pitch > 0).sum(0) > 1]
    return float((pitch.max(0) - np.where(pitch, pitch, 128).min(0)).mean()) if pitch.size else np.nan


def major(score: Score) -> float:
    """How much better the best major key fits than the best minor key: difference of the correlations, see `key_of`."""
    fits = key_fits(score)
    best = [max(fit for key, fit in fits.items() if key.endswith(mode)) for mode in ("major", "minor") if fits]
    return best[0] - best[1] if fits else np.nan


def dissonance(score: Score) -> float:
    """Share of dissonant intervals among those of all two voices that sound together, each weighted by its duration."""
    pitch = sounding(score)
    one, other = (pitch[i] for i in np.triu_indices(len(pitch), 1))
    interval = (one - other)[(one > 0) & (other > 0)] % 12
    return float(np.isin(np.minimum(interval, 12 - interval), DISSONANT).mean()) if len(interval) else np.nan


ATTRIBUTES: dict[str, Callable[[Score], float]] = {  # of one window; nan where it has no notes to tell it from
    "note density": note_density, "register": register, "voice spread": voice_spread, "major": major,
    "dissonance": dissonance}


# -- directions -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Directions:
    names: list[str]
    vectors: Tensor  # (A, S, C)
    sd: Tensor  # (A,) standard deviations of the attributes over the training split
    change_mode: Callable[[Tensor, float], Tensor] | None = None  # what moves "major", in place of its vector

    def move(self, z: Tensor, amounts: dict[str, float]) -> Tensor:
        """Latents (S, C) or (N, S, C), moved by `amounts`, sensibly -3 to 3, and brought back to the length they had.

        One unit is a third of the length of a latent; the attribute of the decoded music follows by half a standard
        deviation to one (`responses` measures it). Three units turn a latent by 45 degrees. `major` is moved first, by
        `change_mode` where there is one: three units are all the way to the parallel mode. Raises ValueError for a name
        that is no attribute and for latents of another shape.
        """
        unknown = sorted(set(amounts) - set(self.names))
        if unknown or z.shape[-2:] != self.vectors.shape[1:]:
            raise ValueError(f"expected amounts of {', '.join(self.names)} and latents of "
                             f"{' x '.join(map(str, self.vectors.shape[1:]))}, got {unknown or tuple(z.shape)}")
        moved, amounts = z, dict(amounts)
        if self.change_mode and amounts.get("major"):
            moved = self.change_mode(z, amounts.pop("major"))
        moved = moved + sum(amount * self.vectors[self.names.index(name)] for name, amount in amounts.items())
        return moved * norm(z) / norm(moved).clamp(min=1e-12)


def norm(z: Tensor) -> Tensor:
    """Lengths of latents (..., S, C) as vectors, (..., 1, 1)."""
    return z.square().sum((-2, -1), keepdim=True).sqrt()


def parallel(score: Score) -> Score:
    """The music in the parallel mode of its key: in major the third and the sixth are lowered, in minor these and the
    seventh raised, where they are minor. The leading tone stays, as in harmonic minor; so does music without a key."""
    changed, (tonic, mode) = score.copy(), (key_of(score) or "C ").split(" ")
    for note in (note for track in changed.tracks if mode and not track.is_drum for note in track.notes):
        note.pitch += PARALLEL[mode].get((note.pitch - KEYS[mode][0].split().index(tonic)) % 12, 0)
    return changed


def change_mode(run, z: Tensor, amount: float) -> Tensor:
    """Latents (S, C) or (N, S, C), turned towards major (amount up to 3) or minor (down to -3); what is there already
    stays.

    Which notes are to change depends on the tonic, so no one direction does it. This one is each window's own: from its
    latent to that of what it decodes to, greedily, in the parallel mode. `slerp` changes the music half-way, all at
    once, so the way is gone by the square root of the amount, and half of it is passed before the first unit.
    """
    windows = z.reshape(-1, *z.shape[-2:])
    scores = run.decode(windows)
    others = run.encode_windows([parallel(score) for score in scores])
    alpha = min(1.0, abs(amount) / 3) ** 0.5
    turned = [slerp(a, b, alpha) if major(score) * amount < 0 else a
              for a, b, score in zip(windows, others, scores, strict=True)]
    return torch.stack(turned).view_as(z)


def find(z: Tensor, values: np.ndarray, names: list[str]) -> Directions:
    """Directions from latents z (N, S, C) and the attributes of their windows, values (N, A); an attribute that most
    windows do not have, such as the spread of a single voice, is left out.

    z is regressed on all attributes together: what the latent does when one of them changes and the others stay (the
    pattern of a forward model, not the weights of a filter: Haufe 2014, NeuroImage 87). All are made a third as long
    as a latent is on average.
    """
    is_common = np.isfinite(values).mean(0) > 0.5
    is_told = np.isfinite(values[:, is_common]).all(1)
    z, values = z[torch.from_numpy(is_told)], values[is_told][:, is_common]
    sd = values.std(0).clip(min=1e-9)
    y = torch.from_numpy((values - values.mean(0)) / sd).float()
    vectors = torch.linalg.lstsq(y, (z - z.mean(0)).flatten(1)).solution.unflatten(1, z.shape[1:])
    vectors = vectors / norm(vectors).clamp(min=1e-12) * norm(z).mean() / 3
    return Directions([name for name, there in zip(names, is_common, strict=True) if there], vectors,
                      torch.from_numpy(sd).float())


def save_directions(directions: Directions, path: Path, weights: Path) -> None:
    """In half precision, for they are shipped; marked with the `weights` whose latent they belong to."""
    tensors = {"vectors": directions.vectors.half().contiguous(), "sd": directions.sd}
    metadata = {"format": "mtxlib directions", "names": json.dumps(directions.names), "weights": digest(weights)}
    atomic(path, lambda p: save_file(tensors, str(p), metadata=metadata))


def load_directions(path: Path, weights: Path) -> Directions | None:
    """None where there is no such file, or where it belongs to other weights. Raises ValueError if it holds none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != "mtxlib directions":
                raise ValueError("no mark of mtxlib.walk in it")
            if metadata["weights"] != digest(weights):
                return None
            return Directions(json.loads(metadata["names"]), f.get_tensor("vectors").float(), f.get_tensor("sd"))
    except (KeyError, SafetensorError, ValueError) as e:
        raise ValueError(f"{path}: expected directions saved by mtxlib.walk, got something else ({e})") from e


# -- from piece to piece ----------------------------------------------------------------------------------------------

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


def sixteenths(run, a: Score, b: Score) -> int:
    """How many a pair of windows lasts, without what rings on beyond its last bar."""
    return max(bar_starts(score)[:run.n_bars + 1][-1] for score in (a, b)) // GRID


def crossfade(a: Score, b: Score, alpha: float, draws: np.ndarray) -> Score:
    """Between two windows without a latent: each sixteenth, in all voices, is b's with probability alpha and else a's:
    the baseline of MusicVAE (Roberts 2018). draws (T,): numbers in [0, 1) that decide it; as they are the
    same for every alpha, what has become b's stays b's."""
    voices = voices_of(a, b)
    pitch, begins = (np.where(draws < alpha, y, x) for x, y in
                     zip(grid(a, voices, len(draws)), grid(b, voices, len(draws)), strict=True))
    begins |= np.diff(pitch, prepend=0) != 0
    mixed = Score(TPQ)
    mixed.time_signatures.extend(a.time_signatures)
    for program, *voice in zip(voices, begins.cumsum(1), pitch, strict=True):
        track, time = Track("", program, False), 0
        for (_, p), cells in groupby(zip(*(x.tolist() for x in voice), strict=True)):
            length = len(list(cells))
            if p:
                track.notes.append(Note(time * GRID, length * GRID, p, VELOCITY))
            time += length
        mixed.tracks.append(track)
    return mixed


def interpolation(run, pairs: list[tuple[Score, Score]], steps: int = 11, seed: int = 0) -> pd.DataFrame:
    """From a to b in `steps` steps, for each pair of windows: by slerp between the posterior means, decoded greedily,
    and by `crossfade`. One row for each way, pair and alpha:

    - `to_a`, `to_b`: Hamming distance to the windows themselves, share of the grid where another pitch sounds, or none.
    - `moved`: the same to the step before; `onward`: whether neither `to_a` has fallen nor `to_b` risen since then.
    - `in_key`: the largest share of the sounding grid that one diatonic scale holds.
    - `nats`: what the step costs this model, reconstruction and KL, a window; nan where it has too many tokens for it.
    - `note_f1`: at the two ends, of the notes of a and of b; nan between.
    """
    alphas, rng = np.linspace(0, 1, steps), np.random.default_rng(seed)
    z = run.encode_windows([window for pair in pairs for window in pair]).unflatten(0, (-1, 2))
    draws = [rng.random(sixteenths(run, *pair)) for pair in pairs]
    ways = {"slerp": run.decode(torch.stack([slerp(a, b, float(alpha)) for a, b in z for alpha in alphas])),
            "crossfade": [crossfade(*pair, alpha, u) for pair, u in zip(pairs, draws, strict=True) for alpha in alphas]}
    frames = []
    for way, scores in ways.items():
        nats = cost(run, scores, seed).reshape(-1, steps)
        for i, (a, b) in enumerate(pairs):
            mixes, voices = scores[i * steps:(i + 1) * steps], voices_of(a, b)
            on_a, on_b, *on = (grid(score, voices, len(draws[i]))[0] for score in (a, b, *mixes))
            to_a, to_b = ((np.stack(on) != end).mean((1, 2)) for end in (on_a, on_b))
            frames.append(pd.DataFrame({
                "way": way, "pair": i, "alpha": alphas, "to_a": to_a, "to_b": to_b,
                "moved": [np.nan, *((x != y).mean() for x, y in pairwise(on))],
                "onward": [np.nan, *((np.diff(to_a) >= 0) & (np.diff(to_b) <= 0))],
                "in_key": [in_key(x) for x in on], "nats": nats[i],
                "note_f1": [note_f1(mixes[0], a), *[np.nan] * (steps - 2), note_f1(mixes[-1], b)]}))
    return pd.concat(frames, ignore_index=True)


def rowwise(run, pairs: list[tuple[Score, Score]], alpha: list[float]) -> pd.DataFrame:
    """Bar by bar from a to b: each bar of a pair's window is mixed by its own `alpha` (see `generate.mix`) and decoded
    greedily. One row for each pair and bar, with the Hamming distances `to_a` and `to_b` of that bar, as in
    `interpolation`.

    Raises ValueError where the latent's rows do not follow the bars.
    """
    z = run.encode_windows([window for pair in pairs for window in pair]).unflatten(0, (-1, 2))
    mixes, rows = run.decode(torch.stack([mix(a, b, alpha, run.n_bars) for a, b in z])), []
    for i, (score, (a, b)) in enumerate(zip(mixes, pairs, strict=True)):
        lines, voices = np.array(bar_starts(a)[:run.n_bars + 1]) // GRID, voices_of(a, b)
        on, on_a, on_b = (np.split(grid(x, voices, lines[-1])[0], lines[1:-1], axis=1) for x in (score, a, b))
        rows += [{"pair": i, "bar": k + 1, "alpha": alpha[k], "to_a": (x != x_a).mean(), "to_b": (x != x_b).mean()}
                 for k, (x, x_a, x_b) in enumerate(zip(on, on_a, on_b, strict=True))]
    return pd.DataFrame(rows)


def in_key(pitch: np.ndarray) -> float:
    """Largest share of the sounding grid (V, T) that lies in one diatonic scale."""
    classes = np.bincount(pitch[pitch > 0] % 12, minlength=12)
    return max(classes[(np.array(MAJOR_SCALE) + tonic) % 12].sum() for tonic in range(12)) / max(1, classes.sum())


def note_f1(a: Score, b: Score) -> float:
    """Notes found again: same voice, onset and pitch."""
    a, b = note_counts(a), note_counts(b)
    return 2 * (a & b).total() / max(1, a.total() + b.total())


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


# -- along a direction ------------------------------------------------------------------------------------------------

def responses(run, directions: Directions, windows: list[Score], positions=POSITIONS) -> pd.DataFrame:
    """Attributes of what is decoded, greedily, with each slider at each position: rows (slider, position, window),
    columns the attributes in standard deviations, and `notes`, their number."""
    z = run.encode_windows(windows)
    at = list(product(directions.names, positions))
    scores = run.decode(torch.cat([directions.move(z, {name: position}) for name, position in at]))
    index = pd.MultiIndex.from_product([directions.names, positions, range(len(windows))],
                                       names=["slider", "position", "window"])
    values = np.array([[ATTRIBUTES[name](score) for name in directions.names] for score in scores])
    frame = pd.DataFrame(values / directions.sd.numpy(), index, directions.names)
    return frame.assign(notes=[score.note_num() for score in scores])


def leakage(responses: pd.DataFrame) -> pd.DataFrame:
    """Mean over the windows of Spearman's rho between a slider's position and each attribute, 0 where nothing changes:
    rows sliders, columns attributes. The diagonal is what was asked for, the rest is leakage."""
    attributes = responses.drop(columns="notes").reset_index("position")
    rho = attributes.groupby(["slider", "window"], sort=False).apply(lambda x: x.rank().corr()["position"])
    return rho.drop(columns="position").fillna(0).groupby("slider", sort=False).mean()
