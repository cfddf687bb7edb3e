"""POP909 onto its beats: 909 pop songs, each as melody, bridge and piano (Wang 2020, ISMIR).

The MIDI of the set is in seconds of the recordings: most onsets miss its own grid. Its annotation puts it right.
`beat_midi.txt` holds the seconds of the quarters; between two of them time is stretched evenly. `beat_audio.txt` names
the downbeats, tracked in the recording: what is wrong there for less than STEADY bars is noise, what holds longer is
a bar of another length. Where the tracker counted eighths for quarters, or halves, its bars are joined or divided;
which of two is the first is then said by the third column of `beat_midi.txt`.
"""

from collections import Counter
from itertools import groupby

import numpy as np
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.music.normal import Unusable
from mtxlib.music.score import KEYS, TPQ

STEADY = 4  # bars that a new place of the downbeat must hold to be believed
CERTAIN = 0.8  # least share of downbeats that stand where the bars are taken to begin
QUARTERS = {2: 4, 3: 3, 4: 4, 8: 4}  # quarters from one downbeat to the next, as most often tracked: quarters a bar


def read_song(midi: bytes, beat_midi: str, beat_audio: str) -> tuple[Score, float]:
    """A song of POP909 on its beats, in bars from its downbeats, and how sure they are, 0 to 1.

    beat_midi, beat_audio: the texts of the files of that name. Raises Unusable below CERTAIN, and where the tracked
    bars are no multiple of the quarters.
    """
    beats, audio = (np.array([line.split() for line in text.splitlines() if line.strip()], float)
                    for text in (beat_midi, beat_audio))
    quarters, downbeats = beats[:, 0], audio[audio[:, 1] == 1, 0]
    tracked = np.round(in_quarters(downbeats, quarters)).astype(int)
    distance = Counter(np.diff(tracked).tolist()).most_common(1)[0][0]
    if distance not in QUARTERS:
        raise Unusable(f"beats unclear: {distance} quarters from downbeat to downbeat")
    per_bar = QUARTERS[distance]
    if distance < per_bar:  # bars of half the length: believe those that the other annotation has
        first = Counter((np.flatnonzero(beats[:, 2]) % per_bar).tolist()).most_common(1)[0][0]
        tracked = tracked[(tracked - first) % per_bar != distance]
    place, believed = tracked % per_bar, steady(tracked % per_bar)
    certainty = float((place == believed).mean())
    if certainty < CERTAIN:
        raise Unusable(f"downbeats unclear: {certainty:.0%} stand where the bars begin")
    return on_beats(Score.from_midi(midi, ttype="second"), quarters, tracked, believed, per_bar), certainty


def in_quarters(seconds: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    """Seconds as numbers of quarters, in the tempo of the nearest quarter before the first and after the last."""
    inside = np.interp(seconds, quarters, np.arange(len(quarters)))
    before = (seconds - quarters[0]).clip(max=0) / (quarters[1] - quarters[0])
    after = (seconds - quarters[-1]).clip(min=0) / (quarters[-1] - quarters[-2])
    return inside + before + after


def steady(place: np.ndarray) -> np.ndarray:
    """The place of each downbeat in the bar, where runs shorter than STEADY follow the run before."""
    runs = [(value, len(list(same))) for value, same in groupby(place.tolist())]
    held = next((value for value, length in runs if length >= STEADY), Counter(place.tolist()).most_common(1)[0][0])
    believed = []
    for value, length in runs:
        held = value if length >= STEADY else held
        believed += [held] * length
    return np.array(believed)


def bar_lines(tracked: np.ndarray, believed: np.ndarray, per_bar: int, first: float, last: float) -> list[int]:
    """The quarters at which bars begin, from one at or before quarter `first` to one after quarter `last`."""
    lines = [int(believed[0] + (first - believed[0]) // per_bar * per_bar)]
    while lines[-1] <= last:
        at = np.searchsorted(tracked, lines[-1] + per_bar / 2).clip(max=len(tracked) - 1)
        lines.append(lines[-1] + (int(believed[at]) - lines[-1] - 1) % per_bar + 1)
    return lines


def on_beats(song: Score, quarters: np.ndarray, tracked: np.ndarray, believed: np.ndarray, per_bar: int) -> Score:
    """`song`, in seconds, with its quarters as quarters, in bars."""
    tracks = [(track, track.notes.numpy()) for track in song.tracks if track.notes]
    spans = [in_quarters(np.stack([notes["time"], notes["time"] + notes["duration"]]), quarters) for _, notes in tracks]
    if not spans:
        raise Unusable("no notes")
    lines = bar_lines(tracked, believed, per_bar, min(x[0].min() for x in spans), max(x[0].max() for x in spans))
    score, lengths = Score(TPQ), np.diff(lines)
    score.tempos.append(Tempo(0, 60 / float(np.median(np.diff(quarters)))))
    score.time_signatures.extend([
        TimeSignature((line - lines[0]) * TPQ, int(n), 4)
        for i, (line, n) in enumerate(zip(lines, lengths, strict=False)) if i == 0 or n != lengths[i - 1]])
    for (track, notes), span in zip(tracks, spans, strict=True):
        start, end = np.round((span - lines[0]) * TPQ).astype(int)
        score.tracks.append(Track(track.name, track.program, track.is_drum))
        score.tracks[-1].notes = Note.from_numpy(start, (end - start).clip(min=1), notes["pitch"], notes["velocity"])
    return score


def key_of_song(key_audio: str) -> str:
    """The key that lasts longest, as `score.key_of` names keys; "" where the file has none. "Gb:maj" is F# major."""
    names = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    lasts: Counter = Counter()
    for start, end, name in (line.split() for line in key_audio.splitlines() if line.strip()):
        tonic, _, mode = name.partition(":")
        number = (names[tonic[0]] + tonic.count("#") - tonic[1:].count("b")) % 12
        mode = {"maj": "major", "min": "minor"}[mode]
        lasts[f"{KEYS[mode][0].split()[number]} {mode}"] += float(end) - float(start)
    return max(lasts, key=lasts.get, default="")
