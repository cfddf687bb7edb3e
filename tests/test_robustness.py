"""Hard knocks: hostile MIDI, a full disk, weights that are not ours. `python tests/hostile.py 2000` does more of it."""

import json
import os
import pickle
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import KINDS, hostile
from safetensors.torch import save_file

from mtxlib.data import tokens
from mtxlib.data.store import TokenStore
from mtxlib.data.tokens import build_store, store_folder
from mtxlib.files import digest
from mtxlib.model.train import Trainer, save_weights, train, write_lines
from mtxlib.music.corpus import load_corpus
from mtxlib.music.readers import read_safely
from mtxlib.run import load_run

# -- hostile MIDI ---------------------------------------------------------------------------------------------------

REASONS = {"empty", "not MIDI", "broken", "too big", "too many tracks", "too many notes", "too many bars", "no notes",
           "crashed its process"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "files"
    folder.mkdir()
    for seed in (*range(13 * len(KINDS)), 445):  # 445 crashes symusic 0.5.9, and the process it is read in
        kind, data = hostile(seed)
        (folder / f"{kind}-{seed:04}.mid").write_bytes(data)
    return folder


def test_the_corpus_keeps_or_leaves_out_each_with_its_reason(zoo):
    pieces = load_corpus("folder", zoo.parent / "data", archive=str(zoo), workers=2, progress=False)
    entries = json.loads((pieces[0].path.parent / "manifest.json").read_text())
    assert [e["name"] for e in entries] == sorted(f.name for f in zoo.iterdir())
    reasons = Counter(e["skipped"].split(":")[0] for e in entries if "skipped" in e)
    assert set(reasons) == REASONS, "none hung"
    assert all(e["skipped"] == "no notes" or len(e["skipped"].split(":", 1)[1]) > 3 for e in entries if "skipped" in e)
    assert all(np.prod([p.bars, p.voices]) for p in pieces) and 0.2 < len(pieces) / len(entries) < 0.8


def test_a_run_encodes_or_refuses_each_with_its_reason(zoo, run):
    n_encoded, n_dense = 0, 0
    for file in [*sorted(zoo.iterdir())[::7], *zoo.glob("dense*")][:36] + [*zoo.glob("*-0445.mid")]:
        try:
            z = run.encode([file])
            n_encoded += 1
            assert z.isfinite().all()
        except ValueError as e:
            why = str(e).removeprefix(f"{file}: ")
            assert why.split(":")[0] in REASONS or why.startswith("expected "), e
            n_dense += "notes in 4 bars" in why
    assert n_encoded and n_dense


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_is_read_or_refused_with_its_reason(kind):
    _, data = hostile(KINDS.index(kind) + 3 * len(KINDS))
    try:
        assert read_safely(data).note_num()
    except ValueError as e:
        assert str(e).removeprefix("the file: ").split(":")[0] in REASONS


# -- a full disk ----------------------------------------------------------------------------------------------------

SAYS_WHAT_TO_DO = "could not write .*what was there before is unharmed: free some space and run the same command again"


class Disk:
    """A small file system that can be filled up."""

    def __init__(self, path: Path):
        self.path, self.filler = path, path / "filler"

    def fill(self, leave: int = 0) -> None:
        with self.filler.open("wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)):
                    pass
            except OSError:
                f.truncate(max(0, f.tell() - leave))

    def free(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield Disk(path)
    subprocess.run(["umount", str(path)], check=True)


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(disk, run_config, tmp_path):
    folder = disk.path / "run"
    train(run_config.replace(steps=6), folder, "cpu")
    trainer = Trainer(run_config.replace(steps=6), folder, "cpu")
    trainer.resume()
    before = files_of(folder)
    disk.fill()
    for write in (trainer.save_state,
                  lambda: save_weights(trainer.model, folder / "model.safetensors", run_config, trainer.store.lengths),
                  lambda: write_lines(folder / "metrics.jsonl", None, [{"step": i, "split": "x"} for i in range(999)])):
        with pytest.raises(OSError, match=SAYS_WHAT_TO_DO):
            write()
        now = files_of(folder)
        assert now.pop("metrics.jsonl").startswith(before["metrics.jsonl"])
        assert now == {name: data for name, data in before.items() if name != "metrics.jsonl"}
    load_run(folder, "cpu")
    with pytest.raises(OSError, match=SAYS_WHAT_TO_DO):
        train(run_config, folder, "cpu")
    disk.free()
    train(run_config, folder, "cpu")
    undisturbed = tmp_path / "undisturbed"
    for steps in (6, 12):
        train(run_config.replace(steps=steps), undisturbed, "cpu")
    again, expected = (torch.load(f / "state.pt", weights_only=True)["model"] for f in (folder, undisturbed))
    assert all(torch.equal(again[k], expected[k]) for k in expected), "it went on as if nothing had been"


def test_a_full_disk_stops_the_corpus_and_it_goes_on_later(disk, music, pieces):
    disk.fill(leave=10 * 4096)
    with pytest.raises(OSError, match=SAYS_WHAT_TO_DO):
        load_corpus("folder", disk.path, archive=str(music), workers=1, progress=False)
    [folder] = disk.path.glob("folder-*")
    assert not (folder / "manifest.json").exists() and len(list(folder.glob("[0-9]*.mid"))) > 2
    disk.free()
    again = load_corpus("folder", disk.path, archive=str(music), workers=1, progress=False)
    assert [p.path.read_bytes() for p in again] == [p.path.read_bytes() for p in pieces]


@pytest.mark.parametrize("room", [0, 0.5, 1.5], ids=["tokenizer", "shard", "store"])
def test_a_full_disk_stops_the_store_and_it_goes_on_later(room, disk, config, pieces, store, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD", 20)
    config = config.replace(data_dir=str(disk.path))
    disk.fill(leave=int(room * sum(map(len, files_of(store.folder).values()))))
    with pytest.raises(OSError, match=SAYS_WHAT_TO_DO):
        build_store(config, pieces, workers=1)
    assert not (store_folder(config, pieces) / "meta.json").exists()
    disk.free()
    assert files_of(build_store(config, pieces, workers=1).folder) == files_of(store.folder)


# -- weights that are not ours --------------------------------------------------------------------------------------

class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def forgeries(folder: Path, weights: Path) -> dict[str, bytes]:
    """What might lie where weights should: name -> bytes. Unpickling any would make the file `opened`."""
    torch.save({"model": Evil(folder / "opened")}, folder / "zip")
    save_file({"a": torch.zeros(3)}, folder / "safetensors")
    save_file({"a": torch.zeros(3)}, folder / "marked", {"format": "mtxlib"})
    save_file({"a": torch.zeros(3)}, folder / "huge", {"format": "mtxlib", "vocab_size": "9" * 9, "n_bars": "4"})
    save_file({"a": torch.zeros(3)}, folder / "prior", {
        "format": "mtxlib prior", "weights": digest(weights), "settings": "[]"})
    claims = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return {"empty": b"", "noise": np.random.default_rng(0).bytes(5000), "text": b"[" * 100_000,
            "pickle": pickle.dumps(Evil(folder / "opened")), "legacy torch": legacy(folder), "claims": len(claims)
            .to_bytes(8, "little") + claims, "length": b"\xff" * 16,
            **{name: (folder / name).read_bytes() for name in ("zip", "safetensors", "marked", "huge", "prior")}}


def legacy(folder: Path) -> bytes:
    torch.save(Evil(folder / "opened"), folder / "legacy", _use_new_zipfile_serialization=False)
    return (folder / "legacy").read_bytes()


@pytest.mark.parametrize("name", [
    "model.safetensors", "prior.safetensors", "tokenizer.json", "config.json", "state.pt"])
def test_files_that_are_not_ours_are_refused_with_a_sentence_and_never_unpickled(name, run_dir, run_config, tmp_path):
    for kind, data in forgeries(tmp_path, run_dir / "model.safetensors").items():
        folder = tmp_path / f"run {kind}"
        shutil.copytree(run_dir, folder)
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as raised:
            train(run_config, folder, "cpu") if name == "state.pt" else load_run(folder, "cpu")
        assert len(str(raised.value)) < 600 and "\n" not in str(raised.value), (kind, str(raised.value))
        assert (folder / name).read_bytes() == data
    assert not (tmp_path / "opened").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "opened"))).close()
    assert (tmp_path / "opened").exists(), "the trap works"


@pytest.mark.parametrize("text", [
    '{"model": {"d_model": "x"}}', '{"model": 3}', '[1]', '{"data": {"hop": 1.5}}', '{"train": {"lr": null}}', '"x"'])
def test_a_config_with_wrong_types_names_the_file(text, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not a config: "):
        load_run(tmp_path / "run", "cpu")


@pytest.mark.parametrize("text", [
    '{"tokenization": "MusicTokenizer"}', '{"tokenization": "__class__"}', '{"tokenization": "REMI"}',
    '{"tokenization": ["REMI"]}', '{"tokenization": "REMI", "config": {}, "_model": "x"}'])
def test_a_tokenizer_of_another_shape_is_refused(text, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: expected"):
        load_run(tmp_path / "run", "cpu")


def test_a_store_that_was_cut_off_is_refused(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "store")
    ids = tmp_path / "store" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:5000])
    with pytest.raises(ValueError, match="ids.npy"):
        TokenStore(tmp_path / "store")
    np.save(ids, np.array([replace], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="ids.npy"):
        TokenStore(tmp_path / "store")
