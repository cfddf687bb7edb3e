"""A large folder of MIDI to measure with: `python benchmarks/make_folk.py FOLDER N`.

Each file is one to four fiddle tunes of music21's Ryan's Mammoth Collection, one after the other, each in a key of its
own; a second voice plays another tune a tenth below in every third. One file in a hundred is cut off in the middle. The
same N gives the same files; none of them may be committed.
"""

import random
import sys
from pathlib import Path

from music21 import converter, corpus
from symusic import Note, Score, TimeSignature, Track
from tqdm.auto import tqdm

from mtxlib.music.readers import tied
from mtxlib.music.score import TPQ

TUNES = 400


def read_tune(path: Path) -> tuple[list[Note], tuple[int, int], int]:
    """Notes, metre and length in ticks, filled up to a whole bar."""
    part = converter.parse(path, forceSource=True).parts[0]
    metre = part.recurse().getElementsByClass("TimeSignature").first()
    metre = (metre.numerator, metre.denominator) if metre else (4, 4)
    notes, bar = tied([(n.offset, n) for n in part.flatten().notes], 0), 4 * TPQ * metre[0] // metre[1]
    return notes, metre, -(-max(n.end for n in notes) // bar) * bar


def make(seed: int, tunes: list) -> Score:
    r, score, at = random.Random(seed), Score(TPQ), 0
    voices = [Track("", program, False) for program in ((40, 42) if seed % 3 == 0 else (40,))]
    for _ in range(r.randint(1, 4)):
        (notes, metre, length), second = r.choice(tunes), r.choice(tunes)[0]
        score.time_signatures.append(TimeSignature(at, *metre))
        shift = r.randint(-5, 6)
        for voice, line, low in zip(voices, (notes, second), (0, 16), strict=False):
            voice.notes.extend(Note(at + n.time, n.duration, n.pitch + shift - low, 80) for n in line
                               if n.end <= length)
        at += length
    score.tracks.extend(voices)
    return score


def main(folder: Path, n: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(map(Path, corpus.getComposer("ryansMammoth")))[:TUNES]
    tunes = [tune for tune in (read_tune(path) for path in tqdm(paths, "reading tunes")) if tune[0]]
    for i in tqdm(range(n), "writing"):
        data = make(i, tunes).dumps_midi()
        sub = folder / f"{i // 1000:03}"
        sub.mkdir(exist_ok=True)
        (sub / f"{i:06}.mid").write_bytes(data if i % 100 else data[:len(data) // 2])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
