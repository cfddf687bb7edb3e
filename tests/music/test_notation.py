"""mtxlib.music.notation against what the tests build by hand, and against music21 as an independent reader."""

import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from small_scores import ALTO, BASS, PROGRAMS, SOPRANO, TENOR, chorale, classes, read_back, score_of
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.music import notation
from mtxlib.music.score import bar_starts


@pytest.fixture(scope="module")
def printed():
    """MusicXML and SVG of the chorale."""
    return notation.musicxml(chorale()), notation.notation(chorale())


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (9, 8), (5, 8), (7, 8), (2, 2), (3, 16)])
def test_split_gives_written_values_that_add_up(metre):
    from music21 import duration

    bar = 96 * metre[0] // metre[1]
    for at in range(0, bar, 3):
        for length in range(3, bar - at + 1, 3):
            parts = list(notation._split(at, length, metre))
            assert sum(parts) == length
            assert all(duration.Duration(p / 24).type != "complex" for p in parts)
            assert all(not duration.Duration(p / 24).tuplets for p in parts)


def test_split_respects_the_beat():
    assert list(notation._split(0, 96, (4, 4))) == [96]
    assert list(notation._split(18, 36, (4, 4))) == [6, 24, 6]
    assert list(notation._split(12, 24, (4, 4))) == [24]
    assert list(notation._split(0, 30, (4, 4))) == [24, 6]
    assert list(notation._split(0, 48, (6, 8))) == [36, 12]
    assert list(notation._split(24, 48, (6, 8))) == [12, 36]


def test_music21_reads_the_same_notes(printed):
    assert read_back(printed[0]) == {(0, 1): SOPRANO, (0, 2): ALTO, (1, 1): TENOR, (1, 2): BASS}


def test_svg_has_a_head_for_every_note_and_every_tied_part(printed):
    # Cut at bar lines: soprano's note at 28, bass's at 24; at beats: alto's at 8 (a bar line too) and tenor's at 16.
    cuts = 1 + 1 + 1 + 1
    counted = classes(printed[1])
    assert counted["notehead"] == len(SOPRANO + ALTO + TENOR + BASS) + cuts
    assert counted["tie"] == cuts
    assert counted["clef"] == 2 and counted["measure"] == 4


def test_four_voices_stand_on_two_staves(printed):
    parts = ElementTree.fromstring(printed[0]).findall("part")
    assert [p.find("measure/attributes/clef/sign").text for p in parts] == ["G", "F"]
    for part in parts:
        assert part.find("measure/attributes/time/beats").text == "3"
        assert part.find("measure/attributes/key/fifths").text == "1"
        stems = {(n.find("voice").text, n.find("stem").text) for n in part.iter("note") if n.find("stem") is not None}
        assert stems == {("1", "up"), ("2", "down")}
    rests = [(n.find("voice").text, n.find("duration").text) for n in parts[1].iter("note")
             if n.find("rest") is not None]
    assert len(rests) == 2  # the tenor's first beat, the bass's last two of bar 2
    assert "Music21" not in printed[0] and "Music21" not in printed[1]


def test_a_common_rest_is_printed_once():
    tracks = [(name, program, [(4, 4, 60 - i)]) for i, (name, program) in enumerate(PROGRAMS.items())]
    assert classes(notation.notation(score_of(tracks, [(0, 2, 4)])))["rest"] == 2  # one a staff


def test_accidentals_hold_for_the_bar_and_not_beyond():
    notes = [(0, 4, 60), (4, 4, 64), (8, 4, 67), (12, 4, 60),  # C E G C
             (16, 4, 61), (20, 4, 61), (24, 4, 60), (28, 4, 73),  # C# C# C C#' : sharp, none, natural, sharp
             (32, 4, 60), (36, 4, 65), (40, 4, 67), (44, 12, 66)]  # C F G F# tied on: one sharp
    xml = notation.musicxml(score_of([("x", 0, notes)], [(0, 4, 4)]))
    assert ElementTree.fromstring(xml).find(".//fifths").text == "0"
    assert [a.text for a in ElementTree.fromstring(xml).iter("accidental")] == ["sharp", "natural", "sharp", "sharp"]


