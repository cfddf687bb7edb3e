"""Each metric on a case whose answer is known, the verdict on made-up numbers, and all keys on a real run."""

import json
import math
import re

import numpy as np
import pytest
import torch
from symusic import Score

from mtxlib.config import BOS, EOS, Config
from mtxlib.data.tokens import Codec, load_tokenizer, tokenize
from mtxlib.latent.diagnose import (
    ACTIVE,
    advise,
    diagnose,
    fidelity,
    is_wellformed,
    mean_sixteenths,
    mutual_information,
    places,
    retrieval,
    verdict,
)
from mtxlib.model.likelihood import Measured, measure
from mtxlib.model.vae import MusicVAE
from mtxlib.music.score import bar_starts, cut

KEYS = {"recon_nats": float, "rate_nats": float, "recon_per_token": float, "nats_per_grid_note": float,
        "kl_per_dim": list, "active_units": float, "mutual_information": float, "ln_n": float,
        "delta_nll_shuffled": float, "delta_nll_prior": float, "gain_over_floor": (float, type(None)), "note_f1": float,
        "duration_accuracy": float, "exact_windows": float, "retrieval_at_1": float, "prior_wellformed": float,
        "n_windows": int, "verdict": str, "advice": str}
SHARES = ("active_units", "note_f1", "duration_accuracy", "exact_windows", "retrieval_at_1", "prior_wellformed")


@pytest.fixture(scope="module")
def codec(store):
    return Codec(load_tokenizer(store.folder / "tokenizer.json"), store.n_bars)


@pytest.fixture(scope="module")
def windows(codec, pieces):
    return tokenize(codec, [p for p in pieces if p.split != "train"])


def all_ids(windows):
    """Each window's ids, without the padding of a batch."""
    return [windows.batch([i]).ids[0, :n].tolist() for i, n in enumerate(windows.lengths)]


def make(config, store, **changes):
    torch.manual_seed(2)
    return MusicVAE(config.replace(**changes).model, store.vocab_size, store.n_bars).eval()


def measured(mu, std=1.0, is_live=None):
    N, S, _ = mu.shape
    return Measured(torch.ones(N), torch.zeros(N), torch.zeros(N), torch.zeros(N), mu,
                    torch.full_like(mu, 2 * math.log(std)),
                    torch.ones(N, S, dtype=torch.bool) if is_live is None else is_live)


# -- the whole ------------------------------------------------------------------------------------------------------

def check_keys(d):
    assert set(KEYS) <= set(d)
    for key, kind in KEYS.items():
        assert isinstance(d[key], kind), f"{key} is {d[key]!r}"
    assert all(math.isfinite(d[k]) for k, kind in KEYS.items() if kind is float)
    assert all(0 <= d[k] <= 1 for k in SHARES) and d["verdict"] in ("healthy", "weak", "collapsed") and d["advice"]
    assert json.loads(json.dumps(d)) == d


def test_all_keys_of_a_run_on_its_test_split(run, store):
    d = run.diagnose("test")
    check_keys(d)
    assert d["n_windows"] == len(store.select("test")) and d["ln_n"] == pytest.approx(math.log(d["n_windows"]))
    assert len(d["kl_per_dim"]) == 16 * run.config.model.latent_channels
    assert sum(d["kl_per_dim"]) == pytest.approx(d["rate_nats"], abs=1e-2)
    assert d["gain_over_floor"] is None and 0 <= d["mutual_information"] <= d["ln_n"] + 1e-6
    assert d["prior_wellformed"] > d["prior_wellformed_free"], "the grammar helps a model that knows little"


def test_numbers_are_those_of_one_measurement(config, store, codec, windows):
    model = make(config, store)
    d = diagnose(model, codec, windows, config, floor=3.0, n_prior=4)
    m = measure(model, windows, np.arange(len(windows)))
    assert d["recon_nats"] == pytest.approx(float(m.recon.mean())) and d["gain_over_floor"] == pytest.approx(
        3.0 - d["recon_per_token"])
    assert d["recon_per_token"] == pytest.approx(float(m.recon.sum() / m.n_tokens.sum()))
    assert d["delta_nll_prior"] == pytest.approx(float((m.recon_prior - m.recon).sum() / m.n_tokens.sum()), abs=1e-6)
    sixteenths = mean_sixteenths(codec, all_ids(windows))
    assert d["nats_per_grid_note"] == pytest.approx((d["recon_nats"] + d["rate_nats"]) / (4 * sixteenths))
    assert diagnose(model, codec, windows, config, floor=3.0, n_prior=4) == d, "and they do not change"


