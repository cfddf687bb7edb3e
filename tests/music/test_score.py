"""The normal form against MidiTok, bar lines by hand, keys against music21."""

import random

import numpy as np
import pytest
from scores import Q, melody, metres_of, notes_of, quarters, score_of
from symusic import Pedal, Tempo

from mtxlib.music import readers
from mtxlib.music.normal import normalise
from mtxlib.music.score import TEMPI, VOICES, bar_starts, chain, key_of


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
    monkeypatch.setattr("mtxlib.music.normal.MAX_NOTES", 15)
    with pytest.raises(ValueError, match="too many notes: 16, at most 15"):
        normalise(score_of((0, melody(0))))


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


# ---- bar lines


def lines_in_file(score, given):
    """The bar lines of the normal form in quarters of the file; the music of both begins together."""
    first = min(t.start() for t in given.tracks) / given.tpq
    begins = min(t.start() for t in score.tracks) / Q
    return [line / Q - begins + first for line in bar_starts(score)]


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (2, 2), (5, 4), (7, 8)])
@pytest.mark.parametrize("upbeat", [(1, 16), (1, 8), (3, 16), (1, 4), (5, 16), (3, 8), (7, 16)])
@pytest.mark.parametrize("stated", [True, False])
def test_an_upbeat_keeps_the_bar_line_where_the_file_has_it(upbeat, metre, stated):
    length, bar = 4 * upbeat[0] / upbeat[1], 4 * metre[0] / metre[1]
    if length >= bar:
        pytest.skip("no upbeat")
    notes = [(0, length, 60), *[(length + i / 2, 0.5, 60 + i % 7) for i in range(40)]]
    given = score_of((0, notes), metres=[(0, *upbeat)] * stated + [(length, *metre)])
    score = normalise(given)
    expected = [length + i * bar for i in range(1 + round(20 / bar))]
    assert [line for line in lines_in_file(score, given) if line > 0][:len(expected) - 1] == expected[:-1]
    assert [p for *_, p in quarters(score)] == [p for *_, p in notes]


@pytest.mark.parametrize("metre, parts", [
    ((4, 4), [(7, 8), (1, 8)]), ((4, 4), [(1, 8), (7, 8)]), ((4, 4), [(3, 16), (13, 16)]),
    ((4, 4), [(1, 16), (15, 16)]),
    ((4, 4), [(5, 8), (3, 8)]), ((4, 4), [(1, 4), (3, 4)]), ((3, 4), [(1, 8), (5, 8)]), ((6, 8), [(5, 8), (1, 8)]),
    ((2, 4), [(3, 16), (5, 16)]), ((4, 4), [(5, 16), (5, 16), (6, 16)])])
def test_a_split_bar_moves_no_later_bar_line(metre, parts):
    bar = 4 * metre[0] / metre[1]
    metres, at = [(0, *metre)], 2 * bar
    for part in parts:
        metres.append((at, *part))
        at += 4 * part[0] / part[1]
    given = score_of((0, [(i / 4, 0.25, 60 + i % 7) for i in range(round(24 * bar))]), metres=[*metres, (at, *metre)])
    score = normalise(given)
    lines = lines_in_file(score, given)
    assert set(lines) >= {i * bar for i in range(6)}
    assert set(lines) <= {i * bar for i in range(7)} | {time for time, *_ in metres}
    assert quarters(score) == quarters(given), "no note moves"
    assert (metre == (6, 8)) == any(m[1:] == (6, 8) for m in metres_of(score))


