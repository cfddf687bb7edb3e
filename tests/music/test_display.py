"""mtxlib.music.display against what the tests build by hand."""

import base64
import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import soundfile
from IPython.display import SVG
from matplotlib.colors import to_rgb
from small_scores import ALTO, BASS, PROGRAMS, SOPRANO, TENOR, chorale, classes, read_back, score_of
from symusic import Note, Score, Tempo, TextMeta, TimeSignature, Track

from mtxlib.music import display, notation

matplotlib.use("agg")


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


def test_drums_are_crosses_below_the_pitches():
    hits = [(0, 1, 36), (4, 1, 38), (8, 1, 36), (12, 1, 42)]
    ax = display.piano_roll(score_of([("Kit", "drums", hits), ("Bass", 32, [(0, 16, 30)])], [(0, 4, 4)]))
    (crosses,) = ax.lines
    x, y = crosses.get_data()
    assert crosses.get_marker() == "x" and x.tolist() == [0, 1, 2, 3] and len(set(y)) == 3 and y[0] == y[2]
    assert y[0] < y[1] < y[3] < display.BAND, "a row for each drum, the bass drum at the bottom"
    (bar,) = ax.patches
    low, high = ax.get_ylim()
    assert (bar.get_y() - low) / (high - low) > display.BAND, "the band is free of pitches"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["Kit", "Bass"]


def test_a_track_keeps_name_and_colour_where_others_rest_or_names_are_lost():
    full = score_of([("Piano", 0, [(0, 4, 60)]), ("Flute", 73, [(0, 4, 72)]), ("Bass", 32, [(0, 4, 36)])])
    decoded = score_of([("", 32, [(0, 4, 36)]), ("", 0, [(0, 4, 60)])])
    fig = display.piano_rolls([full, decoded], ["file", "decoded"])
    display.redraw(fig, 1, decoded, "again")
    for colour, pitches in zip(display.voice_colours(3), ([60], [72], [36]), strict=True):
        assert [y for *_, y in rectangles(fig.axes[0], colour)] == pitches
        assert [y for *_, y in rectangles(fig.axes[1], colour)] == [p for p in pitches if p != 72]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["Piano", "Flute", "Bass"]


def test_twenty_tracks_fit_beside_the_roll():
    score = score_of([(f"A name that is long, and has the number {i}", i, [(i, 2, 40 + i)]) for i in range(20)])
    fig = display.piano_rolls([score], [""])
    fig.set_size_inches(9.6, 2.4)
    fig.draw_without_rendering()
    box = fig.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.y1 <= fig.bbox.height and box.x1 <= fig.bbox.width
    assert fig.axes[0].get_position().width > 0.3
    assert len({p.get_facecolor() for p in fig.axes[0].patches}) == 20
    assert all(len(t.get_text()) <= notation.NAME for t in fig.legends[0].get_texts())


# ---- sound