def test_spelling_agrees_with_the_printed_chorale():
    from music21 import corpus

    piece, tracks = corpus.parse("bwv66.6"), []  # F sharp minor, with its raised degrees
    for i, part in enumerate(piece.parts):
        notes = [(round(n.offset * 4), round(n.quarterLength * 4), n.pitch.midi) for n in part.flatten().notes]
        tracks.append((f"v{i}", i, notes))
    root = ElementTree.fromstring(notation.musicxml(score_of(tracks, [(0, 4, 4)])))
    spelt = Counter((n.find("pitch/step").text, int(n.findtext("pitch/alter", "0"))) for n in root.iter("note")
                    if n.find("pitch") is not None and not any(t.get("type") == "stop" for t in n.findall("tie")))
    assert root.find(".//fifths").text == "3"
    assert spelt == Counter((p.step, int(p.alter)) for p in piece.flatten().pitches)


def test_any_midi_has_one_staff_a_track():
    piano = [(0, 12, 36), (0, 6, 60), (0, 6, 64), (6, 6, 62), (12, 5, 60), (14, 10, 67)]  # chords and overlaps
    drums = [(0, 2, 36), (0, 2, 42), (4, 2, 38), (12, 2, 36)]
    score = score_of([("Piano", 0, piano), ("Kit", "drums", drums), ("Silent", 5, [])], [(0, 6, 8), (12, 5, 4)])
    xml, svg = notation.musicxml(score), notation.notation(score)
    root = ElementTree.fromstring(xml)
    assert [e.text for e in root.iter("part-name")] == ["Piano", "Kit"]
    assert [e.text for e in root.iter("sign")] == ["F", "percussion"]
    assert [e.text for e in root.iter("beats")] == ["6", "5"] * 2
    found = read_back(xml)
    assert sorted(n for (part, _), line in found.items() if part == 0 for n in line) == sorted(piano)
    assert len(list(root.iter("unpitched"))) == len(drums)
    shown = ElementTree.fromstring(notation.musicxml(score, picture=True))
    assert [e.text for e in shown.iter("sign")] == ["G", "F", "percussion"], "a pianist has two staves"
    assert [e.text for e in shown.iter("group-name")] == ["Piano"]
    assert classes(svg)["notehead"] == len(list(shown.iter("pitch"))) + len(drums)


def test_extreme_pitches_keep_their_octave():
    notes = [(0, 4, 0), (4, 4, 11), (8, 4, 127)]
    root = ElementTree.fromstring(notation.musicxml(score_of([("x", 0, notes)])))
    steps = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    midi = [12 * (int(p.find("octave").text) + 1) + steps[p.find("step").text] + int(p.findtext("alter", "0"))
            for p in root.iter("pitch")]
    assert midi == [0, 11, 127]


