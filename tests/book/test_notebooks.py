"""Every notebook as a person would run it: headless, in order, on a small corpus; 06's slider moves in its kernel."""

import json
import re
from dataclasses import fields

import nbformat
import pandas as pd
import pytest
import symusic

import mtxlib
from mtxlib import load_run
from mtxlib.book import notebooks
from mtxlib.config import PARTS
from mtxlib.music.score import note_counts

NOTEBOOKS = sorted((mtxlib.ROOT / "notebooks").glob("0*.ipynb"))
SMALL = {"pairs": "3", "pair_steps": "3", "attribute_windows": "2", "prior_steps": "3", "judged_pieces": "2",
         "judged_bars": "4", "steps_between": "3"}  # of 06
DEFAULTS = {f.name: f.default for part in PARTS for f in fields(part)}
KEYS = {"recon_nats", "rate_nats", "recon_per_token", "nats_per_grid_note", "kl_per_dim", "active_units",
        "mutual_information", "ln_n", "delta_nll_shuffled", "delta_nll_prior", "gain_over_floor", "note_f1",
        "duration_accuracy", "exact_windows", "retrieval_at_1", "prior_wellformed", "n_windows", "verdict", "advice"}
MOVE_SLIDER = """
morph = studio.children[0]
before = bytes(morph.picture.value), morph.sound.value
morph.alpha.value = 0.7
assert b"\\x89PNG" == bytes(morph.picture.value)[:4] and bytes(morph.picture.value) != before[0], "the same picture"
assert morph.sound.value != before[1] and "data:audio/ogg;base64," in morph.sound.value, "the same sound"
print("moved to", morph.alpha.label)
"""


@pytest.fixture(scope="module")
def executed(music, tmp_path_factory):
    """The folder of a run of all notebooks; 06 has one cell more, which moves the slider."""
    copies, out = tmp_path_factory.mktemp("workbook") / "notebooks", tmp_path_factory.mktemp("outputs") / "tiny"
    copies.mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        if path.stem.startswith("06"):
            notebook.cells.append(nbformat.v4.new_code_cell(MOVE_SLIDER))
        nbformat.write(notebook, copies / path.name)
    given = {"source": "folder", "archive": str(music), "data_dir": str(music.parent / "data"), "hop": "2",
             "piece_a": "", "long_bars": "8", "samples": "3", "saved": "2", **SMALL}
    notebooks.run_notebooks([], out, "tiny", given, copies)
    return out


@pytest.mark.parametrize("bottleneck", ["none", "conv", "linear1d"])
def test_the_run_notebooks_take_every_bottleneck(bottleneck, music, tmp_path):
    given = {"source": "folder", "archive": str(music), "data_dir": str(music.parent / "data"), "hop": "2",
             "samples": "2", "saved": "1", "long_bars": "4", "bottleneck": bottleneck, **SMALL}
    notebooks.run_notebooks(["04", "05", "06"], tmp_path / "run", "tiny", given)
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert (diagnosis["verdict"] == "collapsed" and not diagnosis["kl_per_dim"]) == (bottleneck == "none")


def outputs(executed, number: str) -> str:
    """All printed text of a notebook."""
    [path] = executed.glob(f"{number}_*.ipynb")
    return "\n".join(output.get("text", "") for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
                     for output in cell.outputs)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06"])
def test_each_notebook_runs_and_shows_something(executed, number):
    [path] = executed.glob(f"{number}_*.ipynb")
    shown = [kind for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
             for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in shown


def test_the_run_folder_is_complete(executed, music):
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "model.safetensors", "state.pt",
            "diagnosis.json"} <= {path.name for path in executed.iterdir()}
    diagnosis = json.loads((executed / "diagnosis.json").read_text())
    assert KEYS <= set(diagnosis) and diagnosis["verdict"] in ("healthy", "weak", "collapsed")
    run = load_run(executed, "cpu")
    [a] = run.decode(run.encode_windows(run.windows(music / "piece00.mid")[2][:1]))
    assert note_counts(a) == note_counts(run.reconstruct(run.windows(music / "piece00.mid")[2][0]))