@pytest.mark.parametrize("bottleneck, n_dims", [("conv", None), ("linear1d", 4), ("none", 0)])
def test_every_bottleneck_can_be_diagnosed(bottleneck, n_dims, config, store, codec, windows):
    changed = config.replace(bottleneck=bottleneck)
    d = diagnose(make(config, store, bottleneck=bottleneck), codec, windows, changed, n_prior=4)
    check_keys(d)
    assert n_dims is None or len(d["kl_per_dim"]) == n_dims
    if bottleneck == "none":
        assert d["verdict"] == "collapsed" and "floor" in d["advice"]
        assert d["rate_nats"] == d["active_units"] == d["mutual_information"] == d["retrieval_at_1"] == 0.0
        assert d["delta_nll_shuffled"] == d["delta_nll_prior"] == 0.0


def test_a_decoder_that_ignores_z_has_collapsed(config, store, codec, windows):
    model = make(config, store)
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.cross.out.weight.zero_()
        for layer in model.decoder.add_rows:
            layer.weight.zero_()
    d = diagnose(model, codec, windows, config, n_prior=4)
    assert abs(d["delta_nll_shuffled"]) < 1e-6 and abs(d["delta_nll_prior"]) < 1e-6 and d["verdict"] == "collapsed"


def test_no_window_is_refused(config, store, codec, windows):
    with pytest.raises(ValueError, match="no window to diagnose: expected at least one, got 0"):
        diagnose(make(config, store), codec, type(windows)(windows.ids, windows.slots, windows.offsets[:1],
                                                           windows.windows[:0]), config)


# -- information ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 10, 64])
def test_posteriors_far_apart_tell_all_windows(n):
    mu = 100.0 * torch.arange(float(n))[:, None, None].expand(n, 2, 3)
    assert mutual_information(measured(mu, 0.5)) == pytest.approx(math.log(n), abs=1e-9)


def test_equal_posteriors_tell_nothing():
    mu = torch.full((40, 2, 3), 0.7)
    assert mutual_information(measured(mu, 0.5)) == pytest.approx(0.0, abs=1e-9)
    assert mutual_information(measured(torch.zeros(5, 0, 3))) == 0.0


def test_two_groups_tell_one_bit():
    mu = torch.tensor([0.0] * 30 + [500.0] * 30)[:, None, None].expand(60, 1, 2)
    assert mutual_information(measured(mu)) == pytest.approx(math.log(2), abs=1e-9)


def test_what_lies_between_is_the_integral():
    """Two unit Gaussians two standard deviations apart, against a numeric integral of the mixture's entropy."""
    mu = torch.tensor([-1.0, 1.0] * 1000)[:, None, None]
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p = sum(torch.distributions.Normal(m, torch.tensor(1.0).double()).log_prob(x).exp() for m in (-1.0, 1.0)) / 2
    exact = float(torch.trapezoid(-p * p.log(), x)) - 0.5 * math.log(2 * math.pi * math.e)
    assert mutual_information(measured(mu)) == pytest.approx(exact, abs=0.03)


def test_rows_that_are_not_live_tell_nothing():
    mu = torch.zeros(8, 2, 1)
    mu[:, 1, 0] = 100.0 * torch.arange(8.0)
    is_live = torch.tensor([[True, False]]).expand(8, 2)
    assert mutual_information(measured(mu, is_live=is_live)) == pytest.approx(0.0, abs=1e-9)


# -- fidelity -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def original(codec, pieces):
    """A window in 4/4 and its number of notes."""
    piece = next(p for p in pieces if p.metre == "4/4" and p.bars == 8)
    score = Score(piece.path)
    window = cut(score, bar_starts(score), 0, 4)
    return window, window.note_num()


def against(codec, original, change):
    changed = original.copy()
    change(changed)
    a, b = codec.encode([original, changed])
    return fidelity(codec, [a.tolist()], [b.tolist()])


def edit(track, note, **values):
    def change(score):
        notes = score.tracks[track].notes
        for name, value in values.items():
            setattr(notes[note], name, value(getattr(notes[note], name)))
    return change


