"""What `load_run` gives of a run that was trained here: encode, decode, reconstruct, interpolate, generate."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from symusic import Note, Score, Tempo, Track

import mtxlib
from mtxlib.data.tokens import make_tokenizer
from mtxlib.latent.decode import prior_latents
from mtxlib.latent.interpolate import slerp
from mtxlib.model.train import save_weights
from mtxlib.model.vae import MusicVAE
from mtxlib.music.score import bar_starts, cut, window_bars
from mtxlib.run import Run, load_run

VOICES = {52, 53, 54, 42}


def notes(score):
    return sorted((t.program, n.start, n.duration, n.pitch) for t in score.tracks for n in t.notes)


def metres(score):
    return [(t.time, t.numerator, t.denominator) for t in score.time_signatures]


def windows_of(path, n_bars=4):
    score = Score(path)
    starts = bar_starts(score)
    return [cut(score, starts, bar, n_bars) for bar in window_bars(len(starts) - 1, n_bars, n_bars)]


@pytest.fixture(scope="module")
def by_metre(pieces):
    return {p.metre: p for p in pieces if p.bars >= 6}


@pytest.fixture(scope="module")
def conv(run_config, store, tmp_path_factory):
    """A run with another bottleneck, whose latents are as long as the windows; not trained."""
    folder = tmp_path_factory.mktemp("conv")
    config = run_config.replace(bottleneck="conv", conv_stride=16)
    torch.manual_seed(0)
    save_weights(MusicVAE(config.model, store.vocab_size, store.n_bars), folder / "model.safetensors", config,
                 store.lengths)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(store.folder / "tokenizer.json", folder)
    return load_run(folder, "cpu")


# -- loading --------------------------------------------------------------------------------------------------------

def test_load_run_on_cpu_gives_the_weights_that_training_kept(run, run_dir, run_config, store):
    assert isinstance(run, Run) and run.device == torch.device("cpu") and not run.model.training
    assert run.config == run_config and run.folder == run_dir and mtxlib.load_run is load_run
    kept, ours = load_file(run_dir / "model.safetensors"), run.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    assert set(ours) - set(kept) <= {"decoder.head.weight"}, "which is the embedding, tied"
    assert torch.equal(ours["decoder.head.weight"], ours["decoder.embedding.token.weight"])
    assert run.codec.vocab_size == store.vocab_size and run.mean_tokens == int(store.lengths.mean())
    assert run.max_tokens >= store.lengths.max()


def test_loading_twice_gives_the_same(run_dir, by_metre):
    a, b = (load_run(run_dir, "cpu").encode([by_metre["4/4"].path]) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_run_that_is_not_finished_is_refused(name, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"run is not a finished run: expected {name} in it"):
        load_run(folder, "cpu")


class Touch:
    """A pickle of it would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_foreign(kind, path, trap):
    good = path.read_bytes()
    state = load_file(path)
    if kind == "not ours":
        save_file(state, path)
    elif kind == "marked by another":
        save_file(state, path, metadata={"format": "pt"})
    elif kind == "other tensors":
        save_file({"a": torch.zeros(3)}, path, metadata={"format": "mtxlib", "vocab_size": "223", "n_bars": "4",
                                                         "mean_tokens": "9", "most_tokens": "9"})
    elif kind == "half":
        path.write_bytes(good[:len(good) // 2])
    elif kind == "a few bytes":
        path.write_bytes(good[:5])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(trap)))
    elif kind == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("kind", ["not ours", "marked by another", "other tensors", "half", "a few bytes", "empty",
                                  "text", "pickle", "torch.save"])