def test_js_fakes_come_back_from_print():
    archive = Path(__file__).parents[3] / "shared/data/jsfakes.zip"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    for name in ("js-fakes/midi/0.mid", "js-fakes/midi/123.mid"):
        score = Score.from_midi(zipfile.ZipFile(archive).read(name))
        for track, program in zip(score.tracks, PROGRAMS.values(), strict=True):
            track.program = program
        wanted = [sorted((n.time * 4 // score.tpq, n.duration * 4 // score.tpq, n.pitch) for n in t.notes)
                  for t in score.tracks]
        assert list(read_back(notation.musicxml(score)).values()) == wanted


# ---- what is finer than 16ths, other than voices, and slower or faster

def in_24ths(tracks, tempos=((0, 120),)):
    score = Score(24)
    score.tempos = [Tempo(time, qpm) for time, qpm in tempos]
    score.time_signatures = [TimeSignature(0, 4, 4)]
    for name, program, notes in tracks:
        track = Track(name, 0 if program == "drums" else program, program == "drums")
        track.notes = [Note(start, length, pitch, 80) for start, length, pitch in notes]
        score.tracks.append(track)
    return score


def sounding(xml):
    """(start, length, pitch) in 24ths of the first part, ties joined by music21."""
    from music21 import converter

    part = converter.parse(xml, format="musicxml").parts[0].stripTies().flatten()
    return sorted((round(float(n.offset) * 24), round(float(n.quarterLength) * 24), p.midi)
                  for n in part.notes for p in n.pitches)


@pytest.mark.parametrize("beats", [
    [8, 8, 8], [4] * 6, [3] * 8, [6] * 4, [16, 8], [8, 16], [8, 4, 12], [12, 4, 4, 4], [4, 8, 12], [4, 16, 4],
    [8, 8, 32, 24, 24], [24, 40, 8, 24], [3, 45], [36, 8, 4, 24, 24]])
def test_every_beat_of_16ths_32nds_or_triplets_is_printed_as_it_is(beats):
    notes, at = [], 0
    for i, length in enumerate(beats):
        notes.append((at, length, 60 + i))
        at += length
    xml = notation.musicxml(in_24ths([("x", 0, notes)]))
    assert sounding(xml) == notes
    brackets = [t.get("type") for t in ElementTree.fromstring(xml).iter("tuplet")]
    assert brackets.count("start") == brackets.count("stop") and brackets[::2] == ["start"] * (len(brackets) // 2)


def heads(xml):
    """{pitch: start in 24ths} of all heads of one part that no tie leads to; every voice fills its bars."""
    steps, found, start = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}, {}, 0
    root = ElementTree.fromstring(xml)
    divisions = int(root.find(".//divisions").text)
    for measure in root.iter("measure"):
        at, ends = start, set()
        for e in measure.iter():
            if e.tag == "backup":
                ends.add(at)
                at -= int(e.findtext("duration")) / divisions * 24
            elif e.tag == "note":
                length = int(e.findtext("duration")) / divisions * 24
                at -= length if e.find("chord") is not None else 0
                if e.find("pitch") is not None and not any(t.get("type") == "stop" for t in e.findall("tie")):
                    step, octave, alter = (e.findtext(f"pitch/{part}", "0") for part in ("step", "octave", "alter"))
                    pitch = 12 * int(octave) + 12 + steps[step] + int(alter)
                    assert pitch not in found
                    found[pitch] = round(at)
                at += length
        assert {round(end) for end in ends | {at}} == {round(at)}
        start = at
    return found


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (7, 8), (2, 2), (3, 16), (5, 32)])
def test_of_any_rhythm_no_note_is_lost_or_moved_by_more_than_a_sixth_of_a_quarter(metre):
    random = np.random.default_rng(metre[0])
    for _ in range(2):
        starts = np.sort(random.choice(400, 40, replace=False)).tolist()
        notes = [(a, int(random.integers(1, 60)), 40 + i) for i, a in enumerate(starts)] + [(400, 100, 30)]
        score = in_24ths([("x", 0, notes)])
        score.time_signatures = [TimeSignature(0, *metre)]
        found = heads(notation.musicxml(score))
        assert set(found) == {pitch for *_, pitch in notes}
        assert max(abs(found[pitch] - start) for start, _, pitch in notes) <= 4
        assert set(heads(notation.musicxml(score, picture=True)).keys()) == set(found)


