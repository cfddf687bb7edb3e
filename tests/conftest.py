"""A small corpus made here, its token store and a run trained on it for a few steps, once a session."""

import ast
import random
import shutil
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
from symusic import Note, Score, TimeSignature, Track

from mtxlib import ROOT
from mtxlib.config import Config
from mtxlib.music.corpus import load_corpus

torch.set_num_threads(1)

SIXTEENTH = 120  # ticks
VOICES = ((52, 67), (53, 60), (54, 53), (42, 45))  # program and middle pitch, soprano to bass
METRES = {(4, 4): 16, (3, 4): 12, (6, 8): 12}  # metre: sixteenths a bar


def four_voices(seed: int, metres: list[tuple[tuple[int, int], int]], spread: int = 7) -> Score:
    """Four lines with rests, syncopations, long and repeated notes; metres: (metre, bars of it) in their order."""
    r, score, bar_line = random.Random(seed), Score(480), 0
    for metre, bars in metres:
        score.time_signatures.append(TimeSignature(bar_line * SIXTEENTH, *metre))
        bar_line += METRES[metre] * bars
    for program, middle in VOICES:
        track, time = Track("", program, False), 0
        while time < bar_line:
            length = min(r.choice((1, 2, 2, 3, 4, 4, 4, 6, 8, 12)), bar_line - time)
            if r.random() < 0.85 or time == 0:  # a first note at once: no pickup to put right
                track.notes.append(Note(time * SIXTEENTH, length * SIXTEENTH, middle + r.randint(-spread, spread), 80))
            time += length
        score.tracks.append(track)
    return score


def score_of(*voices, metre=(4, 4)) -> Score:
    """Voices of (start, length, pitch) in quarters; soprano first."""
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, *metre))
    for (program, _), notes in zip(VOICES, voices, strict=False):
        track = Track("", program, False)
        track.notes.extend([Note(int(start * 480), int(length * 480), pitch, 80) for start, length, pitch in notes])
        score.tracks.append(track)
    return score


def write_music(folder: Path) -> Path:
    """Sixteen pieces: the three metres, changes between them, one shorter than a window, one with eight empty bars."""
    folder.mkdir()
    kinds = [[((4, 4), 8)], [((3, 4), 9)], [((6, 8), 6)], [((4, 4), 3), ((3, 4), 4), ((6, 8), 3)]]
    pieces = {f"piece{seed:02}": four_voices(seed, kinds[seed % 4]) for seed in range(14)}
    pieces["short"] = four_voices(100, [((4, 4), 2)])
    pieces["gap"] = four_voices(101, [((4, 4), 14)])
    for track in pieces["gap"].tracks:
        track.notes = [n for n in track.notes if not 3 * 16 <= n.start / SIXTEENTH < 12 * 16]
    for name, score in pieces.items():
        score.dump_midi(folder / f"{name}.mid")
    return folder


def defined_in(notebook: str) -> ModuleType:
    """What the cells of a notebook import and define, functions and CONSTANTS, without running the rest."""
    module = ModuleType(notebook)
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
        tree = ast.parse(cell.source if cell.cell_type == "code" else "")
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
                     or isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()]
        exec(compile(tree, notebook, "exec"), vars(module))
    return module


@pytest.fixture(scope="session")
def music(tmp_path_factory):
    return write_music(tmp_path_factory.mktemp("corpus") / "music")


@pytest.fixture(scope="session")
def config(music):
    """The configuration without its store. What tests rely on is named here, so that defaults may change."""
    return Config.from_flat({"preset": "tiny", "source": "folder", "archive": str(music), "hop": 2, "bpe_vocab": 0,
                             "data_dir": str(music.parent / "data"), "lr": 1e-3, "beta_max": 1.0, "beta_warmup": 6,
                             "steps": 12, "batch_size": 8, "eval_every": 6, "dec_token_dropout": 0.3, "wandb": "off"})


@pytest.fixture(scope="session")
def pieces(config):
    return load_corpus("folder", config.data.data_dir, archive=config.data.archive, workers=1, progress=False)


@pytest.fixture(scope="session")
def store(config, pieces):
    from mtxlib.data.tokens import build_store

    return build_store(config, pieces)


@pytest.fixture(scope="session")
def run_config(config, store):
    """The configuration of a run that can be trained."""
    return config.replace(store=str(store.folder), precision="fp32")


@pytest.fixture(scope="session")
def run_dir(run_config, store, tmp_path_factory):
    """A run of twelve steps. Tests must not write into it."""
    from mtxlib.model.train import train

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(run_config, folder, "cpu")
    shutil.copy(store.folder / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def run(run_dir):
    from mtxlib.run import load_run

    return load_run(run_dir, "cpu")
