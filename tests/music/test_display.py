"""mtxlib.show against what the tests build by hand, and against music21 as an independent reader."""

import base64
import io
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import soundfile
from IPython.display import SVG
from matplotlib.colors import to_rgb
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.music import display, notation

matplotlib.use("agg")

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


@pytest.fixture(scope="module")
def printed():
    """MusicXML and SVG of the chorale."""
    return notation.musicxml(chorale()), notation.notation(chorale())


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


def classes(svg):
    return Counter(e.get("class") for e in ElementTree.fromstring(svg).iter())


def rectangles(ax, colour):
    return sorted((p.get_x(), p.get_width(), p.get_y() + p.get_height() / 2)
                  for p in ax.patches if np.allclose(p.get_facecolor()[:3], to_rgb(colour)))


# ---- piano roll

@pytest.mark.parametrize("n", [1, 4, 10, 25])
def test_colours_are_distinct(n):
    assert len(set(display.voice_colours(n))) == n


def test_style_sets_the_palette():
    with matplotlib.rc_context():
        display.set_style()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert [to_rgb(c) for c in cycle[:4]] == [tuple(c) for c in display.voice_colours(4)]


def test_roll_has_one_rectangle_a_note_in_the_colour_of_its_voice():
    ax = display.piano_roll(chorale(), title="a chorale")
    for colour, notes in zip(display.voice_colours(4), (SOPRANO, ALTO, TENOR, BASS), strict=True):
        found = rectangles(ax, colour)
        assert len(found) == len(notes)
        for (x, width, y), (start, length, pitch) in zip(found, notes, strict=True):
            assert (x, round(y, 6)) == (start / 4, pitch)
            assert length / 4 - 0.1 < width < length / 4  # a small gap
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(PROGRAMS)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "3", "4"]
    assert list(ax.get_xticks()) == [0, 3, 6, 9]
    names = dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))
    assert names[60] == "C4" and names[64] == "E4" and names[48] == "C3"
    assert ax.get_title("left") == "a chorale"


def test_roll_keeps_the_colour_of_a_voice_whatever_the_order():
    score = score_of([("", 42, BASS), ("", 54, TENOR), ("", 52, SOPRANO)])  # as decoded: by program, unnamed, no alto
    ax, colours = display.piano_roll(score), display.voice_colours(4)
    assert [len(rectangles(ax, c)) for c in colours] == [len(SOPRANO), 0, len(TENOR), len(BASS)]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["Soprano", "Tenor", "Bass"]


def test_roll_shows_the_bars_asked_for():
    ax = display.piano_roll(chorale(), bars=(2, 3))
    assert ax.get_xlim() == (3, 9) and [t.get_text() for t in ax.get_xticklabels()] == ["2", "3"]
    assert len(rectangles(ax, display.voice_colours(4)[3])) == 2  # the bass note of bar 2, and the one that begins in 3
    assert display.piano_roll(chorale(), bars=1).get_xlim() == (0, 3)
    with pytest.raises(ValueError, match="between 1 and 4"):
        display.piano_roll(chorale(), bars=(5, 6))


def test_bars_follow_the_metre():
    score = score_of([("x", 0, [(0, 56, 60)])], metres=[(0, 6, 8), (24, 4, 4)])
    assert list(display.piano_roll(score).get_xticks()) == [0, 3, 6, 10]


def test_grid_shares_the_pitch_axis():
    low, high = score_of([("x", 0, [(0, 4, 40)])]), score_of([("x", 0, [(0, 4, 90)])])
    fig = display.piano_rolls([low, high, chorale(), Score(480)], ["a", "b", "c", "d"], columns=2)
    assert len(fig.axes) == 4 and [ax.get_title("left") for ax in fig.axes] == ["a", "b", "c", "d"]
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert fig.axes[0].get_ylim()[0] < 40 and fig.axes[0].get_ylim()[1] > 90
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["x", *PROGRAMS]
    with pytest.raises(ValueError):
        display.piano_rolls([low, high], ["only one title"])


# ---- notation

@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (9, 8), (5, 8), (7, 8), (2, 2), (3, 16)])
def test_split_gives_written_values_that_add_up(metre):
    from music21 import duration

    bar = 16 * metre[0] // metre[1]
    for at in range(bar):
        for length in range(1, bar - at + 1):
            parts = list(notation._split(at, length, metre))
            assert sum(parts) == length
            assert all(duration.Duration(p / 4).type != "complex" for p in parts)


