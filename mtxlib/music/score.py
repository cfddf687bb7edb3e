"""What a score is: bars, windows, joining, keys, and its notes as arrays. Pure functions of a score, in the normal form
that `music.normal` gives it.

A window is `n_bars` bars with the notes that start in them, in full length: laid end to end, windows are the piece.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
from symusic import Score, Tempo, TextMeta, TimeSignature, Track
from symusic.core import NoteTickList

TPQ, GRID = 480, 120  # ticks a quarter, ticks a 16th
STEPS, SIXTEENTH = 24, 6  # steps, of notes as arrays, a quarter and a 16th: every grid goes evenly into them
VELOCITY, TEMPO = 80, 120.0  # TEMPO, quarters a minute, is MIDI's own where a file has none
TEMPI = (20, 400)  # what `tempos` bins, at equal ratios, reach from and to
VOICES = {52: "Soprano", 53: "Alto", 54: "Tenor", 42: "Bass"}  # General MIDI programs, from 0
METRES = {8: (3, 5, 6, 7, 9, 12), 4: (1, 2, 3, 4, 5, 6, 7)}  # denominator: numerators
BY_LENGTH = {n * 16 // d: (n, d) for d in METRES for n in METRES[d]}  # 16ths a bar: metre, x/4 rather than x/8
WINDOW_END = "end of the window"  # the text of a marker on a window's last bar line
COMMON_TIME = TimeSignature(0, 4, 4)  # where no metre is given
MAX_BEATS = 16  # longest note, in beats of its metre

KEYS = {  # tonics and key profile: Krumhansl and Kessler 1982, Psychological Review 89(4)
    "major": ("C Db D Eb E F F# G Ab A Bb B", (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)),
    "minor": ("c c# d eb e f f# g g# a bb b", (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)),
}
TONICS = {f"{tonic} {mode}": i for mode, (tonics, _) in KEYS.items() for i, tonic in enumerate(tonics.split())}
SIGNATURES = {key: 7 * (i + 3 * key.endswith("minor")) % 12 for key, i in TONICS.items()}  # fifths above C major's
KEY_NAMES = (*TONICS, "")  # the last: unknown
PROFILES = np.array([np.roll(profile, i) for _, profile in KEYS.values() for i in range(12)])  # (24, 12), as TONICS


def key_fits(score: Score) -> dict[str, float]:
    """How the durations of the pitch classes correlate with the profiles of the 24 keys, major ones first (Krumhansl
    1990, chapter 4); empty where nothing tells the keys apart."""
    _, _, length, pitch = pitched(score).T
    weights = np.bincount(pitch % 12, length, minlength=12)
    if not weights.std():
        return {}
    return dict(zip(TONICS, np.corrcoef(weights, PROFILES)[0, 1:].tolist(), strict=True))


def key_of(score: Score) -> str:
    """The key that fits best, "" where there is none."""
    fits = key_fits(score)
    return max(fits, key=lambda key: (round(fits[key], 9), key), default="")  # rounded: a tie is one on any machine


def bar_starts(score: Score, end: int | None = None) -> list[int]:
    """Ticks of all bar lines, the last one at or after `end`, or the end of the music; 4/4 where no metre is given."""
    changes = [(t.time, max(1, t.numerator * 4 * score.tpq // t.denominator)) for t in reversed(score.time_signatures)]
    end, starts, length = score.end() if end is None else end, [0], 4 * score.tpq
    while starts[-1] < end:
        while changes and changes[-1][0] <= starts[-1]:
            length = changes.pop()[1]
        following = starts[-1] + length  # or a metre that changes inside the bar ends it
        starts.append(min(following, changes[-1][0]) if changes else following)
    return starts


def window_bars(n_total: int, n_bars: int, hop: int) -> list[int]:
    """First bars of a piece's windows: every `hop` bars, and one that ends with the piece; full ones where they can."""
    last = max(0, n_total - n_bars)
    return [*range(0, last, hop), last]


def end_of(window: Score) -> int | None:
    """The tick of a window's last bar line, whatever rings on; None where a score is none, or has become more."""
    ends = [m.time for m in window.markers if m.text == WINDOW_END] if window.tpq == TPQ else []
    return ends[0] if ends and all(n.start < ends[0] for t in window.tracks for n in t.notes) else None


def in_force(marks, begin: int, end: int, first):
    """Of the tempos or metres of a score those of a stretch; `first` holds until there is one."""
    return [*[first, *(m for m in marks if m.time <= begin)][-1:], *(m for m in marks if begin < m.time < end)]


def add_notes(tracks: dict, window: Score, begin: int, end: int, shift: int) -> None:
    """Notes that start in these ticks of a window, moved by `shift`, to the tracks by voice."""
    for part in window.tracks:
        track = tracks.setdefault((part.program, part.is_drum), Track(part.name, part.program, part.is_drum))
        track.notes.extend(part.clip(begin, end, clip_end=False).shift_time(shift).notes)


