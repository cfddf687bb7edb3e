"""Is it music? Measures of a set of pieces beside real, held-out ones, and attributes of a window; no model here.

What is unusual: what a good piece is, the real ones say. A rule that they do not keep binds nobody, and a measure that
means nothing for them is nan (`undefined` says why): parallels are for voices of one note at a time, not for hands.
N notes (`score.notes_of`) are without drums, but for the silence of a bar; V voices go from the highest mean pitch of
the real pieces to the lowest; a chord, of K, is what sounds where some voice begins a note.
"""

from collections import Counter
from itertools import combinations, combinations_with_replacement, compress

import numpy as np
from symusic import Score

from mtxlib.music.score import (
    SIGNATURES,
    SIXTEENTH,
    STEPS,
    TONICS,
    bar_lines,
    bar_starts,
    cut,
    key_fits,
    key_of,
    note_counts,
    notes_of,
    pitched,
    sounding,
    window_bars,
)

BINS = 128  # of every histogram; what lies beyond is counted in the last
CELLS = 2**21  # at most, of one block of bars compared with bars: 8 MB
MOST = 0.95  # the share of the real pieces that makes a rule
RULES = ("all have the same voices", "every voice has one note at a time", "no bar is silent",
         "all voices stop together")
TRIADS = ({0, 3}, {0, 3, 7}, {0, 4}, {0, 4, 7})  # semitones above the root; the fifth may be missing
DISSONANT = (1, 2, 6, 10, 11)  # semitones, modulo 12: seconds, sevenths and the tritone, as in Huron 1994


def judge(pieces: list[Score], real: list[Score]) -> dict[str, float]:
    """How pieces compare with real ones; both in normal form (see `corpus`).

    - `oa_pitch`, `oa_duration`, `oa_onset_interval`, `oa_harmonic_interval`: overlapping area, 0 to 1, of the densities
      of the two sets, after Yang & Lerch 2020, "On the evaluation of generative models in music". A density is the
      normalised histogram of all pieces of a set together, not smoothed, for the bins are natural ones (`histograms`).
    - `voice_crossing`: share of chords in which a voice lies below the next lower one that the piece has.
    - `parallel_fifths`, `parallel_octaves`: pairs of voices that move in one direction from a fifth to a fifth (from an
      octave or unison to one), whole octaves not counted, per 100 chord changes.
    - `key_stability`: share of the stretches of four bars, two bars apart, whose key (`score.key_of`) is that of the
      whole piece or closely related to it: their signatures differ by one accidental at most.
    - `similarity_within`, `similarity_across`: mean similarity, 0 to 1, of two bars of one piece and of two pieces:
      shared notes over all notes, as in Museformer (Yu 2022), where notes are equal that agree in voice, place in the
      bar and pitch class above the tonic of the piece; nan where there are no two such bars.
    - `tonic_ending`: share of pieces whose last chord is a major or minor triad in root position on the tonic of the
      piece; its fifth may be missing. Where most real pieces stop in all voices together, these have to as well.
      `cadence`: share of those whose last chord also begins on a bar line or half a bar after one, and lasts a quarter.
    - `wellformed`: share of pieces that have notes, none of them twice at one place, and keep those of `RULES` that the
      real ones keep (`rules_of`).

    Raises ValueError if one of the sets is empty.
    """
    for name, scores in (("pieces", pieces), ("real", real)):
        if not scores:
            raise ValueError(f"{name}: expected at least one score, got none")
    ours, theirs, reasons = histograms(pieces), histograms(real), undefined(real)
    voices, last, (rules, choir) = from_the_highest(real), stopping(real), rules_of(real)
    chords = [] if "voice_crossing" in reasons else [chords_of(score, voices) for score in pieces]
    n_chords = max(1, sum(x.shape[1] for x in chords))
    changes, (within, across) = max(1, n_chords - len(chords)), similarity(pieces)
    stable = [is_near for score in pieces for is_near in is_near_key(score)]
    tonic_ending, cadence = np.mean([ending(score, last) for score in pieces], axis=0).tolist()
    return {
        **{f"oa_{name}": float(np.minimum(ours[name], theirs[name]).sum()) for name in ours},
        "voice_crossing": float(sum(((x[:-1] < x[1:]) & (x[:-1] > 0)).any(0).sum() for x in chords) / n_chords),
        "parallel_fifths": 100 * sum(parallels(x, 7) for x in chords) / changes,
        "parallel_octaves": 100 * sum(parallels(x, 0) for x in chords) / changes,
        "key_stability": float(np.mean(stable)) if stable else float("nan"),
        "similarity_within": within, "similarity_across": across,
        "tonic_ending": tonic_ending, "cadence": cadence,
        "wellformed": float(np.mean([set(note_counts(score).values()) == {1} and rules <= rules_kept(score, choir)
                                     for score in pieces])),
    } | dict.fromkeys(reasons, float("nan"))


