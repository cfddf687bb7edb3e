"""What of a folder of MIDI comes back from its tokens: `python benchmarks/fidelity.py FOLDER --grid 12`.

Each file is read twice: by mtxlib, into the normal form, the ids of windows that lie end to end, and back; and by this
script, note for note as the file has them. The two are then compared. A folder of POP909 songs (it holds beat_midi.txt)
is put onto its beats first.

notes: share of the file's notes that come back, with their pitch, within half a quarter. moved: share of these whose
onset is off by more than a 64th. velocity: mean distance. tempo: mean relative error at the onsets.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from pop909 import read_song
from symusic import Score

from mtxlib.data.tokens import Codec, make_tokenizer
from mtxlib.music.normal import normalise
from mtxlib.music.score import bar_starts, cut, join, window_bars

MOVED = 1 / 16 + 1e-6  # quarters: a 64th
NEAR = 1 / 2  # quarters within which a note is looked for


def notes_of(score: Score) -> pd.DataFrame:
    """One row a note: drums or not, pitch, onset in quarters, velocity, quarters a minute at its onset."""
    marks = sorted((t.time, t.qpm) for t in score.tempos) or [(0, 120.0)]
    times, qpm = (np.array(column) for column in zip(*marks, strict=True))
    frames = []
    for track in score.tracks:
        notes = track.notes.numpy()
        in_force = np.maximum(np.searchsorted(times, notes["time"], side="right") - 1, 0)
        frames.append(pd.DataFrame({"drum": track.is_drum, "pitch": notes["pitch"], "onset": notes["time"] / score.tpq,
                                    "velocity": notes["velocity"].astype(float), "tempo": qpm[in_force]}))
    return pd.concat(frames, ignore_index=True).sort_values("onset", kind="stable", ignore_index=True)


def decoded(score: Score, form: dict, n_bars: int = 4) -> Score:
    """The score through the ids of its windows and back."""
    score = normalise(score, **form)
    programs = {-1 if t.is_drum else t.program for t in score.tracks}
    codec = Codec(make_tokenizer(programs, form["grid"], form["velocities"], form["tempos"]), n_bars)
    starts = bar_starts(score)
    bars = [bar for bar in window_bars(len(starts) - 1, n_bars, n_bars)]
    windows = [cut(score, starts, bar, n_bars) for bar in bars]
    again = join([codec.decode(ids) for ids in codec.encode(windows)], bars, n_bars, starts)
    if form["tempos"]:  # `join` leaves them out
        for window, bar in zip(windows, bars, strict=True):
            again.tempos.extend([type(t)(t.time + starts[bar], t.qpm) for t in window.tempos])
    else:
        again.tempos.extend(score.tempos)
    return again


def matched(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    """Row numbers (M, 2) of notes of a and b that are one: of one pitch, in order, within NEAR once the bars of rest
    in front, which the normal form leaves out or adds, are taken off."""
    pairs, shift = [], first_shift(a, b)
    waiting = {key: list(group.index) for key, group in b.groupby(["drum", "pitch"])}
    onset_a, onset_b, keys = a["onset"].to_numpy(), b["onset"].to_numpy(), list(zip(a["drum"], a["pitch"], strict=True))
    for i, key in enumerate(keys):
        found = waiting.get(key, [])
        while found and onset_b[found[0]] < onset_a[i] + shift - NEAR:
            found.pop(0)
        if found and abs(onset_b[found[0]] - onset_a[i] - shift) <= NEAR:
            pairs.append((i, found.pop(0)))
    return np.array(pairs, dtype=int).reshape(-1, 2)


def first_shift(a: pd.DataFrame, b: pd.DataFrame, first: int = 60) -> float:
    """The distance, in quarters, at which most of the first notes of a and b lie."""
    a, b = a.head(first), b.head(first)
    distances = np.subtract.outer(b["onset"].to_numpy(), a["onset"].to_numpy())
    is_one = np.equal.outer(b["pitch"].to_numpy(), a["pitch"].to_numpy())
    return Counter(np.round(distances[is_one] * 4) / 4).most_common(1)[0][0]


def compare(score: Score, form: dict) -> dict[str, float]:
    """Counts and sums of one file; see the head of this script."""
    a, b = notes_of(score), notes_of(decoded(score, form))
    pairs = matched(a, b)
    x, y = a.iloc[pairs[:, 0]].reset_index(), b.iloc[pairs[:, 1]].reset_index()
    gap = y["onset"] - x["onset"]
    return {"notes": len(a), "kept": len(pairs), "moved": int(((gap - gap.median()).abs() > MOVED).sum()),
            "velocity": float((x["velocity"] - y["velocity"]).abs().sum()),
            "tempo": float((y["tempo"] / x["tempo"] - 1).abs().sum())}


def scores_of(folder: Path):
    """(name, score) of each file; POP909's songs on their beats."""
    songs = sorted(folder.rglob("beat_midi.txt"))
    for path in [text.parent / f"{text.parent.name}.mid" for text in songs] or sorted(folder.rglob("*.mid")):
        try:
            yield path.name, (read_song(path.read_bytes(), *((path.parent / name).read_text() for name in (
                "beat_midi.txt", "beat_audio.txt")))[0] if songs else Score(path))
        except ValueError as reason:
            print(f"{path.name}: left out: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("grid", 4), ("velocities", 0), ("tempos", 0), ("limit", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    args = parser.parse_args()
    form = {name: getattr(args, name) for name in ("grid", "velocities", "tempos")}
    rows = []
    for name, score in scores_of(args.folder):
        if args.limit and len(rows) == args.limit:
            break
        try:
            rows.append({"file": name, **compare(score, form)})
        except ValueError as reason:
            print(f"{name}: left out: {reason}")
    table = pd.DataFrame(rows).set_index("file")
    total, kept = table.sum(), table["kept"].sum()
    print(f"{len(table)} files, {int(total['notes']):,} notes, {form}")
    print(f"notes kept {kept / total['notes']:.4f}, moved {total['moved'] / kept:.4f}, velocity off by "
          f"{total['velocity'] / kept:.2f}, tempo by {total['tempo'] / kept:.4f}")
    print((table.assign(share=table["kept"] / table["notes"])).nsmallest(5, "share").round(3).to_string())


if __name__ == "__main__":
    main()
