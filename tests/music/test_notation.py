"""mtxlib.music.notation against what the tests build by hand, and against music21 as an independent reader."""

import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from small_scores import ALTO, BASS, PROGRAMS, SOPRANO, TENOR, chorale, classes, read_back, score_of
from symusic import Score

from mtxlib.music import notation


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
