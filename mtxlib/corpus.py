"""Where the music comes from: every source becomes the same normalised MIDI and one manifest, read once, then cached.

Files are read in processes of their own, with a time limit a file: one that hangs or crashes its parser costs that file
only. They are started as `python -c`, not by multiprocessing, so scripts need no `__main__` guard.

Normal form: 480 ticks a quarter, notes on the 16th grid, one tempo and velocity, metres of `METRES` that change on bar
lines only, no controls. Four tracks without drums become soprano to bass (`VOICES`); other music keeps its programs,
made distinct because MidiTok merges tracks of equal program. Repeats are not expanded; grace notes and, in
MusicXML, unpitched percussion are left out.
"""

import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track
from tqdm.auto import tqdm

from .files import atomic, atomic_text

FORM = 1  # raise it when the normal form or the manifest changes: older caches are then rebuilt
TPQ, GRID = 480, 120  # ticks a quarter, ticks a 16th
VELOCITY, TEMPO = 80, 96.0  # TEMPO where the file has none between 20 and 300 quarters a minute
VOICES = {52: "Soprano", 53: "Alto", 54: "Tenor", 42: "Bass"}  # General MIDI programs, from 0
LOW, HIGH, DRUMS = 21, 108, (27, 87)  # MidiTok's pitches: notes outside move by octaves, drum hits are left out
METRES = {8: (3, 5, 6, 7, 9, 12), 4: (1, 2, 3, 4, 5, 6, 7)}  # denominator: numerators
BY_LENGTH = {n * 16 // d: (n, d) for d in METRES for n in METRES[d]}  # 16ths a bar: metre, x/4 rather than x/8
MAX_BEATS = 16  # longest note, in beats of its metre
MAX_BYTES, MAX_TRACKS, MAX_NOTES, MAX_BARS = 5_000_000, 128, 200_000, 4_000
SECONDS = {"xml": 60, "chorale": 60}  # limit a file; 5 for all other kinds
KINDS = {".mid": "midi", ".midi": "midi", ".xml": "xml", ".musicxml": "xml", ".mxl": "xml"}
SPLITS = {"train": 0.8, "valid": 0.9, "test": 1.0}  # where each ends, as a share of the tunes
KEYS = {  # tonics and key profile: Krumhansl and Kessler 1982, Psychological Review 89(4)
    "major": ("C Db D Eb E F F# G Ab A Bb B", (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)),
    "minor": ("c c# d eb e f f# g g# a bb b", (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)),
}
JSFAKES_URL = "https://github.com/omarperacha/js-fakes/archive/68b476d5b265e579d87c74a68f2160f26007fa56.zip"
JSFAKES_SHA256 = "3deb874011b8c4ac5d01874ee2ea4140ba88c69c224ccb6cbca0b3ebdc7df6d4"  # of midi/*.mid, not of the zip
JSB_URL = "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/master/Jsb16thSeparated.json"
LICENCES = {
    "bach": "see music21's corpus/license.txt: distributed with the encoders' permission (mostly Margaret Greentree, "
            "used by permission); commercial use may be restricted",
    "jsfakes": "CC BY 4.0, Omar Peracha",
    "jsb": "music in the public domain; see czhuang/JSB-Chorales-dataset",
    "folder": "as given by you",
}


class Unusable(ValueError):
    """Why a piece is left out, as "category: detail". The summary line counts the categories."""


@dataclass(frozen=True)
class Piece:
    """One line of the manifest that was kept."""

    name: str  # bwv269, jsfakes-007, jsb-test-012, or the path inside the folder
    path: Path  # the normalised MIDI
    source: str
    split: str  # train, valid or test
    bars: int
    metre: str  # "4/4", or "4/4,3/4" in order of appearance
    voices: int  # tracks; all drums are one
    tune: str  # hash of the first ten intervals of the highest voice
    licence: str
    key: str  # "C major", "a minor"; "" if unknown


def load_corpus(source: str = "bach", data_dir: str | Path = "data", *, archive: str = "", limit: int = 0,
                workers: int | None = None, progress: bool = True) -> list[Piece]:
    """Prepare what is missing under `data_dir`, print one summary line per source and return the pieces that were kept.

    source: bach, jsfakes, jsb, folder, or a sum such as "bach+jsfakes".
    archive: what to read instead of a download: a zip or folder (jsfakes), the JSON file (jsb), any tree of MIDI and
      MusicXML (folder). Where several sources of a sum could mean it: "jsfakes=a.zip,jsb=b.json". Once jsfakes or jsb
      is cached it needs no archive; an archive that is new or changed rebuilds the cache.
    limit: keep only the first pieces of each source, in a cache of their own; 0 keeps all.

    Splits go by tune, the same in every source. jsb keeps its own; in a sum with it, the others follow it where it has
    their tune, test before valid before train. Raises ValueError for an unknown source, an archive that cannot be read
    and a source with no usable piece, ConnectionError if a download fails.
    """
    loaded = {name: load_source(name, Path(data_dir), path, limit, workers, progress)
              for name, path in parse_archives(source, archive).items()}
    kept = [e for _, entries in loaded.values() for e in entries if "file" in e]
    jsb = {e["tune"]: split for split in SPLITS for e in kept if e["source"] == "jsb" and e["split"] == split}
    splits, pieces = split_by_tune((e["tune"] for e in kept), jsb), []
    for name, (folder, entries) in loaded.items():
        part = [Piece(**{f: e.get(f) for f in Piece.__annotations__} | {"path": folder / e["file"]} | (
            {"split": splits[e["tune"]]} if name != "jsb" else {})) for e in entries if "file" in e]
        counts = Counter(p.split for p in part)
        counted = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
        print(f"{name}: {len(part)} pieces ({counted}){skipped(entries)} in {folder}")
        pieces += part
    return pieces


def read_score(path: str | Path) -> Score:
    """Read MIDI or MusicXML (.xml, .musicxml, .mxl) and normalise it. ValueError names the file and the reason."""
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


# ---- the normal form


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


# ---- what the manifest says about a piece


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


def split_by_tune(tunes: Iterable[str], taken: dict[str, str]) -> dict[str, str]:
    """Tune -> split: as in `taken`, else 80/10/10 by the hash of the tune. If that leaves a split empty and there are
    three tunes or more, the tune whose hash is nearest to its end moves there."""
    place = {t: int(hashlib.sha256(f"split:{t}".encode()).hexdigest()[:13], 16) / 16**13 for t in sorted(set(tunes))}
    splits = {t: taken.get(t) or next(s for s, end in SPLITS.items() if p < end) for t, p in place.items()}
    for split, end in SPLITS.items():
        sizes = Counter(splits.values())
        free = [t for t in splits if t not in taken and sizes[splits[t]] > 1]
        if split not in sizes and len(splits) >= 3 and free:
            splits[min(free, key=lambda t: abs(place[t] - end))] = split
    return splits


# ---- readers: from a file, or what a source holds, to the score that normalise() takes


def read_bytes(path: str) -> bytes:
    within("too big", os.path.getsize(path), MAX_BYTES)
    return Path(path).read_bytes()


def parse_midi(data: bytes) -> Score:
    if data[:4] != b"MThd":
        raise Unusable("not MIDI: no MThd header" if data else "empty: 0 bytes")
    expected, found = int.from_bytes(data[10:12], "big"), data.count(b"MTrk")
    if found < expected or data[12:14] == b"\0\0":
        raise Unusable(f"broken: {found} of {expected} tracks, {int.from_bytes(data[12:14], 'big')} ticks per quarter")
    return Score.from_midi(data)


def read_xml(path: str, parts: int = 0) -> Score:
    """MusicXML, a track per part (of `parts` parts, if not 0). A pickup moves to the end of its bar, by barDuration -
    duration of the first measure; full measures state their metre, so that `metre_grid` finds the bar line again after
    an incomplete one."""
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
    for part in music.parts:
        instrument = part.getInstrument()
        track = Track(part.partName or "", instrument.midiProgram or 0, instrument.midiChannel == 9)
        track.notes.extend(part_notes(part, shift))
        score.tracks.append(track)
    return score


def part_notes(part, shift: float) -> list[Note]:
    """The notes of a music21 part, `shift` quarters later; tied ones are joined."""
    notes, latest = [], {}
    for n in part.flatten().notes:
        start, end = (round(float(q) * TPQ) for q in (n.offset + shift, n.offset + shift + n.quarterLength))
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
    return str(e) if isinstance(e, Unusable) else f"broken: {type(e).__name__}: {' '.join(str(e).split())[:160]}"


# ---- sources: what each has to read, as (name, kind of reader or why it is left out, input of the reader, own split)


def bach_tasks(_: str) -> list[tuple]:
    folder = Path(importlib.util.find_spec("music21").origin).parent / "corpus" / "bach"
    kinds = {".mxl": "chorale", ".xml": "chorale", ".krn": "other rights: encodings in .krn"}
    return [(f.stem, kinds[f.suffix], str(f), "") for f in sorted(folder.iterdir()) if f.suffix in kinds]


def jsfakes_tasks(archive: str) -> list[tuple]:
    if archive and Path(archive).is_dir():
        files = {f.relative_to(archive): f.read_bytes() for f in Path(archive).rglob("*.mid")}
    else:
        try:
            with zipfile.ZipFile(io.BytesIO(fetch("jsfakes", JSFAKES_URL, archive))) as z:
                files = {Path(n): z.read(n) for n in z.namelist() if n.endswith(".mid")}
        except zipfile.BadZipFile as e:
            raise ValueError(f"{archive or JSFAKES_URL}: expected a zip of js-fakes: {e}") from e
    files = {f.stem: data for f, data in files.items() if f.parent.name in ("midi", "")}
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
    if digest != JSFAKES_SHA256:
        message = f"{archive or JSFAKES_URL} is not js-fakes as expected: {len(files)} files, SHA-256 {digest}"
        if not archive:
            raise ValueError(f"{message}, expected 500 and {JSFAKES_SHA256}; pass a good copy as archive")
        print(f"jsfakes: {message}; reading it all the same")
    return [(f"jsfakes-{name:0>3}", "bytes", files[name].decode("latin-1"), "")
            for name in sorted(files, key=lambda name: (len(name), name))]


def jsb_tasks(archive: str) -> list[tuple]:
    try:
        data = json.loads(fetch("jsb", JSB_URL, archive))
        tasks = [(i / len(data[s]), (f"jsb-{s}-{i:03}", "grid", p, s)) for s in SPLITS for i, p in enumerate(data[s])]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{archive or JSB_URL}: expected JSON with lists train, valid and test, got {e!r}") from e
    return [task for _, task in sorted(tasks)]  # the splits interleaved: `limit` leaves some of each


def folder_tasks(archive: str) -> list[tuple]:
    return [(str(f.relative_to(archive)), KINDS.get(f.suffix.lower(), "not MIDI or MusicXML"), str(f), "")
            for f in files_of(Path(archive))]


TASKS = {"bach": bach_tasks, "jsfakes": jsfakes_tasks, "jsb": jsb_tasks, "folder": folder_tasks}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())


