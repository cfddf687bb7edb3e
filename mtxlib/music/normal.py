"""The normal form of a score: what any music is brought into before it becomes tokens.

480 ticks a quarter, notes on the grid (16ths, or finer), metres of `METRES` that change on bar lines only, no controls;
one tempo and one velocity, or as many as are asked for. Bar lines are the file's: an upbeat becomes a full bar with a
rest in front. Four single voices that nothing calls otherwise become soprano to bass (`VOICES`); other music keeps its
tracks, their names, order and programs, made distinct because MidiTok merges tracks of equal program.
"""

import re
from collections import Counter
from itertools import groupby

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.music.score import BY_LENGTH, GRID, MAX_BEATS, METRES, TEMPI, TEMPO, TPQ, VELOCITY, VOICES, bar_starts

VOICE_WORD = re.compile(  # in names of the tracks of single voices, or of tracks that are just numbered
    "sopran[eios]*|alt[eios]*|altus|tenor[eis]*|bass[eios]*|bassus|cantus|canto|discant|superius|voices?|voce|voix|vox|"
    "vocals?|stimme|parts?|tracks?|staff|choir|chor|chorus|chorale?|wom[ae]n|m[ae]n|untitled|[satbvp]|[iv]{1,3}", re.I)
LOW, HIGH, DRUMS = 21, 108, (27, 87)  # MidiTok's pitches: notes outside move by octaves, drum hits are left out
MAX_BYTES, MAX_TRACKS, MAX_NOTES, MAX_BARS = 5_000_000, 128, 200_000, 4_000


class Unusable(ValueError):
    """Why a piece is left out, as "category: detail". The summary line counts the categories."""


