"""Sources on small data made here, the normal form against MidiTok, bar lines and keys against music21."""

import hashlib
import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import four_voices
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.music import corpus, readers
from mtxlib.music.corpus import Piece, load_corpus, split_by_tune
from mtxlib.music.readers import read_safely, read_score
from mtxlib.music.score import VOICES, bar_starts, key_of, normalise

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
Q = 480  # ticks a quarter


def score_of(*tracks, metres=(), tempo=None, tpq=Q):
    """tracks: (program, [(onset, duration, pitch)]) in quarters; program -1 is drums. metres: (onset, over, under)."""
    score = Score(tpq)
    for program, notes in tracks:
        track = Track(f"track {program}", max(program, 0), program < 0)
        track.notes.extend([Note(round(t * tpq), round(d * tpq), p, 50 + p % 40) for t, d, p in notes])
        score.tracks.append(track)
    score.time_signatures.extend([TimeSignature(round(t * tpq), over, under) for t, over, under in metres])
    if tempo:
        score.tempos.append(Tempo(0, tempo))
    return score


def melody(seed, n=16, low=60):
    r = random.Random(seed)
    return [(i, 1, low + r.randrange(12)) for i in range(n)]


def notes_of(score):
    return sorted((-1 if t.is_drum else t.program, n.time * Q // score.tpq, n.duration * Q // score.tpq, n.pitch)
                  for t in score.tracks for n in t.notes)


def metres_of(score):
    return [(ts.time * Q // score.tpq, ts.numerator, ts.denominator) for ts in score.time_signatures]


def quarters(score, track=0):
    return [(n.time / Q, n.duration / Q, n.pitch) for n in score.tracks[track].notes]


def manifest(folder):
    return {e["name"]: e for e in json.loads((folder / "manifest.json").read_text())}


# ---- the normal form


def test_four_voices_become_soprano_to_bass_on_the_grid():
    voices = [[(i + 0.02 * (v - 1), 0.97, 48 + 7 * v) for i in range(1, 9)] for v in range(4)]
    score = normalise(score_of(*((0, v) for v in voices), tempo=72, tpq=96))
    assert [(t.program, t.name) for t in score.tracks] == list(VOICES.items())
    assert [t.notes[0].pitch for t in score.tracks] == [69, 62, 55, 48]
    assert score.tpq == 480 and score.tempos[0].qpm == pytest.approx(72) and len(score.tempos) == 1
    for t in score.tracks:
        assert [(n.time, n.duration, n.velocity) for n in t.notes] == [(i * Q, Q, 80) for i in range(1, 9)]


def test_voices_that_are_named_already_may_cross():
    low, high = [(0, 1, 40)], [(0, 1, 80)]
    score = normalise(score_of((54, high), (52, low), (42, low), (53, high)))
    assert [(t.program, t.notes[0].pitch) for t in score.tracks] == [(52, 40), (53, 80), (54, 80), (42, 40)]


def test_other_music_keeps_its_programs_apart():
    tracks = [(0, melody(1)), (0, melody(2)), (33, melody(3)), (0, melody(4)), (1, melody(5)), (-1, [(0, 1, 36)]),
              (-1, [(1, 1, 38), (2, 1, 5)])]
    score = normalise(score_of(*tracks, tempo=1000))
    assert [(t.program, t.is_drum) for t in score.tracks] == [(p, False) for p in (0, 2, 33, 3, 1)] + [(0, True)]
    assert quarters(score, 5) == [(0, 1, 36), (1, 1, 38)]  # the drums are one track, without the hit MidiTok lacks
    assert score.tempos[0].qpm == pytest.approx(1000)
    full = normalise(score_of(*[(7, melody(i)) for i in range(128)]))
    assert sorted(t.program for t in full.tracks) == list(range(128))
    assert {t.program for t in full.tracks[:8]} == set(range(8)), "the family of 8 comes first"


@pytest.mark.parametrize("given, expected, n_bars", [
    ((3, 4), "3/4", 8), ((6, 8), "6/8", 8), ((12, 8), "12/8", 4), ((2, 2), "4/4", 6), ((3, 2), "6/4", 4),
    ((12, 16), "6/8", 8), ((8, 4), "4/4", 6), ((3, 16), "3/8", 16), ((4, 8), "2/4", 12), ((7, 8), "7/8", 7),
    ((11, 8), "4/4,3/8", 9), ((5, 16), "5/8", 10), ((1, 8), "1/4", 24)])
def test_metres_that_miditok_does_not_know_are_rewritten(given, expected, n_bars):
    score = normalise(score_of((0, melody(0, 24)), metres=[(0, *given)]))
    entry = readers.describe(score)
    assert (entry["metre"], entry["bars"]) == (expected, n_bars)
    assert quarters(score) == [(i, 1, p) for i, _, p in melody(0, 24)]


def test_metre_changes_fall_on_bar_lines():
    notes = [(0, melody(0, 32))]
    score = normalise(score_of(*notes, metres=[(0, 4, 4), (6, 3, 4)]))
    assert metres_of(score) == [(0, 4, 4), (4 * Q, 2, 4), (6 * Q, 3, 4)] and len(bar_starts(score)) == 1 + 2 + 9
    score = normalise(score_of(*notes, metres=[(0, 4, 4), (4.25, 3, 4)]))  # no metre has 17 16ths: a rest is added
    assert metres_of(score) == [(0, 9, 8), (4.5 * Q, 3, 4)]
    assert [n.time / Q for n in score.tracks[0].notes][3:7] == [3, 4, 5.25, 6.25]
    score = normalise(score_of(*notes, metres=[(4, 3, 4), (100, 5, 4)]))
    assert metres_of(score) == [(0, 4, 4), (4 * Q, 3, 4)]


def test_empty_bars_in_front_are_left_out_but_no_part_of_a_bar():
    score = normalise(score_of((0, [(13, 1, 60), (20, 1, 62)]), metres=[(0, 4, 4), (8, 3, 4), (14, 4, 4)]))
    assert quarters(score) == [(2, 1, 60), (9, 1, 62)] and metres_of(score) == [(0, 3, 4), (3 * Q, 4, 4)]


def test_notes_of_one_pitch_do_not_overlap_and_stay_in_range():
    score = normalise(score_of((0, [(0, 4, 60), (1, 1, 60), (1, 2, 60), (1, 1, 64), (8, 40, 12), (60, 0.01, 120)])))
    assert quarters(score) == [(0, 1, 60), (1, 2, 60), (1, 1, 64), (8, 16, 24), (60, 0.25, 108)]
    assert quarters(normalise(score_of((0, [(0, 40, 60)]), metres=[(0, 6, 8)]))) == [(0, 8, 60)]  # 16 beats are 16/8


def test_normal_form_is_stable_and_lossless_through_miditok():
    from miditok import REMI, TokenizerConfig

    remi = REMI(TokenizerConfig(
        pitch_range=(21, 109), beat_res={(0, 16): 4}, use_velocities=False, use_programs=True, use_time_signatures=True,
        time_signature_range={4: list(range(1, 8)), 8: [3, 5, 6, 7, 9, 12]}))
    lost = 0
    for seed in range(60):
        r, tpq = random.Random(seed), random.Random(seed).choice([1, 24, 220, 480, 960])
        tracks = [(r.choice([-1, 0, 0, 42, 52, 53, 54, 127]), [
            (r.randrange(240) / 4 + r.random() / 9, r.choice([0.1, 0.5, 1, 30]), r.randrange(128))
            for _ in range(r.randrange(60))]) for _ in range(r.choice([1, 4, 4, 9]))]
        metres = [(r.randrange(160) / 4, r.randrange(1, 14), r.choice([1, 2, 4, 4, 8, 16]))
                  for _ in range(r.randrange(4))]
        try:
            score = normalise(score_of(*tracks, metres=metres, tpq=tpq))
        except ValueError as e:
            assert str(e) == "no notes"
            continue
        again = normalise(score)
        assert (notes_of(again), metres_of(again)) == (notes_of(score), metres_of(score)), seed
        back = remi.decode(remi.encode(score))
        lost += (notes_of(back), metres_of(back)) != (notes_of(score), metres_of(score))
    assert lost == 0


@pytest.mark.parametrize("tracks, message", [
    ([], "no notes"), ([(-1, [(0, 1, 1)])], "no notes"),
    ([(i, [(0, 1, 60)]) for i in range(128)] + [(0, [(0, 1, 60)])], "too many tracks: 129, at most 128"),
    ([(0, [(0, 1, 60), (4 * 4000, 1, 60)])], "too many bars: 4,001, at most 4,000")])
def test_scores_beyond_the_limits_are_refused(tracks, message):
    with pytest.raises(ValueError, match=message):
        normalise(score_of(*tracks))


def test_too_many_notes(monkeypatch):
    monkeypatch.setattr("mtxlib.music.score.MAX_NOTES", 15)
    with pytest.raises(ValueError, match="too many notes: 16, at most 15"):
        normalise(score_of((0, melody(0))))


# ---- what the manifest says


def test_key_agrees_with_music21():
    from music21 import analysis, note, stream

    for seed in range(12):
        r = random.Random(seed)
        scale = [r.randrange(12) + p for p in r.choice([(0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 11)])]
        notes = [(i, r.choice([0.5, 1, 2]), 60 + r.choice(scale)) for i in range(40)]
        part = stream.Stream()
        for t, d, p in notes:
            part.insert(t, note.Note(p, quarterLength=d))
        k = analysis.discrete.KrumhanslKessler(part).getSolution(part)
        tonic, mode = key_of(score_of((0, notes))).split()
        spelled = note.Note(tonic[0].upper() + tonic[1:].replace("b", "-"))
        assert (mode, spelled.pitch.pitchClass) == (k.mode, k.tonic.pitchClass), seed
    assert key_of(score_of((-1, [(0, 1, 40)]))) == ""


def test_tune_survives_transposition_rhythm_and_repeated_notes():
    line = [60, 62, 64, 65, 64, 62, 67, 69, 71, 72, 74, 50, 51]
    one = score_of((0, [(i, 1, p) for i, p in enumerate(line)]), (1, melody(1, low=30)))
    twice = [(2 * i + j, 1, p + 5) for i, p in enumerate(line[:11]) for j in (0, 1)]
    same = score_of((1, melody(2, low=30)), (0, twice))
    other = score_of((0, [(i, 1, p) for i, p in enumerate([61, *line[1:]])]))
    assert readers.tune_of(one) == readers.tune_of(same) != readers.tune_of(other)


def test_splits_are_a_function_of_the_tune():
    tunes = [hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(2000)]
    splits = split_by_tune(tunes, {})
    assert split_by_tune(reversed(tunes[:1000]), {}) == {t: splits[t] for t in tunes[:1000]}
    shares = {s: n / 2000 for s, n in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.02)
    of_twelve = "test train train train train train test train test train train train"
    assert [splits[t] for t in tunes[:12]] == of_twelve.split(), "splits of earlier runs must not change"


def test_no_split_is_empty_from_three_tunes_on():
    tunes = [f"{i:012x}" for i in range(40)]
    for start in range(0, 39, 3):
        assert set(split_by_tune(tunes[start:start + 3], {}).values()) == set(corpus.SPLITS)
    assert split_by_tune(tunes[:3], dict.fromkeys(tunes[:3], "train")) == dict.fromkeys(tunes[:3], "train")
    assert len(split_by_tune(tunes[:2], {})) == 2


# ---- readers


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


def broken_files(folder):
    """name -> the start of the reason it must be left out for."""
    good = score_of((0, melody(0)), (1, melody(1))).dumps_midi()
    two = good.index(b"MTrk", good.index(b"MTrk") + 4)
    noise = random.Random(0).randbytes(500)
    xml = ("<score-partwise><part-list/></score-partwise>", "plain text", "<html></html>")
    files = {
        "empty.mid": (b"", "empty"), "half.mid": (good[:len(good) // 2], "broken"), "head.mid": (good[:14], "broken"),
        "fewer.mid": (good[:two], "broken"), "noise.mid": (noise, "not MIDI"), "text.mid": (b"la " * 99, "not MIDI"),
        "noise_inside.mid": (good[:30] + noise, "broken"), "no_ticks.mid": (good[:12] + b"\0\0" + good[14:], "broken"),
        "huge.mid": (good + bytes(5_000_000), "too big"), "silent.mid": (Score(Q).dumps_midi(), "no notes"),
        "far.mid": (score_of((0, [(0, 1, 60), (4_000_000, 1, 60)])).dumps_midi(), "too many bars"),
        "notes.txt": (b"hello", "not MIDI or MusicXML"), "no_suffix": (good, "not MIDI or MusicXML"),
        "bad.mxl": (noise, "broken"), "bomb.mxl": (None, "too big"),
        **{f"bad{i}.xml": (text.encode(), "broken" if i else "no notes") for i, text in enumerate(xml)}}
    for name, (data, _) in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / "bomb.mxl", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("score.xml", bytes(60_000_000))
    return {name: why for name, (_, why) in files.items()}


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


# ---- sources


def test_folder_with_broken_files_keeps_the_good_ones(tmp_path, capsys, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    broken = broken_files(tree)
    score_of(*[(0, melody(i)) for i in range(4)], metres=[(0, 3, 4)]).dump_midi(tree / "waltz.mid")
    score_of(*[(0, melody(i)) for i in range(20)], (-1, [(0, 1, 40)])).dump_midi(tree / "sub" / "band, ü=1.MID")
    score_of((5, melody(7)), metres=[(0, 6, 8)]).dump_midi(tree / "sub" / "deep" / "jig.midi")
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=2, progress=False)
    line = capsys.readouterr().out
    assert {p.name: (p.metre, p.voices, p.bars) for p in pieces} == {
        "waltz.mid": ("3/4", 4, 6), "sub/band, ü=1.MID": ("4/4", 21, 4), "sub/deep/jig.midi": ("6/8", 1, 6)}
    folder = pieces[0].path.parent
    entries = manifest(folder)
    assert {name: e["skipped"] for name, e in entries.items() if "skipped" in e}.keys() == broken.keys()
    for name, why in broken.items():
        assert entries[name]["skipped"].startswith(why), entries[name]
    assert line.count("\n") == 1 and f"3 pieces (1 train, 1 valid, 1 test), {len(broken)} skipped" in line
    assert "1 empty" in line and f"{sum(w == 'broken' for w in broken.values())} broken" in line
    for p in pieces:
        assert notes_of(Score(p.path)) == notes_of(read_score(tree / p.name)) and isinstance(p, Piece)
        assert p.licence == "as given by you" and p.source == "folder"

    monkeypatch.setattr(corpus, "read_apart", lambda *a: pytest.fail("read again"))
    assert load_corpus("folder", tmp_path / "data", archive=str(tree)) == pieces
    monkeypatch.undo()
    pieces[0].path.unlink()  # a file is missing
    assert load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False) == pieces
    assert pieces[0].path.exists()
    (tree / "waltz.mid").unlink()  # the tree changed
    assert len(load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)) == 2
    assert len(list(folder.glob("*.mid"))) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no usable piece, 1 skipped .1 not MIDI or MusicXML"):
        load_corpus("folder", tmp_path / "data", archive=str(tmp_path / "other"), progress=False)


def test_a_file_that_hangs_or_crashes_its_reader_costs_itself_only(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "crash", "hang", "z"):
        score_of((0, melody(name))).dump_midi(tree / f"{name}.mid")
        (tree / f"{name}.mid").write_bytes((tree / f"{name}.mid").read_bytes() + name.encode())
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nfrom mtxlib.music import readers\nreal = readers.parse_midi\ndef parse(data):\n"
        "    os._exit(9) if data.endswith(b'crash') else time.sleep(60 * data.endswith(b'hang'))\n"
        "    print('noise on stdout')\n    return real(data)\nreaders.parse_midi = parse\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(readers.SECONDS, "midi", 2)
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=1, progress=False)
    assert [p.name for p in pieces] == ["a.mid", "z.mid"]
    entries = manifest(pieces[0].path.parent)
    assert entries["crash.mid"]["skipped"] == "crashed its process: 9"
    assert entries["hang.mid"]["skipped"] == "timed out: 2 s"


def test_what_was_read_before_it_was_stopped_is_not_read_again(tmp_path, monkeypatch):
    tree, read = tmp_path / "tree", []
    tree.mkdir()
    for i in range(8):
        score_of((0, melody(i))).dump_midi(tree / f"{i}.mid")
    (tree / "3.mid").write_bytes(b"")
    whole = load_corpus("folder", tmp_path / "whole", archive=str(tree), workers=1, progress=False)

    def until_killed(tasks, workers, left=5):
        for task in tasks[:left]:
            read.append(task[0])
            yield readers.prepare(*task)
        if len(tasks) > left:
            raise RuntimeError("killed")

    monkeypatch.setattr(corpus, "read_apart", until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)
    [notes] = tmp_path.glob("data/*/*.part")
    notes.write_bytes(notes.read_bytes()[:-30])  # killed while it wrote the fifth
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)
    assert read == [f"{i}.mid" for i in (0, 1, 2, 3, 4, 4, 5, 6, 7)]
    assert [(p.name, p.tune, p.split) for p in pieces] == [(p.name, p.tune, p.split) for p in whole]
    folder = pieces[0].path.parent
    assert manifest(folder) == manifest(whole[0].path.parent) and not list(folder.glob("*.part"))

    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "other", archive=str(tree), progress=False)
    (tree / "0.mid").write_bytes(b"other")  # the tree is another one now
    read.clear()
    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "other", archive=str(tree), progress=False)
    assert read[0] == "0.mid"


