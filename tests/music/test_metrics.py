"""The measures of music on pieces made by hand, whose answers can be counted on paper."""

import numpy as np
import pytest
from symusic import Note, Score, TimeSignature, Track

from mtxlib.music.metrics import is_near_key, judge
from mtxlib.music.score import SIGNATURES

VOICES = (52, 53, 54, 42)
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
    near, far = scale(0) * 5 + scale(7) * 2, scale(0) * 5 + scale(6) * 2
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
