"""Files to scores: MIDI, MusicXML, what is refused, what is counted."""

from pathlib import Path

import pytest
from conftest import four_voices
from hostile import chunk, midi, note
from scores import Q, broken_files, melody, metres_of, notes_of, quarters, score_of

from mtxlib.music import readers
from mtxlib.music.normal import normalise
from mtxlib.music.readers import read_counted, read_safely, read_score, told
from mtxlib.music.score import VOICES, bar_starts

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


# ---- parts in step


def music_xml(*parts, names=None):
    """parts: a list of measures each, of which each is the XML inside it, or (number, XML); divisions 2."""
    attributes = "<attributes><divisions>2</divisions></attributes>"
    listed = "".join(f'<score-part id="P{i}"><part-name>{(names or {}).get(i, "")}</part-name></score-part>'
                     for i in range(len(parts)))
    body = ""
    for i, measures in enumerate(parts):
        numbered = [m if isinstance(m, tuple) else (n, m) for n, m in enumerate(measures, 1)]
        body += f'<part id="P{i}">' + "".join(
            f'<measure number="{n}">{attributes * (place == 0)}{xml}</measure>'
            for place, (n, xml) in enumerate(numbered)) + "</part>"
    return f'<score-partwise version="3.1"><part-list>{listed}</part-list>{body}</score-partwise>'


def bar(octave, n=4, length=2):
    return xml_note("C", octave, length) * n


def metre(over, under):
    return f"<attributes><time><beats>{over}</beats><beat-type>{under}</beat-type></time></attributes>"


FULL = [metre(4, 4) + bar(5), bar(5), bar(5)]
LOW = [bar(3)] * 3
REST = "<note><rest/><duration>{}</duration></note>"


@pytest.mark.parametrize("parts", [
    [[FULL[0], bar(5, 2), FULL[2]], LOW], [LOW, [FULL[0], bar(5, 2), FULL[2]]],
    [[FULL[0], bar(5, 2) + "<forward><duration>4</duration></forward>", FULL[2]], LOW],
    [[FULL[0], "<forward><duration>4</duration></forward>" + bar(5, 2), FULL[2]], LOW],
    [[FULL[0], bar(5, 1) + "<forward><duration>4</duration></forward>" + bar(5, 1), FULL[2]], LOW],
    [[FULL[0], "", FULL[2]], LOW], [FULL, [bar(3), REST.format(2), bar(3)]], [FULL, [bar(3), "", bar(3)]],
    [FULL, ["", "", bar(3)]], [FULL, [(3, bar(3))]], [FULL, [(2, bar(3)), (3, bar(3))]], [FULL[:1] + [""] * 2, LOW]],
    ids=range(12))
def test_all_parts_begin_a_bar_together_whatever_one_lacks(parts, tmp_path):
    file = tmp_path / "half.musicxml"
    file.write_text(music_xml(*parts))
    score = read_score(file)
    assert metres_of(score) == [(0, 4, 4)] and [line / Q for line in bar_starts(score)] == [0, 4, 8, 12]
    ends_with_music = [t for t in score.tracks if t.end() > 8 * Q]
    assert len(ends_with_music) >= len(parts) - 1 and all(
        [n.time / Q for n in t.notes if n.time >= 8 * Q] == [8, 9, 10, 11] for t in ends_with_music)


def test_a_bar_that_all_parts_leave_short_is_short_and_one_that_is_too_long_is_long(tmp_path):
    file = tmp_path / "short.musicxml"
    file.write_text(music_xml([*FULL[:1], bar(5, 3), bar(5), bar(5, 5), bar(5)], [bar(3), bar(3, 3), *LOW, bar(3)]))
    lines = [line / Q for line in bar_starts(read_score(file))]
    assert {0, 4, 7, 11, 16} <= set(lines)


@pytest.mark.parametrize("voice", ["soprano", "tenor"])
@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not there")
def test_half_written_bars_of_the_cases(voice):
    score = read_score(CASES / f"half_written_{voice}_bar2.musicxml")
    assert metres_of(score) == [(0, 4, 4)] and all(8 * Q in {n.time for n in t.notes} for t in score.tracks)
    assert max(n.time for t in score.tracks for n in t.notes) == 15 * Q


@pytest.mark.parametrize("tempo, expected", [
    ('<sound tempo="152"/>', 152), ('<direction><sound tempo="48.5"/></direction>', 48.5), ("", 120),
    ("<direction><direction-type><metronome><beat-unit>half</beat-unit><per-minute>76</per-minute></metronome>"
     "</direction-type></direction>", 152),
    ("<direction><direction-type><metronome><beat-unit>quarter</beat-unit><beat-unit-dot/><per-minute>60</per-minute>"
     "</metronome></direction-type></direction>", 90)])
@pytest.mark.parametrize("part", [0, 1])
def test_the_tempo_and_the_metre_may_stand_in_any_part(tempo, expected, part, tmp_path):
    parts = [[bar(5, 3)] * 2, [bar(3, 3)] * 2]
    parts[part][0] = metre(3, 4) + tempo + parts[part][0]
    file = tmp_path / "tempo.musicxml"
    file.write_text(music_xml(*parts))
    score = read_score(file)
    assert [(t.time, round(t.qpm, 2)) for t in score.tempos] == [(0, expected)] and metres_of(score) == [(0, 3, 4)]


# ---- MIDI


def program(number, channel=0, wait=b"\0"):
    return wait + bytes([0xC0 | channel, number])