@pytest.fixture
def jsfakes(tmp_path, monkeypatch):
    """A zip like GitHub's with three chorales; its content is the expected one."""
    files = {str(i): score_of(*[(0, melody(4 * i + v, low=80 - 12 * v)) for v in range(4)]).dumps_midi()
             for i in (0, 2, 10)}
    path = tmp_path / "fakes.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("js-fakes-68b476d/README.md", "x")
        z.writestr("js-fakes-68b476d/jsf-extended/0.mid", b"other")
        for name, data in files.items():
            z.writestr(f"js-fakes-68b476d/midi/{name}.mid", data)
    content = b"".join(name.encode() + files[name] for name in sorted(files))
    monkeypatch.setattr(corpus, "JSFAKES_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_jsfakes_by_download_zip_and_folder(tmp_path, jsfakes, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "JSFAKES_URL", jsfakes.as_uri())
    pieces = load_corpus("jsfakes", tmp_path / "a", workers=1, progress=False)
    assert [p.name for p in pieces] == ["jsfakes-000", "jsfakes-002", "jsfakes-010"]
    assert pieces[0].path == tmp_path / "a" / "jsfakes" / "jsfakes-000.mid" and "CC BY 4.0" in pieces[0].licence
    zipfile.ZipFile(jsfakes).extractall(tmp_path / "tree")
    other = load_corpus("jsfakes", tmp_path / "b", archive=str(tmp_path / "tree"), workers=1, progress=False)
    assert [(p.name, p.tune, p.split) for p in other] == [(p.name, p.tune, p.split) for p in pieces]
    assert capsys.readouterr().out.count("\n") == 2
    part = load_corpus("jsfakes", tmp_path / "a", archive=str(jsfakes), limit=2, workers=1, progress=False)
    assert [p.path.parent.name for p in part] == ["jsfakes-limit2"] * 2 and len(manifest(part[0].path.parent)) == 2
    monkeypatch.setattr(corpus, "read_apart", lambda *a: pytest.fail("read again"))
    assert load_corpus("jsfakes", tmp_path / "b") == other  # cached: the archive is not needed any more


def test_download_errors_say_what_to_do(tmp_path, jsfakes, monkeypatch):
    monkeypatch.setattr(corpus, "JSFAKES_URL", jsfakes.as_uri())
    monkeypatch.setattr(corpus, "JSFAKES_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="fakes.zip .* 3 files, SHA-256 .* expected 500 and 000.*archive"):
        load_corpus("jsfakes", tmp_path / "a", progress=False)
    monkeypatch.setattr(corpus, "JSB_URL", (tmp_path / "gone.json").as_uri())
    with pytest.raises(ConnectionError, match="gone.json: .*as archive .jsb=PATH"):
        load_corpus("jsb", tmp_path / "a", progress=False)
    assert not list((tmp_path / "a").glob("*/manifest.json"))
    (tmp_path / "bad.json").write_text('{"train": []}')
    for source, expected in (("jsb", "JSON with lists"), ("jsfakes", "a zip of")):
        with pytest.raises(ValueError, match=f"bad.json: expected {expected}"):
            load_corpus(source, tmp_path / "a", archive=str(tmp_path / "bad.json"), progress=False)


def test_jsb_keeps_its_splits_and_the_others_follow(tmp_path, jsfakes):
    fake = Score.from_midi(zipfile.ZipFile(jsfakes).read("js-fakes-68b476d/midi/2.mid"))
    tune = [[n.pitch + 3, 55, 50, -1] for n in fake.tracks[0].notes for _ in range(4)]
    held = [[60, 55, 50, 45]] * 4 + [[62, -1, 50, 45]] * 4 + [[62, 55, 50, 45]] * 12
    data = {"train": [held, tune], "valid": [held[::-1]], "test": [tune]}
    file = tmp_path / "jsb.json"
    file.write_text(json.dumps(data))
    pieces = load_corpus("jsb", tmp_path, archive=str(file), workers=1, progress=False)
    assert {p.name: p.split for p in pieces} == {
        "jsb-train-000": "train", "jsb-train-001": "train", "jsb-valid-000": "valid", "jsb-test-000": "test"}
    first = Score(next(p.path for p in pieces if p.name == "jsb-train-000"))
    assert quarters(first) == [(3, 1, 60), (4, 4, 62)]  # 20 steps: a pickup of one quarter, then a bar
    assert quarters(first, 1) == [(3, 1, 55), (5, 3, 55)]
    both = load_corpus("jsfakes+jsb", tmp_path, archive=f"jsb={file},jsfakes={jsfakes}", workers=1, progress=False)
    follower = next(p for p in both if p.name == "jsfakes-002")
    assert follower.tune == next(p for p in pieces if p.name == "jsb-test-000").tune and follower.split == "test"
    assert [p for p in both if p.source == "jsb"] == pieces


@pytest.mark.parametrize("source, archive, message", [
    ("bahc", "", "expected bach, jsfakes, jsb, folder"), ("bach+bach", "", "different ones"), ("bach", "x.zip", "none"),
    ("folder", "", "'folder': archive '' does not exist"), ("jsb", "no.json", "'no.json' does not exist"),
    ("jsfakes+jsb", "x.zip", "for several write"), ("bach+jsb", "jsfakes=x.zip", "expected a path for .'jsb'")])
def test_sources_and_archives_that_make_no_sense(source, archive, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(source, tmp_path, archive=archive)


# ---- Bach


def in_bar(file):
    """(position in the bar, pitch) of the notes in full measures, as music21 has them; whether there is a pickup."""
    from music21 import converter

    found, measures = Counter(), None
    for part in converter.parse(file, forceSource=True).parts:
        measures = list(part.getElementsByClass("Measure"))
        for m in measures:
            if m.duration.quarterLength == m.barDuration.quarterLength:
                found.update((float(n.offset), n.pitch.midi) for n in m.notes
                             if not (n.tie and n.tie.type in ("stop", "continue")))
    return found, measures[0].duration.quarterLength < measures[0].barDuration.quarterLength


def test_bach_pickups_land_before_the_bar_line(tmp_path, capsys):
    pieces = load_corpus("bach", tmp_path, limit=3, workers=2, progress=False)
    assert len(pieces) == 3 and pieces[0].path.parent.name == "bach-limit3"
    assert "3 pieces (1 train, 1 valid, 1 test), 1 skipped (1 not 4 parts)" in capsys.readouterr().out
    import music21

    pickups = 0
    for p in pieces:
        expected, pickup = in_bar(Path(music21.__file__).parent / "corpus" / "bach" / f"{p.name}.mxl")
        score = Score(p.path)
        bar = 4 * score.time_signatures[0].numerator / score.time_signatures[0].denominator
        got = Counter((n.time / Q % bar, n.pitch) for t in score.tracks for n in t.notes)
        assert len(score.time_signatures) == 1 and not expected - got and expected.total() > 0.7 * got.total()
        assert (min(t.start() for t in score.tracks) > 0) == pickup
        pickups += pickup
        assert [t.name for t in score.tracks] == ["Soprano", "Alto", "Tenor", "Bass"] and p.key
    assert pickups, "the first three chorales have none: the test shows nothing"


@pytest.mark.skipif(not (ROOT / "data" / "bach" / "manifest.json").exists(), reason="data/bach is not there yet")
def test_bach_whole():
    pieces = load_corpus("bach", ROOT / "data", progress=False)
    assert len(pieces) == 365 and not any(p.name.endswith(".krn") for p in pieces)
    shares = {s: n / 365 for s, n in Counter(p.split for p in pieces).items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.02)
    tunes = {s: {p.tune for p in pieces if p.split == s} for s in shares}
    assert not tunes["train"] & tunes["valid"] | tunes["train"] & tunes["test"] | tunes["valid"] & tunes["test"]
    scores = [Score(p.path) for p in pieces]
    assert all(n.time % 120 == 0 == n.duration % 120 for s in scores for t in s.tracks for n in t.notes)
    assert all([t.program for t in s.tracks] == [52, 53, 54, 42] for s in scores)
    # 84,909 notes by music21, grace notes and ends of ties not counted; one tie of bwv362 ends where none began
    assert sum(s.note_num() for s in scores) == 84910


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_the_real_js_fakes_have_the_expected_checksum_and_jsb_its_sizes(capsys):
    tasks = corpus.jsfakes_tasks(str(SHARED / "jsfakes.zip"))
    assert capsys.readouterr().out == "" and len(tasks) == 500
    scores = [normalise(readers.READERS[kind](given)[0]) for _, kind, given, _ in tasks[:50]]
    assert {metre for s in scores for metre in metres_of(s)} == {(0, 4, 4)}
    jsb = corpus.jsb_tasks(str(SHARED / "Jsb16thSeparated.json"))
    assert Counter(split for *_, split in jsb) == {"train": 229, "valid": 76, "test": 77}
    assert {split for *_, split in jsb[:8]} == {"train", "valid", "test"}
