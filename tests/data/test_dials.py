"""Grid, velocities and tempos: what the normal form holds comes back from the ids of its windows, on every grid."""

import random

import numpy as np
import pytest
from symusic import Note, Score, Tempo, TimeSignature, Track

from mtxlib.config import BOS, Config
from mtxlib.data.store import pad_sequences
from mtxlib.data.tokens import Codec, base_ids, load_tokenizer, make_tokenizer, window_ids
from mtxlib.music.normal import normalise
from mtxlib.music.score import bar_starts, cut, window_bars

DIALS = [{"grid": 4}, {"grid": 8}, {"grid": 12, "velocities": 32}, {"grid": 24, "tempos": 16},
         {"grid": 12, "velocities": 8, "tempos": 32}]


def performance(seed: int, metres=((4, 4), (3, 4), (6, 8))) -> Score:
    """Two hands and drums, triplets, 32nds, chords, velocities, tempo changes; changes of metre."""
    r, score, time = random.Random(seed), Score(480), 0
    for metre in r.sample(metres, len(metres)):
        score.time_signatures.append(TimeSignature(time, *metre))
        time += r.randint(2, 5) * 4 * 480 * metre[0] // metre[1]
    score.tempos.extend([Tempo(t, r.uniform(40, 200)) for t in (0, *sorted(r.sample(range(1, time // 240), 5)))])
    for i, tempo in enumerate(score.tempos):
        score.tempos[i] = Tempo(tempo.time * 240 if i else 0, tempo.qpm)
    for program, is_drum, middle in ((0, False, 72), (33, False, 45), (0, True, 40)):
        track = Track("", program, is_drum)
        for _ in range(120):
            step = r.choice((480, 240, 160, 120, 80, 60))
            onset = r.randrange(0, time, step)
            track.notes.append(Note(onset, step * r.randint(1, 4), middle + r.randint(-8, 8), r.randint(1, 127)))
        track.notes.append(Note(0, 240, middle, 70))
        score.tracks.append(track)
    return score


def content(score: Score, dials: dict) -> tuple[list, list, list]:
    """Notes (with velocities where there are any), metres, and tempos where there are any."""
    notes = sorted((-1 if t.is_drum else t.program, n.start, n.duration, n.pitch,
                    n.velocity if dials.get("velocities") else 0) for t in score.tracks for n in t.notes)
    tempos = [(t.time, round(t.qpm, 1)) for t in score.tempos] if dials.get("tempos") else []
    return notes, [(t.time, t.numerator, t.denominator) for t in score.time_signatures], tempos


@pytest.fixture(params=DIALS, ids=str)
def dials(request):
    return request.param


@pytest.fixture
def codec(dials):
    return Codec(make_tokenizer((0, 33, -1), **dials), 4)


def test_windows_come_back_whole(codec, dials):
    for seed in range(6):
        score = normalise(performance(seed), **dials)
        starts = bar_starts(score)
        bars = window_bars(len(starts) - 1, 4, 1)
        for bar, ids in window_ids(codec.tokenizer, score, starts, bars, 4):
            window = cut(score, starts, bar, 4)
            assert ids.tolist() == base_ids(codec.tokenizer, window).tolist()
            [sequence] = codec.finish([ids])
            assert content(codec.decode(sequence), dials) == content(window, dials)


def test_the_clock_tells_the_sixteenth_and_the_grammar_agrees(codec, dials):
    score = normalise(performance(9, metres=((4, 4),)), **dials)
    starts = bar_starts(score)
    window = cut(score, starts, 0, 4)
    [ids] = codec.encode([window])
    [slots] = codec.slots([ids])
    is_pitch = [i for i, id in enumerate(ids) if codec.names[id].startswith("Pitch")]
    told = sorted((slots[i], int(codec.names[ids[i]].split("_")[1])) for i in is_pitch)
    assert told == sorted((n.start // 120, n.pitch) for t in window.tracks for n in t.notes)
    clock, begun, previous = codec.table.start(1), codec.grammar.start(1), np.array([BOS])
    for id in ids[1:]:
        clock, _ = codec.table.advance(clock, previous)
        codec.grammar.read(begun, previous)
        assert codec.grammar.allows(previous, clock, begun)[0, id], codec.names[id]
        previous = np.array([id])


def test_they_are_saved_with_the_tokenizer_and_learn_bpe(codec, dials, tmp_path):
    scores = [normalise(performance(seed), **dials) for seed in range(4)]
    windows = [cut(s, bar_starts(s), bar, 4) for s in scores for bar in range(len(bar_starts(s)) - 4)]
    plain = sum(map(len, codec.encode(windows)))
    learned = codec.learn_bpe([base_ids(codec.tokenizer, w) for w in windows], codec.vocab_size + 60)
    learned.tokenizer.save(tmp_path / "tokenizer.json")
    again = Codec(load_tokenizer(tmp_path / "tokenizer.json"), 4)
    ids = again.encode(windows)
    assert sum(map(len, ids)) < plain
    for window, sequence in zip(windows, ids, strict=True):
        assert content(again.decode(sequence), dials) == content(window, dials)
    assert (again.table.slots(pad_sequences(ids)) < 4 * 16).all()


@pytest.mark.parametrize("wrong", [{"grid": 5}, {"velocities": -1}, {"tempos": -2}])
def test_impossible_dials_are_refused(wrong):
    with pytest.raises(ValueError, match=f"parameter '{next(iter(wrong))}'"):
        Config.from_flat(wrong)
