"""Directions in the latent that change one attribute alone. N windows, S latent rows, C channels, A attributes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from symusic import Score
from torch import Tensor

from mtxlib.files import atomic, digest
from mtxlib.latent.interpolate import slerp
from mtxlib.music.metrics import major
from mtxlib.music.score import TONICS, key_of

norm = partial(torch.linalg.matrix_norm, keepdim=True)  # of latents (..., S, C) as vectors: (..., 1, 1)
PARALLEL = {"major": {4: -1, 9: -1}, "minor": {3: 1, 8: 1, 10: 1}}  # what to add to a degree to change the mode


@dataclass(frozen=True)
class Directions:
    names: list[str]
    vectors: Tensor  # (A, S, C)
    sd: Tensor  # (A,) standard deviations of the attributes over the training split
    change_mode: Callable[[Tensor, float], Tensor] | None = None  # what moves "major", in place of its vector

    def move(self, z: Tensor, amounts: dict[str, float]) -> Tensor:
        """Latents (S, C) or (N, S, C), moved by `amounts`, sensibly -3 to 3, and brought back to the length they had.
        One unit is a third of a latent's length, three turn it by 45 degrees; the attribute follows by half a standard
        deviation to one a unit (notebook 06). `major` is moved first, by `change_mode` where there is one: three units
        are the whole way. Raises ValueError for a name that is no attribute and for latents of another shape."""
        unknown = sorted(set(amounts) - set(self.names))
        if unknown or z.shape[-2:] != self.vectors.shape[1:]:
            raise ValueError(f"expected amounts of {', '.join(self.names)} and latents of "
                             f"{' x '.join(map(str, self.vectors.shape[1:]))}, got {unknown or tuple(z.shape)}")
        moved, amounts = z, dict(amounts)
        if self.change_mode and amounts.get("major"):
            moved = self.change_mode(z, amounts.pop("major"))
        moved = moved + sum(amount * self.vectors[self.names.index(name)] for name, amount in amounts.items())
        return moved * norm(z) / norm(moved).clamp(min=1e-12)


def parallel(score: Score) -> Score:
    """The music in the parallel mode of its key: in major the third and the sixth are lowered, in minor these and the
    seventh raised, where they are minor. The leading tone stays, as in harmonic minor; so does music without a key."""
    changed, key = score.copy(), key_of(score)
    steps = PARALLEL.get(key.split(" ")[-1], {})
    for note in (note for track in changed.tracks if not track.is_drum for note in track.notes):
        note.pitch += steps.get((note.pitch - TONICS.get(key, 0)) % 12, 0)
    return changed


def change_mode(run, z: Tensor, amount: float) -> Tensor:
    """Latents (S, C) or (N, S, C), turned towards major (amount up to 3) or minor (down to -3), if not there already.
    Which notes are to change depends on the tonic, so no one direction does it. This one is each window's own: from its
    latent to that of what it decodes to, greedily, in the parallel mode."""
    modes, others = other_modes(run, z)
    alpha = min(1.0, abs(amount) / 3) ** 0.5  # slerp changes the music all at once, half-way: before the first unit
    turned = [slerp(a, b, alpha) if mode * amount < 0 else a
              for a, b, mode in zip(z.reshape(others.shape), others, modes, strict=True)]
    return torch.stack(turned).view_as(z)


@lru_cache(maxsize=1)  # a slider moves the same latents again and again
def other_modes(run, z: Tensor) -> tuple[list[float], Tensor]:
    """How major the music of latents is, and the latents (N, S, C) of that music in the parallel mode."""
    scores = run.decode(z.reshape(-1, *z.shape[-2:]))
    return [major(score) for score in scores], run.encode_windows([parallel(score) for score in scores])


def find(z: Tensor, values: np.ndarray, names: list[str]) -> Directions:
    """Directions, a third as long as the mean latent, from latents z (N, S, C) and the attributes of their windows,
    values (N, A); an attribute that most windows do not have, such as the spread of a single voice, is left out.
    z is regressed on all attributes together: what the latent does when one of them changes and the others stay (the
    pattern of a forward model, not the weights of a filter: Haufe 2014, NeuroImage 87)."""
    is_common = np.isfinite(values).mean(0) > 0.5
    is_told = np.isfinite(values[:, is_common]).all(1)
    z, values = z[torch.from_numpy(is_told)], values[is_told][:, is_common]
    sd = values.std(0).clip(min=1e-9)
    y = torch.from_numpy((values - values.mean(0)) / sd).float()
    vectors = torch.linalg.lstsq(y, (z - z.mean(0)).flatten(1)).solution.unflatten(1, z.shape[1:])
    vectors = vectors / norm(vectors).clamp(min=1e-12) * norm(z).mean() / 3
    return Directions(np.array(names)[is_common].tolist(), vectors, torch.from_numpy(sd).float())


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
                raise ValueError("no mark of mtxlib directions in it")
            if metadata["weights"] != digest(weights):
                return None
            return Directions(json.loads(metadata["names"]), f.get_tensor("vectors").float(), f.get_tensor("sd"))
    except (KeyError, SafetensorError, ValueError) as e:
        raise ValueError(f"{path}: expected directions saved by mtxlib, got something else ({e})") from e
