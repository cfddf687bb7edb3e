"""Distances on the way between pieces, as notebook 06 defines them, counted by hand and by properties."""

import numpy as np
import pytest
import torch
from conftest import defined_in, score_of
from symusic import Note, Score, Track

from mtxlib.data.tokens import tokenize
from mtxlib.latent.diagnose import diagnose
from mtxlib.run import load_run

book = defined_in("06_interpolation")


def notes(score):
    return sorted((n.start, t.program, n.duration, n.pitch) for t in score.tracks for n in t.notes)


def test_a_roll_holds_what_sounds_and_where_it_begins():
    score = score_of([(0, 0.5, 60), (0.5, 0.25, 60), (1, 4, 62)], [(0.25, 0.5, 48), (0.25, 1, 55)])
    sounds, begins = book.roll(score, [53, 52], 36)
    assert [np.flatnonzero(x).tolist() for x in sounds[:, ::6].any(1)] == [[48, 55], [60, 62]]
    assert sounds[0, ::6, 48].tolist() == [0, 1, 1, 0, 0, 0] and sounds[0, ::6, 55].tolist() == [0, 1, 1, 1, 1, 0]
    assert np.argwhere(begins).tolist() == [[0, 6, 48], [0, 6, 55], [1, 0, 60], [1, 12, 60], [1, 24, 62]]


def test_single_notes_are_as_far_apart_as_hamming_says_and_chords_by_what_they_share():
    a, b = (np.zeros((1, 5, 128), bool) for _ in range(2))
    a[0, [0, 1, 2, 4], [60, 60, 60, 60]] = b[0, [0, 1, 3], [60, 62, 60]] = True
    a[0, 4, [64, 67]] = b[0, 4, [60, 64, 72]] = True
    assert book.apart(a, b).tolist() == [[0, 1, 1, 1, 0.5]]
    assert not book.apart(np.zeros_like(a), np.zeros_like(a)).any()


def band(seed, drums=(36, 42)):
    """A pianist's chords over a bass, with drums: a bar."""
    r, score = np.random.default_rng(seed), Score(480)
    for program, n, low in ((0, 3, 60), (33, 1, 36), (-1, 1, 36)):
        track = Track("", max(program, 0), program < 0)
        for start in range(0, 1920, 480):
            pitches = r.choice(drums, n) if program < 0 else low + r.choice(12, n, replace=False)
            track.notes.extend([Note(start, 480, int(p), 80) for p in pitches])
        score.tracks.append(track)
    return score


def test_a_crossfade_keeps_chords_and_drums():
    a, b, draws = band(0), band(1), np.random.default_rng(0).random(16)
    first, *_, last = book.crossfade(a, b, np.linspace(0, 1, 5), draws)
    assert notes(first) == notes(a) and notes(last) == notes(b)
    between = book.crossfade(a, b, [0.5], draws)[0]
    assert {t.is_drum for t in between.tracks} == {True, False} and between.note_num() > a.note_num() / 2


def test_rolls_are_notes_again_on_every_grid_and_with_drums():
    score, voices = band(0), [0, 33, -1]
    score.tracks[0].notes.extend([Note(1920 + 160 * i, 160, 72, 80) for i in range(3)])  # triplets
    again = book.score_of(*book.roll(score, voices, 24 * 8), voices)
    assert notes(again) == notes(score) and len(notes(score)) == 3 * 4 + 4 + 4 + 3