def on_channel(channel, pitches):
    return b"".join(b"\0" + bytes([0x90 | channel, p, 80]) + b"\x83\x60" + bytes([0x80 | channel, p, 0])
                    for p in pitches)


@pytest.mark.parametrize("tracks, expected, n_changes", [
    ([program(52) + on_channel(0, [60]) + program(19) + on_channel(0, [62]) + program(52) + on_channel(0, [64])],
     [(52, 3)], 1),
    ([on_channel(0, [60]) + program(5) + on_channel(0, [62])], [(0, 2)], 1),  # General MIDI begins with program 0
    ([program(5) + program(7) + on_channel(0, [60, 62])], [(7, 2)], 1),
    ([b"\0\x90\x3c\x50" + program(5) + b"\x83\x60\x80\x3c\0" + on_channel(0, [62])], [(0, 2)], 1),
    ([program(5) + on_channel(0, [60]) + program(6, 1) + on_channel(1, [62]) + program(7) + on_channel(0, [64])],
     [(5, 2), (6, 1)], 1),  # as all channels of format 0
    ([b"\0\xff\x03\x02\xc0\x05\0\xf0\x03\xc0\x05\xf7" + program(9) + on_channel(0, [60]) + b"\0\xc0\x0a\0\x0b"
      + on_channel(0, [62])], [(9, 2)], 2),  # what looks like one in a name; a running status
    ([program(9) + b"\x83\x60\x90\x3c\x50\x83\x60\x3c\0"], [(9, 1)], 0),
    ([program(16) + on_channel(0, [60]), program(40) + on_channel(0, [70])], [(16, 1), (40, 1)], 0)])
def test_a_track_keeps_the_program_of_its_first_note(tracks, expected, n_changes, tmp_path):
    file = tmp_path / "programs.mid"
    file.write_bytes(midi(*map(chunk, tracks)))
    score, counted = read_counted(file)
    assert [(t.program, len(t.notes)) for t in score.tracks] == expected and counted["programs"] == n_changes


def test_four_voices_that_change_their_program_are_four_voices(tmp_path):
    file = tmp_path / "choir.mid"
    lines = [program(52, c) + on_channel(c, [72 - 7 * c] * 3) + program(19, c) + on_channel(c, [73 - 7 * c])
             for c in range(4)]
    for tracks, form in ((lines, 1), ([b"".join(lines)], 0)):
        data = bytearray(midi(*map(chunk, tracks)))
        data[9] = form
        file.write_bytes(data)
        assert [(t.program, t.name, len(t.notes)) for t in read_score(file).tracks] == [
            (p, name, 4) for p, name in VOICES.items()]


def test_two_songs_in_one_file_are_refused(tmp_path):
    data = bytearray(midi(chunk(note(0, 480)), chunk(note(0, 480))))
    data[9] = 2
    (tmp_path / "two.mid").write_bytes(data)
    with pytest.raises(ValueError, match=r"two.mid: format 2: 2 songs in one file, expected one; save each"):
        read_score(tmp_path / "two.mid")


# ---- what is given up


def test_what_is_given_up_is_counted_from_the_files_own_notes(tmp_path):
    notes = [(0, 1, 60), (0, 1, 60), (1, 1, 62), (2 + 1 / 3, 1 / 3, 64), (3.125, 0.125, 65), (4.02, 1, 120)]
    score = score_of((0, notes), (-1, [(0, 1, 36), (1, 1, 5)]), tpq=960)
    for track in score.tracks:
        for n in track.notes:
            n.velocity = 90
    score.tracks[0].notes[0].velocity = 70
    score.tempos.extend([readers.Tempo(0, 100), readers.Tempo(960, 90), readers.Tempo(1920, 90)])
    file = tmp_path / "losses.mid"
    score.dump_midi(file)
    normal, counted = read_counted(file)
    assert normal.note_num() == 6 and counted == {
        "notes": 8, "kept": 6, "dropped": 1, "merged": 1, "moved": 2, "octaves": 1,
        "grids": {"4": 0.625, "8": 0.75, "12": 0.75, "24": 0.875}, "triplets": 0.125, "steady": 0.875,
        "velocities": 10.0, "tempos": 1, "programs": 0, "pedal": 0}
    finer = read_counted(file, grid=24, velocities=127, tempos=40)[1]
    assert (finer["moved"], finer["velocities"], finer["tempos"]) == (0, 0.0, 0)
    assert told(finer) == "8 notes, 1 merged, 1 drum hits dropped, 1 moved by octaves"


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not there")
@pytest.mark.parametrize("name, form, expected", [
    ("tremolo_32nds.mid", {}, {"notes": 256, "kept": 132, "merged": 124, "moved": 128}),
    ("tremolo_32nds.mid", {"grid": 8}, {"notes": 256, "kept": 256, "merged": 0, "moved": 0}),
    ("triplets_8th.mid", {}, {"notes": 192, "moved": 128, "triplets": 0.6667}),
    ("triplets_8th.mid", {"grid": 12}, {"notes": 192, "kept": 192, "moved": 0}),
    ("triplets_16th.mid", {"grid": 12}, {"notes": 384, "kept": 384, "moved": 0}),
    ("program_change.mid", {}, {"notes": 64, "kept": 64, "programs": 4})])
def test_the_cases_are_told(name, form, expected):
    score, counted = read_counted(CASES / name, **form)
    assert {key: counted[key] for key in expected} == expected and len(score.tracks) == 4