def cut(score: Score, starts: list[int], bar: int, n_bars: int) -> Score:
    """The window of `n_bars` bars from `bar` on: notes that start there, times counted from its first bar line."""
    begin, end = starts[bar], starts[min(bar + n_bars, len(starts) - 1)]
    window = Score(score.tpq)
    parts = [track.clip(begin, end, clip_end=False).shift_time(-begin) for track in score.tracks]
    window.tracks.extend([part for part in parts if part.notes])
    window.tempos.extend([Tempo(max(0, t.time - begin), t.qpm)
                          for t in in_force(score.tempos, begin, end, Tempo(0, TEMPO))])
    window.time_signatures.extend([TimeSignature(max(0, t.time - begin), t.numerator, t.denominator)
                                   for t in in_force(score.time_signatures, begin, end, COMMON_TIME)])
    window.markers.append(TextMeta(end - begin, WINDOW_END))
    return window


def join(windows: list[Score], bars: list[int], n_bars: int, starts: list[int]) -> Score:
    """Lay windows at their first bars; where two overlap, the earlier one is kept. `starts`: ticks of the bar lines."""
    out, tracks, given = Score(windows[0].tpq), {}, 0
    for window, bar in zip(windows, bars, strict=True):
        begin, end = starts[max(bar, given)], starts[min(bar + n_bars, len(starts) - 1)]
        add_notes(tracks, window, begin - starts[bar], end - starts[bar], starts[bar])
        given = bar + n_bars
    out.tracks.extend(tracks.values())
    return out


def chain(windows: list[Score], spans: list[tuple[int, int]]) -> Score:
    """One piece of the bars [first, last) that each window gives, in its own metre; missing bars are empty.
    Only at the very end a note is cut at the bar line; the four voices (`VOICES`) sing one note at a time, each
    ends where the next begins, unless they are choirs: more than one note in twenty begins with another."""
    out, tracks, end, last_metre = Score(windows[0].tpq), {}, 0, None
    for window, (first, last) in zip(windows, spans, strict=True):
        lines = bar_starts(window)
        bar = lines[-1] - lines[-2] if len(lines) > 1 else 4 * window.tpq
        lines += [lines[-1] + bar * (i + 1) for i in range(last + 1 - len(lines))]
        begin, until, shift = lines[first], lines[last], end - lines[first]
        add_notes(tracks, window, begin, until, shift)
        for t in in_force(window.time_signatures, begin, until, COMMON_TIME):
            metre = t.numerator, t.denominator
            if metre != last_metre:
                out.time_signatures.append(TimeSignature(max(t.time, begin) + shift, *metre))
                last_metre = metre
        end += until - begin
    for track in tracks.values():
        notes = sorted(track.notes, key=lambda n: n.start)
        line = {n.start: n for n in notes}
        if track.program in VOICES and not track.is_drum and 20 * len(line) >= 19 * len(notes):
            notes = list(line.values())
            for note, following in pairwise(notes):
                note.duration = min(note.duration, following.start - note.start)
        for note in notes:
            note.duration = min(note.duration, end - note.start)
        track.notes = NoteTickList(notes)
    out.tracks.extend(tracks.values())
    out.tempos.extend(windows[0].tempos)
    return out


def notes_of(score: Score) -> np.ndarray:
    """(N, 4) integers in ascending order: voice (program, -1 for drums), onset, length (at least 1) in steps, pitch."""
    rows = [np.zeros((0, 4), int)]
    for track in score.tracks:
        notes = track.notes.numpy()
        voice = np.full(len(track.notes), -1 if track.is_drum else track.program)
        rows.append(np.stack([voice, notes["time"], notes["duration"], notes["pitch"]], 1))
    notes = np.concatenate(rows)
    notes[:, 1:3] = (2 * STEPS * notes[:, 1:3] + score.tpq) // (2 * score.tpq)
    notes[:, 2] = notes[:, 2].clip(1)
    return notes[np.lexsort(notes.T[::-1])]


def pitched(score: Score) -> np.ndarray:
    """Notes (N, 4) without drums."""
    notes = notes_of(score)
    return notes[notes[:, 0] >= 0]


def sounding(notes: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the notes (N, 4) sounds at which of the times (T,), steps that ascend: indices of both, (M,) each."""
    first, last = (np.searchsorted(times, at) for at in (notes[:, 1], notes[:, 1] + notes[:, 2]))
    often = last - first
    which = np.repeat(np.arange(len(notes)), often)
    return which, np.arange(len(which)) + np.repeat(last - often.cumsum(), often)


def bar_lines(score: Score) -> np.ndarray:
    """Steps of all bar lines, see `bar_starts`."""
    return np.array(bar_starts(score)) * STEPS // score.tpq


def note_counts(score: Score) -> Counter:
    """(voice, onset in steps, pitch) -> how many; the voice is its MIDI program, -1 for drums."""
    return Counter((voice, onset, pitch) for voice, onset, _, pitch in notes_of(score).tolist())


def durations(score: Score) -> dict:
    """(voice, onset, pitch), as in `note_counts` -> length in steps, of several the longest."""
    return {(voice, onset, pitch): length for voice, onset, length, pitch in notes_of(score).tolist()}


def note_f1(a: Score, b: Score) -> float:
    """Notes found again: same voice, onset and pitch."""
    a, b = note_counts(a), note_counts(b)
    return 2 * (a & b).total() / max(1, a.total() + b.total())
