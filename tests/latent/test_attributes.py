"""Attributes of music counted by hand, directions planted in random latents."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import defined_in, score_of
from safetensors.torch import save_file
from symusic import Score

from mtxlib.latent import attributes
from mtxlib.latent.attributes import Directions, find
from mtxlib.music.metrics import ATTRIBUTES
from mtxlib.run import load_run


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
    found = defined_in("06_interpolation").leakage(frame)
    assert found.loc["a", "a"] == 1 and found.loc["b", "a"] == -0.5
    assert found.loc["a", "b"] == 0.25 and found.loc["b", "b"] == 0.75


def test_responses_at_zero_are_the_reconstructions(walker, pieces):
    directions = walker.directions()
    windows = [walker.windows(piece)[2][0] for piece in pieces[:3]]
    frame = defined_in("06_interpolation").respond(walker, directions, windows, (-1, 0))
    assert len(frame) == 5 * 2 * 3
    decoded = walker.decode(walker.encode_windows(windows))
    for i, score in enumerate(decoded):
        at = frame.loc["register", 0, i]
        assert at["notes"] == score.note_num()
        assert at["note density"] * directions.sd[0] == pytest.approx(ATTRIBUTES["note density"](score), rel=1e-4)
