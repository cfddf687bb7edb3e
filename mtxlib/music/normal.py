"""The normal form of a score, which any music is brought into before it becomes tokens: 480 ticks a quarter, notes on
the grid, metres of `METRES` that change on bar lines only, no controls. Bar lines are the file's; an upbeat becomes a
full bar with a rest in front. Four single voices that nothing calls otherwise become soprano to bass (`VOICES`); other
music keeps its tracks, their names, order and programs, made distinct because MidiTok merges tracks of one program.
"""

import re
from collections import Counter
from itertools import accumulate, groupby, pairwise

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

    grid: positions a quarter, 4, 8, 12 or 24. velocities, tempos: how many different ones there may be; 0 gives every
    note VELOCITY, and keeps the tempo at the first note only. pedal: notes sound as long as the sustain pedal is down.
    Onsets and ends go to the nearest position; notes last one position to 16 beats and end where the next of their
    pitch and track begins. Empty bars at the start are left out. Raises ValueError, with the reason, for a score
    without notes or beyond 128 tracks, 200,000 notes or 4,000 bars.
    """
    tracks = [t for t in score.tracks if len(t.notes)]
    within("too many tracks", len(tracks), MAX_TRACKS)
    within("too many notes", sum(len(t.notes) for t in tracks), MAX_NOTES)
    parts = [(program, name, t.is_drum, rows) for program, name, t in named(tracks, score.tpq)
             if len(rows := grid_notes(t, score.tpq, grid, velocities, pedal))]
    if not parts:
        raise Unusable("no notes")
    onsets, fine, step = np.concatenate([rows[:, 0] for *_, rows in parts]), grid // 4, TPQ // grid
    bars = written_bars(score, int(onsets.min()) // fine, int(onsets.max()) // fine)
    lines, metres = np.array([start for start, *_ in bars]), [metre for *_, metre in bars]
    starts = np.array([*accumulate(map(bar_length, metres[:-1]), initial=0)])
    longest = np.array([MAX_BEATS * 16 * fine // denominator for _, denominator in metres])
    shift = fine * (starts - lines)

    def bar_of(times: np.ndarray, side: str = "right") -> np.ndarray:
        return np.maximum(np.searchsorted(fine * lines, times, side) - 1, 0)

    result = Score(TPQ)
    result.time_signatures.extend([TimeSignature(start * GRID, *metre) for start, metre, before in zip(
        starts.tolist(), metres, [None, *metres[:-1]], strict=True) if metre != before])
    for program, name, rows, is_drum in distinct_programs(parts):
        start, length, pitch, velocity = rows.T
        bar, end = bar_of(start), start + length
        length = np.minimum(end + shift[bar_of(end, "left")] - start - shift[bar], longest[bar])
        start, length, *sound = in_turn(np.stack([start + shift[bar], length, pitch, velocity], axis=1)).T
        result.tracks.append(Track(name, program, is_drum))
        result.tracks[-1].notes = Note.from_numpy(start * step, length * step, *sound)
    within("too many bars", len(bar_starts(result)) - 1, MAX_BARS)
    first, *others = tempo_line(score, onsets.min(), onsets.max(), grid, tempos)
    result.tempos.extend([Tempo(0, first[1]), *(Tempo(int(t + shift[bar_of(t)]) * step, qpm) for t, qpm in others)])
    return result


def within(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise Unusable(f"{what}: {number:,}, at most {limit:,}")


def on_grid(ticks, tpq: int, grid: int):
    """The nearest position, `grid` of them a quarter."""
    return (ticks * 2 * grid + tpq) // (2 * tpq)


def named(tracks: list[Track], tpq: int) -> list[tuple[int, str, Track]]:
    """Tracks with their program and name. Four single voices are soprano to bass where no name or program says
    otherwise, in the order of the programs of `VOICES` if they have those, else of their mean pitch."""
    programs, order = [t.program for t in tracks], list(VOICES)
    words = [word for t in tracks for word in re.findall(r"[^\W\d_]+", t.name)]
    in_order = sorted(programs) == sorted(order)
    if (len(tracks) != 4 or any(t.is_drum for t in tracks) or not all(map(VOICE_WORD.fullmatch, words))
            or not (in_order or set(programs) <= {0, 52, 53, 54}) or not all(is_single(t, tpq) for t in tracks)):
        return [(t.program, t.name, t) for t in tracks]
    tracks = sorted(tracks, key=lambda t: order.index(t.program) if in_order else -t.notes.numpy()["pitch"].mean())
    return [(*voice, t) for voice, t in zip(VOICES.items(), tracks, strict=True)]


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
    marks = [(on_grid(t.time, score.tpq, grid), t.qpm) for t in score.tempos if 0 < t.qpm < np.inf]
    marks = sorted([(0, TEMPO), *marks], key=lambda mark: mark[0])
    line = {first: [qpm for time, qpm in marks if time <= first][-1]}
    if tempos:
        line |= {time: qpm for time, qpm in marks if first < time <= last}
        levels = np.geomspace(*TEMPI, tempos).round(2)  # as MidiTok has them
        line = {time: float(levels[np.abs(np.log(levels / qpm)).argmin()]) for time, qpm in line.items()}
    return [next(same) for _, same in groupby(line.items(), key=lambda mark: mark[1])]


def in_turn(notes: np.ndarray) -> np.ndarray:
    """In order, and no two of one pitch at once; of equal onsets the longest stays."""
    notes = notes[np.lexsort((-notes[:, 1], notes[:, 0], notes[:, 2]))]
    notes = notes[np.r_[True, np.diff(notes[:, [0, 2]], axis=0).any(axis=1)]]
    wait, interval = np.diff(notes[:, [0, 2]], axis=0).T
    notes[:-1, 1] = np.where(interval == 0, np.minimum(notes[:-1, 1], wait), notes[:-1, 1])
    return notes[np.lexsort((notes[:, 2], notes[:, 0]))]


def distinct_programs(parts: list[tuple]) -> list[tuple]:
    """The first part of a program keeps it, others take the nearest free one, of its family of 8 if possible; all
    drums are one part."""
    free, result = set(range(128)) - {program for program, _, is_drum, _ in parts if not is_drum}, {}
    for program, name, is_drum, rows in parts:
        key = "drums" if is_drum else program
        if key in result and not is_drum:
            key = min(free, key=lambda q: (q // 8 != program // 8, abs(q - program)))
            free.remove(key)
        first, hits = result.get(key, (name or "Drums" * is_drum, rows[:0]))
        result[key] = first, np.concatenate([hits, rows])
    return [(0, *part, True) if key == "drums" else (key, *part, False) for key, part in result.items()]


def file_bars(score: Score, first: int, last: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, length, metre) of the file's bars, 4/4 until told otherwise, that hold the 16ths from `first` to `last`,
    and some more. A metre begins a bar where it is stated, whatever the bar before had so far."""
    within("too many bars", (last - first) // max(BY_LENGTH), MAX_BARS)
    signs, starts = {0: (4, 4)}, {}
    for ts in sorted(score.time_signatures, key=lambda ts: ts.time):
        metre = ts.numerator, ts.denominator
        signs[on_grid(ts.time, score.tpq, 4)] = metre if min(metre) > 0 else (4, 4)
    n_signs = sum(at <= last for at in signs) + 3
    for (at, metre), (until, _) in list(pairwise([*signs.items(), (2**40, ())]))[:n_signs]:
        length = max(1.0, 16 * metre[0] / metre[1])
        n_bars = min(-int((at - until) // length), int((max(at, last) - at) // length) + 5)
        starts |= {at + int(i * length): metre for i in range(max(0, int((first - at) // length)), n_bars)}
    return [(start, end - start, metre) for (start, metre), end in zip(starts.items(), list(starts)[1:], strict=False)
            if end > first]


def bar_length(metre: tuple[int, int]) -> int:
    return 16 * metre[0] // metre[1]


def in_metres(length: int, metre: tuple[int, int]) -> list[tuple[int, int]]:
    """Metres of METRES that together are as long as a bar of `length` 16ths, or a little longer where none are: its own
    (2/2 as 4/4, 12/16 as 6/8), else equal ones (8/4 as 4/4 twice), else 4/4 and a shorter one (11/8)."""
    over, under = (metre[0] // 2, 8) if metre[1] == 16 and metre[0] % 2 == 0 else metre
    if over in METRES.get(under, ()) and 16 * over == length * under:
        return [(over, under)]
    for n in (1, 2, 3, 4):
        if length % n == 0 and length // n in BY_LENGTH:
            return [BY_LENGTH[length // n]] * n
    if length % 2 or length < 4:
        return in_metres(max(4, length + length % 2), metre)
    rest = length % 16 if length % 16 > 2 else length % 16 + 16
    return [(4, 4)] * ((length - rest) // 16) + [BY_LENGTH[rest]]


def written_bars(score: Score, first: int, last: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(start and end in the file, metre) of the bars that the 16ths from `first` to `last` are written in. An upbeat, a
    first bar of at most half the next one or of a length that no metre has, becomes a bar like the next one."""
    upbeat, bars = [], file_bars(score, first, last)
    (start, length, _), (_, _, following) = bars[:2]
    full = bar_length(following)
    if length < full and length not in BY_LENGTH and start + length <= last:
        [metre, *_] = in_metres(full if full in BY_LENGTH else length, following)
        upbeat, bars = [(start + length - bar_length(metre), start + length, metre)], bars[1:]
    written = upbeat + [bar for bar in joined(bars) if bar[1] > first and bar[0] <= last]
    if len(written) > 1 and 2 * bar_length(written[0][2]) <= (full := bar_length(written[1][2])):
        written[0] = (written[0][1] - full, written[0][1], written[1][2])
    return written


def joined(bars: list[tuple[int, int, tuple[int, int]]]) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, end, metre) of bars of METRES for the bars of a file. Where they have none, up to four become one or one
    becomes several, by the cheapest way (dynamic programming): a bar line that goes or is added costs 1, a bar of a
    length that is rare in the piece up to .4, each 16th of rest that is added for want of a metre 10."""
    count = Counter(length for _, length, _ in bars)
    common = {bar_length(m): m for *_, metre in bars for m in in_metres(bar_length(metre) or 1, metre)}
    best, most = [(0.0, 0, [])], 1 if set(count) <= set(BY_LENGTH) else 4  # cost so far, bars before the last, the last
    for last, (start, length, metre) in enumerate(bars):
        ways = []
        for first in range(max(0, last + 1 - most), last + 1):
            begin, end = bars[first][0], start + length
            metres = in_metres(end - begin, metre if first == last else common.get(end - begin, (4, 4)))
            lengths = [bar_length(m) for m in metres]
            rare = sum(1 - count[n] / len(bars) for n in lengths)
            cost = best[first][0] + last - first + len(metres) - 1 + 0.4 * rare + 10 * (sum(lengths) - end + begin)
            lines = [*accumulate(lengths[:-1], initial=begin), end]
            ways.append((cost, first, [(*line, m) for line, m in zip(pairwise(lines), metres, strict=True)]))
        best.append(min(ways))
    result, at = [], len(bars)
    while at:
        _, at, written = best[at]
        result[:0] = written
    return result
