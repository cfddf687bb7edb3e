"""Files to scores in normal form: MIDI, MusicXML, the JSB grid.

Files are read in processes of their own, with a time limit a file: one that hangs or crashes its parser costs that file
only (`processes`). Repeats are not expanded; grace notes and, in MusicXML, unpitched percussion are left out.
"""

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from symusic import Note, Score, TimeSignature, Track

from mtxlib.files import atomic, brief
from mtxlib.music.score import MAX_BYTES, TPQ, VELOCITY, VOICES, Unusable, count_bars, key_of, normalise, within
from mtxlib.processes import apart

SECONDS = {"xml": 60, "chorale": 60}  # limit a file; 5 for all other kinds
KINDS = {".mid": "midi", ".midi": "midi", ".xml": "xml", ".musicxml": "xml", ".mxl": "xml"}


def read_score(path: str | Path) -> Score:
    """Read MIDI or MusicXML (.xml, .musicxml, .mxl) and normalise it. ValueError names the file and the reason. For
    files that are known to be good: symusic crashes the process on some others, see `read_safely`."""
    try:
        return normalise(READERS[KINDS.get(Path(path).suffix.lower(), "midi")](path))
    except Exception as e:
        raise ValueError(f"{path}: {reason(e)}") from e


def read_safely(music: str | Path | bytes) -> Score:
    """`read_score` for files nobody has vouched for, an upload for one: a path, or what such a file holds.

    Read in a process of its own within the limits of time of `load_corpus`, 5 s for MIDI; one that hangs or crashes its
    parser raises ValueError like any other that cannot be read, with the reason in one sentence.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, name = music, str(music)
        if isinstance(music, bytes):
            suffix = ".mxl" if music[:2] == b"PK" else ".musicxml" if b"<" in music.lstrip()[:4] else ".mid"
            path, name = Path(folder, f"music{suffix}"), "the file"
            path.write_bytes(music)
        kind, output = KINDS.get(Path(path).suffix.lower(), "midi"), Path(folder, "normal.mid")
        [entry] = read_apart([(name, kind, str(path), "", str(output))], 1)
        if "skipped" in entry:
            raise ValueError(f"{name}: {entry['skipped']}")
        return Score(output)


def read_bytes(path: str) -> bytes:
    within("too big", os.path.getsize(path), MAX_BYTES)
    return Path(path).read_bytes()


def parse_midi(data: bytes) -> Score:
    if data[:4] != b"MThd":
        raise Unusable("not MIDI: no MThd header" if data else "empty: 0 bytes")
    expected, found, at = int.from_bytes(data[10:12], "big"), 0, 14
    while (end := at + 8 + int.from_bytes(data[at + 4:at + 8], "big")) <= len(data):
        found, at = found + (data[at:at + 4] == b"MTrk"), end
    if found < expected or data[12:14] == b"\0\0":
        raise Unusable(f"broken: {found} of {expected} tracks, {int.from_bytes(data[12:14], 'big')} ticks per quarter")
    return Score.from_midi(data)


def read_xml(path: str, parts: int = 0) -> Score:
    """MusicXML, a track per part (of `parts` parts, if not 0), or four for two staves of two voices each. A pickup goes
    to the end of its bar, by barDuration - duration of the first measure; full measures state their metre, so that
    `metre_grid` finds the bar line again after an incomplete one."""
    from music21 import converter

    if zipfile.is_zipfile(io.BytesIO(read_bytes(path))):
        within("too big", sum(member.file_size for member in zipfile.ZipFile(path).infolist()), 10 * MAX_BYTES)
    music = converter.parse(Path(path), format="musicxml", forceSource=True)  # forceSource: leave no pickle behind
    if parts and len(music.parts) != parts:
        raise Unusable(f"not {parts} parts: {len(music.parts)}")
    music.toSoundingPitch(inPlace=True)
    score, metre, shift = Score(TPQ), (4, 4), 0.0
    for m in music.parts[0].getElementsByClass("Measure"):
        if m.timeSignature:
            metre = m.timeSignature.numerator, m.timeSignature.denominator
        missing = 4 * metre[0] / metre[1] - float(m.duration.quarterLength)
        if m.offset == 0:
            shift = max(missing, 0.0)
            score.time_signatures.append(TimeSignature(0, *metre))
        elif m.timeSignature or not missing:
            score.time_signatures.append(TimeSignature(round((float(m.offset) + shift) * TPQ), *metre))
    staves = [staff_voices(part) for part in music.parts]
    if len(staves) == 2 and all(len(upper_lower) == 2 for upper_lower in staves):
        for (program, name), line in zip(VOICES.items(), chain(*staves), strict=True):
            score.tracks.append(Track(name, program, False))
            score.tracks[-1].notes.extend(tied(line, shift))
        return score
    for part in music.parts:
        instrument = part.getInstrument()
        track = Track(part.partName or "", instrument.midiProgram or 0, instrument.midiChannel == 9)
        track.notes.extend(tied([(n.offset, n) for n in part.flatten().notes], shift))
        score.tracks.append(track)
    return score


def staff_voices(part) -> list[list[tuple]]:
    """The upper and the lower voice of a staff, as (offset in quarters, music21 note), if it is written in two: in at
    least half of its bars with notes, in none of them more, and without chords; else nothing. A bar that names no
    voices is the upper one's."""
    lines, n_bars, n_double = ([], []), 0, 0
    for m in part.getElementsByClass("Measure"):
        voices = sorted(m.voices, key=lambda voice: str(voice.id)) if len(m.voices) else [m]
        n_bars += any(voice.notes for voice in voices)
        n_double += len(voices) == 2
        if len(voices) > 2 or any(n.isChord and "Harmony" not in n.classes for voice in voices for n in voice.notes):
            return []
        for line, voice in zip(lines, voices, strict=False):
            line.extend((m.offset + n.offset + (voice.offset if voice is not m else 0), n) for n in voice.notes)
    return list(lines) if 2 * n_double >= n_bars > 0 else []