def test_a_perfect_copy(codec, original):
    assert against(codec, original[0], lambda s: None) == {
        "note_f1": 1.0, "duration_accuracy": 1.0, "exact_windows": 1.0, "repeats": 0.0}


@pytest.mark.parametrize("change", [edit(0, 3, pitch=lambda p: p + 13), edit(2, -1, time=lambda t: t + 120)])
def test_one_wrong_note(codec, original, change):
    window, n = original
    d = against(codec, window, change)
    assert d == {"note_f1": pytest.approx((n - 1) / n), "duration_accuracy": 1.0, "exact_windows": 0.0, "repeats": 0.0}


def test_one_wrong_length(codec, original):
    window, n = original
    d = against(codec, window, edit(1, 2, duration=lambda d: d + 120))
    assert d == {"note_f1": 1.0, "duration_accuracy": pytest.approx((n - 1) / n), "exact_windows": 0.0, "repeats": 0.0}


def test_a_missing_and_an_extra_note(codec, original):
    window, n = original

    def lose(score):
        score.tracks[3].notes = score.tracks[3].notes[1:]

    assert against(codec, window, lose)["note_f1"] == pytest.approx(2 * (n - 1) / (2 * n - 1))

    def add(score):
        score.tracks[3].notes.append(score.tracks[3].notes[0].shift_pitch(-15))

    assert against(codec, window, add)["note_f1"] == pytest.approx(2 * n / (2 * n + 1))


def test_the_right_notes_in_the_wrong_voice_are_not_found(codec, original):
    window, n = original

    def swap(score):
        score.tracks[0].program, score.tracks[1].program = score.tracks[1].program, score.tracks[0].program

    moved = len(window.tracks[0].notes) + len(window.tracks[1].notes)
    assert against(codec, window, swap)["note_f1"] == pytest.approx((n - moved) / n)


def test_nothing_decoded(codec, original):
    window, n = original
    [a] = codec.encode([window])
    assert fidelity(codec, [a.tolist()], [[BOS, EOS]]) == {
        "note_f1": 0.0, "duration_accuracy": 0.0, "exact_windows": 0.0, "repeats": 0.0}


def test_fidelity_weighs_notes_not_windows(codec, original):
    window, n = original
    short = cut(window, bar_starts(window), 0, 1)
    a, b = (ids.tolist() for ids in codec.encode([window, short]))
    k = short.note_num()
    d = fidelity(codec, [a, b], [a, [BOS, EOS]])
    assert d["note_f1"] == pytest.approx(2 * n / (2 * n + k)) and d["exact_windows"] == 0.5


def test_sixteenths_of_the_windows_are_those_of_their_metres(codec, pieces):
    by_metre = {p.metre: p for p in pieces if p.bars >= 6}
    ids = {}
    for metre, piece in by_metre.items():
        score = Score(piece.path)
        ids[metre] = codec.encode([cut(score, bar_starts(score), 0, 4)])[0].tolist()
    assert mean_sixteenths(codec, [ids["4/4"]]) == 64 and mean_sixteenths(codec, [ids["3/4"]]) == 48
    assert mean_sixteenths(codec, [ids["6/8"]]) == 48 and mean_sixteenths(codec, [ids["4/4"], ids["3/4"]]) == 56
    assert mean_sixteenths(codec, [ids["4/4,3/4,6/8"]]) == 3 * 16 + 12


def test_retrieval_finds_perfect_copies_and_no_others(config, store, codec, windows):
    model = make(config, store)
    m = measure(model, windows, np.arange(len(windows)))
    originals = all_ids(windows)
    assert retrieval(model, codec, m, originals, originals) == 1.0
    assert retrieval(model, codec, m, originals, originals[1:] + originals[:1]) == 0.0
    half = [o if i % 2 else originals[(i + 1) % len(originals)] for i, o in enumerate(originals)]
    assert retrieval(model, codec, m, originals, half) == pytest.approx(
        sum(a == b for a, b in zip(originals, half, strict=True)) / len(originals))


def test_what_is_wellformed(codec, original, windows):
    assert all(is_wellformed(codec, ids) for ids in all_ids(windows))
    [ids] = [ids.tolist() for ids in codec.encode([original[0]])]
    names = [codec.names[i] for i in ids]
    pitch = next(i for i, name in enumerate(names) if name.startswith("Pitch"))
    bar = codec.names.index("Bar_None")
    assert not is_wellformed(codec, ids[:-1]), "it does not end"
    assert not is_wellformed(codec, [BOS, EOS]), "no notes"
    assert not is_wellformed(codec, ids[:pitch + 1] + ids[pitch + 2:]), "a pitch without its duration"
    assert is_wellformed(codec, ids) and not is_wellformed(codec, ids[:-1] + [bar, EOS]), "a fifth bar"