def normalise(score: Score, grid: int = 4, velocities: int = 0, tempos: int = 0, pedal: bool = False) -> Score:
    """A new score in the normal form described at the head of this file; doing it twice changes nothing.

    grid: positions a quarter, 4, 8, 12 or 24. velocities, tempos: how many different ones there may be; 0 keeps the
    tempo at the first note only and gives every note VELOCITY. pedal: notes sound as long as the sustain pedal holds
    them. Onsets and ends go to the nearest position; a note lasts one position to 16 beats and ends where the next of
    its pitch and track begins. Bars that are empty at the start are left out. Raises ValueError, with the reason, for a
    score without notes or beyond 128 tracks, 200,000 notes or 4,000 bars.
    """
    tracks = [t for t in score.tracks if len(t.notes)]
    within("too many tracks", len(tracks), MAX_TRACKS)
    within("too many notes", sum(len(t.notes) for t in tracks), MAX_NOTES)
    voices = as_voices(tracks, score.tpq)
    parts = [(t.program, t.name, t.is_drum, rows) for t in voices or tracks
             if len(rows := grid_notes(t, score.tpq, grid, velocities, pedal))]
    if not parts:
        raise Unusable("no notes")
    if voices:
        parts = [(*voice, *part[2:]) for voice, part in zip(VOICES.items(), parts, strict=True)]
    onsets, fine = np.concatenate([rows[:, 0] for *_, rows in parts]), grid // 4
    bars = written_bars(score, int(onsets.min()) // fine, int(onsets.max()) // fine)
    lines, metres = np.array([start for start, *_ in bars]), [metre for *_, metre in bars]
    starts = np.cumsum([0, *map(bar_length, metres[:-1])])
    metres = [next(same) for _, same in groupby(zip(starts.tolist(), metres, strict=True), lambda bar: bar[1])]

    def placed(times: np.ndarray, side: str = "right") -> np.ndarray:
        return times + fine * (starts - lines)[np.maximum(np.searchsorted(fine * lines, times, side) - 1, 0)]

    result = Score(TPQ)
    result.time_signatures.extend([TimeSignature(start * GRID, *metre) for start, metre in metres])
    for program, name, is_drum, rows in distinct_programs(parts):
        start, end = placed(rows[:, 0]), placed(rows[:, 0] + rows[:, 1], "left")
        rows = well_formed(np.stack([start, end - start, *rows.T[2:]], axis=1), metres, fine)
        start, length, pitch, velocity = rows.T
        track = Track(name, program, is_drum)
        track.notes = Note.from_numpy(start * (TPQ // grid), length * (TPQ // grid), pitch, velocity)
        result.tracks.append(track)
    within("too many bars", len(bar_starts(result)) - 1, MAX_BARS)
    for time, qpm in tempo_line(score, onsets.min(), onsets.max(), grid, tempos):
        result.tempos.append(Tempo(int(placed(time)) * (TPQ // grid) if len(result.tempos) else 0, qpm))
    return result


def within(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise Unusable(f"{what}: {number:,}, at most {limit:,}")


def on_grid(ticks, tpq: int, grid: int):
    """The nearest position, `grid` of them a quarter."""
    return (ticks * 2 * grid + tpq) // (2 * tpq)


def as_voices(tracks: list[Track], tpq: int) -> list[Track]:
    """Soprano to bass, where the tracks are four single voices and neither a name nor a program says otherwise; else
    nothing. Voices that carry the programs of `VOICES` already may cross, others go by their mean pitch."""
    programs = [t.program for t in tracks]
    words = [word for t in tracks for word in re.findall(r"[^\W\d_]+", t.name)]
    named = sorted(programs) == sorted(VOICES)
    if (len(tracks) != 4 or any(t.is_drum for t in tracks) or not all(map(VOICE_WORD.fullmatch, words))
            or not (named or set(programs) <= {0, 52, 53, 54}) or not all(is_single(t, tpq) for t in tracks)):
        return []
    order = list(VOICES)
    return sorted(tracks, key=lambda t: order.index(t.program) if named else -t.notes.numpy()["pitch"].mean())


def is_single(track: Track, tpq: int) -> bool:
    """Whether at most one note in twenty sounds on for more than a 16th while the next one begins."""
    notes = track.notes.numpy()
    order = np.lexsort((-notes["duration"], notes["time"]))
    onset, end = notes["time"][order], np.maximum.accumulate((notes["time"] + notes["duration"])[order])
    return np.count_nonzero((onset[1:] == onset[:-1]) | (end[:-1] > onset[1:] + tpq // 4)) <= len(onset) / 20


def grid_notes(track: Track, tpq: int, grid: int, velocities: int, pedal: bool) -> np.ndarray:
    """(N, 4) ints: onset and length in positions of the grid, pitch, velocity."""
    notes = {k: v.astype(int) for k, v in track.notes.numpy().items()}
    pitch, end = notes["pitch"], notes["time"] + notes["duration"]
    if pedal and len(track.pedals):
        down = {k: v.astype(int) for k, v in track.pedals.numpy().items()}
        held = np.maximum(np.searchsorted(down["time"], end, side="right") - 1, 0)
        end = np.where(down["time"][held] <= end, np.maximum(end, (down["time"] + down["duration"])[held]), end)
    onset, end = on_grid(notes["time"], tpq, grid), on_grid(end, tpq, grid)
    octaves = np.maximum(LOW - pitch + 11, 0) // 12 - np.maximum(pitch - HIGH + 11, 0) // 12
    levels = velocity_levels(velocities)
    velocity = levels[np.abs(levels - notes["velocity"][:, None]).argmin(1)]
    rows = np.stack([onset, np.maximum(end - onset, 1), pitch if track.is_drum else pitch + 12 * octaves, velocity], 1)
    return rows[(pitch >= DRUMS[0]) & (pitch <= DRUMS[1])] if track.is_drum else rows


def velocity_levels(velocities: int) -> np.ndarray:
    return np.linspace(0, 127, velocities + 1, dtype=int)[1:] if velocities else np.array([VELOCITY])  # as MidiTok's


def tempo_line(score: Score, first: int, last: int, grid: int, tempos: int) -> list[tuple[int, float]]:
    """(position, quarters a minute) of the tempos of the music from `first` to `last`; without `tempos` the first."""
    marks = [(0, TEMPO), *((on_grid(t.time, score.tpq, grid), t.qpm) for t in score.tempos if 0 < t.qpm < np.inf)]
    marks.sort(key=lambda mark: mark[0])
    line = {first: next(qpm for time, qpm in reversed(marks) if time <= first)}
    if tempos:
        line |= {time: qpm for time, qpm in marks if first < time <= last}
        levels = np.geomspace(*TEMPI, tempos).round(2)  # as MidiTok has them
        line = {time: float(levels[np.abs(np.log(levels / qpm)).argmin()]) for time, qpm in line.items()}
    return [next(same) for _, same in groupby(line.items(), key=lambda mark: mark[1])]


def well_formed(notes: np.ndarray, metres: list, fine: int) -> np.ndarray:
    """No longer than MAX_BEATS, no two of one pitch at once (of equal onsets the longest stays), in order; times in
    positions, `fine` of them a 16th."""
    section = np.searchsorted([fine * start for start, _ in metres], notes[:, 0], side="right") - 1
    beats = np.array([16 * fine // denominator for _, (_, denominator) in metres])[section]
    notes[:, 1] = np.minimum(notes[:, 1], MAX_BEATS * beats)
    notes = notes[np.lexsort((-notes[:, 1], notes[:, 0], notes[:, 2]))]
    notes = notes[np.r_[True, np.diff(notes[:, [0, 2]], axis=0).any(axis=1)]]
    step = np.diff(notes[:, [0, 2]], axis=0)
    notes[:-1, 1] = np.where(step[:, 1] == 0, np.minimum(notes[:-1, 1], step[:, 0]), notes[:-1, 1])
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]


def distinct_programs(parts: list[tuple]) -> list[tuple]:
    """The first part of a program keeps it; the others take the nearest free one, of its family of 8 if possible.
    All drums are one part, in the place of the first."""
    used, result = {program for program, _, is_drum, _ in parts if not is_drum}, {}
    for p, name, is_drum, rows in parts:
        if is_drum:
            _, first_name, _, hits = result.get("drums", (0, name or "Drums", True, rows[:0]))
            result["drums"] = (0, first_name, True, np.concatenate([hits, rows]))
        else:
            if p in result:
                p = min(set(range(128)) - used, key=lambda q: (q // 8 != p // 8, abs(q - p)))
                used.add(p)
            result[p] = (p, name, False, rows)
    return list(result.values())


def file_bars(score: Score, first: int, last: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, length, metre) of the file's bars that hold the 16ths from `first` to `last`, and three more: a metre
    begins a bar where it is stated, whatever the bar before had so far. In 16ths; 4/4 until told otherwise."""
    within("too many bars", (last - first) // max(BY_LENGTH), MAX_BARS)
    signs = {0: (4, 4)}
    for ts in sorted(score.time_signatures, key=lambda ts: ts.time):
        known = ts.numerator > 0 and ts.denominator > 0
        signs[on_grid(ts.time, score.tpq, 4)] = (ts.numerator, ts.denominator) if known else (4, 4)
    starts, n_after = {}, 0
    for (at, metre), until in zip(signs.items(), [*list(signs)[1:], 2**40], strict=True):
        n_after += at > last
        length = max(1.0, 16 * metre[0] / metre[1])
        n_bars = min(-int((at - until) // length), int((max(at, last) - at) // length) + 5)
        starts |= {at + int(i * length): metre for i in range(max(0, int((first - at) // length)), n_bars)}
        if n_after == 3:
            break
    return [(start, end - start, metre) for (start, metre), end in zip(starts.items(), list(starts)[1:], strict=False)
            if end > first]


def in_metres(length: int, metre: tuple[int, int]) -> list[tuple[int, int]]:
    """Metres of METRES that together are as long as a bar of `length` 16ths, or a little longer where none are: its own
    (2/2 as 4/4, 12/16 as 6/8), else equal ones (8/4 as 4/4 twice), else 4/4 and a shorter one (11/8)."""
    over, under = (metre[0] // 2, 8) if metre[1] == 16 and metre[0] % 2 == 0 else metre
    if over in METRES.get(under, ()) and 16 * over == length * under:
        return [(over, under)]
    equal = [BY_LENGTH[length // n] for n in (1, 2, 3, 4) if length % n == 0 and length // n in BY_LENGTH]
    if equal:
        return [m for m in equal[:1] for _ in range(length // bar_length(m))]
    if length % 2 or length < 4:
        return in_metres(max(4, length + length % 2), metre)
    rest = length % 16 if length % 16 > 2 else length % 16 + 16
    return [(4, 4)] * ((length - rest) // 16) + [BY_LENGTH[rest]]


def bar_length(metre: tuple[int, int]) -> int:
    return 16 * metre[0] // metre[1]


def written_bars(score: Score, first: int, last: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(start and end in the file, metre) of the bars that the 16ths from `first` to `last` are written in.

    An upbeat, which is a first bar of at most half the next one or of a length that no metre has, gets the metre of the
    next one and begins so much earlier.
    """
    upbeat, bars = [], file_bars(score, first, last)
    (start, length, _), (_, _, following) = bars[:2]
    full = 16 * following[0] // following[1]
    if length < full and length not in BY_LENGTH and start + length <= last:
        [metre, *_] = in_metres(full if full in BY_LENGTH else length, following)
        upbeat, bars = [(start + length - bar_length(metre), start + length, metre)], bars[1:]
    written = upbeat + [(start, end, metre) for start, end, metre in joined(bars) if end > first and start <= last]
    if len(written) > 1 and 2 * bar_length(written[0][2]) <= (full := bar_length(written[1][2])):
        written[0] = (written[0][1] - full, written[0][1], written[1][2])
    return written


def joined(bars: list[tuple[int, int, tuple[int, int]]]) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, end, metre) of bars of METRES for the bars of a file. Where they have none, up to four become one or one
    becomes several, by the cheapest way (dynamic programming): a bar line that goes or is added costs 1, a bar of a
    length that is rare in the piece up to .4, each 16th of rest that is added for want of a metre 10."""
    count = Counter(length for _, length, _ in bars)
    named = {bar_length(m): m for *_, metre in bars for m in in_metres(bar_length(metre) or 1, metre)}
    best, most = [(0.0, 0, 0, [])], 1 if set(count) <= set(BY_LENGTH) else 4
    for last, (start, length, metre) in enumerate(bars):
        ways = []
        for first in range(max(0, last + 1 - most), last + 1):
            span = start + length - bars[first][0]
            metres = in_metres(span, metre if first == last else named.get(span, (4, 4)))
            lengths = [bar_length(m) for m in metres]
            rare = sum(1 - count[n] / len(bars) for n in lengths)
            cost = best[first][0] + last - first + len(metres) - 1 + 0.4 * rare + 10 * (sum(lengths) - span)
            ways.append((cost, first, bars[first][0], metres))
        best.append(min(ways))
    result, at = [], len(bars)
    while at:
        end, (_, first, start, metres) = bars[at - 1][0] + bars[at - 1][1], best[at]
        starts = [start + sum(map(bar_length, metres[:i])) for i in range(len(metres))]
        result += reversed([*zip(starts, [*starts[1:], end], metres, strict=True)])
        at = first
    return result[::-1]
