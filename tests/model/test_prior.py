"""The prior over latent rows: against torch.distributions, a process with a known answer, and a decoder's own music."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from symusic import Note, Score, Tempo, Track
from torch import distributions

from mtxlib.config import BOS
from mtxlib.latent.compose import context, lay, line, lines_of, sampled, transposed
from mtxlib.model.prior import CONTEXT, Line, RowPrior, fit, load_prior, rates, save_prior, stretches
from mtxlib.music.score import KEY_NAMES, VOICES, bar_starts, chain, cut, key_of, note_counts
from mtxlib.run import load_run

C = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def prior():
    torch.manual_seed(0)
    prior = RowPrior(C, rows_per_bar=4, d_model=16, n_layers=2, n_heads=2, hidden=8, components=4).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return prior


def notes(score):
    return sorted((n.start, t.program, n.duration, n.pitch) for t in score.tracks for n in t.notes)


def told(n_rows, batch=1, key=0, closes=0):
    """What a prior is told of pieces: n_rows, key, closes."""
    return tuple(torch.full((batch,), x) for x in (n_rows, key, closes))


def test_log_prob_is_that_of_channels_one_after_the_other(prior):
    state, z = torch.randn(5, 7, 16), torch.randn(5, 7, C)
    expected = torch.zeros(5, 7)
    for c in range(C):
        known = torch.where(torch.arange(C) < c, z, torch.randn(5, 7, C))  # what comes later makes no difference
        weights, mean, log_sigma = (x[..., c, :] for x in prior.mixture(state, known))
        expected += distributions.MixtureSameFamily(distributions.Categorical(logits=weights),
                                                    distributions.Normal(mean, log_sigma.exp())).log_prob(z[..., c])
    torch.testing.assert_close(prior.log_prob(z, state), expected)
    weights, _, log_sigma = prior.mixture(state, z)
    torch.testing.assert_close(weights.exp().sum(-1), torch.ones(5, 7, C))
    assert log_sigma.min() >= -4 and log_sigma.max() <= 1.5


def test_later_channels_depend_on_earlier_ones(prior):
    state, z = torch.randn(1, 16), torch.zeros(1, C)
    changed = torch.tensor([[1.0, 0.0, 0.0]])
    differs = [(a - b).abs().amax(-1)[0] > 1e-5 for a, b in zip(prior.mixture(state, z), prior.mixture(state, changed),
                                                                strict=True)]
    assert [x.tolist() for x in differs] == [[False, True, True]] * 3


def test_drawn_rows_are_as_likely_as_they_should_be(prior):
    """E[-log p] of draws from p is its entropy: that of narrow, separate Gaussians is known."""
    with torch.no_grad():
        prior.to_mixture.zero_()
        prior.bias[:] = torch.tensor([0.0, 0.0, -30, -30, -4.0, 4.0, 0, 0, -2.0, -2.0, 0, 0])
        state = torch.randn(4000, 16)
        z = prior.draw(state, 1.0, torch.Generator().manual_seed(0))
        nats = -prior.log_prob(z, state).mean()
    entropy = C * (np.log(2) + 0.5 * np.log(2 * np.pi * np.e) - 2.0)
    assert float(nats) == pytest.approx(entropy, abs=0.1)
    assert 0.45 < (z > 0).float().mean() < 0.55


def test_a_row_depends_on_the_rows_before_it_only(prior):
    z = torch.randn(1, 13, C)
    at = torch.arange(12)[None]
    changed = z.clone()
    changed[0, 7] += 1.0  # the row before row 7
    difference = (prior(z[:, :-1], at, *told(12)) - prior(changed[:, :-1], at, *told(12))).abs().amax(-1)[0]
    assert (difference[:7] == 0).all() and (difference[7:] > 1e-5).all()


def test_key_length_and_ending_are_heard_where_they_should_be(prior):
    z, at = torch.randn(1, 48, C), torch.arange(48)[None]

    def differs(a, b):
        return ((prior(z, at, *a) - prior(z, at, *b)).abs().amax(-1)[0] > 1e-5).tolist()

    assert all(differs(told(48, key=0), told(48, key=5)))
    assert differs(told(48), told(88)) == [False] * 32 + [True] * 16, "the last four bars know that the end is near"
    assert all(differs(told(48, closes=0), told(48, closes=1)))


def test_sampling_follows_the_whole_pass(prior):
    z = prior.sample(2, 24, temperature=1e-4, seed=3, key=KEY_NAMES.index("D major"))
    before = torch.cat([torch.zeros(2, 1, C), z[:, :-1]], 1)
    state = prior(before, torch.arange(24).expand(2, -1), *told(24, 2, KEY_NAMES.index("D major"), 1))
    weights, mean, _ = prior.mixture(state, z)
    likely = mean.gather(-1, weights.argmax(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(z, likely, atol=5e-2, rtol=5e-2)


def test_samples_go_on_from_what_they_are_given_and_repeat(prior):
    begin = torch.randn(6, C)
    a, b, c = (prior.sample(2, CONTEXT + 9, seed=seed, begin=begin) for seed in (0, 0, 1))
    assert a.shape == (2, CONTEXT + 9, C) and torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[0, :6], begin) and torch.equal(a[1, :6], begin) and not torch.equal(a[0], a[1])


@pytest.mark.parametrize("given", [0, 6, 21])
def test_endings_differ_in_the_last_bar(given, prior):
    z = prior.sample(2, 24, seed=1, begin=torch.randn(given, C) if given else None, endings=3).view(2, 3, 24, C)
    fork = max(20, given)
    assert torch.equal(z[:, 0, :fork], z[:, 1, :fork]) and torch.equal(z[:, 0, :fork], z[:, 2, :fork])
    assert (z[:, 0, fork:] != z[:, 1, fork:]).all() and (z[:, 1, fork:] != z[:, 2, fork:]).all()
    assert (z[0, :, given:fork] != z[1, :, given:fork]).all()


def walk(n, rng, rho=0.9):
    """An AR(1) process of variance 1, known up to a posterior of variance 0.01."""
    x = rng.standard_normal((n, C)) * np.sqrt(1 - rho**2)
    x[0] /= np.sqrt(1 - rho**2)
    for t in range(1, n):
        x[t] += rho * x[t - 1]
    return Line(torch.tensor(x, dtype=torch.float32), torch.full((n, C), np.log(0.01)).float(), 3, 1)


def test_the_prior_learns_how_rows_follow():
    rng = np.random.default_rng(0)
    lines, held_out = [[walk(40, rng) for _ in range(n)] for n in (200, 40)]
    prior, figures = fit(lines, held_out, 4, steps=150, batch_size=16, d_model=32, n_layers=1, components=2)
    assert figures == rates(prior, held_out, 4)
    nats_saved = -0.5 * C * np.log(1 - 0.9**2)  # of a row, were nothing noisy
    assert 0.7 * nats_saved < figures["normal"] - figures["learned"] < 1.05 * nats_saved
    assert prior.keys.tolist() == [float(i == 3) for i in range(len(KEY_NAMES))], "only keys that were met are drawn"


def test_stretches_keep_place_and_length():
    line = Line(torch.arange(100.0)[:, None].expand(-1, C), torch.full((100, C), -40.0), 7, 1)
    drawn = stretches([line] * 32, 4, torch.Generator().manual_seed(0))
    at = drawn.at
    assert drawn.z.shape == (32, CONTEXT + 1, C) and drawn.is_there.all() and (drawn.n_rows == 100).all()
    assert (at[:, 0] % 4 == 0).all() and len(at[:, 0].unique()) > 3
    torch.testing.assert_close(drawn.z[:, 1:, 0], at.float())
    started = at[:, 0] > 0
    torch.testing.assert_close(drawn.z[started, 0, 0], at[started, 0].float() - 1)
    assert (drawn.key == 7).all() and (drawn.closes == 1).all()
    short = stretches([line, Line(line.mu[:20], line.logvar[:20])], 4, torch.Generator().manual_seed(0))
    assert short.is_there.sum(1).tolist() == [CONTEXT, 20] and (short.z[1, 21:] == 0).all()


@pytest.mark.parametrize(("key", "semitones", "name"), [("C major", 2, "D major"), ("a minor", -5, "e minor"),
                                                        ("B major", 1, "C major"), ("c minor", -1, "b minor"),
                                                        ("", 3, "")])
def test_keys_are_moved_with_their_mode(key, semitones, name):
    assert KEY_NAMES[transposed(key, semitones)] == name


def test_windows_that_overlap_are_laid_once():
    windows = [(bar, torch.arange(bar * 4, bar * 4 + 16)[:, None].float(), torch.zeros(16, 1)) for bar in (0, 4, 6)]
    assert lay(windows, 4)[0][:, 0].tolist() == list(range(40))
    assert lay(windows[1:], 4)[0][:, 0].tolist() == [0] * 16 + list(range(16, 40)), "an empty window"


def test_a_prior_is_kept_with_the_weights_it_belongs_to(prior, tmp_path, capsys):
    weights, path = tmp_path / "model.safetensors", tmp_path / "prior.safetensors"
    weights.write_bytes(b"weights")
    assert load_prior(path, weights) is None
    save_prior(prior, path, weights)
    again = load_prior(path, weights)
    assert all(torch.allclose(x, again.state_dict()[name], atol=1e-3) for name, x in prior.state_dict().items())
    weights.write_bytes(b"others")
    assert load_prior(path, weights) is None and "other weights" in capsys.readouterr().out


def test_a_file_that_is_no_prior_is_refused(tmp_path):
    path = tmp_path / "prior.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"prior\.safetensors: expected a prior"):
        load_prior(path, path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"prior\.safetensors: expected a prior"):
        load_prior(path, path)


# -- long pieces of a run -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def composer(run_dir, tmp_path_factory):
    """A tiny run with a prior that is not trained."""
    run = load_run(shutil.copytree(run_dir, tmp_path_factory.mktemp("composer") / "run"), "cpu")
    torch.manual_seed(1)
    run.prior = RowPrior(run.config.model.latent_channels, run.config.model.rows_per_bar, d_model=16, n_layers=1,
                         n_heads=2, hidden=8, components=2).eval()
    return run


def test_posteriors_of_pieces_are_their_windows(composer, pieces):
    pieces = [piece for piece in pieces if piece.name != "gap.mid"][:2]
    for piece, found in zip(pieces, lines_of(composer.model, composer.codec, pieces), strict=True):
        ours = line(composer, composer.score(piece.path))
        torch.testing.assert_close(found.mu[:len(ours)], ours, atol=1e-4, rtol=1e-4)


def test_lines_in_all_keys_are_drawn_from_a_seed(composer, pieces):
    pieces = [piece for piece in pieces if piece.name != "gap.mid"][:2]

    def drawn(*how):
        return [line.mu for line in lines_of(composer.model, composer.codec, pieces, *how)]

    def among(mu, others):
        return any(mu.shape == other.shape and torch.allclose(mu, other, atol=1e-4) for other in others)

    everything, few = drawn(1000), drawn(7, 3)
    assert len(everything) > 12 and len(few) == 7 and all(among(mu, everything) for mu in few)
    assert all(among(mu, everything) for mu in drawn()), "the pieces' own keys are among them"
    assert all(map(torch.equal, few, drawn(7, 3))) and not all(among(mu, few) for mu in drawn(7, 4))


@pytest.mark.parametrize("bars", [1, 3, 4, 5, 6, 11])
def test_a_piece_is_as_long_as_asked(bars, composer):
    a, b = composer.compose(2, bars, seed=4)
    assert notes(a) != notes(b) and notes(composer.compose(2, bars, seed=4)[0]) == notes(a)
    for score in (a, b):
        assert len(bar_starts(score)) - 1 <= bars


def test_a_prompt_stays_and_is_gone_on_from(composer, pieces):
    piece = min(pieces, key=lambda p: p.bars)
    prompt = composer.score(piece.path)
    score = composer.generate(piece.bars + 3, seed=1, prompt=piece.path)
    line = bar_starts(prompt)[-1]
    assert [n for n in notes(score) if n[0] < line] == notes(prompt)
    with pytest.raises(ValueError, match=f"expected more than the {piece.bars} bars of the prompt"):
        composer.generate(piece.bars, prompt=piece.path)


def test_a_window_goes_on_from_the_end_of_the_one_before(composer, pieces):
    window = composer.windows(pieces[0].path)[2][0]
    ids = context(composer, window, 4, 2)
    assert ids[0] == BOS and len(ids) > 1
    again = composer.decode(torch.zeros(1, *composer.encode_windows([window]).shape[1:]), begin=[ids])[0]
    lines = bar_starts(window)
    expected = [(start - lines[2], *rest) for start, *rest in notes(window) if lines[2] <= start < lines[4]]
    assert [n for n in notes(again) if n[0] < expected[-1][0]] == [n for n in expected if n[0] < expected[-1][0]]
    assert set(expected) <= set(notes(again)), "to the last of them, where others may join"


def test_each_window_of_a_piece_goes_on_from_the_end_of_the_one_before(composer, monkeypatch):
    asked = []
    monkeypatch.setattr("mtxlib.latent.compose.context",
                        lambda run, window, *bars: asked.append(bars) or context(run, window, *bars))
    composer.compose(2, 9, seed=4)
    assert asked == [(4, 1)] * 2 + [(4, 2)] * 2, "the last bar; before the last window, which ends with the piece, two"


@pytest.mark.parametrize(("asked", "heard"), [({}, (None, True)), ({"key": "b minor"}, ("b minor", True)),
                                              ({"cadence": False}, (None, False)), ({"prompt": 0}, ("", True)),
                                              ({"prompt": 0, "key": "A major"}, ("A major", True))])
def test_the_prior_is_told_key_and_ending(asked, heard, composer, pieces, monkeypatch):
    piece, told, sample = min(pieces, key=lambda p: p.bars), [], composer.prior.sample
    monkeypatch.setattr(composer.prior, "sample", lambda n, rows, *how: told.append(how[3:5]) or sample(n, rows, *how))
    composer.generate(piece.bars + 1, **{**asked, **({"prompt": piece.path} if "prompt" in asked else {})})
    key = key_of(Score(piece.path)) if heard[0] == "" else heard[0]
    assert told == [(None if key is None else KEY_NAMES.index(key), heard[1])]


def test_of_several_endings_one_that_closes_is_taken(composer, monkeypatch):
    open_ended = composer.compose(2, 6, seed=4, cadence=False)
    assert len(open_ended) == 2
    offered = []
    monkeypatch.setattr("mtxlib.latent.compose.closes",
                        lambda score, voices: offered.append(score) or len(offered) in (3, 9))
    a, b = composer.compose(2, 6, seed=4)
    assert len(offered) == 9 and notes(a) == notes(offered[2]) and notes(b) == notes(offered[8])
    line = 4 * 1920
    assert len({str([n for n in notes(score) if n[0] < line]) for score in offered[:3]}) == 1, "one piece up to there"
    monkeypatch.setattr("mtxlib.latent.compose.closes", lambda score, voices: False)
    assert [notes(s) for s in composer.compose(2, 6, seed=4)] == [notes(s) for s in (offered[0], offered[3])]


def test_keys_that_are_none_are_refused(composer):
    with pytest.raises(ValueError, match="key: expected one of C major, .*, b minor, got 'H dur'"):
        composer.generate(4, key="H dur")


def test_without_a_prior_nothing_can_be_continued(run_dir, pieces):
    run = load_run(run_dir, "cpu")
    with pytest.raises(ValueError, match="prompt: expected a run with a learned prior"):
        run.generate(64, prompt=pieces[0].path)
    with pytest.raises(ValueError, match="key: expected a run with a learned prior"):
        run.generate(64, key="a minor")
    assert isinstance(run.generate(5), Score)


def test_the_normal_prior_can_still_be_asked_for(composer, run_dir):
    plain = load_run(run_dir, "cpu")
    assert notes(composer.generate(6, seed=2, learned=False)) == notes(plain.generate(6, seed=2))
    assert notes(composer.generate(6, seed=2)) != notes(plain.generate(6, seed=2))


def dense_bar():
    """One bar with 192 notes."""
    score = Score(480)
    for voice in range(4):
        score.tracks.append(Track("", list(VOICES)[voice], False))
        score.tracks[-1].notes.extend([Note(120 * i, 120, 40 + 8 * voice + k, 80) for i in range(16) for k in range(3)])
    return score


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_context_that_leaves_no_room_is_shortened_by_whole_bars(n, composer, pieces):
    sparse = composer.windows(pieces[0].path)[2][0]
    window = chain([dense_bar(), sparse], [(0, 1), (0, 3)])
    room = composer.max_tokens - composer.mean_tokens
    assert len(composer.codec.encode([dense_bar()])[0]) > room
    assert context(composer, window, 1, 1) == [BOS]
    window = chain([sparse, dense_bar()], [(0, 3), (0, 1)])
    expected = context(composer, window, 3, n)
    assert 1 < len(expected) <= room and context(composer, window, 4, n + 1) == expected, "what comes before it stays"


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_raised_and_no_note_is_doubled_whatever_the_weights(seed, run_dir, pieces):
    """Untrained and spoilt decoders and priors, prompts, keys, endings, temperatures and lengths."""
    run, rng = load_run(run_dir, "cpu"), random.Random(seed)
    torch.manual_seed(seed)
    run.prior = RowPrior(run.config.model.latent_channels, run.config.model.rows_per_bar, d_model=16, n_layers=1,
                         n_heads=2, hidden=8, components=2).eval()
    with torch.no_grad():
        for p in [*run.model.parameters(), *run.prior.parameters()]:
            p.add_(rng.choice((0, 0.1, 1.0)) * torch.randn_like(p))
    short = cut(Score(pieces[0].path), bar_starts(Score(pieces[0].path)), 0, 1)
    for prompt in (None, short, dense_bar(), run.decode(torch.randn(1, 16, run.config.model.latent_channels))[0]):
        bars = rng.randint(1 if prompt is None else 5, 12)
        if prompt and not prompt.note_num():
            continue
        scores = run.compose(2, bars, seed, rng.choice((0.0, 0.5, 1.0, 5.0)), prompt=prompt,
                             key=rng.choice((None, *KEY_NAMES[:-1])), cadence=rng.random() < 0.5)
        for score in scores + run.sample(2, seed, 5.0) + [run.reconstruct(scores[0])] * (scores[0].note_num() > 0):
            assert max(note_counts(score).values(), default=1) == 1
        assert all(len(bar_starts(score)) - 1 <= bars for score in scores)


def test_a_dense_bar_can_be_gone_on_from(composer):
    path = ROOT / "../shared/cases/dense_bar.mid"
    if not path.exists():
        pytest.skip("needs ../shared/cases/dense_bar.mid; `dense_bar` here is like it")
    score = composer.generate(6, prompt=path)
    assert 4 < len(bar_starts(score)) <= 7


def test_a_prompt_that_is_a_window_is_as_long_as_the_window(composer):
    window = ringing_window()
    score = composer.generate(8, seed=1, prompt=window)
    assert [(*n[:2], n[3]) for n in notes(score) if n[0] < 4 * 1920] == [(*n[:2], n[3]) for n in notes(window)]
    assert score.tempos[0].qpm == pytest.approx(132, abs=0.01)
    with pytest.raises(ValueError, match="bars: expected more than the 4 bars of the prompt, got 4"):
        composer.generate(4, prompt=window)


def ringing_window():
    """Four bars at 132, the last chord rings on for a bar."""
    score = Score(480)
    score.tempos.append(Tempo(0, 132))
    for program, pitch in zip(VOICES, (72, 67, 60, 48), strict=True):
        score.tracks.append(Track("", program, False))
        score.tracks[-1].notes.extend([Note(0, 960, pitch, 80)] * (program == 52) + [Note(7200, 2400, pitch, 80)])
    return cut(score, [0, 1920, 3840, 5760, 7680, 9600], 0, 4)


def test_the_pieces_a_prior_learns_from_are_bounded(pieces, monkeypatch, capsys):
    assert sampled(pieces) == pieces and capsys.readouterr().out == ""
    monkeypatch.setattr("mtxlib.latent.compose.MOST_BARS", 30)
    few = sampled(pieces)
    assert 0 < sum(p.bars for p in few) <= 30 and few == [p for p in pieces if p in few] == sampled(pieces)
    assert f"{len(pieces) - len(few)} of {len(pieces)} pieces left out, at random: 30 bars" in capsys.readouterr().out
    monkeypatch.setattr("mtxlib.latent.compose.MOST_BARS", 1)
    assert len(sampled(pieces)) == 1


@pytest.mark.parametrize("bottleneck", ["conv", "none"])
def test_a_latent_that_does_not_follow_the_bars_has_no_such_prior(bottleneck, composer, monkeypatch):
    monkeypatch.setattr(composer, "config", composer.config.replace(bottleneck=bottleneck))
    with pytest.raises(ValueError, match=f"bottleneck: expected rows, .* got '{bottleneck}'"):
        composer.fit_prior(steps=1)


def test_fit_prior_is_kept_and_loaded(composer, run_dir):
    figures = composer.fit_prior(steps=2)
    assert set(figures) == {"normal", "learned"} and load_run(composer.folder, "cpu").prior is not None