def undefined(real: list[Score]) -> dict[str, str]:
    """The measures of `judge` that mean nothing beside such real pieces, each with the reason."""
    leading = ("voice_crossing", "parallel_fifths", "parallel_octaves")
    harmony = (*leading, "oa_harmonic_interval", "tonic_ending", "cadence")
    shares = histograms(real)
    if not shares["pitch"].any():
        return dict.fromkeys((*harmony, "oa_pitch", "oa_duration", "oa_onset_interval", "key_stability"),
                             "the real pieces have no notes but drums")
    if not shares["harmonic_interval"].any():
        return dict.fromkeys(harmony, "the real pieces never have two notes at once")
    if len(from_the_highest(real)) < 2 or np.mean([RULES[1] in rules_kept(score) for score in real]) < MOST:
        return dict.fromkeys(leading, "the real pieces do not have several voices of one note at a time each")
    return {}


def from_the_highest(scores: list[Score]) -> list[int]:
    notes = np.concatenate([pitched(score) for score in scores])
    return sorted(set(notes[:, 0].tolist()), key=lambda voice: -notes[notes[:, 0] == voice, 3].mean())


def chords_of(score: Score, voices: list[int]) -> np.ndarray:
    """(V, K): the pitch in each chord of those of the voices that the score has, 0 for none."""
    notes = pitched(score)
    voices = [voice for voice in voices if voice in notes[:, 0]]
    notes = notes[np.isin(notes[:, 0], voices)]
    times = np.unique(notes[:, 1])
    which, when = sounding(notes, times)
    chords = np.zeros((len(voices), len(times)), int)
    chords[[voices.index(voice) for voice in notes[which, 0].tolist()], when] = notes[which, 3]
    return chords


