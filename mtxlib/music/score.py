"""What a score is: its normal form, bars, windows, voices, keys, and its notes as arrays. Pure functions of a score.

Normal form: 480 ticks a quarter, notes on the 16th grid, one tempo and velocity, metres of `METRES` that change on bar
lines only, no controls. Four tracks without drums become soprano to bass (`VOICES`); other music keeps its programs,
made distinct because MidiTok merges tracks of equal program.

A window is `n_bars` bars with the notes that start in them, with their full lengths, so that windows laid end to end
are the piece again.
"""

from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import symusic
from symusic import Note, Score, Tempo, TimeSignature, Track

TPQ, GRID = 480, 120  # ticks a quarter, ticks a 16th
VELOCITY, TEMPO = 80, 96.0  # TEMPO where the file has none between 20 and 300 quarters a minute
VOICES = {52: "Soprano", 53: "Alto", 54: "Tenor", 42: "Bass"}  # General MIDI programs, from 0
LOW, HIGH, DRUMS = 21, 108, (27, 87)  # MidiTok's pitches: notes outside move by octaves, drum hits are left out
METRES = {8: (3, 5, 6, 7, 9, 12), 4: (1, 2, 3, 4, 5, 6, 7)}  # denominator: numerators
BY_LENGTH = {n * 16 // d: (n, d) for d in METRES for n in METRES[d]}  # 16ths a bar: metre, x/4 rather than x/8
WINDOW_END = "end of the window"  # the text of a marker on a window's last bar line
MAX_BEATS = 16  # longest note, in beats of its metre
MAX_BYTES, MAX_TRACKS, MAX_NOTES, MAX_BARS = 5_000_000, 128, 200_000, 4_000
KEYS = {  # tonics and key profile: Krumhansl and Kessler 1982, Psychological Review 89(4)
    "major": ("C Db D Eb E F F# G Ab A Bb B", (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)),
    "minor": ("c c# d eb e f f# g g# a bb b", (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)),
}
SIGNATURES = {f"{tonic} {mode}": (7 * (i + 3 * (mode == "minor"))) % 12  # steps on the circle of fifths from C
              for mode, (tonics, _) in KEYS.items() for i, tonic in enumerate(tonics.split())}
TONICS = {f"{tonic} {mode}": i for mode, (tonics, _) in KEYS.items() for i, tonic in enumerate(tonics.split())}
KEY_NAMES = (*TONICS, "")  # the last: unknown


class Unusable(ValueError):
    """Why a piece is left out, as "category: detail". The summary line counts the categories."""


def normalise(score: Score) -> Score:
    """A new score in the normal form described at the head of this file; doing it twice changes nothing.

    Onsets and ends go to the nearest 16th; a note lasts one 16th to 16 beats and ends where the next of its pitch and
    track begins. Bars that are empty at the start are left out. Raises ValueError, with the reason, for a score without
    notes or beyond 128 tracks, 200,000 notes or 4,000 bars.
    """
    tracks = [t for t in score.tracks if len(t.notes)]
    within("too many tracks", len(tracks), MAX_TRACKS)
    within("too many notes", sum(len(t.notes) for t in tracks), MAX_NOTES)
    parts = [(t.program, t.name, False, grid_notes(t, score.tpq)) for t in tracks if not t.is_drum]
    drums = [hits for t in tracks if t.is_drum and len(hits := grid_notes(t, score.tpq))]
    if len(parts) == 4 and not drums:  # voices that carry these programs already may cross
        order, named = list(VOICES), sorted(program for program, *_ in parts) == sorted(VOICES)
        parts.sort(key=lambda part: order.index(part[0]) if named else -part[3][:, 2].mean())
        parts = [(*voice, *part[2:]) for voice, part in zip(VOICES.items(), parts, strict=True)]
    parts = distinct_programs(parts) + ([(0, "Drums", True, np.concatenate(drums))] if drums else [])
    if not parts:
        raise Unusable("no notes")
    onsets = np.concatenate([notes[:, 0] for *_, notes in parts])
    metres, skip = metre_grid(score, int(onsets.min()), int(onsets.max()))
    within("too many bars", (int(onsets.max()) - skip) // max(BY_LENGTH), MAX_BARS)  # at least so many: ticks are int32
    result = Score(TPQ)
    tempo = score.tempos[0].qpm if len(score.tempos) else TEMPO
    result.tempos.append(Tempo(0, tempo if 20 <= tempo <= 300 else TEMPO))
    result.time_signatures.extend([TimeSignature(start * GRID, *metre) for start, metre in metres])
    for program, name, is_drum, notes in parts:
        start, length, pitch = well_formed(notes - (skip, 0, 0), metres).T
        track = Track(name, program, is_drum)
        track.notes = Note.from_numpy(start * GRID, length * GRID, pitch, np.full(len(pitch), VELOCITY))
        result.tracks.append(track)
    within("too many bars", count_bars(result), MAX_BARS)
    return result


def within(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise Unusable(f"{what}: {number:,}, at most {limit:,}")


def grid_notes(track: Track, tpq: int) -> np.ndarray:
    """(N, 3) ints: onset and length in 16ths, pitch."""
    notes = {k: v.astype(int) for k, v in track.notes.numpy().items()}
    onset, end = ((ticks * 8 + tpq) // (2 * tpq) for ticks in (notes["time"], notes["time"] + notes["duration"]))
    pitch = notes["pitch"]
    octaves = np.maximum(LOW - pitch + 11, 0) // 12 - np.maximum(pitch - HIGH + 11, 0) // 12
    rows = np.stack([onset, np.maximum(end - onset, 1), pitch if track.is_drum else pitch + 12 * octaves], axis=1)
    return rows[(pitch >= DRUMS[0]) & (pitch <= DRUMS[1])] if track.is_drum else rows


def well_formed(notes: np.ndarray, metres: list) -> np.ndarray:
    """No longer than MAX_BEATS, no two of one pitch at once (of equal onsets the longest stays), in order."""
    section = np.searchsorted([start for start, _ in metres], notes[:, 0], side="right") - 1
    beats = np.array([16 // denominator for _, (_, denominator) in metres])[section]
    notes[:, 1] = np.minimum(notes[:, 1], MAX_BEATS * beats)
    notes = notes[np.lexsort((-notes[:, 1], notes[:, 0], notes[:, 2]))]
    notes = notes[np.r_[True, np.diff(notes[:, [0, 2]], axis=0).any(axis=1)]]
    step = np.diff(notes[:, [0, 2]], axis=0)
    notes[:-1, 1] = np.where(step[:, 1] == 0, np.minimum(notes[:-1, 1], step[:, 0]), notes[:-1, 1])
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]


def distinct_programs(parts: list[tuple]) -> list[tuple]:
    """The first part of a program keeps it; the others take the nearest free one, of its family of 8 if possible."""
    used, result = {program for program, *_ in parts}, {}
    for p, *rest in parts:
        if p in result:
            p = min(set(range(128)) - used, key=lambda q: (q // 8 != p // 8, abs(q - p)))
            used.add(p)
        result[p] = (p, *rest)
    return list(result.values())


def supported(numerator: int, denominator: int) -> tuple[int, int]:
    """The metre of METRES to write this one in: 2/2 as 4/4, 12/16 as 6/8, else one whose bar is as long or goes evenly
    into it (8/4 as 4/4) or is twice as long (3/16 as 3/8); 4/4 where there is none (11/8)."""
    if denominator == 16 and numerator % 2 == 0:
        numerator, denominator = numerator // 2, 8
    if numerator in METRES.get(denominator, ()):
        return numerator, denominator
    length = 16 * numerator / denominator if denominator else 0
    return next((BY_LENGTH[length / k] for k in (1, 2, 3, 4, 0.5) if length / k in BY_LENGTH), (4, 4))


def metre_grid(score: Score, first: int, last: int) -> tuple[list[tuple[int, tuple[int, int]]], int]:
    """[(start in 16ths, metre)] for onsets from `first` to `last`, and how many 16ths to leave out in front.

    A time signature inside a bar ends that bar there if some metre is as long as what it had so far (three quarters of
    4/4 become a bar of 3/4); otherwise it waits for the next bar line.
    """
    metres = [(0, (4, 4))]
    for ts in sorted(score.time_signatures, key=lambda ts: ts.time):
        start, metre = metres[-1]
        at = max(start, (ts.time * 8 + score.tpq) // (2 * score.tpq))
        begun = (at - start) % (bar := 16 * metre[0] // metre[1])
        if begun in BY_LENGTH:
            metres.append((at - begun, BY_LENGTH[begun]))
        elif begun:
            at += bar - begun
        metres.append((at, supported(ts.numerator, ts.denominator)))
    metres = [m for m in dict(metres).items() if m[0] <= last]  # of several at one place the last one counts
    start, metre = [m for m in metres if m[0] <= first][-1]
    skip = first - (first - start) % (16 * metre[0] // metre[1])
    metres = [(max(at - skip, 0), m) for at, m in metres if at >= start]
    return [next(same) for _, same in groupby(metres, key=lambda m: m[1])], skip


def count_bars(score: Score) -> int:
    """Bars of a score in normal form, up to the end of its last note."""
    bounds = [ts.time for ts in score.time_signatures] + [score.end()]
    return sum(-((a - b) * ts.denominator // (4 * TPQ * ts.numerator))
               for ts, a, b in zip(score.time_signatures, bounds, bounds[1:], strict=False))


def key_fits(score: Score) -> dict[str, float]:
    """How the durations of the pitch classes correlate with the profile of each of the 24 keys, the best fit being the
    key (Krumhansl 1990, chapter 4); empty where nothing tells the keys apart."""
    weights = np.zeros(12)
    for t in score.tracks:
        if not t.is_drum:
            notes = t.notes.numpy()
            np.add.at(weights, notes["pitch"] % 12, notes["duration"])
    if not weights.std():
        return {}
    return {f"{tonic} {mode}": np.corrcoef(np.roll(profile, i), weights)[0, 1]
            for mode, (tonics, profile) in KEYS.items() for i, tonic in enumerate(tonics.split())}


def key_of(score: Score) -> str:
    """The key that fits best, "" where there is none."""
    fits = key_fits(score)
    return max(fits, key=lambda key: (fits[key], key), default="")


def bar_starts(score: Score, end: int | None = None) -> list[int]:
    """Ticks of all bar lines, the last one at or after `end`, or the end of the music; 4/4 where no metre is given."""
    changes = [(t.time, t.numerator * 4 * score.tpq // t.denominator) for t in reversed(score.time_signatures)]
    end, starts, length = score.end() if end is None else end, [0], 4 * score.tpq
    while starts[-1] < end:
        while changes and changes[-1][0] <= starts[-1]:
            length = changes.pop()[1]
        starts.append(starts[-1] + length)
    return starts


def window_bars(n_total: int, n_bars: int, hop: int) -> list[int]:
    """First bars of the windows of a piece: every `hop` bars, and one that ends with the piece. All are full where
    the piece is long enough."""
    if n_total <= n_bars:
        return [0]
    starts = list(range(0, n_total - n_bars + 1, hop))
    return starts if starts[-1] == n_total - n_bars else [*starts, n_total - n_bars]


def end_of(window: Score) -> int | None:
    """The tick of a window's last bar line, whatever rings on; None where a score is none, or has become more."""
    ends = [m.time for m in window.markers if m.text == WINDOW_END] if window.tpq == TPQ else []
    return ends[0] if ends and all(n.start < ends[0] for t in window.tracks for n in t.notes) else None


def cut(score: Score, starts: list[int], bar: int, n_bars: int) -> Score:
    """The window of `n_bars` bars from `bar` on: notes that start there, times counted from its first bar line."""
    begin, end = starts[bar], starts[min(bar + n_bars, len(starts) - 1)]
    window = Score(score.tpq)
    window.tempos.append(symusic.Tempo(0, score.tempos[0].qpm if len(score.tempos) else TEMPO))
    for track in score.tracks:
        part = track.clip(begin, end, clip_end=False).shift_time(-begin)
        if len(part.notes):
            window.tracks.append(part)
    before = [t for t in score.time_signatures if t.time <= begin] or [symusic.TimeSignature(0, 4, 4)]
    window.time_signatures.append(symusic.TimeSignature(0, before[-1].numerator, before[-1].denominator))
    for t in score.time_signatures:
        if begin < t.time < end:
            window.time_signatures.append(symusic.TimeSignature(t.time - begin, t.numerator, t.denominator))
    window.markers.append(symusic.TextMeta(end - begin, WINDOW_END))
    return window


def join(windows: list[Score], bars: list[int], n_bars: int, starts: list[int]) -> Score:
    """Lay windows at their first bars; where two overlap, the earlier one is kept. `starts`: ticks of the bar lines."""
    out, tracks, given = Score(windows[0].tpq), {}, 0
    for window, bar in zip(windows, bars, strict=True):
        begin, end = starts[max(bar, given)], starts[min(bar + n_bars, len(starts) - 1)]
        given = bar + n_bars
        for part in window.tracks:
            empty = symusic.Track(part.name, part.program, part.is_drum)
            track = tracks.setdefault((part.program, part.is_drum), empty)
            track.notes.extend(n for n in part.shift_time(starts[bar]).notes if begin <= n.start < end)
    out.tracks.extend(tracks.values())
    return out


def chain(windows: list[Score], spans: list[tuple[int, int]]) -> Score:
    """One piece of the bars [first, last) that each window gives, in its own metre; missing bars are empty.
    Only at the very end a note is cut at the bar line; the four voices (`VOICES`) sing one note at a time, each ends
    where the next begins."""
    out, tracks, end, last_metre = Score(windows[0].tpq), {}, 0, None
    for window, (first, last) in zip(windows, spans, strict=True):
        lines = bar_starts(window)
        bar = lines[-1] - lines[-2] if len(lines) > 1 else 4 * window.tpq
        lines += [lines[-1] + bar * (i + 1) for i in range(last + 1 - len(lines))]
        begin, until, shift = lines[first], lines[last], end - lines[first]
        for part in window.tracks:
            empty = symusic.Track(part.name, part.program, part.is_drum)
            track = tracks.setdefault((part.program, part.is_drum), empty)
            track.notes.extend(part.clip(begin, until, clip_end=False).shift_time(shift).notes)
        metres = [(t.time, t.numerator, t.denominator) for t in window.time_signatures] or [(0, 4, 4)]
        in_force = [metre for metre in metres if metre[0] <= begin][-1:]
        for time, *metre in in_force + [metre for metre in metres if begin < metre[0] < until]:
            if metre != last_metre:
                out.time_signatures.append(symusic.TimeSignature(max(time, begin) + shift, *metre))
                last_metre = metre
        end += until - begin
    for track in tracks.values():
        notes = sorted(track.notes, key=lambda n: n.start)
        if track.program in VOICES and not track.is_drum:
            notes = list({n.start: n for n in notes}.values())
            for note, following in pairwise(notes):
                note.duration = min(note.duration, following.start - note.start)
        for note in notes:
            note.duration = min(note.duration, end - note.start)
        track.notes = symusic.core.NoteTickList(notes)
    out.tracks.extend(tracks.values())
    out.tempos.extend(windows[0].tempos)
    return out


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


def track_programs(*scores: Score) -> list[int]:
    """Programs of the tracks but drums, in the order of the tracks, which is that of the tokens."""
    return list(dict.fromkeys(t.program for score in scores for t in score.tracks if not t.is_drum))


def note_counts(score: Score) -> Counter:
    """(voice, onset in sixteenths, pitch) -> how many; the voice is its MIDI program, -1 for drums."""
    return Counter((-1 if t.is_drum else t.program, round(n.start * 4 / score.tpq), n.pitch)
                   for t in score.tracks for n in t.notes)


def durations(score: Score) -> dict:
    return {(-1 if t.is_drum else t.program, round(n.start * 4 / score.tpq), n.pitch): round(n.duration * 4 / score.tpq)
            for t in score.tracks for n in t.notes}


def note_f1(a: Score, b: Score) -> float:
    """Notes found again: same voice, onset and pitch."""
    a, b = note_counts(a), note_counts(b)
    return 2 * (a & b).total() / max(1, a.total() + b.total())
