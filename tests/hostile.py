"""MIDI files made to break a reader, the same for the same number; `python tests/hostile.py 2000` prints what
becomes of them, `python tests/hostile.py 2000 jsfakes.zip` with real files among those that are mutated."""

import random
import struct

from symusic import Note, Score, TimeSignature, Track

KINDS = ("flipped", "cut", "garbage", "empty", "tempo", "far", "long", "tracks", "ticks", "metres", "sysex", "running",
         "lengths", "dense", "grown")


def good(seed: int, n_tracks: int = 4, n: int = 64) -> Score:
    r, score = random.Random(seed), Score(480)
    score.time_signatures.append(TimeSignature(0, *r.choice([(4, 4), (3, 4), (6, 8)])))
    for voice in range(n_tracks):
        score.tracks.append(Track("", 0, False))
        score.tracks[-1].notes.extend([Note(240 * i, 240, 72 - 7 * (voice % 5) + r.randrange(5), 80) for i in range(n)])
    return score


def variable(n: int) -> bytes:
    """A variable-length quantity."""
    out = [n & 127]
    while n := n >> 7:
        out.append(128 | n & 127)
    return bytes(reversed(out))


def chunk(events: bytes, end: bytes = b"\0\xff\x2f\0") -> bytes:
    return b"MTrk" + struct.pack(">I", len(events) + len(end)) + events + end


def midi(*tracks: bytes, ticks: int = 480) -> bytes:
    return b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks) & 0xFFFF, ticks & 0xFFFF) + b"".join(tracks)


def note(wait: int, length: int, pitch: int = 60) -> bytes:
    return variable(wait) + bytes([0x90, pitch, 80]) + variable(length) + bytes([0x80, pitch, 0])


def hostile(seed: int, data: bytes = b"") -> tuple[str, bytes]:
    """(kind, file), mutated from `data` or from a small score where the kind mutates."""
    r = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    data = data or good(seed).dumps_midi()
    limit = 2**28 - 1  # the longest wait
    if kind == "flipped":
        flipped = bytearray(data)
        for _ in range(r.choice((1, 3, 10, 100))):
            flipped[r.randrange(r.choice((30, len(data))))] = r.randrange(256)
        return kind, bytes(flipped)
    if kind == "cut":
        return kind, data[:r.randrange(len(data))]
    if kind == "garbage":
        at = r.randrange(len(data))
        return kind, data[:at] + r.randbytes(r.randrange(1, 200)) + data[at + r.choice((0, 50)):]
    if kind == "empty":
        return kind, r.choice((b"", b"MThd", bytes(100), midi(), midi(chunk(b"")), data[:14], r.randbytes(64)))
    if kind == "tempo":
        tempos = b"".join(variable(r.choice((0, 1, limit))) + b"\xff\x51\x03" + r.choice((bytes(3), b"\xff" * 3,
                          r.randbytes(3))) for _ in range(r.choice((1, 2, 20_000))))
        return kind, midi(chunk(tempos), *[chunk(note(0, 480) * 9)] * 4)
    if kind == "far":
        far_on = note(r.choice((limit, 1920 * 100_000, 1920 * 900, 480)), 480) * r.choice((1, 2, 4, 40))
        return kind, midi(*[chunk(far_on)] * 4, ticks=r.choice((1, 480)))
    if kind == "long":
        length = min(1920 * 1_000_000, limit)
        after = r.choice((0, 4))
        return kind, midi(*[chunk(note(0, length) + note(0, 480) * after)] * 4, ticks=r.choice((1, 24, 480)))
    if kind == "tracks":
        n = r.choice((129, 10_000, 65_535))
        return kind, midi(*[chunk(note(0, 480))] * n)
    if kind == "ticks":
        return kind, midi(*[chunk(note(0, 480) * 9)] * 4, ticks=r.choice((0, 1, 3, 0x7FFF, 0x8000, 0xE250, 0xFFFF)))
    if kind == "metres":
        n = r.choice((300, 30_000))
        storm = b"".join(variable(r.choice((0, 1, 120, 480))) + b"\xff\x58\x04"
                         + bytes([r.randrange(r.choice((8, 256))), r.randrange(r.choice((5, 256))), 24, 8])
                         for _ in range(n))
        return kind, midi(chunk(storm), *[chunk(note(0, 480) * 400)] * 4)
    if kind == "sysex":
        size = r.choice((5, 3000, limit))
        junk = b"\0" + r.choice((b"\xf0", b"\xf7")) + variable(size) + r.randbytes(min(size, 3000))
        return kind, midi(*[chunk(note(0, 480) * 4 + junk + note(0, 480) * 4)] * 4)
    if kind == "running":
        events = b"".join(variable(r.randrange(200)) + bytes(r.randrange(256) for _ in range(r.choice((1, 2, 3))))
                          for _ in range(r.randrange(500)))
        return kind, midi(chunk(events), *[chunk(note(0, 480) * 4)] * r.choice((3, 4)))
    if kind == "lengths":
        wrong = bytearray(midi(*[chunk(note(0, 480) * 9)] * 4))
        at = wrong.index(b"MTrk", r.choice((0, 30))) + 4
        wrong[at:at + 4] = struct.pack(">I", r.choice((0, 1, 2**31, 2**32 - 1, r.randrange(2000))))
        return kind, bytes(wrong)
    if kind == "dense":
        pitches = range(21, 109)  # each on every 16th
        on, off = (b"".join(b"\0" + bytes([0x90, pitch, velocity]) for pitch in pitches) for velocity in (80, 0))
        beat = on + variable(120) + off[1:]
        return kind, midi(*[chunk(beat * 16 * r.choice((1, 4, 40)))] * r.choice((1, 4)))
    return kind, data + r.randbytes(r.choice((1, 3000, 6_000_000)))


