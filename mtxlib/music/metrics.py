"""Is it music? Measures of a set of pieces beside real, held-out ones, and attributes of a window; no model here.

What is unusual: a piece is looked at as a grid, voices by sixteenths, so that chords, motions and crossings are plain
array comparisons; a *chord* is a column of the grid in which some voice begins a note. Voices are told apart by their
programs and ordered by their mean pitch in the real pieces; drums are left out.

V voices, from the highest; T sixteenths.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
from symusic import Score

from mtxlib.music.score import (
    SIGNATURES,
    TONICS,
    bar_lines,
    bar_starts,
    chords_of,
    cut,
    grid,
    key_fits,
    key_of,
    notes_of,
    track_programs,
    voices_of,
    window_bars,
)

BINS = 128  # of every histogram; what lies beyond is counted in the last
KEY_BARS = 4  # bars of the stretches whose key is compared with that of the piece


def judge(pieces: list[Score], real: list[Score]) -> dict[str, float]:
    """How pieces compare with real ones; both in normal form (see `corpus`).

    - `oa_pitch`, `oa_duration`, `oa_onset_interval`, `oa_harmonic_interval`: overlapping area, 0 to 1, of the densities
      of the two sets, after Yang & Lerch 2020, "On the evaluation of generative models in music". A density is the
      normalised histogram of all pieces of a set together, not smoothed, for the bins are natural ones (`histograms`).
    - `voice_crossing`: share of chords in which a voice lies below the next lower one.
    - `parallel_fifths`, `parallel_octaves`: pairs of voices that move in one direction from a fifth to a fifth (from an
      octave or unison to one), whole octaves not counted, per 100 chord changes.
    - `key_stability`: share of the stretches of four bars, two bars apart, whose key (`score.key_of`) is that of the
      whole piece or closely related to it: their signatures differ by one accidental at most.
    - `similarity_within`, `similarity_across`: mean similarity, 0 to 1, of two bars of one piece and of two pieces:
      shared notes over all notes, as in Museformer (Yu 2022), where notes are equal that agree in voice, place in the
      bar and pitch class above the tonic of the piece. Music that comes back to itself has a high first; pieces that
      are all alike, a high second. nan where there are no two such bars.
    - `tonic_ending`: share of pieces whose voices stop together on a major or minor triad in root position on the tonic
      of the piece; its fifth may be missing. `cadence`: share of those whose last chord also begins on a bar line or
      half a bar after one, and lasts a quarter at least.
    - `wellformed`: share of pieces in which every voice of the real ones sings, one note at a time, no bar is silent
      in all voices, and all voices stop together.

    Raises ValueError if one of the sets is empty.
    """
    for name, scores in (("pieces", pieces), ("real", real)):
        if not scores:
            raise ValueError(f"{name}: expected at least one score, got none")
    voices = voices_of(real)
    ours, theirs = histograms(pieces, voices), histograms(real, voices)
    chords = [chords_of(score, voices) for score in pieces]
    n_chords = sum(chord.shape[1] for chord in chords)
    alike, number = similarity(pieces, voices)
    is_same, is_other = number[:, None] == number, ~np.eye(len(number), dtype=bool)
    return {
        **{f"oa_{name}": float(np.minimum(ours[name], theirs[name]).sum()) for name in ours},
        "voice_crossing": sum(crossings(chord).sum() for chord in chords) / max(1, n_chords),
        **{f"parallel_{name}": 100 * sum(parallels(chord, size) for chord in chords) / max(1, n_chords - len(chords))
           for name, size in (("fifths", 7), ("octaves", 0))},
        "key_stability": mean([near for score in pieces for near in is_near_key(score)]),
        "similarity_within": mean(alike[is_same & is_other]), "similarity_across": mean(alike[~is_same]),
        "tonic_ending": mean([ends_on_tonic(score, voices) for score in pieces]),
        "cadence": mean([closes(score, voices) for score in pieces]),
        "wellformed": mean([is_wellformed(score, voices) for score in pieces]),
    }


def mean(values: list | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def histograms(scores: list[Score], voices: list[int]) -> dict[str, np.ndarray]:
    """Shares, (BINS,) each: MIDI pitches; durations and onset intervals of successive notes of a voice, in sixteenths;
    harmonic intervals, in semitones, of all pairs of voices at all chords."""
    values: dict[str, list] = {"pitch": [], "duration": [], "onset_interval": [], "harmonic_interval": []}
    for score in scores:
        voice, onset, length, pitch = notes_of(score, voices).T
        values["pitch"].append(pitch)
        values["duration"].append(length)
        values["onset_interval"].append(np.diff(onset)[np.diff(voice) == 0])
        chords = chords_of(score, voices)
        for a, b in combinations(chords, 2):
            values["harmonic_interval"].append(np.abs(a - b)[(a > 0) & (b > 0)])
    counts = {name: np.bincount(np.concatenate(x).clip(max=BINS - 1), minlength=BINS) for name, x in values.items()}
    return {name: n / max(1, n.sum()) for name, n in counts.items()}


def crossings(chords: np.ndarray) -> np.ndarray:
    """Whether a voice lies below the next lower one, for each of the chords (V, N)."""
    return ((chords[:-1] < chords[1:]) & (chords[:-1] > 0)).any(0)


def parallels(chords: np.ndarray, interval: int) -> int:
    """How many pairs of voices of chords (V, N) move in one direction from this interval (modulo 12) to itself."""
    step, found = np.diff(chords), 0
    for a, b in combinations(range(len(chords)), 2):
        is_it = ((chords[a] - chords[b]) % 12 == interval) & (chords[a] > 0) & (chords[b] > 0)
        found += (is_it[:-1] & is_it[1:] & (step[a] * step[b] > 0)).sum()
    return int(found)


def is_near_key(score: Score) -> list[bool]:
    """For each stretch of four bars, two bars apart, that has notes."""
    starts, home = bar_starts(score), SIGNATURES.get(key_of(score), 0)
    stretches = [cut(score, starts, bar, KEY_BARS) for bar in window_bars(len(starts) - 1, KEY_BARS, 2)]
    keys = [key for key in map(key_of, stretches) if key]
    return [(SIGNATURES[key] - home + 1) % 12 <= 2 for key in keys]


def similarity(scores: list[Score], voices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Shared notes over all notes of each two bars, (N, N) for the N bars of all scores that have notes, and the number
    of the score that each belongs to, (N,)."""
    bars: dict[tuple[int, int], set] = {}
    for i, score in enumerate(scores):
        lines, tonic = bar_lines(score), TONICS.get(key_of(score), 0)
        for voice, onset, _, pitch in notes_of(score, voices):
            bar = int(np.searchsorted(lines, onset, side="right")) - 1
            bars.setdefault((i, bar), set()).add((voice, onset - lines[bar], (pitch - tonic) % 12))
    columns = {note: k for k, note in enumerate(set().union(*bars.values()))}
    has = np.zeros((len(bars), len(columns)), np.float32)
    for row, key in zip(has, sorted(bars), strict=True):
        row[[columns[note] for note in bars[key]]] = 1
    shared, size = has @ has.T, has.sum(1)
    return shared / (size[:, None] + size - shared), np.array([i for i, _ in sorted(bars)])


