"""Is it music? Measures of a set of pieces beside real, held-out ones; nothing here knows a model.

What is unusual: a piece is looked at as a grid, voices by sixteenths, so that chords, motions and crossings are plain
array comparisons; a *chord* is a column of the grid in which some voice begins a note. Voices are told apart by their
programs and ordered by their mean pitch in the real pieces; drums are left out.

V voices, from the highest; T sixteenths.
"""

from itertools import combinations

import numpy as np
from symusic import Score

from .corpus import KEYS, key_of
from .tokens import bar_starts, cut, window_bars

BINS = 128  # of every histogram; what lies beyond is counted in the last
KEY_BARS = 4  # bars of the stretches whose key is compared with that of the piece
SIGNATURES = {f"{tonic} {mode}": (7 * (i + 3 * (mode == "minor"))) % 12  # steps on the circle of fifths from C
              for mode, (tonics, _) in KEYS.items() for i, tonic in enumerate(tonics.split())}
TONICS = {f"{tonic} {mode}": i for mode, (tonics, _) in KEYS.items() for i, tonic in enumerate(tonics.split())}


def judge(pieces: list[Score], real: list[Score]) -> dict[str, float]:
    """How pieces compare with real ones; both in normal form (see `corpus`).

    - `oa_pitch`, `oa_duration`, `oa_onset_interval`, `oa_harmonic_interval`: overlapping area, 0 to 1, of the densities
      of the two sets, after Yang & Lerch 2020, "On the evaluation of generative models in music". A density is the
      normalised histogram of all pieces of a set together, not smoothed, for the bins are natural ones (`histograms`).
    - `voice_crossing`: share of chords in which a voice lies below the next lower one.
    - `parallel_fifths`, `parallel_octaves`: pairs of voices that move in one direction from a fifth to a fifth (from an
      octave or unison to one), whole octaves not counted, per 100 chord changes.
    - `key_stability`: share of the stretches of four bars, two bars apart, whose key (`corpus.key_of`) is that of the
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


# -- a piece as a grid ------------------------------------------------------------------------------------------------

def voices_of(scores: list[Score]) -> list[int]:
    """The programs of all tracks but drums, from the highest mean pitch to the lowest."""
    pitches: dict[int, list[int]] = {}
    for track in (t for score in scores for t in score.tracks if t.notes and not t.is_drum):
        pitches.setdefault(track.program, []).extend(n.pitch for n in track.notes)
    return sorted(pitches, key=lambda program: -np.mean(pitches[program]))


def notes_of(score: Score, voices: list[int]) -> np.ndarray:
    """(N, 4) integers: voice, onset and length in sixteenths, one at least, pitch; by voice, then onset."""
    notes = [(voices.index(t.program), n.start * 4 // score.tpq, max(1, n.duration * 4 // score.tpq), n.pitch)
             for t in score.tracks if not t.is_drum and t.program in voices for n in t.notes]
    return np.array(sorted(notes), dtype=int).reshape(-1, 4)


def grid(score: Score, voices: list[int], steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The pitch that sounds, 0 for none, and whether it begins there: (V, T) each, of the first `steps` sixteenths, or
    to the end of the last note."""
    notes = notes_of(score, voices)
    steps = (notes[:, 1] + notes[:, 2]).max(initial=0) if steps is None else steps
    pitch, begins = np.zeros((len(voices), steps), int), np.zeros((len(voices), steps), bool)
    for voice, onset, length, p in notes:
        pitch[voice, onset:onset + length], begins[voice, onset:onset + 1] = p, True
    return pitch, begins


def chords_of(score: Score, voices: list[int]) -> np.ndarray:
    """(V, number of chords): the columns of the grid in which some voice begins a note."""
    pitch, begins = grid(score, voices)
    return pitch[:, begins.any(0)]


def bar_lines(score: Score) -> np.ndarray:
    return np.array(bar_starts(score)) * 4 // score.tpq


# -- measures ---------------------------------------------------------------------------------------------------------

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