def test_split_respects_the_beat():
    assert list(notation._split(0, 16, (4, 4))) == [16]
    assert list(notation._split(3, 6, (4, 4))) == [1, 4, 1]
    assert list(notation._split(2, 4, (4, 4))) == [4]
    assert list(notation._split(0, 5, (4, 4))) == [4, 1]
    assert list(notation._split(0, 8, (6, 8))) == [6, 2]
    assert list(notation._split(4, 8, (6, 8))) == [2, 6]


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
    assert classes(svg)["notehead"] == len(list(root.iter("pitch"))) + len(drums)


def test_extreme_pitches_keep_their_octave():
    notes = [(0, 4, 0), (4, 4, 11), (8, 4, 127)]
    root = ElementTree.fromstring(notation.musicxml(score_of([("x", 0, notes)])))
    steps = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    midi = [12 * (int(p.find("octave").text) + 1) + steps[p.find("step").text] + int(p.findtext("alter", "0"))
            for p in root.iter("pitch")]
    assert midi == [0, 11, 127]


def test_show_notation_is_an_svg(printed):
    assert isinstance(display.show_notation(chorale()), SVG)
    assert notation.notation(chorale()) == printed[1]  # nothing random in it


# ---- sound

def test_sound_is_there_and_ends_with_the_music():
    samples, rate = display.waveform(chorale(bpm=60))
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == 22050
    assert abs(len(samples) / rate - (12 + display.ROOM)) < 0.05  # four bars of 3/4, a second a beat
    assert 0.89 < np.abs(samples).max() <= 0.91
    loudness = np.sqrt((samples[:12 * rate].reshape(24, -1) ** 2).mean(axis=1))  # each half second
    assert loudness.min() > 0.02
    assert np.abs(samples[-rate // 20:]).max() < 1e-3


def test_a_note_begins_in_time():
    samples, rate = display.waveform(score_of([("x", 52, [(8, 8, 69)])]))  # one second of rest
    assert np.abs(samples[:int(0.99 * rate)]).max() < 0.02
    assert np.abs(samples[rate:int(1.05 * rate)]).max() > 0.3


@pytest.mark.parametrize("program", [0, 42, 52])  # as the soundfont's own programs these are semitones off
def test_notes_are_in_tune(program):
    pitches = list(range(36, 85, 4))
    samples, rate = display.waveform(score_of([("x", program, [(8 * i, 8, p) for i, p in enumerate(pitches)])]))
    for i, pitch in enumerate(pitches):
        held = samples[i * rate + rate // 4:(i + 1) * rate]
        power = np.abs(np.fft.rfft(held * np.hanning(len(held)), 8 * rate)) ** 2  # bins of 1/8 Hz
        expected = 8 * 440 * 2 ** ((pitch - 69) / 12)
        strongest = power.argmax() / expected
        assert round(strongest) in (1, 2, 3)  # one of the first harmonics, within 12 cents
        assert abs(1200 * np.log2(strongest / round(strongest))) < 12
        assert power[int(expected * 0.99):int(expected * 1.01)].max() > 0.1 * power.max()  # no octave too high


def test_drums_sound():
    samples, _ = display.waveform(score_of([("x", "drums", [(0, 8, 36), (8, 8, 38)])]))
    assert np.isfinite(samples).all() and np.abs(samples).max() > 0.5


def test_ogg_decodes_to_the_same_length(tmp_path):
    samples, rate = display.waveform(chorale())
    path = display.save_ogg(chorale(), tmp_path / "chorale.ogg")
    decoded, decoded_rate = soundfile.read(path)
    assert (len(decoded), decoded_rate) == (len(samples), rate)
    assert np.corrcoef(decoded, samples)[0, 1] > 0.95
    assert [p.name for p in tmp_path.iterdir()] == ["chorale.ogg"]
    player = display.audio(chorale())
    assert "data:audio/ogg;base64," in player._repr_html_()
    assert soundfile.info(io.BytesIO(player.data)).frames == len(samples)


def test_five_minutes_of_sound_fit_into_an_ogg():
    noise = 0.1 * np.random.default_rng(0).standard_normal(300 * display.RATE).astype(np.float32)
    with soundfile.SoundFile(io.BytesIO(display._ogg(noise, display.RATE))) as file:
        assert file.frames == len(noise)


# ---- all of them

def test_an_empty_score_gives_a_clear_result():
    for empty in (Score(480), score_of([("Soprano", 52, []), ("Alto", 53, [])])):
        assert [t.get_text() for t in display.piano_roll(empty).texts] == ["no notes"]
        counted = classes(notation.notation(empty))
        assert counted["notehead"] == 0 and counted["measure"] == 1 and counted["mRest"] == 1
        samples, rate = display.waveform(empty)
        assert len(samples) == rate and not samples.any()
        assert "audio/ogg" in display.audio(empty)._repr_html_()


def test_nothing_changes_the_score():
    score, before = chorale(), chorale()
    display.piano_roll(score), notation.musicxml(score), display.waveform(score)
    assert score == before


def test_slow_and_foreign_packages_stay_out():
    code = ("import sys; from symusic import *; from mtxlib.music import display; s = Score(480); s.tracks.append(Track());"
            "s.tracks[0].notes.append(Note(0, 480, 60, 80)); display.waveform(s);"
            "print([m for m in ('torch', 'music21', 'verovio', 'soundfile', 'pretty_midi') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


# ---- a page, and pictures for widgets

def test_a_page_holds_all_it_shows(tmp_path):
    score, long = chorale(), score_of([("x", 0, [(16 * bar, 16, 60) for bar in range(30)])], [(0, 4, 4)])
    display.page(tmp_path / "page.html", "A <title>", "An introduction.", {"First": [("one & two", score)],
                                                                        "Second": [("long", long)]})
    text = (tmp_path / "page.html").read_text()
    assert "A &lt;title&gt;" in text and "one &amp; two" in text and text.count("<h2>") == 2
    found = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(found) == 2 * 4 and all(uri.startswith("data:") for uri in found)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    kinds = [uri.split(";")[0] for uri in found]
    assert kinds == ["data:audio/ogg", "data:audio/midi", "data:image/png", "data:image/svg+xml"] * 2
    data = [base64.b64decode(uri.partition(",")[2]) for uri in found]
    for original, ogg, mid in ((score, *data[:2]), (long, *data[4:6])):
        sound, rate = soundfile.read(io.BytesIO(ogg))
        assert len(sound) / rate == pytest.approx(original.to("second").end() + display.ROOM, abs=0.05)
        assert Score.from_midi(mid).note_num() == original.note_num()
    assert data[2].startswith(b"\x89PNG")
    assert classes(data[3].decode())["measure"] == 4 and classes(data[7].decode())["measure"] == display.NOTATED


def test_redraw_puts_another_score_into_a_figure():
    low, high = score_of([("x", 0, [(0, 4, 40)])]), score_of([("x", 0, [(0, 4, 90)])])
    fig = display.piano_rolls([low, low, chorale()], ["a", "b", "c"])
    before, others = fig.axes[1].get_position().bounds, [len(fig.axes[i].patches) for i in (0, 2)]
    display.redraw(fig, 1, high, "new", bars=1)
    assert fig.axes[1].get_title("left") == "new" and [p.get_y() + 0.4 for p in fig.axes[1].patches] == [90]
    assert [len(fig.axes[i].patches) for i in (0, 2)] == others
    assert len({ax.get_ylim() for ax in fig.axes}) == 1 and fig.axes[0].get_ylim()[1] > 90
    display.redraw(fig, 1, low, "again")
    assert fig.axes[0].get_ylim()[1] > 90  # the axis does not jump back
    assert fig.axes[1].get_position().width == pytest.approx(before[2], rel=0.5)
    assert display.png(fig).startswith(b"\x89PNG")


def test_rolls_and_notation_of_the_first_bars():
    fig = display.piano_rolls([chorale(), chorale()], ["a", "b"], bars=2)
    assert {ax.get_xlim() for ax in fig.axes} == {(0, 6)}
    assert classes(notation.notation(chorale(), 2))["measure"] == 2


@pytest.mark.parametrize("suffix", [".mid", ".musicxml"])
def test_save_writes_what_the_name_says(tmp_path, suffix):
    display.save(chorale(), tmp_path / f"a{suffix}")
    if suffix == ".mid":
        assert Score(tmp_path / "a.mid").note_num() == chorale().note_num()
    else:
        assert read_back((tmp_path / "a.musicxml").read_text())[0, 1] == SOPRANO
