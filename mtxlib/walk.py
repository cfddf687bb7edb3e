"""Walks through the latent, measured on what the decoder makes of them: towards an attribute, and from piece to piece.

A *direction* is what is added to a latent to change one attribute of the music by one standard deviation. A window is
compared with another on its grid: voices by sixteenths, the pitch that sounds or none.

N windows, S latent rows, C latent channels, A attributes; V voices, T sixteenths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from symusic import Score
from torch import Tensor

from .corpus import key_fits
from .files import atomic
from .prior import digest
from .tokens import bar_starts

DISSONANT = (1, 2, 6)  # interval classes: seconds, sevenths and the tritone, the dissonant ones of Huron 1994
RIDGE = 1.0  # weight of the penalty, in windows


# -- attributes of a window -------------------------------------------------------------------------------------------

def grid(score: Score, voices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The pitch that sounds in the voices of these programs, 0 for none, and whether it begins there: (V, T) each."""
    notes = [(voices.index(t.program), n.start * 4 // score.tpq, n.end * 4 // score.tpq, n.pitch)
             for t in score.tracks if not t.is_drum and t.program in voices for n in t.notes]
    pitch = np.zeros((len(voices), max((end for *_, end, _ in notes), default=0)), int)
    begins = np.zeros(pitch.shape, bool)
    for voice, onset, end, p in sorted(notes):
        pitch[voice, onset:end], begins[voice, onset] = p, True
    return pitch, begins


def sounding(score: Score) -> np.ndarray:
    return grid(score, sorted({t.program for t in score.tracks if not t.is_drum}))[0]


def note_density(score: Score) -> float:
    """Onsets a quarter, all voices together."""
    return score.note_num() * score.tpq / max(1, bar_starts(score)[-1])


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
    pairs = np.array([*combinations(sounding(score), 2)]).reshape(-1, 2, sounding(score).shape[1])
    below, above = pairs[:, 0][(pairs > 0).all(1)], pairs[:, 1][(pairs > 0).all(1)]
    interval = (above - below) % 12
    return float(np.isin(np.minimum(interval, 12 - interval), DISSONANT).mean()) if len(interval) else np.nan


ATTRIBUTES: dict[str, Callable[[Score], float]] = {  # of one window; nan where it has no notes to tell it from
    "note density": note_density, "register": register, "voice spread": voice_spread, "major": major,
    "dissonance": dissonance}


# -- directions -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Directions:
    names: list[str]
    vectors: Tensor  # (A, S, C)

    def move(self, z: Tensor, amounts: dict[str, float]) -> Tensor:
        """Latents (S, C) or (N, S, C), moved by so many standard deviations of each attribute (over the training
        split), sensibly -3 to 3. Raises ValueError for a name that is no attribute and latents of another shape."""
        unknown = sorted(set(amounts) - set(self.names))
        if unknown or z.shape[-2:] != self.vectors.shape[1:]:
            raise ValueError(f"expected amounts of {', '.join(self.names)} and latents of "
                             f"{' x '.join(map(str, self.vectors.shape[1:]))}, got {unknown or tuple(z.shape)}")
        return z + sum(amount * self.vectors[self.names.index(name)] for name, amount in amounts.items())


def find(z: Tensor, values: np.ndarray) -> Tensor:
    """Directions (A, S, C) from latents z (N, S, C) and the attributes of their windows, values (N, A)."""
    y = torch.from_numpy((values - values.mean(0)) / values.std(0)).float()
    x = (z - z.mean(0)).flatten(1)
    covariance = x.T @ x / len(x)
    weights = torch.linalg.solve(covariance + RIDGE / len(x) * torch.eye(len(covariance)), x.T @ y / len(x))
    spread = covariance @ weights
    return torch.linalg.solve(weights.T @ spread, spread.T).unflatten(1, z.shape[1:])


def save_directions(directions: Directions, path: Path, weights: Path) -> None:
    """Marked with the `weights` of the model whose latent they belong to."""
    tensors = {name: vector.half().contiguous() for name, vector in zip(directions.names, directions.vectors,
                                                                        strict=True)}
    metadata = {"format": "mtxlib directions", "weights": digest(weights)}
    atomic(path, lambda p: save_file(tensors, str(p), metadata=metadata))


def load_directions(path: Path, weights: Path) -> Directions | None:
    """None where there is no such file, or where it belongs to other weights. Raises ValueError if it holds none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            if (f.metadata() or {}).get("format") != "mtxlib directions":
                raise ValueError("no mark of mtxlib.walk in it")
            if f.metadata()["weights"] != digest(weights):
                return None
            return Directions(list(ATTRIBUTES), torch.stack([f.get_tensor(name).float() for name in ATTRIBUTES]))
    except (KeyError, RuntimeError, SafetensorError, ValueError) as e:
        raise ValueError(f"{path}: expected directions saved by mtxlib.walk, got something else ({e})") from e