# -- the verdict ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("delta, units, gain, expected", [
    (2.0, 0.9, None, "healthy"), (0.5, 0.5, 0.1, "healthy"), (0.49, 0.9, None, "weak"), (2.0, 0.4, 0.3, "weak"),
    (2.0, 0.9, -0.01, "weak"), (2.0, 0.9, 0.0, "weak"), (0.04, 0.9, 1.0, "collapsed"), (5.0, 0.0, 1.0, "collapsed"),
    (0.0, 0.0, None, "collapsed"), (0.05, 0.05, None, "weak")])
def test_verdict(delta, units, gain, expected):
    assert verdict({"delta_nll_shuffled": delta, "active_units": units, "gain_over_floor": gain}) == expected


GOOD = {"verdict": "healthy", "note_f1": 0.95, "rate_nats": 100.0, "gain_over_floor": 0.5, "prior_wellformed": 1.0}


@pytest.mark.parametrize("numbers, dials, words", [
    ({}, {}, "Every latent dimension is active."),
    ({"note_f1": 0.5}, {}, "finds 50% of the notes.*more than 100 nats"),
    ({"verdict": "weak"}, {"dec_token_dropout": 0.2}, "raise target_rate.*dec_token_dropout above 0.2"),
    ({"verdict": "collapsed"}, {"recon_scale": "token"}, "set it to 'sequence'"),
    ({"verdict": "collapsed"}, {"condition": "cross"}, "condition = 'both'"),
    ({"verdict": "collapsed"}, {"beta_max": 0.7}, "beta = 0.7: set target_rate, or free_bits"),
    ({"verdict": "collapsed"}, {"free_bits": 0.1, "beta_warmup": 70}, r"lengthen beta_warmup \(70\)"),
    ({"gain_over_floor": -0.1}, {}, "nothing is gained"),
    ({"prior_wellformed": 0.5}, {}, "50% of the prior's samples are ill-formed"),
    ({}, {"bottleneck": "none"}, "the floor the others are compared with")])
def test_advice_names_the_remedy(numbers, dials, words):
    m = measured(torch.randn(50, 4, 3))
    said = advise({**GOOD, **numbers}, m, Config.from_flat(dials))
    assert re.search(words, said), said


def still(mu):
    """Dimensions whose posterior mean does not move."""
    return measured(mu).mean_variance() <= ACTIVE


def test_dead_dimensions_are_named():
    mu = torch.randn(50, 4, 3)
    mu[:, 2] = 0.0
    assert places(still(mu)) == "whole rows 2"
    mu[:, :, 1] = 1.0
    assert places(still(mu)) == "whole rows 2; whole channels 1"
    assert "6 of 12 latent dimensions are dead (whole rows 2; whole channels 1)" in advise(GOOD, measured(mu), Config())
    assert places(still(torch.zeros(50, 4, 3))) == "all of them"
    spread = torch.randn(50, 4, 3)
    spread[:, 0, 0] = spread[:, 1, 2] = 0.0
    assert places(still(spread)) == "row 0 channel 0, row 1 channel 2"


def test_idle_dimensions_are_named():
    mu = torch.randn(50, 4, 3)
    mu[:, :, 0] *= 0.15  # active by its variance of 0.02, and worth about 0.01 nats
    said = advise(GOOD, measured(mu, std=1.0), Config())
    assert "4 of 12 latent dimensions are idle, below 0.05 nats (whole channels 0)" in said and "dead" not in said


def test_a_bias_is_not_activity(config, store, codec, windows):
    """A posterior mean that is large but the same for all windows counts as dead."""
    model = make(config, store)
    with torch.no_grad():
        model.bottleneck.head.weight.zero_()
        model.bottleneck.head.bias.fill_(1.5)
    d = diagnose(model, codec, windows, config, n_prior=4)
    assert d["active_units"] == 0.0 and d["rate_nats"] > 10 and d["verdict"] == "collapsed"
    assert d["mutual_information"] == pytest.approx(0.0, abs=1e-6)