def test_the_samples_are_midi_that_opens(executed):
    names = {path.name for path in (executed / "samples").glob("*.mid")}
    assert {"original_00.mid", "reconstruction_00.mid", "interpolation_00.mid", "prior_02.mid",
            "long_8_bars.mid", "my_file_again.mid"} <= names
    for path in (executed / "samples").glob("*.mid"):
        symusic.Score(path)
    assert "sample 2</b><audio" in (executed / "samples" / "index.html").read_text()


def test_round_trip_is_lossless_in_the_notebook(executed):
    assert re.search(r"\b0 of \d+ windows|\b0 lossy|lossy[^\n]*\b0\b", outputs(executed, "02"))


def test_moving_the_slider_changes_roll_and_sound(executed):
    assert "moved to α 0.70" in outputs(executed, "06")


FIGURES = dict.fromkeys(notebooks.FIGURES, 0.5) | {"verdict": "healthy", "n_windows": 9, "seconds": 100}
SWEEP = [  # a table as mtx sweep writes it: settings that a run leaves to the preset are empty
    {"run": "plain", "state": "done", **FIGURES, "rate_nats": 200.0, "recon_nats": 40.0, "note_f1": 0.75},
    {"run": "plain-seed-1", "state": "done", "seed": 1, **FIGURES, "rate_nats": 210.0, "recon_nats": 41.0,
     "note_f1": 0.625},
    {"run": "pressed-hard", "state": "done", "beta_max": 1.0, **FIGURES, "rate_nats": 0.0, "recon_nats": 138.0,
     "note_f1": 0.05, "verdict": "collapsed"},
    {"run": "stumbled", "state": "failed", "beta_max": 9.0},
    {"run": "none", "state": "done", "bottleneck": "none", **FIGURES, "rate_nats": 0.0, "recon_nats": 137.0,
     "note_f1": 0.04, "verdict": "collapsed"},
]


def sweep_notebook(rows: list[dict], folder) -> str:
    """What 07 prints about a table of these rows."""
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    notebooks.run_notebooks(["07"], folder / "run", given={"table": str(folder / "table.csv")})
    return outputs(folder / "run", "07")


def test_the_sweep_notebook_draws_the_runs_that_finished(tmp_path):
    printed = sweep_notebook(SWEEP, tmp_path)
    assert (tmp_path / "figures" / "07_rate_distortion.png").stat().st_size > 10_000
    assert "4 of 5 runs have figures; without: stumbled (failed)" in printed
    assert "The floor is 137 nats a window (run none" in printed
    assert "note_f1 differs by up to 0.125, the rate by up to 10.0" in printed  # between the two seeds of plain
    assert "No two runs differ only in condition." in printed


def test_the_sweep_notebook_needs_no_floor(tmp_path):
    named = [{**row, "run": f"beta_max={row.get('beta_max', 0.3)},seed=0"} for row in SWEEP if row.get("seed") != 1]
    printed = sweep_notebook(named[:-1], tmp_path)
    assert (tmp_path / "figures" / "07_rate_distortion.png").exists()
    assert "the floor is not known" in printed and "No setting was run with two seeds" in printed


def test_the_sweep_notebook_refuses_a_table_without_a_finished_run(tmp_path):
    with pytest.raises(notebooks.NotebookFailed, match="expected a finished run"):
        sweep_notebook(SWEEP[3:4], tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "commit notebooks without outputs"
    assert not any(re.search(r"^class ", cell.source, re.MULTILINE) for cell in code), "classes belong in mtxlib"
    assert "begin(globals())" in code[1].source and not any("chdir" in cell.source for cell in code)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.source.startswith(f"# {path.stem[:2]} ") and "**The question.**" in first.source
    assert last.cell_type == "markdown" and "## The answer" in last.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_have_the_defaults_of_the_config(path):
    declared = notebooks.declared(path)
    assert {name: value for name, value in declared.items() if name in DEFAULTS} == {
        name: DEFAULTS[name] for name in declared if name in DEFAULTS}