def test_the_ends_of_a_crossfade_are_the_windows_and_between_each_column_is_of_one(run, pieces):
    a, b = book.pairs_of(run, 1, "train")[0]
    steps = book.steps_of(run, a, b)
    draws, voices = np.random.default_rng(0).random(steps // 6), book.voices_of([a, b])
    inside = [[n for n in notes(x) if n[0] + n[2] <= 20 * steps] for x in (a, b)]
    at_a, middle, at_b = book.crossfade(a, b, [0.0, 0.4, 1.0], draws)
    assert set(inside[0]) <= set(notes(at_a)) and set(inside[1]) <= set(notes(at_b))
    on_a, on_b, on_mix = (book.roll(x, voices, steps)[0] for x in (a, b, middle))
    assert (on_mix == np.where(np.repeat(draws, 6)[:, None] < 0.4, on_b, on_a)).all()
    assert 0 < (on_mix != on_a).any(-1).mean() < 1


def test_interpolation_measures_known_distances(run, monkeypatch):
    a = score_of([(0, 4, 60), (4, 4, 62)], [(0, 8, 48)])
    b = score_of([(0, 4, 60), (4, 4, 64)], [(0, 4, 48), (4, 4, 49)])
    middle = score_of([(0, 4, 60), (4, 4, 64)], [(0, 8, 48)])
    monkeypatch.setattr(run, "encode_windows", lambda windows: torch.zeros(len(windows), 4, 3))
    monkeypatch.setattr(run, "decode", lambda z: [a, middle, b])
    monkeypatch.setattr(book, "nats_of", lambda run, scores, seed: np.arange(float(len(scores))))
    frame = book.interpolation(run, [(a, b)], steps=3).set_index("way")
    slerp = frame.loc["slerp"]
    assert slerp.alpha.tolist() == [0, 0.5, 1] and slerp.to_a.tolist() == [0, 0.25, 0.5]
    assert slerp.to_b.tolist() == [0.5, 0.25, 0] and slerp.moved[1:].tolist() == [0.25, 0.25]
    assert slerp.onward[1:].tolist() == [1, 1] and slerp.note_f1.iloc[[0, 2]].tolist() == [1, 1]
    assert slerp.in_key.tolist() == [1, 1, 0.75]  # C, D and E; with a C sharp that sounds for four of sixteen quarters
    fade = frame.loc["crossfade"]
    assert fade.nats.tolist() == [0, 1, 2]
    assert fade.to_a.iloc[0] == fade.to_b.iloc[-1] == 0 and fade.to_b.iloc[0] == fade.to_a.iloc[-1] == 0.5
    assert (fade.to_a + fade.to_b).tolist() == pytest.approx([0.5] * 3)
    monkeypatch.setattr(book, "COSTED", 0)
    nats = book.interpolation(run, [(a, b)], steps=3).set_index("way").nats
    assert nats["crossfade"].isna().all() and nats["slerp"].notna().all()


def test_rowwise_counts_each_bar_by_itself(run, monkeypatch):
    a, b = (score_of(*([(4 * i, 4, pitch + i) for i in range(4)] for pitch in pitches))
            for pitches in ((60, 48), (70, 52)))
    mixed = score_of([(0, 4, 60), (4, 4, 71), (8, 4, 62), (12, 4, 63)],
                     [(0, 4, 48), (4, 4, 53), (8, 2, 50), (10, 6, 54)])
    asked = []
    monkeypatch.setattr(run, "encode_windows", lambda windows: torch.randn(len(windows), 8, 3))
    monkeypatch.setattr(run, "decode", lambda z: asked.append(z) or [mixed])
    rows = book.rowwise(run, [(a, b)], [0.0, 1.0, 0.0, 0.5])
    assert rows.bar.tolist() == [1, 2, 3, 4] and rows.alpha.tolist() == [0, 1, 0, 0.5] and asked[0].shape == (1, 8, 3)
    assert rows.to_a.tolist() == [0, 1, 0.25, 0.5] and rows.to_b.tolist() == [1, 0, 0.75, 1]


def test_pairs_are_of_two_pieces_and_one_metre(run):
    pairs = book.pairs_of(run, 50, "train", seed=1)
    metres = [[[(m.time, m.numerator, m.denominator) for m in w.time_signatures] for w in pair] for pair in pairs]
    assert len(pairs) > 10 and all(a == b for a, b in metres)
    assert all(notes(a) != notes(b) for a, b in pairs)
    with pytest.raises(ValueError, match="two pieces with windows of one metre"):
        book.pairs_of(run, 0, "train")


def test_cost_is_the_negative_elbo_of_the_diagnosis(run, pieces):
    some = [piece for piece in pieces if piece.name != "gap.mid"][:3]  # the gap makes empty windows
    d = diagnose(run.model, run.codec, tokenize(run.codec, some), run.config, n_prior=2)
    cost = book.nats_of(run, [window for piece in some for window in run.windows(piece)[2]])
    assert cost.shape == (d["n_windows"],)
    assert cost.mean() == pytest.approx(d["recon_nats"] + d["rate_nats"], rel=0.01)  # other samples of the posterior


def test_what_is_too_long_for_the_model_has_no_cost(run_dir, pieces):
    run = load_run(run_dir, "cpu")
    windows = [window for piece in pieces[:4] for window in run.windows(piece)[2]]
    limit = int(np.median(run.pack(windows).lengths))
    run.config = run.config.replace(max_tokens=limit)
    assert (np.isnan(book.nats_of(run, windows)) == (run.pack(windows).lengths > limit)).all()
