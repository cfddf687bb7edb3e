"""How a notebook begins."""

from pathlib import Path

import pytest

from mtxlib import ROOT
from mtxlib.book.setup import begin
from mtxlib.config import Config


def test_the_dials_among_a_notebooks_names_make_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and back again after the test
    config = begin({"steps": 7, "source": "folder", "run_dir": "outputs/a", "piece": "x", "Path": Path})
    assert config == Config.from_flat({"steps": 7, "source": "folder"})
    assert Path.cwd() == ROOT


def test_a_dial_that_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'steps': expected more than 0, got 0"):
        begin({"steps": 0})
