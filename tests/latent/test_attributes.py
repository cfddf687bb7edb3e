"""Attributes of music counted by hand, directions planted in random latents, distances on the way between pieces."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from symusic import Note, Score, TimeSignature, Track

from mtxlib.data.tokens import tokenize
from mtxlib.latent import attributes, interpolate
from mtxlib.latent.attributes import Directions, find, leakage
from mtxlib.latent.diagnose import diagnose
from mtxlib.latent.interpolate import crossfade, interpolation, pairs_of
from mtxlib.music.metrics import ATTRIBUTES
from mtxlib.music.score import grid, track_programs
from mtxlib.run import load_run

Q = 480  # ticks a quarter


def score_of(*voices, metre=(4, 4)):
    """Voices of (start, length, pitch) in quarters; soprano first."""
    score = Score(Q)
    score.time_signatures.append(TimeSignature(0, *metre))
    for program, notes in zip((52, 53, 54, 42), voices, strict=False):
        track = Track("", program, False)
        track.notes.extend([Note(int(start * Q), int(length * Q), pitch, 80) for start, length, pitch in notes])
        score.tracks.append(track)
    return score


def attributes_of(*voices):
    return {name: value(score_of(*voices)) for name, value in ATTRIBUTES.items()}


# -- attributes -------------------------------------------------------------------------------------------------------

def test_attributes_are_what_one_counts_by_hand():
    # C5 then D5 over C4, over a G3 that rests in the second half: 4 onsets in 4 quarters
    a = attributes_of([(0, 3, 72), (3, 1, 74)], [(0, 4, 60)], [(0, 2, 55)])
    assert a["note density"] == 1.0
    assert a["register"] == pytest.approx((3 * 72 + 74 + 4 * 60 + 2 * 55) / 10)
    assert a["voice spread"] == pytest.approx((2 * 17 + 12 + 14) / 4)
    # intervals: twelve semitones for three quarters, 14 for one, 17 and 5 for two each
    assert a["dissonance"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("semitones, is_dissonant", [(0, 0), (1, 1), (2, 1), (3, 0), (4, 0), (5, 0), (6, 1), (7, 0),
                                                     (8, 0), (9, 0), (10, 1), (11, 1), (12, 0), (13, 1)])
def test_seconds_sevenths_and_the_tritone_are_dissonant_whichever_voice_is_above(semitones, is_dissonant):
    for pitches in ((60 + semitones, 60), (60, 60 + semitones)):
        assert attributes_of(*([(0, 1, pitch)] for pitch in pitches))["dissonance"] == is_dissonant


def test_major_tells_the_modes_apart_in_every_key():
    for tonic in range(12):
        for third, sign in ((4, 1), (3, -1)):
            scale = (0, 2, third, 5, 7, 9 if third == 4 else 8, 11 if third == 4 else 10)
            notes = [(i, 2 if step in (0, third, 7) else 1, 60 + tonic + step) for i, step in enumerate(scale)]
            assert attributes_of(notes)["major"] * sign > 0.05


def test_transposition_moves_the_register_alone(pieces):
    score = Score(pieces[0].path)
    before, after = ([value(x) for value in ATTRIBUTES.values()] for x in (score, score.shift_pitch(5)))
    moved = dict(zip(ATTRIBUTES, np.subtract(after, before), strict=True))
    assert moved.pop("register") == pytest.approx(5) and max(map(abs, moved.values())) < 1e-9


def test_what_cannot_be_told_is_nan():
    assert all(np.isnan(value) for name, value in attributes_of().items() if name != "note density")
    alone = attributes_of([(0, 4, 60)])
    assert np.isnan([alone["voice spread"], alone["dissonance"]]).all() and alone["register"] == 60


# -- directions -------------------------------------------------------------------------------------------------------

def planted(n=4000, shape=(4, 3), seed=0):
    """Latents whose mean follows two attributes that go together; where each of them leads is known."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal((2, *shape))
    values = rng.standard_normal((n, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    z = np.einsum("na,asc->nsc", values, true) + 0.5 * rng.standard_normal((n, *shape))
    return torch.from_numpy(z).float(), values * (3.0, 0.1) + (60, 5), torch.from_numpy(true).float()


def test_a_planted_direction_is_found_apart_from_what_goes_with_it():
    z, values, true = planted()
    directions = find(z, values, ["a", "b"])
    length = z.flatten(1).norm(dim=1).mean() / 3
    torch.testing.assert_close(directions.vectors.flatten(1).norm(dim=1), length.expand(2))
    for found, planned in zip(directions.vectors, true, strict=True):
        assert torch.cosine_similarity(found.flatten(), planned.flatten(), 0) > 0.995
    torch.testing.assert_close(directions.sd, torch.tensor([3.0, 0.1]), atol=0.01, rtol=0.05)


def test_what_most_windows_lack_has_no_direction_and_a_window_without_an_attribute_does_not_count():
    z, values, _ = planted()
    alone = np.full(len(values), np.nan)
    alone[:10] = 1.0
    some = values.copy()
    some[:50, 0] = np.nan
    found = find(z, np.stack([some[:, 0], alone, some[:, 1]], 1), ["a", "alone", "b"])
    expected = find(z[50:], values[50:], ["a", "b"])
    assert found.names == ["a", "b"]
    torch.testing.assert_close(found.vectors, expected.vectors)


def test_moving_turns_a_latent_and_keeps_its_length():
    directions = Directions(["a", "b"], torch.randn(2, 4, 3), torch.ones(2))
    z = torch.randn(5, 4, 3)
    torch.testing.assert_close(directions.move(z, {"a": 0.0}), z)
    torch.testing.assert_close(directions.move(z, {}), z)
    moved = directions.move(z, {"a": 2.0, "b": -1.0})
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1))
    whither = z + 2 * directions.vectors[0] - directions.vectors[1]
    assert (torch.cosine_similarity(moved.flatten(1), whither.flatten(1)) > 0.99999).all()
    torch.testing.assert_close(directions.move(z[0], {"a": 2.0, "b": -1.0}), moved[0])
    with pytest.raises(ValueError, match="amounts of a, b .*got .*'c'"):
        directions.move(z, {"c": 1.0})
    with pytest.raises(ValueError, match="4 x 3, got .*2, 3"):
        directions.move(z[:, :2], {"a": 1.0})


