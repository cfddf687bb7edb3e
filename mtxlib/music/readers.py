"""Files to scores in normal form: MIDI, MusicXML, the JSB grid; and what the normal form gives up of each, counted.

Files are read in processes of their own, with a time limit a file: one that hangs or crashes its parser costs that file
only (`processes`). Repeats are not expanded; grace notes and, in MusicXML, unpitched percussion are left out.
"""

import hashlib
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.files import atomic, brief
from mtxlib.music.normal import DRUMS, HIGH, LOW, MAX_BYTES, Unusable, normalise, velocity_levels, within
from mtxlib.music.score import TPQ, VELOCITY, VOICES, bar_starts, key_of
from mtxlib.processes import apart

SECONDS = {"xml": 60, "chorale": 60}  # limit a file; 5 for all other kinds
ON, STEADY = 1 / 96, 0.6  # an onset this near to a position, in quarters, is on it; see `losses`
KINDS = {".mid": "midi", ".midi": "midi", ".xml": "xml", ".musicxml": "xml", ".mxl": "xml"}


def read_score(path: str | Path, **form) -> Score:
    """Read MIDI or MusicXML (.xml, .musicxml, .mxl) that is known to be good (symusic crashes the process on some other
    files) and normalise it; `form`: the dials of `normalise`. ValueError names the file and the reason."""
    try:
        return normalise(READERS[KINDS.get(Path(path).suffix.lower(), "midi")](path)[0], **form)
    except Exception as e:
        raise ValueError(f"{path}: {reason(e)}") from e


def read_safely(music: str | Path | bytes, **form) -> Score:
    """`read_score` for what nobody has vouched for, a path or what such a file holds: in a process of its own, within
    `SECONDS`. ValueError for one that hangs or crashes its parser too."""
    return read_counted(music, **form)[0]


def read_counted(music: str | Path | bytes, **form) -> tuple[Score, dict]:
    """`read_safely`, and what the normal form gave up: see `losses`."""
    path, name = music, str(music)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(music, bytes):
            suffix = ".mxl" if music[:2] == b"PK" else ".musicxml" if b"<" in music.lstrip()[:4] else ".mid"
            path, name = Path(folder, f"music{suffix}"), "the file"
            path.write_bytes(music)
        kind, output = KINDS.get(Path(path).suffix.lower(), "midi"), Path(folder, "normal.mid")
        [entry] = read_apart([(name, kind, str(path), "", str(output), form)], 1)
        if "skipped" in entry:
            raise ValueError(f"{name}: {entry['skipped']}")
        return Score(output), entry["losses"]


def read_bytes(path: str) -> bytes:
    within("too big", os.path.getsize(path), MAX_BYTES)
    return Path(path).read_bytes()


def parse_midi(data: bytes) -> tuple[Score, int]:
    """The score, and how many program changes it gives up: each channel of a track keeps the program of its first note,
    where symusic would make a track of each program."""
    if data[:4] != b"MThd":
        raise Unusable("not MIDI: no MThd header" if data else "empty: 0 bytes")
    expected, ticks, edited = int.from_bytes(data[10:12]), int.from_bytes(data[12:14]), bytearray(data)
    n_tracks, n_changes, at = 0, 0, 14
    while (end := at + 8 + int.from_bytes(data[at + 4:at + 8])) <= len(data):
        if data[at:at + 4] == b"MTrk":
            n_tracks += 1
            for place, program in first_programs(data[at + 8:end]):
                n_changes += data[at + 8 + place] != program
                edited[at + 8 + place] = program
        at = end
    if n_tracks < expected or not ticks:
        raise Unusable(f"broken: {n_tracks} of {expected} tracks, {ticks} ticks per quarter")
    if data[9] == 2:
        raise Unusable(f"format 2: {expected} songs in one file, expected one; save each as a file of its own")
    return Score.from_midi(bytes(edited)), n_changes