def test_a_pianist_has_two_staves_in_the_picture_and_one_part_in_the_file():
    right, left = [(0, 48, 76), (0, 96, 72), (24, 24, 74), (48, 48, 79)], [(0, 96, 36), (24, 72, 52), (48, 48, 55)]
    score = in_24ths([("A pianist whose name is longer than a line", 0, right + left), ("Bass", 32, [(0, 96, 40)])])
    shown = read_back(notation.musicxml(score, picture=True))
    assert shown[0, 1] == [(0, 4, 72), (0, 4, 76), (4, 4, 74), (8, 8, 79)], "each ends where the hand goes on"
    assert shown[1, 1] == [(0, 4, 36), (4, 4, 52), (8, 8, 55)] and len(shown) == 3
    xml = notation.musicxml(score)
    assert len(ElementTree.fromstring(xml).findall("part")) == 2
    assert sorted((start, length, pitch) for (part, _), line in read_back(xml).items() if part == 0
                  for start, length, pitch in line) == sorted((a // 6, n // 6, p) for a, n, p in right + left)
    assert "longer than a line" in xml
    svg = notation.notation(score)
    assert "A pianist whose name is…" in svg and "longer than a line" not in svg


def test_one_voice_or_one_register_stays_on_one_staff():
    wide = [(0, 24, 40), (24, 24, 80), (48, 24, 45)]
    high = [(0, 48, 76), (24, 48, 60), (48, 48, 64)]
    for notes in (wide, high):
        xml = notation.musicxml(in_24ths([("x", 0, notes)]), picture=True)
        assert len(ElementTree.fromstring(xml).findall("part")) == 1


def test_drums_stand_at_their_places_and_last_to_the_next_hit():
    hits = [(0, 1, 36), (0, 1, 42), (12, 1, 42), (24, 1, 38), (24, 1, 42), (48, 1, 36), (72, 1, 49)]
    root = ElementTree.fromstring(notation.musicxml(in_24ths([("", "drums", hits)])))
    notes = [n for n in root.iter("note") if n.find("unpitched") is not None]
    places = [n.find("unpitched/display-step").text + n.find("unpitched/display-octave").text for n in notes]
    assert sorted(places) == sorted(["F4", "G5", "G5", "C5", "G5", "F4", "A5"])
    assert [n.findtext("notehead") == "x" for n in notes] == [p in ("G5", "A5") for p in places]
    assert not list(root.iter("rest"))


def test_tempos_are_written_and_the_picture_shows_those_that_tell():
    score = in_24ths([("x", 0, [(0, 384, 60)])], [(0, 96), (96, 97.5), (204, 152.25)])
    root = ElementTree.fromstring(notation.musicxml(score))
    assert [float(s.get("tempo")) for s in root.iter("sound")] == [96, 97.5, 152.25]
    measures = root.findall("part/measure")
    assert [len(list(m.iter("sound"))) for m in measures] == [1, 1, 1, 0]
    divisions = int(root.find(".//divisions").text)
    assert [int(o.text) / divisions for o in root.iter("offset")] == [0.5]
    shown = ElementTree.fromstring(notation.musicxml(score, picture=True))
    assert [m.text for m in shown.iter("per-minute")] == ["96", "152"]


def test_programs_and_names_are_written_for_who_reads_the_file():
    from music21 import converter

    score = in_24ths([("Guitar", 25, [(0, 24, 60)]), ("Flute", 73, [(0, 24, 72)])])
    parts = converter.parse(notation.musicxml(score), format="musicxml").parts
    assert [(p.partName, p.getInstrument().midiProgram) for p in parts] == [("Guitar", 25), ("Flute", 73)]


def test_a_metre_that_changes_inside_a_bar_ends_it():
    score = in_24ths([("x", 0, [(0, 240, 60)])])
    score.time_signatures = [TimeSignature(0, 4, 4), TimeSignature(120, 3, 4)]
    assert notation.bars_of(score) == [(0, 96, (4, 4)), (96, 120, (4, 4)), (120, 192, (3, 4)), (192, 264, (3, 4))]
    assert bar_starts(score) == [0, 96, 120, 192, 264]
    assert sounding(notation.musicxml(score)) == [(0, 240, 60)]
