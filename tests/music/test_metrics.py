"""The measures of music on pieces made by hand, whose answers can be counted on paper, and beside outside ones."""

import tracemalloc
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import four_voices
from symusic import Note, Score, TimeSignature, Track

from mtxlib.music import metrics
from mtxlib.music.corpus import load_corpus
from mtxlib.music.metrics import ATTRIBUTES, is_near_key, judge, parallels, similarity, undefined
from mtxlib.music.normal import normalise
from mtxlib.music.readers import read_score
from mtxlib.music.score import SIGNATURES, bar_starts, key_of, note_f1, notes_of

VOICES = (52, 53, 54, 42)
SHARED = Path(__file__).parents[3] / "shared" / "data"
TONIC = (72, 67, 64, 48)  # C major in root position


def piece(*chords, lengths=4, metre=(4, 4), programs=VOICES) -> Score:
    """Chords, from the highest voice down, 0 for a rest; `lengths` in sixteenths, one for all or one each."""
    score, lengths = Score(480), [lengths] * len(chords) if isinstance(lengths, int) else lengths
    score.time_signatures.append(TimeSignature(0, *metre))
    for program, line in zip(programs, zip(*chords, strict=True), strict=True):
        track, time = Track("", program, False), 0
        for pitch, length in zip(line, lengths, strict=True):
            if pitch:
                track.notes.append(Note(time * 120, length * 120, pitch, 80))
            time += length
        score.tracks.append(track)
    return score


@pytest.fixture
def hymn() -> Score:
    """Four bars in C major: I vi ii V7, IV V I."""
    return piece(TONIC, (72, 64, 60, 57), (69, 65, 62, 50), (71, 65, 62, 43), (69, 65, 60, 53), (67, 62, 59, 55),
                 (72, 64, 55, 48), lengths=[8] * 6 + [16])


def test_a_set_is_like_itself(hymn):
    other = piece(TONIC, (74, 65, 62, 50), TONIC, TONIC, lengths=[4, 4, 8, 16])
    found = judge([hymn, other], [hymn, other])
    areas = [found[f"oa_{name}"] for name in ("pitch", "duration", "onset_interval", "harmonic_interval")]
    assert areas == pytest.approx([1.0] * 4)
    assert found["wellformed"] == found["tonic_ending"] == found["cadence"] == found["key_stability"] == 1.0


def test_overlapping_areas_count_what_is_shared():
    real = piece(TONIC, TONIC)
    found = judge([piece(TONIC, (73, 66, 63, 49), lengths=[4, 2])], [real])
    assert found["oa_pitch"] == 0.5 and found["oa_duration"] == 0.5
    assert found["oa_onset_interval"] == 1.0, "the next begins a quarter later in both"
    # 5 8 24 3 19 16 semitones between the voices of C5 G4 E4 C3; 7 10 24 3 17 14 in the other chord, two of them shared
    assert found["oa_harmonic_interval"] == pytest.approx((6 + 2) / 12)


def test_only_the_pitches_change_with_the_key(hymn):
    here, there = judge([hymn], [hymn]), judge([hymn.shift_pitch(5)], [hymn])
    assert there.pop("oa_pitch") < 0.6 < here.pop("oa_pitch")
    np.testing.assert_equal(there, here)


def test_parallel_fifths_and_octaves_are_counted_per_hundred_chord_changes():
    fifths = [(0, a + 7, a, 0) for a in (60, 62, 64)]  # two parallels in two changes
    assert judge([piece(*fifths)], [piece(TONIC)])["parallel_fifths"] == 100
    octaves = [(84, 0, 0, 60), (83, 0, 0, 59), (84, 0, 0, 60), (84, 0, 0, 60)]  # the last does not move
    found = judge([piece(*octaves)], [piece(TONIC)])
    assert found["parallel_octaves"] == pytest.approx(200 / 3) and found["parallel_fifths"] == 0
    contrary = [(79, 0, 0, 60), (74, 0, 0, 67), (76, 0, 0, 69)]  # 19, then 7, then 7 in one direction: one of two
    assert judge([piece(*contrary)], [piece(TONIC)])["parallel_fifths"] == 50
    apart = [*fifths[:1], (0, 0, 60, 0), *fifths[1:2]]  # a rest lies between
    assert judge([piece(*apart)], [piece(TONIC)])["parallel_fifths"] == 0
    assert judge([piece((0, 67, 60, 0))], [piece(TONIC)])["parallel_fifths"] == 0, "no change, nothing to divide by"


def test_voices_cross_where_a_lower_one_is_higher():
    crossed = (67, 72, 64, 48)
    assert judge([piece(TONIC, crossed, TONIC, crossed)], [piece(TONIC)])["voice_crossing"] == 0.5
    assert judge([piece(TONIC, (67, 67, 64, 48), (0, 72, 64, 48))], [piece(TONIC)])["voice_crossing"] == 0


