"""Scores that the tests of pictures and sound build by hand."""

from collections import Counter
from xml.etree import ElementTree

from symusic import Note, Score, Tempo, TimeSignature, Track

# (start, length, pitch) in 16ths: 3/4, four bars in G major; ties over bar lines, a syncopation, 16ths, rests.
SOPRANO = [(0, 4, 67), (4, 4, 69), (8, 4, 71), (12, 12, 72), (24, 4, 74), (28, 12, 73), (40, 6, 74), (46, 2, 71)]
ALTO = [(0, 8, 62), (8, 8, 66), (16, 2, 67), (18, 4, 66), (22, 2, 67), (24, 12, 66), (36, 4, 67), (40, 8, 62)]
TENOR = [(4, 8, 59), (12, 1, 60), (13, 1, 62), (14, 2, 60), (16, 5, 59), (21, 3, 57), (24, 12, 57), (36, 12, 50)]
BASS = [(0, 12, 43), (12, 4, 48), (24, 24, 50)]
PROGRAMS = {"Soprano": 52, "Alto": 53, "Tenor": 54, "Bass": 42}


def score_of(tracks, metres=((0, 3, 4),), tpq=480, bpm=120):
    """tracks: (name, program, notes in 16ths) or (name, "drums", notes)."""
    score = Score(tpq)
    score.tempos.append(Tempo(0, bpm))
    for start, beats, unit in metres:
        score.time_signatures.append(TimeSignature(start * tpq // 4, beats, unit))
    for name, program, notes in tracks:
        track = Track(name, 0 if program == "drums" else program, program == "drums")
        for start, length, pitch in notes:
            track.notes.append(Note(start * tpq // 4, length * tpq // 4, pitch, 80))
        score.tracks.append(track)
    return score


def chorale(**kwargs):
    voices = zip(PROGRAMS.items(), (SOPRANO, ALTO, TENOR, BASS), strict=True)
    return score_of([(name, program, notes) for (name, program), notes in voices], **kwargs)


def classes(svg):
    return Counter(e.get("class") for e in ElementTree.fromstring(svg).iter())


def read_back(xml):
    """{(part, voice): sorted [(start, length, pitch)] in 16ths} as music21 reads it, tied notes joined."""
    from music21 import converter

    found = {}
    for p, part in enumerate(converter.parse(xml, format="musicxml").parts):
        for measure in part.getElementsByClass("Measure"):
            for voice in list(measure.voices) or [measure]:
                name = int(voice.id) if voice is not measure else 1
                notes, shift = found.setdefault((p, name), []), 0 if voice is measure else voice.offset
                for n in voice.notes:
                    at = round(float(measure.offset + shift + n.offset) * 4)
                    for pitch in n.pitches:
                        if n.tie is not None and n.tie.type != "start":
                            before = next(x for x in notes if x[2] == pitch.midi and x[0] + x[1] == at)
                            before[1] += round(float(n.quarterLength) * 4)
                        else:
                            notes.append([at, round(float(n.quarterLength) * 4), pitch.midi])
    return {k: sorted(map(tuple, v)) for k, v in found.items()}
