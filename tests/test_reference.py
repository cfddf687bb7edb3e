"""The run that comes with the repository does what its diagnosis.json says, on windows cut here from the MIDI files."""

import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from symusic import Note, Score, TimeSignature, Track

from mtxlib.data.store import pad_sequences
from mtxlib.latent.compose import lines_of
from mtxlib.model.prior import rates
from mtxlib.music.corpus import load_corpus
from mtxlib.music.score import bar_starts, key_of
from mtxlib.run import load_run

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "outputs" / "reference"
ARCHIVE = ROOT.parent / "shared" / "data" / "jsfakes.zip"
PROGRAMS = (52, 53, 54, 42)  # soprano to bass
KEYS = {"recon_nats", "rate_nats", "recon_per_token", "nats_per_grid_note", "kl_per_dim", "active_units",
        "mutual_information", "ln_n", "delta_nll_shuffled", "delta_nll_prior", "gain_over_floor", "note_f1",
        "duration_accuracy", "exact_windows", "retrieval_at_1", "prior_wellformed", "n_windows", "verdict", "advice"}


@pytest.fixture(scope="module")
def reference():
    return load_run(REFERENCE, "cpu")


@pytest.fixture(scope="module")
def diagnosis():
    return json.loads((REFERENCE / "diagnosis.json").read_text())


def notes(score):
    """(program, onset in 16ths, pitch), each as often as it is there."""
    return Counter((t.program, round(4 * n.start / score.tpq), n.pitch) for t in score.tracks for n in t.notes)


def windows_of(score, n_bars=4):
    """Full windows end to end, as scores of 480 ticks a quarter; the four voices go by their height. All is in 4/4."""
    voices = [np.array([(round(4 * n.start / score.tpq), round(4 * n.duration / score.tpq), n.pitch) for n in t.notes])
              for t in score.tracks]
    voices.sort(key=lambda voice: -voice[:, 2].mean())
    length, windows = 16 * n_bars, []
    for begin in range(0, max(voice[:, :2].sum(1).max() for voice in voices) - length + 1, length):
        window = Score(480)
        window.time_signatures.append(TimeSignature(0, 4, 4))
        for program, voice in zip(PROGRAMS, voices, strict=True):
            track = Track("", program, False)
            track.notes.extend([Note(120 * int(onset - begin), 120 * int(duration), int(pitch), 80)
                                for onset, duration, pitch in voice if begin <= onset < begin + length])
            window.tracks.append(track)
        windows.append(window)
    return windows


@pytest.fixture(scope="module")
def held_out_pieces(tmp_path_factory):
    if not ARCHIVE.exists():
        pytest.skip("needs ../shared/data/jsfakes.zip, a local copy of js-fakes")
    pieces = load_corpus("jsfakes", tmp_path_factory.mktemp("data"), archive=str(ARCHIVE), limit=150, progress=False)
    return [piece for piece in pieces if piece.split == "test"]


@pytest.fixture(scope="module")
def held_out(held_out_pieces):
    """The first 24 windows of test pieces, read from the archive itself."""
    with zipfile.ZipFile(ARCHIVE) as z:
        scores = [Score.from_midi(z.read(f"js-fakes/midi/{int(p.name.removeprefix('jsfakes-'))}.mid"))
                  for p in held_out_pieces]
    windows = [window for score in scores for window in windows_of(score)]
    assert len(windows) >= 24 and all(w.tracks[0].notes for w in windows)
    return windows[:24]


def test_it_gives_back_the_notes_that_it_claims(reference, diagnosis, held_out):
    decoded = reference.decode(reference.encode_windows(held_out))
    pairs = [(notes(a), notes(b)) for a, b in zip(held_out, decoded, strict=True)]
    f1 = 2 * sum((a & b).total() for a, b in pairs) / sum(a.total() + b.total() for a, b in pairs)
    assert f1 == pytest.approx(diagnosis["note_f1"], abs=0.05)
    swapped = [2 * (a & b).total() / (a.total() + b.total())
               for (a, _), (_, b) in zip(pairs, pairs[12:] + pairs[:12], strict=True)]
    assert np.mean(swapped) < 0.3, "which the latent of another piece does not"


def test_its_latent_costs_the_nats_that_it_claims(reference, diagnosis, held_out):
    ids = pad_sequences(reference.codec.encode(held_out))
    with torch.no_grad():
        mu, logvar, _ = (x.numpy() for x in reference.model.encode(ids, reference.codec.table.slots(ids)))
    kl = 0.5 * (mu ** 2 + np.exp(logvar) - 1 - logvar)
    assert kl.sum((1, 2)).mean() == pytest.approx(diagnosis["rate_nats"], rel=0.1)
    np.testing.assert_allclose(mu, reference.encode_windows(held_out).numpy(), atol=1e-4, rtol=1e-3)


def test_it_loads_and_plays_a_sample_of_the_prior(reference):
    config = reference.config
    assert config.data.source == "jsfakes", "whose licence lets the weights be given on"
    [score] = reference.sample(1, seed=3)
    assert score.note_num() > 20 and {t.program for t in score.tracks} == set(PROGRAMS)
    assert max(n.start for t in score.tracks for n in t.notes) < config.data.n_bars * 4 * score.tpq


def test_it_composes_a_piece_with_its_prior(reference):
    assert reference.prior is not None, "prior.safetensors belongs to these weights"
    score = reference.generate(9, seed=1, key="G major")
    assert len(bar_starts(score)) == 10 and {t.program for t in score.tracks} == set(PROGRAMS)
    assert key_of(score).split()[0] in ("G", "e", "D", "b", "C", "a")


def test_its_prior_knows_more_of_real_music_than_no_order(reference, held_out_pieces):
    lines = lines_of(reference.model, reference.codec, held_out_pieces)
    nats = rates(reference.prior, lines, reference.config.model.rows_per_bar)
    assert nats["learned"] < nats["normal"] - 1.5


def test_it_is_small_and_whole(reference):
    assert sum((REFERENCE / name).stat().st_size for name in ("model.safetensors", "prior.safetensors")) < 12e6
    last = json.loads((REFERENCE / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["split"]) == (reference.config.train.steps, "valid"), "it was trained to its end"


def test_its_diagnosis_has_the_agreed_keys_and_is_healthy(reference, diagnosis):
    assert diagnosis["verdict"] == "healthy"
    assert {"jsfakes/valid", "bach/test", "jsb/test"} <= set(diagnosis["others"])
    size = reference.config.model.latent_channels * reference.model.bottleneck.n_rows(0)
    for of_set in (diagnosis, *diagnosis["others"].values()):
        assert KEYS <= set(of_set) and of_set["n_windows"] > 100
        assert len(of_set["kl_per_dim"]) == size
        assert sum(of_set["kl_per_dim"]) == pytest.approx(of_set["rate_nats"], rel=1e-3)
