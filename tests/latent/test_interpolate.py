"""Distances on the way between pieces, counted by hand and by properties."""

import shutil

import numpy as np
import pytest
import torch
from conftest import score_of
from symusic import Note, Score, Track

from mtxlib.data.tokens import tokenize
from mtxlib.latent import interpolate
from mtxlib.latent.diagnose import diagnose
from mtxlib.latent.interpolate import crossfade, interpolation, pairs_of
from mtxlib.music.score import note_f1, roll, score_of as score_of_roll, voices_of
from mtxlib.run import load_run


def test_the_grid_holds_what_sounds_and_where_it_begins():
    pitch, begins = grid(score_of([(0, 0.5, 60), (0.5, 0.25, 60), (1, 4, 62)], [(0.25, 0.5, 48)]), [53, 52], 6)
    assert pitch.tolist() == [[0, 48, 48, 0, 0, 0], [60, 60, 60, 0, 62, 62]]
    assert begins.tolist() == [[False, True, *[False] * 4], [True, False, True, False, True, False]]


def notes(score):
    return sorted((n.start, t.program, n.duration, n.pitch) for t in score.tracks for n in t.notes)


def test_the_ends_of_a_crossfade_are_the_windows_and_between_each_column_is_of_one(walker, pieces):
    a, b = pairs_of(walker, 1, "train")[0]
    draws = np.random.default_rng(0).random(interpolate.sixteenths(walker, a, b))
    voices = track_programs(a, b)
    inside = [[n for n in notes(x) if n[0] + n[2] <= 120 * len(draws)] for x in (a, b)]
    for alpha, end in ((0.0, inside[0]), (1.0, inside[1])):
        assert set(end) <= set(notes(crossfade(a, b, alpha, draws)))
    on_a, on_b, on_mix = (grid(x, voices, len(draws))[0] for x in (a, b, crossfade(a, b, 0.4, draws)))
    assert (on_mix == np.where(draws < 0.4, on_b, on_a)).all() and 0 < (on_mix != on_a).mean() < 1


def test_interpolation_measures_known_distances(walker, monkeypatch):
    a = score_of([(0, 4, 60), (4, 4, 62)], [(0, 8, 48)])
    b = score_of([(0, 4, 60), (4, 4, 64)], [(0, 4, 48), (4, 4, 49)])
    middle = score_of([(0, 4, 60), (4, 4, 64)], [(0, 8, 48)])
    monkeypatch.setattr(walker, "encode_windows", lambda windows: torch.zeros(len(windows), 4, 3))
    monkeypatch.setattr(walker, "decode", lambda z: [a, middle, b])
    monkeypatch.setattr(interpolate, "cost", lambda run, scores, seed: np.arange(len(scores)))
    frame = interpolation(walker, [(a, b)], steps=3).set_index("way")
    slerp = frame.loc["slerp"]
    assert slerp.alpha.tolist() == [0, 0.5, 1] and slerp.to_a.tolist() == [0, 0.25, 0.5]
    assert slerp.to_b.tolist() == [0.5, 0.25, 0] and slerp.moved[1:].tolist() == [0.25, 0.25]
    assert slerp.onward[1:].tolist() == [1, 1] and slerp.note_f1.iloc[[0, 2]].tolist() == [1, 1]
    assert slerp.in_key.tolist() == [1, 1, 0.75]  # C, D and E; with a C sharp that sounds for four of sixteen quarters
    fade = frame.loc["crossfade"]
    assert fade.to_a.iloc[0] == fade.to_b.iloc[-1] == 0 and fade.to_b.iloc[0] == fade.to_a.iloc[-1] == 0.5
    assert (fade.to_a + fade.to_b).tolist() == pytest.approx([0.5] * 3)


def test_rowwise_counts_each_bar_by_itself(walker, monkeypatch):
    a, b = (score_of(*([(4 * i, 4, pitch + i) for i in range(4)] for pitch in pitches))
            for pitches in ((60, 48), (70, 52)))
    mixed = score_of([(0, 4, 60), (4, 4, 71), (8, 4, 62), (12, 4, 63)],
                     [(0, 4, 48), (4, 4, 53), (8, 2, 50), (10, 6, 54)])
    asked = []
    monkeypatch.setattr(walker, "encode_windows", lambda windows: torch.randn(len(windows), 8, 3))
    monkeypatch.setattr(walker, "decode", lambda z: asked.append(z) or [mixed])
    rows = interpolate.rowwise(walker, [(a, b)], [0.0, 1.0, 0.0, 0.5])
    assert rows.bar.tolist() == [1, 2, 3, 4] and rows.alpha.tolist() == [0, 1, 0, 0.5] and asked[0].shape == (1, 8, 3)
    assert rows.to_a.tolist() == [0, 1, 0.25, 0.5] and rows.to_b.tolist() == [1, 0, 0.75, 1]


def test_pairs_are_of_two_pieces_and_one_metre(walker):
    pairs = pairs_of(walker, 50, "train", seed=1)
    metres = [[[(m.time, m.numerator, m.denominator) for m in w.time_signatures] for w in pair] for pair in pairs]
    assert len(pairs) > 10 and all(a == b for a, b in metres)
    assert all(notes(a) != notes(b) for a, b in pairs)
    with pytest.raises(ValueError, match="two pieces with windows of one metre"):
        pairs_of(walker, 0, "train")


def test_cost_is_the_negative_elbo_of_the_diagnosis(walker, pieces):
    some = [piece for piece in pieces if piece.name != "gap.mid"][:3]  # the gap makes empty windows
    d = diagnose(walker.model, walker.codec, tokenize(walker.codec, some), walker.config, n_prior=2)
    cost = interpolate.cost(walker, [window for piece in some for window in walker.windows(piece)[2]])
    assert cost.shape == (d["n_windows"],)
    assert cost.mean() == pytest.approx(d["recon_nats"] + d["rate_nats"], rel=0.01)  # other samples of the posterior


def test_what_is_too_long_for_the_model_has_no_cost(run_dir, pieces):
    run = load_run(run_dir, "cpu")
    windows = [window for piece in pieces[:4] for window in run.windows(piece)[2]]
    limit = int(np.median(run.pack(windows).lengths))
    run.config = run.config.replace(max_tokens=limit)
    assert (np.isnan(interpolate.cost(run, windows)) == (run.pack(windows).lengths > limit)).all()