def test_the_parallel_mode_keeps_the_tonic_and_the_leading_tone():
    def line(*scale):
        return score_of([(i, 3 if step in (0, 3, 4, 7) else 1, 62 + step) for i, step in enumerate(scale)])

    def steps(score):
        return [note.pitch - 62 for track in score.tracks for note in track.notes]
    in_major, in_minor = (0, 2, 4, 5, 7, 9, 11, 12, 0, 7), (0, 2, 3, 5, 7, 8, 11, 12, 0, 7)
    original = line(*in_major)
    assert tuple(steps(attributes.parallel(original))) == in_minor and tuple(steps(original)) == in_major
    assert tuple(steps(attributes.parallel(attributes.parallel(original)))) == in_major
    assert steps(attributes.parallel(line(0, 2, 3, 5, 7, 8, 10, 12, 0, 7)))[6] == 11
    assert steps(attributes.parallel(score_of([]))) == []


def test_the_mode_turns_towards_the_other_one_alone(monkeypatch):
    latents = torch.nn.functional.normalize(torch.randn(3, 4, 3).flatten(1)).unflatten(1, (4, 3))
    modes = [1.0, -1.0, np.nan]
    monkeypatch.setattr(attributes, "parallel", lambda score: score)
    monkeypatch.setattr(attributes, "major", lambda score: modes[score])
    monkeypatch.setattr(attributes, "slerp", lambda a, b, alpha: (1 - alpha) * a + alpha * b)

    class Coder:
        decode = staticmethod(lambda z: range(len(z)))
        encode_windows = staticmethod(lambda scores: -latents[[1, 2, 0]])
    others = -latents[[1, 2, 0]]
    turned = attributes.change_mode(Coder, latents, -3.0)
    torch.testing.assert_close(turned, torch.stack([others[0], latents[1], latents[2]]))
    turned = attributes.change_mode(Coder, latents, 0.75)
    torch.testing.assert_close(turned, torch.stack([latents[0], (latents[1] + others[1]) / 2, latents[2]]))