def fetch(source: str, url: str, archive: str) -> bytes:
    if archive:
        return Path(archive).read_bytes()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except OSError as e:
        raise ConnectionError(f"{source}: could not download {url}: {e}; fetch it by other means and give its path as "
                              f"archive ({source}=PATH in a sum of sources)") from e


def parse_archives(source: str, archive: str) -> dict[str, str]:
    """Source -> its archive, "" for none; `load_corpus` says how both are written."""
    names, which = source.split("+"), "|".join(TASKS)
    if set(names) - set(TASKS) or len(set(names)) < len(names):
        raise ValueError(f"source {source!r}: expected {', '.join(TASKS)}, or different ones of them joined by +")
    users = [name for name in names if name != "bach"]
    given = dict(re.findall(f"(?:^|,)({which})=(.*?)(?=,(?:{which})=|$)", archive))
    given = given or (dict.fromkeys(users, archive) if archive and len(users) == 1 else {})
    if set(given) - set(users) or archive and not given:
        raise ValueError(f"archive {archive!r} for source {source!r}: expected a path for {users or 'none'}; for "
                         f"several write jsfakes=a.zip,jsb=b.json")
    for name in {*given, *(set(users) & {"folder"})}:
        if not given.get(name) or not Path(given[name]).exists():
            raise ValueError(f"source {name!r}: archive {given.get(name, '')!r} does not exist")
    return {name: given.get(name, "") for name in names}


