"""Files to scores: MIDI, MusicXML, what is refused, what is counted."""

from pathlib import Path

import pytest
from conftest import four_voices
from scores import Q, broken_files, melody, metres_of, notes_of, quarters, score_of

from mtxlib.music import readers
from mtxlib.music.readers import read_safely, read_score
from mtxlib.music.score import VOICES, normalise

CASES = Path(__file__).parents[3] / "shared" / "cases"


def test_tune_survives_transposition_rhythm_and_repeated_notes():
    line = [60, 62, 64, 65, 64, 62, 67, 69, 71, 72, 74, 50, 51]
    one = score_of((0, [(i, 1, p) for i, p in enumerate(line)]), (1, melody(1, low=30)))
    twice = [(2 * i + j, 1, p + 5) for i, p in enumerate(line[:11]) for j in (0, 1)]
    same = score_of((1, melody(2, low=30)), (0, twice))
    other = score_of((0, [(i, 1, p) for i, p in enumerate([61, *line[1:]])]))
    assert readers.tune_of(one) == readers.tune_of(same) != readers.tune_of(other)


XML = """<?xml version="1.0"?><score-partwise version="3.0"><part-list>
<score-part id="P1"><part-name>Clarinet</part-name></score-part>
<score-part id="P2"><part-name>Piano</part-name></score-part></part-list><part id="P1">
<measure number="0" implicit="yes"><attributes><divisions>2</divisions>
<time><beats>3</beats><beat-type>4</beat-type></time>
<transpose><diatonic>-1</diatonic><chromatic>-2</chromatic></transpose></attributes>{a}</measure>
<measure number="1">{b}</measure><measure number="2">{c}</measure></part>
<part id="P2"><measure number="0" implicit="yes"><attributes><divisions>2</divisions></attributes>{r1}</measure>
<measure number="1">{chord}</measure><measure number="2">{r6}</measure></part></score-partwise>"""


def xml_note(step, octave, length, extra="", head=""):
    return (f"<note>{head}<pitch><step>{step}</step><octave>{octave}</octave></pitch><duration>{length}</duration>"
            f"{extra}</note>")


def test_musicxml_with_pickup_tie_chord_grace_note_and_transposition(tmp_path):
    rest = "<note><rest/><duration>{}</duration></note>".format
    file = tmp_path / "pickup.musicxml"
    file.write_text(XML.format(
        a=xml_note("D", 5, 2), b=xml_note("E", 5, 4) + xml_note("F", 5, 2, '<tie type="start"/>'),
        c=xml_note("F", 5, 2, '<tie type="stop"/>') + xml_note("G", 5, 4)
        + "<note><grace/><pitch><step>A</step><octave>5</octave></pitch></note>", r1=rest(2), r6=rest(6),
        chord=xml_note("C", 3, 6) + xml_note("E", 3, 6, head="<chord/>")))
    score = read_score(file)
    assert metres_of(score) == [(0, 3, 4)] and len({t.program for t in score.tracks}) == 2
    assert quarters(score) == [(2, 1, 72), (3, 2, 74), (5, 2, 75), (7, 2, 77)]  # sounding: a tone lower
    assert quarters(score, 1) == [(3, 3, 48), (3, 3, 52)]


@pytest.mark.parametrize("metres", [[((4, 4), 6)], [((3, 4), 7)], [((4, 4), 2), ((3, 4), 3)]])
@pytest.mark.parametrize("pickup", [0, 1, 3])
def test_a_chorale_on_two_staves_is_read_as_the_four_voices_it_was_written_from(metres, pickup, tmp_path):
    """With rests, ties over bar lines, syncopations, a voice that is silent for two bars, and crossing voices."""
    from mtxlib.music.notation import musicxml

    written = four_voices(pickup, metres, spread=9)
    for i, track in enumerate(written.tracks):
        track.notes = [n for n in track.notes if n.start >= pickup * Q and (i != 2 or not 4 * Q <= n.start < 12 * Q)]
    written = normalise(written)
    file = tmp_path / "closed.musicxml"
    file.write_text(musicxml(written))
    score = read_score(file)
    assert (notes_of(score), metres_of(score)) == (notes_of(written), metres_of(written))
    assert [(t.program, t.name) for t in score.tracks] == list(VOICES.items())


def test_a_piano_staff_with_a_second_voice_now_and_then_stays_one_track(tmp_path):
    from music21 import chord, note, stream

    def hand(pitch, doubled, with_chord):
        part = stream.Part()
        for i in range(8):
            upper, lower = stream.Voice(id="1"), stream.Voice(id="2")
            upper.append([note.Note(pitch + i, quarterLength=2), note.Note(pitch, quarterLength=2)])
            lower.append(chord.Chord([pitch - 9, pitch - 5], quarterLength=4) if with_chord and i == 0
                         else note.Note(pitch - 9, quarterLength=4))
            part.append(stream.Measure([upper, lower] if i < doubled else upper.notes, number=i + 1))
        return part

    def n_tracks(*hands):
        file = tmp_path / "piano.musicxml"
        stream.Score([hand(*h) for h in hands]).write("musicxml", file)
        score = read_score(file)
        assert score.note_num() == sum(16 + doubled + with_chord for _, doubled, with_chord in hands)
        return len(score.tracks)

    assert n_tracks((72, 8, False), (50, 8, False)) == 4
    assert n_tracks((72, 4, False), (50, 5, False)) == 4
    assert n_tracks((72, 3, False), (50, 8, False)) == 2, "a second voice in three bars of eight"
    assert n_tracks((72, 8, True), (50, 8, False)) == 2, "a chord in a voice"
    assert n_tracks((72, 8, False)) == 1, "one staff"


def test_read_score_names_the_file_and_the_reason(tmp_path):
    for name, why in broken_files(tmp_path).items():
        if name not in ("no_suffix", "notes.txt"):  # read as MIDI here, whatever the name
            with pytest.raises(ValueError, match=f"{name}: {why}"):
                read_score(tmp_path / name)
    assert len(read_score(tmp_path / "no_suffix").tracks) == 2
    with pytest.raises(ValueError, match="none.mid: .*No such file"):
        read_score(tmp_path / "none.mid")


def test_files_nobody_has_vouched_for_are_read_apart(tmp_path, monkeypatch):
    files = broken_files(tmp_path)
    for name in ("empty.mid", "noise.mid", "noise_inside.mid", "bomb.mxl", "bad0.xml"):
        with pytest.raises(ValueError, match=f"{name}: {files[name]}"):
            read_safely(tmp_path / name)
        with pytest.raises(ValueError, match=f"the file: {files[name]}"):
            read_safely((tmp_path / name).read_bytes())
    good = tmp_path / "no_suffix"
    for score in (read_safely(good), read_safely(str(good)), read_safely(good.read_bytes())):
        assert (notes_of(score), metres_of(score)) == (notes_of(read_score(good)), metres_of(read_score(good)))
    (tmp_path / "sitecustomize.py").write_text("from mtxlib.music import readers\nimport os\n"
                                               "readers.parse_midi = lambda data: os._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="the file: crashed its process: 9"):
        read_safely(good.read_bytes())