def histograms(scores: list[Score]) -> dict[str, np.ndarray]:
    """Shares, (BINS,) each: MIDI pitches; durations and intervals between the onsets of a voice, in sixteenths;
    harmonic intervals, in semitones, of all two notes of all chords."""
    counts = np.zeros((4, BINS))
    for score in scores:
        notes = pitched(score)
        onsets = np.unique(notes[:, :2], axis=0)
        between = np.diff(onsets[:, 1])[np.diff(onsets[:, 0]) == 0]
        values = notes[:, 3], (notes[:, 2] // SIXTEENTH).clip(1), between // SIXTEENTH
        counts[:3] += [np.bincount(x.clip(max=BINS - 1), minlength=BINS) for x in values]
        counts[3] += intervals(notes, np.unique(notes[:, 1]))
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    return dict(zip(("pitch", "duration", "onset_interval", "harmonic_interval"), shares, strict=True))


def intervals(notes: np.ndarray, times: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """(128,): how many pairs of notes sound so many semitones apart at `times`, each counted by the time's weight."""
    which, when = sounding(notes, times)
    counts = np.bincount(when * 128 + notes[which, 3], minlength=128 * len(times)).reshape(-1, 128).astype(float)
    weighted = counts.T * weights
    pairs = weighted @ counts - np.diag(weighted.sum(1))  # each pair twice, none of a note with itself
    apart = np.abs(np.subtract.outer(np.arange(128), np.arange(128)))
    return np.bincount(apart.ravel(), pairs.ravel(), minlength=128) / 2


def parallels(chords: np.ndarray, interval: int) -> int:
    """How many pairs of voices of chords (V, K) move in one direction from this interval (modulo 12) to itself."""
    found = 0
    for a, b in combinations(chords, 2):
        is_it = ((a - b) % 12 == interval) & (a > 0) & (b > 0)
        found += int((is_it[:-1] & is_it[1:] & (np.diff(a) * np.diff(b) > 0)).sum())
    return found


def is_near_key(score: Score) -> list[bool]:
    """For each stretch of four bars, two bars apart, that has notes."""
    starts, home = bar_starts(score), SIGNATURES.get(key_of(score), 0)
    keys = [key_of(cut(score, starts, bar, 4)) for bar in window_bars(len(starts) - 1, 4, 2)]
    return [(SIGNATURES[key] - home + 1) % 12 <= 2 for key in keys if key]


def bars_of(scores: list[Score]) -> tuple[np.ndarray, np.ndarray]:
    """(M, 2) integers without doubles, by bar: the number of a bar, of all that have notes, and of a note in it (its
    voice, place and pitch class, see `judge`); and to which score each bar belongs (N,)."""
    rows = [np.zeros((0, 3), int)]
    for i, score in enumerate(scores):
        (voice, onset, _, pitch), lines, tonic = pitched(score).T, bar_lines(score), TONICS.get(key_of(score), 0)
        bar = np.searchsorted(lines, onset, side="right") - 1
        note = ((onset - lines[bar]) * 128 + voice) * 12 + (pitch - tonic) % 12
        rows.append(np.stack([np.full(len(bar), i), bar, note], 1))
    rows = np.unique(np.concatenate(rows), axis=0)
    bars, number = np.unique(rows[:, :2], axis=0, return_inverse=True)
    return np.stack([number.ravel(), np.unique(rows[:, 2], return_inverse=True)[1]], 1), bars[:, 0]


def alike(bars: np.ndarray, some: range, others: range) -> np.ndarray:
    """Shared notes over all notes of each two of the bars (`bars_of`) that these are the numbers of, as a matrix."""
    x, y = (np.zeros((len(numbers), bars[:, 1].max(initial=0) + 1), np.float32) for numbers in (some, others))
    for has, numbers in ((x, some), (y, others)):
        first, last = np.searchsorted(bars[:, 0], (numbers.start, numbers.stop))
        has[bars[first:last, 0] - numbers.start, bars[first:last, 1]] = 1
    shared = (x @ y.T).astype(float)
    return shared / (x.sum(1)[:, None] + y.sum(1) - shared)


def similarity(scores: list[Score]) -> list[float]:
    """Mean similarity of two bars of one piece, and of two pieces, see `judge`; block by block, in bounded memory."""
    bars, piece = bars_of(scores)
    n, step = len(piece), max(1, min(int(CELLS**0.5), CELLS // (bars[:, 1].max(initial=0) + 1)))
    blocks, within, total = [range(i, min(i + step, n)) for i in range(0, n, step)], 0.0, 0.0
    for some, others in combinations_with_replacement(blocks, 2):
        block = alike(bars, some, others) * (1 if some is others else 2)
        is_same = piece[some.start:some.stop, None] == piece[others.start:others.stop]
        within, total = within + block[is_same].sum(), total + block.sum()
    n_within = (np.bincount(piece) ** 2).sum()
    pairs = np.array([n_within - n, n * n - n_within])  # no bar beside itself
    return (np.array([within - n, total - within]) / np.where(pairs, pairs, np.nan)).tolist()


def ending(score: Score, voices: list[int]) -> tuple[bool, bool]:
    """Whether the last chord is a triad of the tonic, and whether it is long and on a strong beat as well, see `judge`;
    `voices` have to sound until the end."""
    notes, lines, key = pitched(score), bar_lines(score), key_of(score)
    if not key:
        return False, False
    ends, begin = notes[:, 1] + notes[:, 2], notes[:, 1].max()
    last, bar = notes[ends > begin, 3] - TONICS[key], np.searchsorted(lines, begin, side="right") - 1
    is_tonic = (set(voices) <= set(notes[ends == ends.max(), 0].tolist()) and last.min() % 12 == 0
                and set((last % 12).tolist()) in TRIADS)
    is_strong = (begin - lines[bar]) * 2 % (lines[bar + 1] - lines[bar]) == 0
    return bool(is_tonic), bool(is_tonic and is_strong and ends.max() - begin >= STEPS)


def closes(score: Score, voices: list[int]) -> bool:
    return ending(score, voices)[1]


def rules_kept(score: Score, choir: frozenset[int] = frozenset()) -> set[str]:
    """Those of `RULES` that a score keeps; `choir`: the voices that all should have."""
    notes, found, lines = notes_of(score), pitched(score), bar_lines(score)
    begun, ended = np.sort(notes[:, 1]), np.sort(notes[:, 1] + notes[:, 2])
    heard = np.searchsorted(begun, lines[1:]) - np.searchsorted(ended, lines[:-1], side="right")
    ends, voices = found[:, 1] + found[:, 2], set(found[:, 0].tolist())
    overlap = (found[1:, 1] < ends[:-1]) & (np.diff(found[:, 0]) == 0)
    stopping_last = set(found[ends == ends.max(initial=0), 0].tolist())
    return set(compress(RULES, (voices == choir, not overlap.any(), heard.all(), voices == stopping_last)))


def choir_of(scores: list[Score]) -> frozenset[int]:
    """The voices that most of the scores have, drums apart."""
    have = Counter(voice for score in scores for voice in set(pitched(score)[:, 0].tolist()))
    return frozenset(voice for voice in have if have[voice] > len(scores) / 2)


def rules_of(real: list[Score]) -> tuple[set[str], frozenset[int]]:
    """Those of `RULES` that, together, 95 % of the real pieces keep, and the voices that the first of them means."""
    choir, rules = choir_of(real), set()
    kept = [rules_kept(score, choir) for score in real]
    for rule in RULES:
        if np.mean([rules | {rule} <= some for some in kept]) >= MOST:
            rules.add(rule)
    return rules, choir


def stopping(scores: list[Score]) -> list[int]:
    """The voices that an ending needs: those that most have, where most stop in all their voices together."""
    together = [RULES[3] in rules_kept(score) for score in scores]
    return sorted(choir_of(scores)) if sum(together) > len(scores) / 2 else []


def note_density(score: Score) -> float:
    """Onsets a quarter, all voices together, until the last note ends."""
    return score.note_num() * score.tpq / max(1, score.end())


def register(score: Score) -> float:
    """Mean MIDI pitch, weighted by duration."""
    notes = pitched(score)
    return float(notes[:, 2] @ notes[:, 3] / notes[:, 2].sum()) if len(notes) else np.nan


def voice_spread(score: Score) -> float:
    """Semitones from the lowest to the highest note, mean of the time in which two notes or more sound."""
    times, long = moments(notes := pitched(score))
    which, when = sounding(notes, times)
    low, high = np.full(len(times), 128), np.zeros(len(times), int)
    np.minimum.at(low, when, notes[which, 3])
    np.maximum.at(high, when, notes[which, 3])
    long = long * (np.bincount(when, minlength=len(times)) > 1)
    return float((high - low) @ long / long.sum()) if long.any() else np.nan


def major(score: Score) -> float:
    """How much better the best major key fits than the best minor key: difference of the correlations, see `key_of`."""
    fits = list(key_fits(score).values())
    return max(fits[:12]) - max(fits[12:]) if fits else np.nan


def dissonance(score: Score) -> float:
    """Share of dissonant intervals among those of all two notes that sound together, each weighted by its duration."""
    found = intervals(notes := pitched(score), *moments(notes))
    return float(found[np.isin(np.arange(128) % 12, DISSONANT)].sum() / found.sum()) if found.any() else np.nan


def moments(notes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When the sound of the notes (N, 4) changes, in steps, and how long it stays so, (T,) each."""
    times = np.unique(np.concatenate([notes[:, 1], notes[:, 1] + notes[:, 2]]))
    return times, np.diff(times, append=times[-1:])


ATTRIBUTES = {  # of one window; nan where it has no notes to tell it from
    f.__name__.replace("_", " "): f for f in (note_density, register, voice_spread, major, dissonance)}