def main(n: int, archive: str = "") -> None:
    """Through corpus, `run.encode` and `read_safely`, the way of uploads. Where a kind mutates, every second file is a
    real one of `archive`, a zip of MIDI."""
    import tempfile
    import time
    import zipfile
    from collections import Counter
    from pathlib import Path

    import mtxlib
    from mtxlib.music.readers import read_apart, read_safely

    real = []
    if archive:
        with zipfile.ZipFile(archive) as z:
            real = [z.read(name) for name in z.namelist() if name.endswith(".mid")]
    run = mtxlib.load_run(mtxlib.ROOT / "outputs" / "reference", "cpu")
    outcomes, slowest = Counter(), dict.fromkeys(("corpus", "encode", "upload"), (0.0, ""))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            kind, data = hostile(i, real[i % len(real)] if real and i // len(KINDS) % 2 else b"")
            file = Path(folder, f"{i:05}-{kind}.mid")
            file.write_bytes(data)
        files = sorted(Path(folder).iterdir())

        def note(way: str, file: Path, begin: float, why: str) -> None:
            why = why.removeprefix(f"{file}: ").removeprefix("the file: ").split(":")[0][:40]
            outcomes[file.stem[6:], way, why] += 1
            slowest[way] = max(slowest[way], (time.monotonic() - begin, file.name))

        tasks = [(f.name, "midi", str(f), "", str(f.with_suffix(".out")), {}) for f in files]
        begin = time.monotonic()
        for file, entry in zip(files, read_apart(tasks, 1), strict=True):
            note("corpus", file, begin, entry.get("skipped", "kept"))
            begin = time.monotonic()
        ways = {"encode": lambda file: run.encode([file]), "upload": lambda file: read_safely(file.read_bytes())}
        for way, call in ways.items():
            for file in files:
                begin = time.monotonic()
                try:
                    call(file)
                    note(way, file, begin, "kept")
                except ValueError as e:
                    note(way, file, begin, str(e))
    for (kind, way, why), number in sorted(outcomes.items()):
        print(f"{kind:8} {way:7} {number:4} {why}")
    print("slowest, in seconds:", slowest)


if __name__ == "__main__":
    import sys

    main(int(sys.argv[1]), *sys.argv[2:])
