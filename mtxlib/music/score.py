"""What a score is: its normal form, bars, windows, voices, keys, and its notes as arrays. Pure functions of a score.

Normal form: 480 ticks a quarter, notes on the grid (16ths, or finer), metres of `METRES` that change on bar lines only,
no controls; one tempo and one velocity, or as many as are asked for. Bar lines are the file's: an upbeat becomes a full
bar with a rest in front. Four single voices that nothing calls otherwise become soprano to bass (`VOICES`); other music
keeps its tracks, their names, order and programs, made distinct because MidiTok merges tracks of equal program.

A window is `n_bars` bars with the notes that start in them, with their full lengths, so that windows laid end to end
are the piece again.
"""

import re
from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import symusic
from symusic import Note, Score, Tempo, TimeSignature, Track

TPQ, GRID = 480, 120  # ticks a quarter, ticks a 16th
VELOCITY, TEMPO = 80, 120.0  # TEMPO, quarters a minute, is MIDI's own where a file has none
TEMPI = (20, 400)  # what `tempos` bins, at equal ratios, reach from and to
VOICES = {52: "Soprano", 53: "Alto", 54: "Tenor", 42: "Bass"}  # General MIDI programs, from 0
VOICE_WORD = re.compile(  # in names of the tracks of single voices, or of tracks that are just numbered
    "sopran[eios]*|alt[eios]*|altus|tenor[eis]*|bass[eios]*|bassus|cantus|canto|discant|superius|voices?|voce|voix|vox|"
    "vocals?|stimme|parts?|tracks?|staff|choir|chor|chorus|chorale?|wom[ae]n|m[ae]n|untitled|[satbvp]|[iv]{1,3}", re.I)
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
PROFILES = np.array([np.roll(profile, i) for _, profile in KEYS.values() for i in range(12)])  # (24, 12), as TONICS
PROFILES = (PROFILES - PROFILES.mean(1, keepdims=True)) / (PROFILES.std(1, keepdims=True) * 12 ** 0.5)


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


def key_fits(score: Score) -> dict[str, float]:
    """How the durations of the pitch classes correlate with the profile of each of the 24 keys, the best fit being the
    key (Krumhansl 1990, chapter 4); empty where nothing tells the keys apart."""
    weights = np.zeros(12)
    for t in score.tracks:
        if not t.is_drum:
            notes = t.notes.numpy()
            weights += np.bincount(notes["pitch"] % 12, notes["duration"], minlength=12)
    if not weights.std():
        return {}
    centred = weights - weights.mean()
    return dict(zip(TONICS, (PROFILES @ (centred / np.linalg.norm(centred))).tolist(), strict=True))


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
    in_force = [t.qpm for t in score.tempos if t.time <= begin][-1:] or [TEMPO]
    window.tempos.append(symusic.Tempo(0, in_force[0]))
    window.tempos.extend([symusic.Tempo(t.time - begin, t.qpm) for t in score.tempos if begin < t.time < end])
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
    Only at the very end a note is cut at the bar line; the four voices (`VOICES`) sing one note at a time, each
    ends where the next begins, unless they are choirs: more than one note in twenty begins with another."""
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
        line = {n.start: n for n in notes}
        if track.program in VOICES and not track.is_drum and 20 * len(line) >= 19 * len(notes):
            notes = list(line.values())
            for note, following in pairwise(notes):
                note.duration = min(note.duration, following.start - note.start)
        for note in notes:
            note.duration = min(note.duration, end - note.start)
        track.notes = symusic.core.NoteTickList(notes)
    out.tracks.extend(tracks.values())
    out.tempos.extend(windows[0].tempos)
    return out


# -- notes as arrays, in steps of a 24th of a quarter, into which every grid goes evenly -------------------------------

STEPS, SIXTEENTH = 24, 6  # steps a quarter, steps a sixteenth


def voices_of(scores: list[Score]) -> list[int]:
    """The programs of all tracks with notes, -1 for drums, in the order of the tracks, which is that of the tokens."""
    return list(dict.fromkeys(-1 if t.is_drum else t.program for score in scores for t in score.tracks if t.notes))


def notes_of(score: Score) -> np.ndarray:
    """(N, 4) integers in ascending order: voice (program, -1 for drums), onset and length in steps, one at least,
    pitch."""
    rows = [np.zeros((0, 4), int)]
    for track in score.tracks:
        notes = {name: x.astype(int) for name, x in track.notes.numpy().items()}
        onset, length = ((2 * STEPS * notes[x] + score.tpq) // (2 * score.tpq) for x in ("time", "duration"))
        voice = np.full(len(onset), -1 if track.is_drum else track.program)
        rows.append(np.stack([voice, onset, length.clip(1), notes["pitch"]], 1))
    notes = np.concatenate(rows)
    return notes[np.lexsort(notes.T[::-1])]


def sounding(notes: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the notes (N, 4) sounds at which of the times (T,), in steps and ascending: indices of both, (M,)
    each."""
    first, last = (np.searchsorted(times, at) for at in (notes[:, 1], notes[:, 1] + notes[:, 2]))
    often = last - first
    which = np.repeat(np.arange(len(notes)), often)
    return which, np.arange(len(which)) + np.repeat(last - often.cumsum(), often)


def roll(score: Score, voices: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Piano roll, (V, T, 128) booleans each: which pitches sound in the first `steps` steps, and which begin."""
    sounds, begins = np.zeros((2, len(voices), steps, 128), bool)
    notes = notes_of(score)
    notes = notes[np.isin(notes[:, 0], voices) & (notes[:, 1] < steps)]
    voice = np.array([voices.index(v) for v in notes[:, 0].tolist()], int)
    which, when = sounding(notes, np.arange(steps))
    sounds[voice[which], when, notes[which, 3]] = True
    begins[voice, notes[:, 1], notes[:, 3]] = True
    return sounds, begins


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