def test_major_is_moved_by_the_change_of_mode():
    directions = Directions(["major", "b"], torch.randn(2, 4, 3), torch.ones(2), lambda z, amount: z.flip(-1) * amount)
    z, amounts = torch.randn(5, 4, 3), {"major": 2.0, "b": 1.0}
    whither = 2 * z.flip(-1) + directions.vectors[1]
    expected = whither * attributes.norm(z) / attributes.norm(whither)
    torch.testing.assert_close(directions.move(z, amounts), expected)
    assert amounts == {"major": 2.0, "b": 1.0}
    torch.testing.assert_close(directions.move(z, {"major": 0.0}), z)


def test_directions_are_kept_with_the_weights_they_belong_to(tmp_path):
    weights, path = tmp_path / "model.safetensors", tmp_path / "directions.safetensors"
    weights.write_bytes(b"weights")
    assert attributes.load_directions(path, weights) is None
    directions = Directions(["a", "b"], torch.randn(2, 4, 3), torch.tensor([3.0, 0.02]))
    attributes.save_directions(directions, path, weights)
    again = attributes.load_directions(path, weights)
    assert again.names == ["a", "b"]
    torch.testing.assert_close(again.vectors, directions.vectors, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again.sd, directions.sd)
    weights.write_bytes(b"others")
    assert attributes.load_directions(path, weights) is None
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"directions\.safetensors: expected directions"):
        attributes.load_directions(path, weights)


@pytest.fixture(scope="module")
def walker(run_dir, tmp_path_factory):
    """A tiny run that directions may be written into."""
    return load_run(shutil.copytree(run_dir, tmp_path_factory.mktemp("walker") / "run"), "cpu")


def test_a_run_finds_its_directions_once(walker, pieces, monkeypatch):
    directions = walker.directions()
    assert directions.names == list(ATTRIBUTES)
    assert directions.vectors.shape[1:] == walker.encode([pieces[0].path]).shape[1:]
    assert directions.vectors.isfinite().all()
    monkeypatch.setattr(walker, "pieces", lambda split: pytest.fail("found again"))
    torch.testing.assert_close(walker.directions().vectors, directions.vectors, atol=1e-2, rtol=1e-2)


def test_latents_of_many_shapes_have_no_directions(run_dir, monkeypatch):
    run = load_run(run_dir, "cpu")
    run.config = run.config.replace(bottleneck="conv")
    with pytest.raises(ValueError, match="expected rows or linear1d, .*got 'conv'"):
        run.directions()


def test_leakage_is_the_rank_correlation_of_each_attribute_with_the_slider():
    index = pd.MultiIndex.from_product([["a", "b"], [-2, 0, 2], [0, 1]], names=["slider", "position", "window"])
    up, down, mixed, still = [1, 8, 27], [3, 2, 1], [1, 3, 2], [5, 5, 5]
    frame = pd.DataFrame({"a": np.r_[np.stack([up, up], 1).ravel(), np.stack([down, still], 1).ravel()],
                          "b": np.r_[np.stack([mixed, still], 1).ravel(), np.stack([up, mixed], 1).ravel()],
                          "notes": 1}, index)
    found = leakage(frame)
    assert found.loc["a", "a"] == 1 and found.loc["b", "a"] == -0.5
    assert found.loc["a", "b"] == 0.25 and found.loc["b", "b"] == 0.75


def test_responses_at_zero_are_the_reconstructions(walker, pieces):
    directions = walker.directions()
    windows = [walker.windows(piece)[2][0] for piece in pieces[:3]]
    frame = attributes.responses(walker, directions, windows, (-1, 0))
    assert len(frame) == 5 * 2 * 3
    decoded = walker.decode(walker.encode_windows(windows))
    for i, score in enumerate(decoded):
        at = frame.loc["register", 0, i]
        assert at["notes"] == score.note_num()
        assert at["note density"] * directions.sd[0] == pytest.approx(ATTRIBUTES["note density"](score), rel=1e-4)


# -- from piece to piece ----------------------------------------------------------------------------------------------

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