def ends_on_tonic(score: Score, voices: list[int]) -> bool:
    """Whether all voices stop together on a triad of the tonic, see `judge`."""
    pitch, _ = grid(score, voices)
    if not pitch.size or not (pitch[:, -1] > 0).all():
        return False
    above = (pitch[:, -1] - TONICS[key_of(score)]) % 12
    return bool(above[-1] == 0 and set(above.tolist()) in ({0, 3}, {0, 3, 7}, {0, 4}, {0, 4, 7}))


def closes(score: Score, voices: list[int]) -> bool:
    """Whether the triad of the tonic at its end is long and on a strong beat, see `judge`."""
    if not ends_on_tonic(score, voices):
        return False
    begins, lines = grid(score, voices)[1].any(0), bar_lines(score)
    last = np.flatnonzero(begins)[-1]
    bar = np.searchsorted(lines, last, side="right") - 1
    is_strong = (last - lines[bar]) * 2 % (lines[bar + 1] - lines[bar]) == 0
    return bool(is_strong and len(begins) - last >= 4)


def is_wellformed(score: Score, voices: list[int]) -> bool:
    pitch, _ = grid(score, voices)
    notes, lines = notes_of(score, voices), bar_lines(score)
    is_sung = set(notes[:, 0]) == set(range(len(voices)))
    is_single = notes[:, 2].sum() == (pitch > 0).sum()
    return bool(is_sung and is_single and (pitch[:, -1] > 0).all()
                and all((pitch[:, a:b] > 0).any() for a, b in zip(lines, lines[1:], strict=False)))


DISSONANT = (1, 2, 6)  # interval classes: seconds, sevenths and the tritone, the dissonant ones of Huron 1994
MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)  # semitones above the tonic


def sounding(score: Score) -> np.ndarray:
    return grid(score, track_programs(score))[0]


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


def in_key(pitch: np.ndarray) -> float:
    """Largest share of the sounding grid (V, T) that lies in one diatonic scale."""
    classes = np.bincount(pitch[pitch > 0] % 12, minlength=12)
    return max(classes[(np.array(MAJOR_SCALE) + tonic) % 12].sum() for tonic in range(12)) / max(1, classes.sum())
