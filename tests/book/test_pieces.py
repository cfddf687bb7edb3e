"""Pieces of a run: those of its corpus, wherever they are asked for, and those that lie in its folder."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from symusic import Score

import mtxlib
from mtxlib.config import SOURCES
from mtxlib.music.corpus import TASKS
from mtxlib.run import load_run


def test_kept_pieces_need_no_corpus_and_are_those_that_may_be_given_on(run, pieces, tmp_path):
    own = copy.copy(run)
    own.folder = tmp_path / "run"
    own.folder.mkdir()
    own.pieces = lambda split: [f"from the corpus: {split}"]
    assert own.kept_pieces("test") == ["from the corpus: test"]
    test = [replace(piece, split="test") for piece in pieces]
    restricted = replace(test[3], source="bach")
    own.keep_pieces([*test[:3], restricted, *test[4:]], 8)
    kept = own.kept_pieces("test")
    assert len(kept) == 8 and restricted.name not in [piece.name for piece in kept]
    assert all(piece.bars >= own.n_bars and piece.path.parent == own.folder / "pieces" for piece in kept)
    assert [Score(piece.path) for piece in kept[:3]] == [Score(piece.path) for piece in test[:3]]
    assert own.kept_pieces("valid") == ["from the corpus: valid"]
    own.keep_pieces(test[:2])
    assert len(list((own.folder / "pieces").glob("*.mid"))) == len(own.kept_pieces("test")) == 2


def test_pieces_are_those_of_the_project_wherever_it_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = run.config.data
    monkeypatch.setattr("mtxlib.run.ROOT", Path(data.archive).parent)
    own = copy.copy(run)
    own.config = run.config.replace(data_dir=Path(data.data_dir).name, archive=Path(data.archive).name)
    assert [p.name for p in own.pieces("test")] == [p.name for p in run.pieces("test")]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="split: expected one of train, valid, test, got 'val'"):
        run.pieces("val")


def test_the_shipped_run_has_pieces_and_their_licence():
    pieces = load_run(mtxlib.ROOT / "outputs" / "reference", "cpu").kept_pieces("test")
    assert len(pieces) == 12 and {(p.source, p.licence) for p in pieces} == {("jsfakes", "CC BY 4.0, Omar Peracha")}
    for piece in pieces:
        assert mtxlib.ROOT / "outputs" / "reference" / "pieces" == piece.path.parent and Score(piece.path).note_num()


def test_the_config_knows_the_sources_of_the_corpus():
    assert set(SOURCES) == set(TASKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(run_dir):
    with pytest.raises(ValueError, match="device: expected cpu, for torch sees no GPU, got 'cuda:1'"):
        load_run(run_dir, "cuda:1")