# ---- the cache


def load_source(source: str, data_dir: Path, archive: str, limit: int, workers: int | None,
                progress: bool) -> tuple[Path, list[dict]]:
    """The cache folder of a source and the entries of its manifest, built first where it is missing or out of date."""
    where, files = os.path.realpath(archive), files_of(Path(archive)) if archive else []
    state = short_hash(f"{where}{[(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]}") if archive else ""
    folder = data_dir / (f"{source}-{short_hash(where)}" if source == "folder" else source)
    folder = folder.with_name(f"{folder.name}-limit{limit}") if limit else folder
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else []
    fresh = entries and entries[0]["stamp"].startswith(f"{FORM} {state}")
    if not fresh or not all((folder / e["file"]).exists() for e in entries if "file" in e):
        folder.mkdir(parents=True, exist_ok=True)
        entries = [{**e, "source": source, "licence": LICENCES[source], "stamp": f"{FORM} {state}"}
                   for e in build(source, folder, archive, limit, workers, progress)]
        atomic_text(manifest, json.dumps(entries, indent=1))
        for stale in set(folder.glob("*.mid")) - {folder / e["file"] for e in entries if "file" in e}:
            stale.unlink()
    if not any("file" in e for e in entries):
        raise ValueError(f"source {source!r} has no usable piece{skipped(entries)}; the reasons are in {manifest}")
    return folder, entries