def test_bars_that_metres_can_write_are_the_files_own():
    for seed in range(40):
        r = random.Random(seed)
        bars = [r.choice([(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (4, 4)]) for _ in range(12)]
        lines = np.cumsum([0, *[4 * over / under for over, under in bars]])
        given = score_of((0, [(i / 4, 0.25, 60) for i in range(round(4 * lines[-1]))]), metres=[
            (line, *bar) for line, bar in zip(lines, bars, strict=False)])
        assert set(lines[1:].tolist()) <= {round(line, 3) for line in lines_in_file(normalise(given), given)}, seed


# ---- voices


LINES = [melody(i, low=76 - 9 * i) for i in range(4)]


def four(names=("", "", "", ""), programs=(0, 0, 0, 0), lines=LINES):
    score = score_of(*zip(programs, lines, strict=True))
    for track, name in zip(score.tracks, names, strict=True):
        track.name = name
    return score


@pytest.mark.parametrize("given", [
    {}, {"names": ("Soprano", "Alto", "Tenor", "Bass")}, {"names": ("S.", "A.", "T.", "B.")},
    {"names": ("Voice 1", "Voice 2", "voice_3", "Part-4")}, {"names": ("Cantus", "Altus", "Tenor I", "Bassus")},
    {"names": ("V0", "V1", "V2", "V3")}, {"programs": (52, 52, 52, 52)}, {"programs": (52, 53, 53, 0)},
    {"lines": [[(t, d + 0.2, p) for t, d, p in line] for line in LINES]}], ids=lambda given: str(given)[:60])
def test_four_single_voices_are_soprano_to_bass(given):
    assert [(t.program, t.name) for t in normalise(four(**given)).tracks] == list(VOICES.items())


@pytest.mark.parametrize("given", [
    {"names": ("Guitar", "Keys", "Bass", "Strings")}, {"names": ("Lead", "", "", "")}, {"names": ("Piano",) * 4},
    {"names": ("", "", "", "Drums")}, {"names": ("Violin 1", "Violin 2", "Viola", "Cello")},
    {"names": ("Soprano Sax", "Alto Sax", "Tenor Sax", "Bass")}, {"names": ("MELODY", "Chords", "", "")},
    {"programs": (40, 40, 41, 42)}, {"programs": (24, 0, 32, 48)}, {"programs": (19, 19, 19, 19)},
    {"programs": (0, 0, 33, 0)}, {"programs": (0, 0, 0, -1)},
    {"lines": [*LINES[:3], [(t, d, p + k) for t, d, p in LINES[3] for k in (0, 7)]]},
    {"lines": [[(t, 4, p) for t, d, p in line] for line in LINES]}], ids=lambda given: str(given)[:60])
def test_four_other_tracks_keep_names_and_programs(given):
    score, own = four(**given), normalise(four(**given))
    given_programs, programs = ([t.program for t in x.tracks if not t.is_drum] for x in (score, own))
    assert [t.name for t in own.tracks] == [t.name or "Drums" * t.is_drum for t in score.tracks]
    assert len(set(programs)) == len(programs) == len(given_programs)
    assert all(programs[given_programs.index(program)] == program for program in given_programs)


def test_tracks_keep_their_order_and_drums_theirs():
    score = score_of((-1, [(0, 1, 36)]), (5, melody(1)), (-1, [(0, 1, 40)]), (5, melody(2)))
    assert [(t.name, t.program, t.is_drum, len(t.notes)) for t in normalise(score).tracks] == [
        ("track -1", 0, True, 2), ("track 5", 5, False, 16), ("track 5", 4, False, 16)]


def test_a_choir_keeps_its_chords_when_windows_are_chained_and_single_voices_stay_single():
    chords, line = [(i, 1, p) for i in range(8) for p in (48, 52, 55)], [(i, 1.5, 60 + i % 2) for i in range(8)]
    window = normalise(score_of((52, chords), (42, line)))
    piece = chain([window, window], [(0, 2), (0, 2)])
    assert [len(t.notes) for t in piece.tracks] == [48, 16]
    assert {n.duration for n in piece.tracks[0].notes} == {Q} == {n.duration for n in piece.tracks[1].notes}


# ---- tempo, and what the music is written with


def with_tempos(*marks):
    score = score_of((0, melody(0, 32)))
    score.tempos.extend([Tempo(round(t * Q), qpm) for t, qpm in marks])
    return score


@pytest.mark.parametrize("marks, expected", [
    ([], 120), ([(0, 320)], 320), ([(0, 12)], 12), ([(0, 5000)], 5000), ([(0, 60), (8, 90)], 60), ([(4, 90)], 120),
    ([(0, 60), (0.01, 90)], 90)])
def test_the_tempo_is_the_one_at_the_first_note(marks, expected):
    assert [(t.time, round(t.qpm, 2)) for t in normalise(with_tempos(*marks)).tempos] == [(0, expected)]


def test_tempo_changes_are_kept_to_two_per_cent():
    marks = [(0, 60), (3.5, 61.5), (8, 144), (9, 144), (20, 350), (90, 30)]
    found = normalise(with_tempos(*marks), tempos=80).tempos
    assert [t.time / Q for t in found] == [0, 3.5, 8, 20]
    assert [t.qpm for t in found] == pytest.approx([60, 61.5, 144, 350], rel=0.02)


@pytest.mark.parametrize("grid, per_quarter", [(4, 4), (8, 8), (12, 3), (12, 6), (12, 12), (24, 8), (24, 24)])
def test_a_grid_keeps_the_onsets_and_lengths_that_lie_on_it(grid, per_quarter):
    notes = [(i / per_quarter, 1 / per_quarter, 60 + i % 7) for i in range(64)]
    assert quarters(normalise(score_of((0, notes), tpq=96), grid=grid)) == [
        (pytest.approx(t), pytest.approx(d), p) for t, d, p in notes]


def test_velocities_go_to_the_nearest_of_so_many():
    given = score_of((0, [(i, 1, 30 + i) for i in range(40)]))
    for n in (1, 8, 32, 127):
        notes = normalise(given, velocities=n).tracks[0].notes
        errors = [abs(a.velocity - b.velocity) for a, b in zip(notes, given.tracks[0].notes, strict=True)]
        assert len({n.velocity for n in notes}) <= n and max(errors[:1 if n == 1 else None]) <= max(1, 127 / n)
    assert {n.velocity for n in normalise(given).tracks[0].notes} == {80}


def test_the_pedal_holds_what_ends_within_it():
    score = score_of((0, [(0, 1, 60), (1, 1, 64), (5, 1, 67), (6, 1, 60)]))
    score.tracks[0].pedals.extend([Pedal(round(0.5 * Q), round(3.5 * Q))])  # from 0.5 to 4
    assert quarters(normalise(score)) == [(0, 1, 60), (1, 1, 64), (5, 1, 67), (6, 1, 60)]
    assert quarters(normalise(score, pedal=True)) == [(0, 4, 60), (1, 3, 64), (5, 1, 67), (6, 1, 60)]


def test_every_form_is_stable_and_lossless_through_miditok():
    from miditok import REMI, TokenizerConfig

    def loudness(score):
        return sorted((t.is_drum, t.program, n.time, n.pitch, n.velocity) for t in score.tracks for n in t.notes)

    for seed in range(30):
        r = random.Random(seed)
        form = {"grid": r.choice([8, 12, 24]), "velocities": r.choice([4, 32]), "tempos": r.choice([16, 80]),
                "pedal": r.random() < 0.5}
        tracks = [(program, [(r.randrange(480) / 24, r.choice([0.1, 1 / 3, 1, 3]), r.randrange(30, 90))
                             for _ in range(60)]) for program in (0, 33, -1)]
        given = score_of(*tracks, metres=[(0, *r.choice([(1, 8), (3, 4), (4, 4)])), (0.5, 4, 4)])
        given.tempos.extend([Tempo(r.randrange(20 * Q), r.uniform(20, 400)) for _ in range(4)])
        score = normalise(given, **form)
        remi = REMI(TokenizerConfig(
            pitch_range=(21, 109), beat_res={(0, 16): form["grid"]}, num_velocities=form["velocities"],
            use_programs=True, use_time_signatures=True, use_tempos=True, num_tempos=form["tempos"], log_tempos=True,
            tempo_range=TEMPI, time_signature_range={4: list(range(1, 8)), 8: [3, 5, 6, 7, 9, 12]}))
        back = remi.decode(remi.encode(score)).resample(Q)
        for other in (normalise(score, **form), back):
            assert (notes_of(other), metres_of(other)) == (notes_of(score), metres_of(score)), seed
            assert loudness(other) == loudness(score), seed
            assert [t.qpm for t in other.tempos] == pytest.approx([t.qpm for t in score.tempos], rel=1e-3)
            assert [t.time for t in other.tempos] == [t.time for t in score.tempos], seed