def test_the_order_of_voices_is_that_of_the_real_pieces():
    upside_down = piece(TONIC[::-1], programs=VOICES[::-1])
    assert judge([upside_down], [piece(TONIC)])["voice_crossing"] == 0


def scale(tonic: int) -> list[tuple]:
    """Two bars of quarters in major on this tonic."""
    return [(72 + tonic, 64 + tonic, 55 + tonic, 48 + tonic), (74 + tonic, 65 + tonic, 59 + tonic, 43 + tonic),
            (76 + tonic, 67 + tonic, 60 + tonic, 48 + tonic), (72 + tonic, 69 + tonic, 60 + tonic, 53 + tonic)] * 2


def test_a_key_is_near_when_its_signature_is():
    near, far = scale(0) * 5 + scale(7) * 2, scale(0)[:4] * 11 + scale(6)[:4] * 3  # 11 bars and 3: no tie
    assert judge([piece(*near)], [piece(TONIC)])["key_stability"] == 1.0
    n = len(is_near_key(piece(*far)))
    assert n == 6 and judge([piece(*far)], [piece(TONIC)])["key_stability"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(("key", "signature"), [("C major", 0), ("G major", 1), ("F major", 11), ("a minor", 0),
                                                ("e minor", 1), ("d minor", 11), ("F# major", 6), ("eb minor", 6)])
def test_signatures_go_round_the_circle_of_fifths(key, signature):
    assert SIGNATURES[key] == signature


def test_bars_are_alike_within_a_piece_and_across():
    again = piece(*scale(0)[:4] * 3)
    assert judge([again], [again])["similarity_within"] == 1.0
    assert np.isnan(judge([again], [again])["similarity_across"])
    both = judge([again, again.shift_pitch(3)], [again])
    assert both["similarity_across"] == 1.0, "the key makes no difference"
    half = piece(*scale(0)[:4], *scale(0)[:2], (71, 62, 55, 50), (71, 62, 55, 50))
    assert judge([half], [half])["similarity_within"] == pytest.approx(8 / 24)


@pytest.mark.parametrize(("chords", "lengths", "ends", "closing"), [
    ([TONIC], [16], True, True),
    ([TONIC], [2], True, False),  # short
    ([(72, 67, 64, 43), TONIC], [8, 8], True, True),  # half a bar after the line
    ([(72, 67, 64, 43), TONIC], [4, 12], True, False),  # on a weak beat
    ([TONIC, (72, 67, 64, 52)], [8, 8], False, False),  # not in root position
    ([TONIC, (72, 67, 65, 48)], [8, 8], False, False),  # no triad
    ([TONIC, (72, 64, 60, 48)], [8, 8], True, True),  # no fifth
    ([TONIC, TONIC, (71, 67, 62, 55)], [8, 8, 8], False, False),  # on the dominant
    ([TONIC, (0, 67, 64, 48)], [8, 8], False, False),  # one voice stops before
])
def test_an_ending_is_on_the_tonic_long_and_on_a_strong_beat(chords, lengths, ends, closing):
    found = judge([piece(*chords, lengths=lengths)], [piece(TONIC)])
    assert (found["tonic_ending"], found["cadence"]) == (ends, closing)


def test_wellformed_pieces_have_all_voices_one_note_at_a_time_and_end_together():
    real = [piece(TONIC)]
    two_at_once = piece(TONIC)
    two_at_once.tracks[0].notes.append(Note(0, 480, 76, 80))
    silent_bar = piece(TONIC, (0, 0, 0, 0), TONIC, lengths=[16, 16, 4])
    for bad in (piece(TONIC[:3], programs=VOICES[:3]), two_at_once, silent_bar, piece(TONIC, (0, 67, 64, 48)),
                Score(480)):
        assert judge([bad, piece(TONIC)], real)["wellformed"] == 0.5


def test_an_empty_set_is_refused(hymn):
    with pytest.raises(ValueError, match="pieces: expected at least one score, got none"):
        judge([], [hymn])
    with pytest.raises(ValueError, match="real: expected"):
        judge([hymn], [])


# -- music of other kinds ----------------------------------------------------------------------------------------------

def hands(*chords, length=8) -> Score:
    """A pianist: one track, several notes at once."""
    score, track = Score(480), Track("Piano", 0, False)
    score.time_signatures.append(TimeSignature(0, 4, 4))
    track.notes.extend([Note(i * length * 120, length * 120, p, 80) for i, chord in enumerate(chords) for p in chord])
    score.tracks.append(track)
    return score


def drummed(score: Score) -> Score:
    score, drums = score.copy(), Track("Drums", 0, True)
    drums.notes.extend([Note(time, 120, 36, 80) for time in range(0, score.end(), 480)])
    score.tracks.append(drums)
    return score


def test_all_notes_of_a_chord_are_measured():
    chords = [(72, 67, 64, 48), (72, 69, 65, 53), (71, 67, 62, 55), (72, 67, 64, 48)]
    of_voices, of_hands = piece(*chords, lengths=8), hands(*chords)
    together, apart = judge([of_hands], [of_hands]), judge([of_voices], [of_voices])
    for name in ("oa_pitch", "oa_harmonic_interval", "key_stability", "tonic_ending", "cadence", "wellformed"):
        assert together[name] == apart[name] == 1.0, name
    assert judge([of_hands], [of_voices])["oa_harmonic_interval"] == pytest.approx(1.0)
    assert judge([of_hands], [of_voices])["oa_onset_interval"] == 1.0, "notes of a chord do not follow each other"
    for name, value in ATTRIBUTES.items():
        assert value(of_hands) == pytest.approx(value(of_voices)), name


def test_what_means_nothing_for_hands_is_nan_and_says_why():
    real = [hands((60, 64, 67, 72), (60, 64), (62, 65)), hands((60, 67, 72))]
    reasons, found = undefined(real), judge(real, real)
    assert set(reasons) == {"voice_crossing", "parallel_fifths", "parallel_octaves"}
    assert all("voices of one note at a time" in reason for reason in reasons.values())
    assert {name for name, value in found.items() if np.isnan(value)} == set(reasons)
    assert undefined([piece(TONIC, TONIC)]) == {}


def test_a_single_voice_has_neither_harmony_nor_parallels_and_is_judged_all_the_same():
    tune = piece(*[(p,) for p in (60, 62, 64, 65, 67, 65, 62, 60)] * 4, programs=(0,))
    reasons, found = undefined([tune]), judge([tune], [tune])
    assert {name for name, value in found.items() if np.isnan(value)} == {*reasons, "similarity_across"}
    assert {"oa_harmonic_interval", "parallel_fifths", "tonic_ending"} <= set(reasons) and found["wellformed"] == 1.0
    doubled = tune.copy()
    doubled.tracks[0].notes.append(Note(0, 480, 64, 80))
    assert judge([doubled, tune], [tune])["wellformed"] == 0.5, "the real ones sing one note at a time"


def test_a_band_is_judged_with_its_drums_and_drums_alone_are_not_music_in_a_key():
    band = drummed(hands((60, 64, 67), (65, 69, 72), (67, 71, 74), (60, 64, 67)))
    late = piece((0,), (60,), lengths=16, programs=(0,))
    assert judge([drummed(late)], [late])["wellformed"] == 1.0, "drums sound in the first bar"
    assert judge([band], [band])["wellformed"] == 1.0
    alone = drummed(late)
    del alone.tracks[0]
    found = judge([alone], [alone])
    assert {name for name, x in found.items() if np.isnan(x)} == {*undefined([alone]), "similarity_within",
                                                                  "similarity_across"} and found["wellformed"] == 1.0
    assert judge([Score(480)], [band])["wellformed"] == 0.0


def test_rules_are_those_that_the_real_pieces_keep():
    band, trio = hands((60, 64, 67)), piece(TONIC[:3], programs=VOICES[:3])
    assert metrics.rules_of([piece(TONIC)])[0] == set(metrics.RULES)
    assert metrics.RULES[1] not in metrics.rules_of([band])[0]
    assert metrics.RULES[0] not in metrics.rules_of([band, trio, piece(TONIC)])[0]
    twice = piece(TONIC, TONIC)
    twice.tracks[0].notes.append(twice.tracks[0].notes[0].copy())
    assert judge([twice, hands((60, 64))], [band, trio])["wellformed"] == 0.5, "a note twice at one place"


def some_music(n: int, bars: int) -> list[Score]:
    return [normalise(four_voices(seed, [((4, 4), bars)])) for seed in range(n)]


@pytest.mark.parametrize("cells", [1, 2000, 2**21])
def test_similarity_is_that_of_sets_whatever_the_blocks(monkeypatch, cells):
    monkeypatch.setattr(metrics, "CELLS", cells)
    bars = []
    for i, score in enumerate(scores := [*some_music(3, 4), Score(480)]):
        lines, tonic = bar_starts(score), metrics.TONICS.get(key_of(score), 0)
        for a, b in zip(lines, lines[1:], strict=False):
            bars.append((i, {(t.program, n.start - a, (n.pitch - tonic) % 12) for t in score.tracks for n in t.notes
                             if a <= n.start < b}))
    alike = {True: [], False: []}
    for (i, x), (j, y) in combinations(bars, 2):
        alike[i == j].append(len(x & y) / len(x | y))
    assert similarity(scores) == pytest.approx((np.mean(alike[True]), np.mean(alike[False])), abs=1e-12)


def test_similarity_takes_bounded_memory():
    scores = some_music(40, 80)
    tracemalloc.start()
    try:
        similarity(scores)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    n_bars = 40 * 80
    assert most < 80e6 < n_bars**2 * 8, "less than one matrix of bars by bars"


# -- outside checks ----------------------------------------------------------------------------------------------------

def test_mir_eval_finds_the_same_notes():
    transcription = pytest.importorskip("mir_eval.transcription")
    rng, sixteenth = np.random.default_rng(0), 0.125

    def as_mir_eval(score):
        voices = (-1, *VOICES)  # voices lie octaves apart: mir_eval knows none
        voice, onset, length, pitch = notes_of(score).T
        octaves = np.array([voices.index(v) for v in voice.tolist()])
        seconds = np.stack([onset, onset + length], 1) / 6 * sixteenth
        return seconds, 440 * 2 ** ((pitch - 69) / 12 + 10 * octaves)
    for seed in range(4):
        a = normalise(four_voices(seed, [((4, 4), 8)]))
        b = a.copy()
        for track in b.tracks:
            keep = rng.random(len(track.notes)) < 0.9
            track.notes = [n for n, kept in zip(track.notes, keep, strict=True) if kept]
            for note in track.notes:
                note.pitch += int(rng.choice([0, 1, 12], p=[0.8, 0.1, 0.1]))
                note.start += int(rng.choice([0, 120], p=[0.9, 0.1]))
        *_, f1, _ = transcription.precision_recall_f1_overlap(
            *as_mir_eval(a), *as_mir_eval(b), onset_tolerance=sixteenth / 4, pitch_tolerance=10, offset_ratio=None)
        assert 0.5 < f1 < 1 and note_f1(a, b) == pytest.approx(f1), seed


def test_music21_finds_the_same_parallels():
    from music21.note import Note as Note21
    from music21.voiceLeading import VoiceLeadingQuartet

    scale = np.array([48, 50, 52, 53, 55, 57, 59, 60, 62, 64, 65, 67, 69, 71, 72])
    chords = -np.sort(-np.random.default_rng(0).choice(scale, (4, 120)), axis=0)  # no voices cross
    chords[0, ::7] = 0
    expected = {7: 0, 0: 0}
    for upper, lower in combinations(chords, 2):
        for k in range(chords.shape[1] - 1):
            pitches = [*lower[k:k + 2].tolist(), *upper[k:k + 2].tolist()]
            if all(pitches):
                motion = VoiceLeadingQuartet(*map(Note21, pitches))
                sizes = {interval.chromatic.mod12 for interval in motion.vIntervals}
                for size in expected:
                    expected[size] += motion.similarMotion() and sizes == {size}
    assert {size: parallels(chords, size) for size in expected} == expected and min(expected.values()) > 5


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, local copies of public corpora")
def test_chorales_have_the_figures_they_had(tmp_path):
    pieces = load_corpus("jsfakes", tmp_path, archive=str(SHARED / "jsfakes.zip"), progress=False)
    valid, test = ([Score(p.path) for p in pieces if p.split == split] for split in ("valid", "test"))
    expected = {  # of the measures before they knew chords
        "oa_pitch": 0.9244825470308023, "oa_duration": 0.9923709469066504, "oa_onset_interval": 0.9930188450945521,
        "oa_harmonic_interval": 0.977096008068959, "voice_crossing": 0.01659625829812915,
        "parallel_fifths": 1.3786764705882353, "parallel_octaves": 1.0110294117647058,
        "key_stability": 0.9519650655021834, "similarity_within": 0.06757250428199768,
        "similarity_across": 0.054026611149311066, "tonic_ending": 0.62, "cadence": 0.32, "wellformed": 0.98}
    assert judge(valid, test) == pytest.approx(expected, rel=1e-7), "similarities were means in float32"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, local copies of public corpora")
@pytest.mark.parametrize("archive, n", [("pop909.zip", 16), ("freedoom.zip", 24)])
def test_real_songs_and_bands_are_wellformed(tmp_path, archive, n):
    with zipfile.ZipFile(SHARED / archive) as z:
        names = [name for name in z.namelist() if name.endswith(".mid")]
        z.extractall(tmp_path, names[::len(names) // n])
    scores = [read_score(file) for file in sorted(tmp_path.rglob("*.mid"))]
    found = judge(scores[::2], scores[1::2])
    assert found["wellformed"] >= 0.95
    assert {name for name, x in found.items() if np.isnan(x)} == set(undefined(scores[1::2]))
    assert found["oa_harmonic_interval"] > 0.7