def first_programs(data: bytes) -> list[tuple[int, int]]:
    """(where in the events of a track a program stands, the one its channel had at its first note)."""
    if not re.search(rb"[\xc0-\xcf][\0-\x7f]", data):
        return []
    places, latest, first, at, status = [], {}, {}, 0, 0
    data, end = data + bytes(4), len(data)  # a track may be cut off inside an event
    while at < end:
        _, at = variable(data, at)  # the wait before the event
        if data[at] >= 0x80:
            status, at = data[at], at + 1
        kind, channel = status >> 4, status & 15
        if kind == 0xF:  # of the system, or not music
            size, at = variable(data, at + (status == 0xFF))
            at += size
            continue
        if kind == 0xC and at < end:
            places.append((at, channel))
            latest[channel] = data[at]
        elif kind == 9:
            first.setdefault(channel, latest.get(channel, 0))
        at += 1 if kind in (0xC, 0xD) else 2
    return [(place, first[channel]) for place, channel in places if channel in first]


def variable(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length quantity, and where it ends."""
    value = data[at] & 127
    while data[at] >= 128:
        at += 1
        value = value << 7 | data[at] & 127
    return value, at + 1


def read_xml(path: str, parts: int = 0) -> Score:
    """A track per part, or four for two staves of two voices each; with `parts`, four voices in just so many parts,
    whatever they are called. A pickup goes to the end of its bar."""
    from music21 import converter

    if zipfile.is_zipfile(io.BytesIO(read_bytes(path))):
        within("too big", sum(member.file_size for member in zipfile.ZipFile(path).infolist()), 10 * MAX_BYTES)
    music = converter.parse(Path(path), format="musicxml", forceSource=True)  # forceSource: leave no pickle behind
    if parts and len(music.parts) != parts:
        raise Unusable(f"not {parts} parts: {len(music.parts)}")
    music.toSoundingPitch(inPlace=True)
    columns = in_step(music.parts, score := Score(TPQ))
    staves = [staff_voices(column) for column in columns]
    if len(staves) == 2 and all(staves):
        tracks, lines = [Track(name, program) for program, name in VOICES.items()], [*chain(*staves)]
    else:
        played = [part.getInstrument() for part in music.parts]
        tracks = [Track("") if parts else Track(part.partName or "", i.midiProgram or 0, i.midiChannel == 9)
                  for part, i in zip(music.parts, played, strict=True)]
        lines = [[(start + n.offset, n) for start, m in column for n in m.flatten().notes] for column in columns]
    for track, line in zip(tracks, lines, strict=True):
        track.notes.extend(tied(line))
        score.tracks.append(track)
    return score


def in_step(parts, score: Score) -> list[list[tuple]]:
    """(start in quarters, measure) of the measures of each part; metres and tempos of any part go into `score`.

    The n-th measures of all parts begin together, or those of one number where a part lacks some. They last until the
    last note in any of them ends, or as long as the longest is written, which may not be longer than the metre. Full
    ones state their metre, so that `file_bars` finds the bar line again after an incomplete one.
    """
    columns = [list(part.getElementsByClass("Measure")) for part in parts]
    longest = max(columns, key=len, default=[])
    order = {m.measureNumberWithSuffix(): i for i, m in enumerate(longest)}
    bars, result, at, metre = [[] for _ in longest], [[] for _ in columns], 0.0, (4, 4)
    for i, column in enumerate(columns):
        own = [m.measureNumberWithSuffix() for m in column]
        by_number = len(order) == len(longest) and len(set(own)) == len(own) and set(own) <= set(order)
        for n, m in enumerate(column):
            bars[order[own[n]] if by_number else n].append((i, m))
    for n, bar in enumerate(bars):
        stated = [m.timeSignature for _, m in bar if m.timeSignature]
        metre = (stated[0].numerator, stated[0].denominator) if stated else metre
        full = 4 * metre[0] / metre[1]
        sounding = max((x.offset + x.quarterLength for _, m in bar for x in m.flatten().notes), default=0)
        length = max(sounding, min(full, max(m.duration.quarterLength for _, m in bar))) or full
        if n == 0:
            at = max(full - length, 0.0)
        if n == 0 or stated or length == full:
            score.time_signatures.append(TimeSignature(round(at * TPQ) if n else 0, *metre))
        for i, m in bar:
            result[i].append((at, m))
            score.tempos.extend([Tempo(round(float(at + mark.offset) * TPQ), mark.getQuarterBPM())
                                 for mark in m.flatten().getElementsByClass("MetronomeMark")
                                 if (mark.getQuarterBPM() or 0) > 0])
        at += float(length)
    return result


def staff_voices(column: list[tuple]) -> list[list[tuple]]:
    """The two voices of a staff as (start in quarters, note), if at least half of its bars with notes have two, none
    more, and no chords; else nothing. A bar that names no voices is the upper one's."""
    lines, n_bars, n_double = ([], []), 0, 0
    for start, m in column:
        voices = sorted(m.voices, key=lambda voice: str(voice.id)) if len(m.voices) else [m]
        n_bars += any(voice.notes for voice in voices)
        n_double += len(voices) == 2
        if len(voices) > 2 or any(n.isChord and "Harmony" not in n.classes for voice in voices for n in voice.notes):
            return []
        for line, voice in zip(lines, voices, strict=False):
            line.extend((start + n.offset + (voice.offset if voice is not m else 0), n) for n in voice.notes)
    return list(lines) if 2 * n_double >= n_bars > 0 else []


def tied(line: list[tuple]) -> list[Note]:
    """Notes for (start in quarters, music21 note or chord); tied ones are joined."""
    notes, latest = [], {}
    for begin, n in line:
        start, end = (round(float(q) * TPQ) for q in (begin, begin + n.quarterLength))
        heads = [] if n.duration.isGrace or "Harmony" in n.classes else n.notes if n.isChord else [n] * n.isNote
        for head in heads:
            before = latest.get(head.pitch.midi)
            if head.tie and head.tie.type != "start" and before and before.end == start:
                before.duration = end - before.time
            else:
                latest[head.pitch.midi] = Note(start, end - start, head.pitch.midi, VELOCITY)
                notes.append(latest[head.pitch.midi])
    return notes


def read_grid(steps: list[list[int]]) -> Score:
    """A piece of jsb: at each 16th the pitches of soprano to bass, -1 for a rest; a repeated pitch is one held note.
    The format has no bar lines: counting in 4/4, what is over after the last full bar is taken to be the pickup."""
    score, shift = Score(4), -len(steps) % 16
    for (program, name), line in zip(VOICES.items(), np.array(steps, int).T, strict=True):
        bounds = np.flatnonzero(np.diff(line, prepend=-2, append=-2)).tolist()
        score.tracks.append(Track(name, program))
        score.tracks[-1].notes.extend([Note(start + shift, end - start, int(line[start]), VELOCITY)
                                       for start, end in pairwise(bounds) if line[start] >= 0])
    return score


READERS = {  # kind: (score, program changes given up) of what a task holds
    "midi": lambda path: parse_midi(read_bytes(path)), "bytes": lambda text: parse_midi(text.encode("latin-1")),
    "xml": lambda path: (read_xml(path), 0), "chorale": lambda path: (read_xml(path, parts=4), 0),
    "grid": lambda steps: (read_grid(steps), 0)}


def reason(e: Exception) -> str:
    return str(e) if isinstance(e, Unusable) else f"broken: {brief(e)}"


def describe(score: Score) -> dict:
    metres = dict.fromkeys(f"{ts.numerator}/{ts.denominator}" for ts in score.time_signatures)
    return {"bars": len(bar_starts(score)) - 1, "metre": ",".join(metres), "voices": len(score.tracks),
            "tune": tune_of(score), "key": key_of(score)}


def tune_of(score: Score) -> str:
    """Hash of the first ten intervals of the highest voice's top notes. Unisons are left out: jsb cannot tell a
    repeated note from a held one, and a tune should be the same in every source."""
    voices = [t.notes.numpy() for t in score.tracks if not t.is_drum] or [t.notes.numpy() for t in score.tracks]
    highest = max(voices, key=lambda notes: notes["pitch"].mean())
    line = dict(sorted(zip(highest["time"].tolist(), highest["pitch"].tolist(), strict=True)))
    intervals = [int(i) for i in np.diff(list(line.values())) if i]
    return hashlib.sha256(str(intervals[:10]).encode()).hexdigest()[:12]


def losses(given: Score, normal: Score, n_programs: int, grid: int = 4, velocities: int = 0, tempos: int = 0,
           pedal: bool = False) -> dict:
    """What the normal form, with these dials of `normalise`, gave up of a file.

    notes: in the file. kept: in the normal form. dropped: drum hits that MidiTok has no token for. merged: the others,
    doubles of a note at one place. moved: onsets that went by more than a 64th. octaves: pitches moved into the range.
    grids: {positions a quarter: share of the onsets that lie on them}. triplets: share on triplet 16ths, off the 16ths.
    steady: share on 32nds or triplet 16ths, 0 where less than a tenth is on 8ths; below STEADY the music is not on the
    quarters of its file. velocities: how far they moved on average. tempos, pedal, programs: changes and presses.
    """
    tracks = [t for t in given.tracks if len(t.notes)]
    onset, pitch, velocity = (np.concatenate([t.notes.numpy()[name] for t in tracks]).astype(int)
                              for name in ("time", "pitch", "velocity"))
    is_drum = np.repeat([t.is_drum for t in tracks], [len(t.notes) for t in tracks])
    quarters, levels = onset / given.tpq, velocity_levels(velocities)
    on = {n: np.abs(quarters * n - np.round(quarters * n)) <= n * ON for n in (2, 4, 6, 8, 12, 24)}
    moved = np.abs(quarters * grid - np.floor(quarters * grid + 0.5)) > grid / 16
    dropped, kept = int((is_drum & ((pitch < DRUMS[0]) | (pitch > DRUMS[1]))).sum()), normal.note_num()
    changes = sum(a.qpm != b.qpm for a, b in pairwise(sorted(given.tempos, key=lambda tempo: tempo.time)))
    return {"notes": len(onset), "kept": kept, "dropped": dropped, "merged": len(onset) - kept - dropped,
            "moved": int(moved.sum()), "octaves": int((~is_drum & ((pitch < LOW) | (pitch > HIGH))).sum()),
            "grids": {str(n): round(float(on[n].mean()), 4) for n in (4, 8, 12, 24)},
            "triplets": round(float((on[6] & ~on[4]).mean()), 4),
            "steady": round(float((on[8] | on[12]).mean()) * (on[2].mean() >= 0.1), 4),
            "velocities": round(float(np.abs(velocity[:, None] - levels).min(1).mean()), 2),
            "tempos": max(0, changes + 1 - len(normal.tempos)), "programs": n_programs,
            "pedal": 0 if pedal else sum(len(t.pedals) for t in given.tracks)}


def told(counted: dict) -> str:
    """`losses` in a few words: the notes of the file, and what is not 0."""
    words = {"notes": "notes", "merged": "merged", "dropped": "drum hits dropped", "moved": "moved by more than a 64th",
             "octaves": "moved by octaves", "tempos": "tempo changes given up", "programs": "program changes given up",
             "pedal": "pedal presses given up"}
    return ", ".join(f"{counted[key]:,} {text}" for key, text in words.items() if counted[key])


def prepare(name: str, kind: str, given, split: str, output: str, form: dict) -> dict:
    """The manifest entry of one task; the piece, if it is kept, is written to `output`. Runs in a reader process."""
    try:
        if kind not in READERS:
            raise Unusable(kind)
        raw, n_programs = READERS[kind](given)
        score = normalise(raw, **form)
        entry = {"name": name, "file": Path(output).name, "split": split, **describe(score),
                 "losses": losses(raw, score, n_programs, **form)}
    except Exception as e:
        return {"name": name, "skipped": reason(e)}
    atomic(output, lambda path: path.write_bytes(score.dumps_midi()))  # dump_midi does not tell when the disk is full
    return entry


def read_apart(tasks: list[tuple], workers: int | None) -> Iterator[dict]:
    """`prepare` of every task, in order, in processes of their own; one that takes too long is killed."""
    answers = apart("mtxlib.music.readers:prepare", tasks, workers, lambda task: SECONDS.get(task[1], 5))
    for (name, *_), (entry, why) in zip(tasks, answers, strict=True):
        yield entry or {"name": name, "skipped": why}