def build(source: str, folder: Path, archive: str, limit: int, workers: int | None, progress: bool) -> list[dict]:
    tasks, entries, kept = [], [], 0
    for i, task in enumerate(TASKS[source](archive)):
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", task[0])[-80:]
        tasks.append((*task, str(folder.absolute() / (f"{i:05}-{slug}.mid" if source == "folder" else f"{slug}.mid"))))
    with closing(read_apart(tasks, workers)) as results:
        for entry in tqdm(results, source, limit or len(tasks), unit=" files", disable=not progress):
            entries.append(entry)
            kept += "file" in entry
            if kept == limit > 0:
                break
    splits = split_by_tune((e["tune"] for e in entries if "file" in e), {})
    return [e | {"split": e["split"] or splits[e["tune"]]} if "file" in e else e for e in entries]


def prepare(name: str, kind: str, given, split: str, output: str) -> dict:
    """The manifest entry of one task; the piece, if it is kept, is written to `output`. Runs in a reader process."""
    try:
        if kind not in READERS:
            raise Unusable(kind)
        score = normalise(READERS[kind](given))
        atomic(output, score.dump_midi)
        return {"name": name, "file": Path(output).name, "split": split, **describe(score)}
    except Exception as e:
        return {"name": name, "skipped": reason(e)}


def read_apart(tasks: list[tuple], workers: int | None) -> Iterator[dict]:
    """`prepare` of every task, in order, in `workers` processes (one a core by default, at most 16). One that takes
    too long is killed, one that ends is replaced; either costs only the piece it was at."""
    here, processes = threading.local(), []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", "from mtxlib.corpus import reader; reader()"]

    def one(task: tuple) -> dict:
        if not hasattr(here, "process"):
            here.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            processes.append(here.process)
            here.process.stdout.readline()  # it is ready: its imports must not count against the first piece
        seconds, begin = SECONDS.get(task[1], 5), time.monotonic()
        timer = threading.Timer(seconds, here.process.kill)
        timer.start()
        try:
            print(json.dumps(task), file=here.process.stdin, flush=True)
            return json.loads(here.process.stdout.readline())
        except (OSError, ValueError):
            code = here.process.wait()
            del here.process
            late = time.monotonic() - begin >= seconds
            return {"name": task[0], "skipped": f"timed out: {seconds} s" if late else f"crashed its reader: {code}"}
        finally:
            timer.cancel()

    pool = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16))
    try:
        yield from pool.map(one, tasks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.wait()


def reader() -> None:
    """A reader process: a task a line in, an entry a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a parser prints must not pass for an answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(prepare(*json.loads(line))), file=answers, flush=True)


def short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def skipped(entries: list[dict]) -> str:
    counts = Counter(e["skipped"].split(":")[0] for e in entries if "skipped" in e)
    reasons = ", ".join(f"{n} {why}" for why, n in counts.most_common())
    return f", {counts.total()} skipped ({reasons})" if counts else ""
