"""Small scores made by hand, and what is in a score as plain lists."""

import random
import zipfile
from pathlib import Path

from symusic import Note, Score, Tempo, TimeSignature, Track

Q = 480  # ticks a quarter


def score_of(*tracks, metres=(), tempo=None, tpq=Q):
    """tracks: (program, [(onset, duration, pitch)]) in quarters; program -1 is drums. metres: (onset, over, under)."""
    score = Score(tpq)
    for program, notes in tracks:
        track = Track(f"track {program}", max(program, 0), program < 0)
        track.notes.extend([Note(round(t * tpq), round(d * tpq), p, 50 + p % 40) for t, d, p in notes])
        score.tracks.append(track)
    score.time_signatures.extend([TimeSignature(round(t * tpq), over, under) for t, over, under in metres])
    if tempo:
        score.tempos.append(Tempo(0, tempo))
    return score


def melody(seed, n=16, low=60):
    r = random.Random(seed)
    return [(i, 1, low + r.randrange(12)) for i in range(n)]


def notes_of(score):
    return sorted((-1 if t.is_drum else t.program, n.time * Q // score.tpq, n.duration * Q // score.tpq, n.pitch)
                  for t in score.tracks for n in t.notes)


def metres_of(score):
    return [(ts.time * Q // score.tpq, ts.numerator, ts.denominator) for ts in score.time_signatures]


def quarters(score, track=0):
    return [(n.time / Q, n.duration / Q, n.pitch) for n in score.tracks[track].notes]


def broken_files(folder: Path) -> dict[str, str]:
    """name -> the start of the reason it must be left out for."""
    good = score_of((0, melody(0)), (1, melody(1))).dumps_midi()
    two = good.index(b"MTrk", good.index(b"MTrk") + 4)
    noise = random.Random(0).randbytes(500)
    xml = ("<score-partwise><part-list/></score-partwise>", "plain text", "<html></html>")
    files = {
        "empty.mid": (b"", "empty"), "half.mid": (good[:len(good) // 2], "broken"), "head.mid": (good[:14], "broken"),
        "fewer.mid": (good[:two], "broken"), "noise.mid": (noise, "not MIDI"), "text.mid": (b"la " * 99, "not MIDI"),
        "noise_inside.mid": (good[:30] + noise, "broken"), "no_ticks.mid": (good[:12] + b"\0\0" + good[14:], "broken"),
        "huge.mid": (good + bytes(5_000_000), "too big"), "silent.mid": (Score(Q).dumps_midi(), "no notes"),
        "far.mid": (score_of((0, [(0, 1, 60), (4_000_000, 1, 60)])).dumps_midi(), "too many bars"),
        "notes.txt": (b"hello", "not MIDI or MusicXML"), "no_suffix": (good, "not MIDI or MusicXML"),
        "bad.mxl": (noise, "broken"), "bomb.mxl": (None, "too big"),
        **{f"bad{i}.xml": (text.encode(), "broken" if i else "no notes") for i, text in enumerate(xml)}}
    for name, (data, _) in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / "bomb.mxl", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("score.xml", bytes(60_000_000))
    return {name: why for name, (_, why) in files.items()}