def test_weights_that_are_not_a_runs_are_refused_by_name(kind, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    write_foreign(kind, folder / "model.safetensors", tmp_path / "trap")
    with pytest.raises(ValueError, match=r"run/model\.safetensors"):
        load_run(folder, "cpu")
    assert not (tmp_path / "trap").exists(), "nothing in the file was run"


@pytest.mark.parametrize("change", [{"d_model": 64}, {"bottleneck": "conv"}, {"dec_layers": 2}])
def test_weights_that_do_not_fit_the_config_are_refused(change, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    config = load_run(run_dir, "cpu").config.replace(**change)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the config\.json beside it"):
        load_run(folder, "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_other_files_that_are_broken_are_named(name, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    (folder / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=f"run/{name}"):
        load_run(folder, "cpu")


# -- encode and decode ----------------------------------------------------------------------------------------------

def test_encode_gives_posterior_means_of_all_windows(run, by_metre):
    paths = [by_metre["4/4"].path, by_metre["3/4"].path]
    z = run.encode(paths)
    n = [len(windows_of(path)) for path in paths]
    assert z.shape == (sum(n), 16, run.config.model.latent_channels) and z.dtype == torch.float32
    assert z.device.type == "cpu" and not z.requires_grad
    torch.testing.assert_close(z[n[0]:], run.encode([Score(paths[1])]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(z[:n[0]], run.encode([str(paths[0])]), atol=1e-5, rtol=1e-4)
    [ids] = run.codec.encode([windows_of(paths[0])[1]])
    ids = torch.from_numpy(ids)[None]
    expected = run.model.encode(ids, run.codec.table.slots(ids)).mu
    torch.testing.assert_close(z[1], expected[0].detach(), atol=1e-5, rtol=1e-4)


def test_latents_that_follow_the_tokens_are_filled_up_and_decode_the_same(conv, by_metre):
    windows = windows_of(by_metre["4/4"].path) + windows_of(by_metre["6/8"].path)
    z, alone = conv.encode_windows(windows), [conv.encode_windows([w]) for w in windows]
    assert len({a.shape[1] for a in alone}) > 1 and z.shape[1] == max(a.shape[1] for a in alone)
    for row, a in zip(z, alone, strict=True):
        torch.testing.assert_close(row[:a.shape[1]], a[0], atol=1e-5, rtol=1e-4)
        assert (row[a.shape[1]:] == 0).all()
    short = min(range(len(alone)), key=lambda i: alone[i].shape[1])
    assert notes(conv.decode(z)[short]) == notes(conv.decode(alone[short])[0])


def test_decode_gives_scores_with_the_voices_apart(run):
    z = prior_latents(run.model, 5, 100)
    scores = run.decode(z)
    assert len(scores) == 5 and [notes(s) for s in scores] == [notes(s) for s in run.decode(z)]
    sampled = run.decode(z, temperature=1.0, seed=3)
    assert [notes(s) for s in sampled] == [notes(s) for s in run.decode(z, temperature=1.0, seed=3)]
    assert [notes(s) for s in sampled] != [notes(s) for s in run.decode(z, temperature=1.0, seed=4)]
    for score in scores + sampled:
        programs = [t.program for t in score.tracks]
        assert set(programs) <= VOICES and len(set(programs)) == len(programs) and score.tpq == 480
        assert all(n.start < bar_starts(score)[:5][-1] for t in score.tracks for n in t.notes), "four bars at most"
    assert any(s.note_num() for s in sampled)


def test_decoding_does_not_depend_on_how_many_go_at_once(run, monkeypatch):
    z = prior_latents(run.model, 5, 100)
    together = [notes(s) for s in run.decode(z)]
    monkeypatch.setattr("mtxlib.run.BATCH", 2)
    assert [notes(s) for s in run.decode(z)] == together


# -- whole pieces ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metre", ["4/4", "3/4", "6/8", "4/4,3/4,6/8"])
def test_a_reconstruction_keeps_bars_metre_and_tempo(metre, run, by_metre):
    original = Score(by_metre[metre].path)
    again = run.reconstruct(by_metre[metre].path)
    assert metres(again) == metres(original) and again.tempos[0].qpm == pytest.approx(original.tempos[0].qpm)
    assert all(n.start < bar_starts(original)[-1] for t in again.tracks for n in t.notes)
    assert {t.program for t in again.tracks} <= VOICES


@pytest.mark.parametrize("metre", ["4/4", "3/4", "6/8", "4/4,3/4,6/8"])
def test_a_decoder_without_faults_would_give_the_piece_back(metre, run, by_metre, monkeypatch):
    """Cutting and joining lose nothing: windows go through ids and back in place of the model."""
    path = by_metre[metre].path
    monkeypatch.setattr(run, "encode_windows", lambda windows: windows)
    monkeypatch.setattr(run, "decode", lambda windows, temperature: [run.codec.decode(ids)
                                                                     for ids in run.codec.encode(windows)])
    assert notes(run.reconstruct(path)) == notes(Score(path)) == notes(run.reconstruct(Score(path)))


def test_a_reconstruction_is_the_decoded_means(run, by_metre):
    path = by_metre["4/4"].path
    first = run.decode(run.encode([path]))[0]
    end = 4 * 1920
    assert [n for n in notes(run.reconstruct(path)) if n[1] < end] == [n for n in notes(first) if n[1] < end]


def test_another_tokenizer_than_the_weights_is_refused(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    make_tokenizer([0]).save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"run/tokenizer\.json: expected the \d+ ids"):
        load_run(folder, "cpu")


def test_calls_that_make_no_sense_are_refused(run, music):
    path = music / "piece00.mid"
    with pytest.raises(ValueError, match="steps: expected at least 2, the two ends, got 1"):
        run.interpolate(path, path, steps=1)
    with pytest.raises(ValueError, match="expected at least one path or score"):
        run.encode([])
    with pytest.raises(ValueError, match="bars: expected at least 1, got 0"):
        run.generate(bars=0)


@pytest.mark.parametrize("call, says", [
    (lambda run: run.compose(n=0), "n: expected at least 1, got 0"),
    (lambda run: run.sample(0), "n: expected at least 1, got 0"),
    (lambda run: run.generate(bars=5.5), "bars: expected a whole number, at least 1, got 5.5"),
    (lambda run: run.generate(bars=4, temperature=-1), "temperature: expected 0 .greedy. or more, got -1"),
    (lambda run: run.generate(bars=4, top_p=5), "top_p: expected a share above 0, at most 1, got 5"),
    (lambda run: run.decode(torch.zeros(1, 16, 4), temperature=float("nan")), "temperature: expected 0 .* got nan"),
    (lambda run: run.decode(torch.zeros(16, 4)), r"z: expected \(N, S, 4\), got \(16, 4\)"),
    (lambda run: run.pieces("val"), "split: expected one of train, valid, test, got 'val'"),
    (lambda run: run.diagnose("val"), "split: expected one of train, valid, test, got 'val'"),
    (lambda run: run.interpolate(torch.zeros(16, 4), torch.zeros(16, 4), steps=2.5), "steps: expected a whole number"),
    (lambda run: load_run(run.folder, device="tpu"), "device: expected cpu.*, got 'tpu'")])
def test_what_cannot_be_is_refused_in_a_sentence(call, says, run):
    with pytest.raises(ValueError, match=says):
        call(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused(run_dir):
    with pytest.raises(ValueError, match="device: expected cpu, for torch sees no GPU, got 'cuda'"):
        load_run(run_dir, device="cuda")


def test_one_path_alone_arrays_and_tuples_are_welcome(run, by_metre):
    a, b = by_metre["4/4"], by_metre["3/4"]
    for music in (a.path, str(a.path), a, Score(a.path)):
        torch.testing.assert_close(run.encode(music), run.encode([a.path]))
    z = prior_latents(run.model, 2, 100)
    assert [notes(s) for s in run.decode(z.numpy())] == [notes(s) for s in run.decode(z)]
    expected = notes(run.morph(a, b, [0, 0, 1, 1]))
    for alpha in ((0, 0, 1, 1), np.array([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])):
        assert notes(run.morph(a, b, alpha)) == expected


def voices_at(*times, length=480, tempo=72):
    score = Score(480)
    score.tempos.append(Tempo(0, tempo))
    for program, pitch in ((52, 72), (53, 67), (54, 60), (42, 48)):
        score.tracks.append(Track("", program, False))
        score.tracks[-1].notes.extend([Note(time, length, pitch, 80) for time in times])
    return score


def test_a_window_stays_a_window_whatever_rings_on_or_is_silent(run):
    lines = [1920 * i for i in range(8)]
    for window in (cut(voices_at(0, 7200, length=2400), lines, 0, 4), cut(voices_at(1920, 3840), lines, 0, 4)):
        assert run.windows(window)[1] == [0] and notes(run.windows(window)[2][0]) == notes(window)
        torch.testing.assert_close(run.encode(window), run.encode_windows([window]))
        again = run.reconstruct(window)
        assert notes(again) == notes(run.decode(run.encode(window))[0])
        assert run.windows(again)[1] == [0], "it is one still"
        window.tracks[0].notes.append(Note(7680, 480, 60, 80))
        assert run.windows(window)[1] == [0, 1] or len(bar_starts(run.windows(window)[0])) == 5, "or a piece again"


def test_silent_windows_stay_silent(run):
    score = voices_at(*range(0, 7680, 480), *range(12 * 1920, 16 * 1920, 480))
    again = run.reconstruct(score)
    assert not [n for n in notes(again) if 7680 <= n[1] < 12 * 1920]
    assert notes(again) and notes(run.reconstruct(cut(score, bar_starts(score), 5, 4))) == []
    path = Path(__file__).parents[1] / "../shared/cases/silent_bars.mid"
    if path.exists():
        assert not [n for n in notes(run.reconstruct(path)) if 7680 <= n[1] < 12 * 1920]


def test_decoded_windows_keep_the_tempo_of_the_pieces(run):
    a, b = voices_at(0, 960, tempo=60), voices_at(0, 480, tempo=120)
    assert run.reconstruct(a).tempos[0].qpm == pytest.approx(60)
    assert [s.tempos[0].qpm for s in run.interpolate(a, b, steps=3)] == pytest.approx([60, 90, 120])
    assert run.morph(a, b, (0, 0, 0, 1)).tempos[0].qpm == pytest.approx(75)


def test_voices_the_tokenizer_does_not_know_become_their_relatives(run, tmp_path, capsys):
    score = Score(480)
    for program in (0, 7):
        score.tracks.append(Track("", program, False))
        score.tracks[-1].notes.append(Note(0, 480, 60, 80))
    run.encode([score, score])
    said = capsys.readouterr().out
    assert said.count("the score: expected the programs [42, 52, 53, 54]") == 1, "it is said once"
    assert "program 0 becomes 42, program 7 becomes 52" in said
    assert {t.program for t in run.score(score).tracks} == {42, 52}
    score.dump_midi(tmp_path / "duo.mid")
    run.reconstruct(tmp_path / "duo.mid")
    assert "duo.mid: expected the programs" in capsys.readouterr().out
    drums = Score(480)
    drums.tracks.append(Track("", 0, True))
    drums.tracks[0].notes.append(Note(0, 480, 40, 80))
    with pytest.raises(ValueError, match=r"the score: .* drums left out \(1 notes\); no note is left"):
        run.encode([drums])
    (tmp_path / "text.mid").write_text("not MIDI")
    with pytest.raises(ValueError, match=r"text\.mid: not MIDI"):
        run.encode([tmp_path / "text.mid"])


def test_a_piece_of_the_corpus_is_as_good_as_its_path(run, pieces):
    torch.testing.assert_close(run.encode([pieces[0]]), run.encode([pieces[0].path]))


def test_any_four_voices_are_welcome(run):
    """Piano voices, off the grid, in no order: they become soprano to bass."""
    score = Score(96)
    for pitch in (50, 70, 60, 40):
        track = Track("", 0, False)
        track.notes.extend([Note(96 * i + 2, 90, pitch + i % 3, 80) for i in range(16)])
        score.tracks.append(track)
    assert run.encode([score]).shape[0] == 1
    assert [t.program for t in run.score(score).tracks] == [52, 53, 54, 42]


# -- between and beyond ---------------------------------------------------------------------------------------------

def test_the_ends_of_an_interpolation_are_the_reconstructions(run, by_metre):
    a, b = by_metre["4/4"].path, by_metre["3/4"].path
    za, zb = run.encode([a])[0], run.encode([b])[0]
    scores = run.interpolate(a, b, steps=5)
    assert len(scores) == 5
    assert [notes(scores[0]), notes(scores[-1])] == [notes(s) for s in run.decode(torch.stack([za, zb]))]
    expected = run.decode(torch.stack([slerp(za, zb, i / 4) for i in range(5)]))
    assert [notes(s) for s in scores] == [notes(s) for s in expected]
    assert [notes(s) for s in run.interpolate(za, Score(b), steps=5)] == [notes(s) for s in scores], "latents will do"
    assert len(run.interpolate(a, b)) == 7


def test_a_morph_may_go_bar_by_bar(run, by_metre):
    a, b = by_metre["4/4"].path, by_metre["3/4"].path
    za, zb, _ = run.pair(a, b)
    ends = [notes(s) for s in run.decode(torch.stack([za, zb]))]
    assert [notes(run.morph(a, b, 0)), notes(run.morph(a, b, [1, 1, 1, 1]))] == ends
    half = torch.cat([za[:len(za) // 2], zb[len(zb) // 2:]])
    assert notes(run.morph(a, b, [0, 0, 1, 1])) == notes(run.decode(half[None])[0])


def test_latents_of_different_lengths_cannot_be_mixed(conv):
    with pytest.raises(ValueError, match=r"one shape to be mixed, got \(3, 4\) and \(2, 4\): the conv bottleneck"):
        conv.interpolate(torch.zeros(3, 4), torch.zeros(2, 4))


def test_samples_are_reproducible(run):
    a, b, c = (run.sample(3, seed=seed) for seed in (1, 1, 2))
    assert len(a) == 3 and [notes(s) for s in a] == [notes(s) for s in b] != [notes(s) for s in c]


@pytest.mark.parametrize("bars", [1, 4, 10])
def test_a_generated_piece_has_the_length_asked_for(bars, run, by_metre, monkeypatch):
    a, b = run.generate(bars=bars, seed=5), run.generate(bars=bars, seed=5)
    assert notes(a) == notes(b) and metres(a) == metres(b)
    assert len(bar_starts(a)) - 1 <= bars
    windows = windows_of(by_metre["4/4"].path)[:1] + windows_of(by_metre["3/4"].path)[:1]
    monkeypatch.setattr(run, "sample", lambda n, *_: (windows * n)[:n])
    score = run.generate(bars=bars)
    lines = [0, 1920, 3840, 5760, 7680, 9120, 10560, 12000, 13440, 15360, 17280][:bars + 1]
    assert bar_starts(score)[:bars + 1] == lines and all(n[1] < lines[-1] for n in notes(score))
    played = [(start, min(length, lines[-1] - start), *rest) for _, start, length, *rest in notes(windows[0])
              if start < lines[-1]]
    first = [n[1:] for n in notes(score) if n[1] < min(lines[-1], 7680)]
    assert [(start, *rest) for start, _, *rest in first] == [(start, *rest) for start, _, *rest in played]
    assert all(ours[1] == theirs[1] or ours[1] < theirs[1] and sum(theirs[:2]) > 7680
               for ours, theirs in zip(first, played, strict=True)), "only what rings into the next window is cut there"


def test_pieces_and_diagnosis_of_a_split(run, pieces, monkeypatch):
    for split in ("train", "valid", "test"):
        assert [p.name for p in run.pieces(split)] == [p.name for p in pieces if p.split == split]
    monkeypatch.setattr("mtxlib.run.diagnose", lambda model, codec, windows, config, floor: (windows.windows, floor))
    for asked in ("valid", [p for p in pieces if p.split == "valid"]):
        windows, floor = run.diagnose(asked, floor=5.0)
        assert floor == 5.0 and {int(s) for s in windows["split"]} == {1} and set(windows["shift"]) == {0}
        assert len(windows) == sum(w.note_num() > 0 for p in run.pieces("valid") for w in windows_of(p.path))


def test_importing_the_package_is_cheap():
    code = "import sys, mtxlib; print('torch' in sys.modules, 'symusic' in sys.modules); mtxlib.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"] and "has no attribute 'nothing'" in done.stderr