def test_sound_is_there_and_ends_with_the_music():
    samples, rate = display.waveform(chorale(bpm=60))
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == display.RATE
    assert abs(len(samples) / rate - (12 + display.TAIL)) < 0.05  # four bars of 3/4, a second a beat
    assert np.abs(samples).max() <= 0.901
    loudness = np.sqrt((samples[:12 * rate].reshape(24, -1) ** 2).mean(axis=1))  # each half second
    assert loudness.min() > 0.02
    assert np.abs(samples[13 * rate - rate // 20:]).max() < 0.02
    assert np.abs(samples[int(12.1 * rate):int(12.3 * rate)]).max() > 0.001, "the last notes ring"


@pytest.mark.parametrize("tracks", [[("x", 0, [(0, 8, 60)])], [("x", 48, [(0, 8, p) for p in range(40, 80, 5)])],
                                    [("x", "drums", [(i, 1, 36 + 2 * (i % 3)) for i in range(16)])]])
def test_all_scores_are_equally_loud(tracks):
    samples, _ = display.waveform(score_of(tracks))
    sounding = samples[np.abs(samples) > np.abs(samples).max() / 100]
    level, peak = np.sqrt((sounding ** 2).mean()), np.abs(samples).max()
    assert level == pytest.approx(display.LOUDNESS, rel=0.02) or level < display.LOUDNESS and 0.89 < peak < 0.91


def test_the_tempo_and_its_changes_set_the_length():
    score = score_of([("x", 0, [(4 * i, 4, 60) for i in range(8)])], bpm=60)
    score.tempos.append(Tempo(4 * score.tpq, 240))
    score.tempos.append(Tempo(400 * score.tpq, 30))  # long after the music
    samples, rate = display.waveform(score)
    assert len(samples) / rate == pytest.approx(4 + 1 + display.TAIL, abs=0.05)
    score.tempos = []
    assert len(display.waveform(score)[0]) / rate == pytest.approx(4 + display.TAIL, abs=0.05)  # the standard's 120


def test_a_note_begins_in_time():
    samples, rate = display.waveform(score_of([("x", 0, [(8, 8, 69)])]))  # one second of rest
    assert np.abs(samples[:int(0.99 * rate)]).max() < 0.02
    assert np.abs(samples[rate:int(1.05 * rate)]).max() > 0.1


def test_velocities_matter():
    score = score_of([("x", 0, [(0, 8, 60), (16, 8, 60)])])
    soft, loud = score.tracks[0].notes
    soft.velocity, loud.velocity = 40, 100
    samples, rate = display.waveform(score)
    assert np.abs(samples[2 * rate:3 * rate]).max() > 3 * np.abs(samples[:rate]).max()


def cents(samples, rate, pitch):
    """How far the harmonics of a note lie from where they should, by the best of all shifts within 3 semitones; and
    what share of the power lies within half a semitone of one of them."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 8 * rate)) ** 2  # bins of 1/8 Hz
    expected, shifts = 8 * 440 * 2 ** ((pitch - 69) / 12), np.arange(-300, 301)
    sums = sum(np.sqrt(power[np.round(h * expected * 2 ** (shifts / 1200)).astype(int)]) for h in (1, 2, 3, 4))
    place = np.arange(1, len(power)) / expected
    harmonic = np.abs(1200 * np.log2(place / np.maximum(1, np.round(place)))) < 50
    return shifts[sums.argmax()], power[1:][harmonic].sum() / power[1:].sum()


# Left out: bells and drums whose partials are no harmonics (glockenspiel 9, tubular bells 14, timpani 47), orchestra
# hit (55), breath rather than tone (76 to 78), goblins (101, a glide), percussion and effects (112 to 127), and what
# the soundfont has 30 to 70 cents off above C5: accordions and harmonica (21 to 23).
PITCHED = sorted(set(range(112)) - {9, 14, 21, 22, 23, 47, 55, 76, 77, 78, 101})
WAVERING = {52, 60, 67, 94, 103}  # choir, horn, baritone saxophone, two pads: one or two notes of seven 18 to 22 off


@pytest.mark.parametrize("programs", [PITCHED[i::6] for i in range(6)], ids=lambda programs: f"from {programs[0]}")
def test_programs_are_in_tune(programs):
    pitches = (40, 47, 54, 61, 68, 75, 82)
    for program in programs:
        samples, rate = display.waveform(score_of([("x", program, [(8 * i, 8, p) for i, p in enumerate(pitches)])]))
        held = [samples[int((i + 0.1) * rate):int((i + 0.9) * rate)] for i in range(len(pitches))]
        found = [cents(part, rate, pitch) for part, pitch in zip(held, pitches, strict=True)]
        shifts, harmonic = np.transpose(found)
        assert np.abs(shifts).max() <= (25 if program in WAVERING else 15), f"program {program}: {shifts}"
        assert np.median(harmonic) > 0.3, f"program {program}: {harmonic}"


def test_each_of_twenty_tracks_sounds_as_its_own_program():
    def alone(program, at):
        return score_of([("x", program, [(at, 8, 60)])])

    programs = range(0, 80, 4)  # more than there are channels
    together = score_of([("x", p, [(16 * i, 8, 60)]) for i, p in enumerate(programs)])
    samples, rate = display.waveform(together)
    for i, program in enumerate(programs):
        wanted, found = display.waveform(alone(program, 0))[0][:rate], samples[2 * i * rate:(2 * i + 1) * rate]
        assert np.corrcoef(np.abs(np.fft.rfft(wanted)), np.abs(np.fft.rfft(found)))[0, 1] > 0.9, program


def test_drums_sound():
    samples, rate = display.waveform(score_of([("x", "drums", [(0, 8, 36), (8, 8, 38), (16, 8, 42)])]))
    kick, snare, hat = (np.abs(np.fft.rfft(samples[i * rate:(i + 1) * rate])) ** 2 for i in range(3))
    centres = [(np.arange(len(p)) * p).sum() / p.sum() for p in (kick, snare, hat)]  # Hz
    assert np.isfinite(samples).all() and np.abs(samples).max() > 0.3
    assert centres[0] < 500 < centres[1] < centres[2] and centres[2] > 4000


def test_ogg_decodes_to_the_same_length():
    samples, rate = display.waveform(chorale())
    player = display.audio(chorale())
    decoded, decoded_rate = soundfile.read(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)"', player.data)[1])))
    assert (len(decoded), decoded_rate) == (len(samples), rate)
    assert np.corrcoef(decoded, samples)[0, 1] > 0.95
    assert "data:audio/ogg;base64," in player._repr_html_()


def test_five_minutes_of_sound_fit_into_an_ogg():
    noise = 0.1 * np.random.default_rng(0).standard_normal(300 * display.RATE).astype(np.float32)
    with soundfile.SoundFile(io.BytesIO(display._ogg(noise, display.RATE))) as file:
        assert file.frames == len(noise)


# ---- all of them

def test_show_notation_is_an_svg():
    assert isinstance(display.show_notation(chorale()), SVG)
    assert notation.notation(chorale()) == notation.notation(chorale())  # nothing random in it


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
    code = ("import sys; from symusic import *; from mtxlib.music import display; s = Score(480);"
            "s.tracks.append(Track()); s.tracks[0].notes.append(Note(0, 480, 60, 80)); display.waveform(s);"
            "print([m for m in ('torch', 'music21', 'verovio', 'soundfile', 'pretty_midi') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
        assert len(sound) / rate == pytest.approx(original.to("second").end() + display.TAIL, abs=0.05)
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


def test_the_sound_ends_after_the_last_note_whatever_is_marked_later():
    score = Score(480)
    score.tracks.append(Track("", 0, False))
    score.tracks[0].notes.append(Note(0, 960, 60, 80))
    score.markers.append(TextMeta(9600, "the end of the window"))
    score.time_signatures.append(TimeSignature(4800, 3, 4))
    samples, rate = display.waveform(score)
    assert len(samples) / rate == pytest.approx(1 + display.TAIL, abs=0.05)
    assert len(score.markers) == len(score.time_signatures) == 1, "the score stays as it was"