def tied(line: list[tuple], shift: float) -> list[Note]:
    """The notes of (offset in quarters, music21 note or chord), `shift` quarters later; tied ones are joined."""
    notes, latest = [], {}
    for offset, n in line:
        start, end = (round(float(q) * TPQ) for q in (offset + shift, offset + shift + n.quarterLength))
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
        track = Track(name, program, False)
        bounds = np.flatnonzero(np.diff(line, prepend=-2, append=-2)).tolist()
        track.notes.extend([Note(a + shift, b - a, int(line[a]), VELOCITY)
                            for a, b in zip(bounds, bounds[1:], strict=False) if line[a] >= 0])
        score.tracks.append(track)
    return score


READERS = {"midi": lambda path: parse_midi(read_bytes(path)), "bytes": lambda text: parse_midi(text.encode("latin-1")),
           "xml": read_xml, "chorale": lambda path: read_xml(path, parts=4), "grid": read_grid}


def reason(e: Exception) -> str:
    return str(e) if isinstance(e, Unusable) else f"broken: {brief(e)}"


def describe(score: Score) -> dict:
    metres = dict.fromkeys(f"{ts.numerator}/{ts.denominator}" for ts in score.time_signatures)
    return {"bars": count_bars(score), "metre": ",".join(metres), "voices": len(score.tracks),
            "tune": tune_of(score), "key": key_of(score)}


def tune_of(score: Score) -> str:
    """Hash of the first ten intervals of the highest voice, the top note where it has several. Unisons are left out:
    jsb cannot tell a repeated note from a held one, and a tune should be the same in every source."""
    voices = [t.notes.numpy() for t in score.tracks if not t.is_drum] or [t.notes.numpy() for t in score.tracks]
    highest = max(voices, key=lambda notes: notes["pitch"].mean())
    line = dict(sorted(zip(highest["time"].tolist(), highest["pitch"].tolist(), strict=True)))
    intervals = [int(i) for i in np.diff(list(line.values())) if i]
    return hashlib.sha256(str(intervals[:10]).encode()).hexdigest()[:12]


def prepare(name: str, kind: str, given, split: str, output: str) -> dict:
    """The manifest entry of one task; the piece, if it is kept, is written to `output`. Runs in a reader process."""
    try:
        if kind not in READERS:
            raise Unusable(kind)
        score = normalise(READERS[kind](given))
        entry = {"name": name, "file": Path(output).name, "split": split, **describe(score)}
    except Exception as e:
        return {"name": name, "skipped": reason(e)}
    atomic(output, lambda path: path.write_bytes(score.dumps_midi()))  # dump_midi does not tell when the disk is full
    return entry


def read_apart(tasks: list[tuple], workers: int | None) -> Iterator[dict]:
    """`prepare` of every task, in order, in processes of their own; one that takes too long is killed."""
    answers = apart("mtxlib.music.readers:prepare", tasks, workers, lambda task: SECONDS.get(task[1], 5))
    for (name, *_), (entry, why) in zip(tasks, answers, strict=True):
        yield entry or {"name": name, "skipped": why}
