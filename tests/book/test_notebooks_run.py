"""The command is tried on small notebooks made here; the real ones have their own test."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from symusic import Score

from mtxlib import ROOT
from mtxlib.book import cli, notebooks
from mtxlib.book.sweep import SWEEP_FORMAT, read_sweep
from mtxlib.config import PRESETS

DEFAULTS = 'preset: str = "quick"  # named settings\nrun_dir: str = "outputs/x"  # where this run writes'
NOTE = """
import os, sys
with open("ran.txt", "a") as f:
    f.write({!r} + "\\n")
"""


def make(folder: Path, name: str, parameters: str, *cells: str) -> Path:
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[tagged, *map(nbformat.v4.new_code_cell, cells)])
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def ran(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().split()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{seconds} s passed"
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "notebooks", "01_data", DEFAULTS + "\nseed: int = 0", NOTE.format("01"))
    make(tmp_path / "notebooks", "02_training", DEFAULTS + "\nsteps: int = 50  # steps = updates\nlr: float = 1\n"
         "wandb: str = 'off'\nrates: list = [1.0]", NOTE.format("02"))
    make(tmp_path / "notebooks", "07_sweep", DEFAULTS, NOTE.format("07"))
    return tmp_path / "notebooks"


def record(folder: Path, out: Path, stem: str, passed: dict) -> dict:
    """As `run_notebooks` notes a notebook that is done."""
    notebook = folder / f"{stem}.ipynb"
    (out / ".done").mkdir(parents=True, exist_ok=True)
    (out / notebook.name).touch()
    entry = {**notebooks.rests_on(notebook, passed, out), "seconds": 1.0,
             "products": notebooks.products(notebook, out)}
    notebooks.done_file(notebook, out).write_text(json.dumps(entry))
    return entry


# Without a kernel


def test_a_changed_source_and_lost_products_are_to_do_again(tmp_path):
    folder, out, music = tmp_path / "notebooks", tmp_path / "out", tmp_path / "music"
    make(folder, "04_training", DEFAULTS + '\narchive: str = ""')
    make(folder, "05_latent", DEFAULTS)
    music.mkdir()
    (music / "a.mid").write_text("a")
    passed = {"archive": str(music)}

    def is_done():
        given = {"04_training": passed, "05_latent": {}}
        return [notebooks.seconds_done(folder / f"{stem}.ipynb", given[stem], out) is not None for stem in given]

    def do():
        (out / ".done").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps({"data": {"archive": str(music)}}))
        (out / "model.safetensors").touch()
        assert record(folder, out, "04_training", passed)["products"] == ["config.json", "model.safetensors"]
        (out / "diagnosis.json").touch()
        assert record(folder, out, "05_latent", {})["products"] == ["diagnosis.json"]
        assert is_done() == [True, True]

    def is_stale():
        (out / ".done").mkdir(parents=True, exist_ok=True)
        rests = notebooks.rests_on(folder / "04_training.ipynb", passed, out)
        return notebooks.is_stale(out, out / ".done" / "04_training.json", rests)

    assert not is_stale()  # nothing is done yet
    do()
    assert not is_stale()
    (music / "b.mid").write_text("b")
    assert is_done() == [False, False] and is_stale()
    do()
    (music / "a.mid").write_text("another")
    assert is_done() == [False, False]
    do()
    (out / "diagnosis.json").unlink()
    assert is_done() == [True, False]
    do()
    (out / "model.safetensors").unlink()
    assert is_stale() and is_done() == [False, True]  # 05 follows, since the done file before it will be another
    do()
    (out / "samples.mid").touch()
    (out / "samples.mid").unlink()
    assert is_done() == [True, True]


def test_paths_are_those_of_the_folder_in_which_the_command_is_given(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = notebooks.from_here({"archive": "music", "archives": "jsb=../b.json", "table": "/t.csv", "my_file": "",
                                 "seed": "3"})
    assert given == {"archive": str(tmp_path / "elsewhere" / "music"), "archives": f"jsb={tmp_path / 'b.json'}",
                     "table": "/t.csv", "my_file": "", "seed": "3"}
    make(tmp_path / "notebooks", "01_data", DEFAULTS + '\narchive: str = ""')
    sweep(tmp_path, "list: [{archive: music}]")
    assert runs(tmp_path / "ablation.yaml", tmp_path / "notebooks") == {"archive=music": {"archive": given["archive"]}}
    monkeypatch.chdir(tmp_path)
    [passed] = notebooks.plan([tmp_path / "notebooks" / "01_data.ipynb"], tmp_path / "out", "tiny",
                              {"archive": given["archive"]}).values()
    assert passed["archive"] == "elsewhere/music"  # so that executed notebooks hold no machine's paths


def test_declared_gives_typed_defaults(folder):
    found = notebooks.declared(folder / "02_training.ipynb")
    assert found == {"preset": "quick", "run_dir": "outputs/x", "steps": 50, "lr": 1.0, "wandb": "off", "rates": [1.0]}
    assert type(found["lr"]) is float and type(found["steps"]) is int


@pytest.mark.parametrize("cell", ["a: int = len('b')", "import os", "a.b = 1", "a: int", "a = = 1"])
def test_declared_refuses_what_papermill_cannot_set(tmp_path, cell):
    with pytest.raises(ValueError, match="01_x.ipynb: expected one cell tagged 'parameters', of lines `name: type"):
        notebooks.declared(make(tmp_path, "01_x", cell))


@pytest.mark.parametrize("path", sorted(notebooks.NOTEBOOKS.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_papermill_documents_every_parameter(path):
    """papermill --help-notebook drops a line with a second equals sign, for one."""
    shown = papermill.inspect_notebook(path)
    assert set(shown) == set(notebooks.declared(path))
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in shown.values())


@pytest.mark.parametrize("text, like, expected", [
    ("3", 1, 3), ("1e-3", 1.0, 0.001), ("2", 1.0, 2.0), ("true", False, True), ("False", True, False),
    ("off", "offline", "off"), ("1", "a", "1"), ("[1, 2e-1]", [0.5], [1.0, 0.2]), (["3", "4"], [1], [3, 4]),
    ("[a, 1]", [], ["a", 1]), ("[]", [1], []),
])
def test_typed(text, like, expected):
    value = notebooks.typed("x", text, like)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text, like, message", [
    ("abc", 1.0, "parameter 'x': expected float, got 'abc'"), ("0.5", 1, "expected int, got '0.5'"),
    ("1", True, "expected bool, got '1'"), ("3", [1], "expected list, got '3'"), ("[a]", [1], "expected int, got 'a'"),
    (["a"], "a", "expected str, got "), ("[", [1], "expected list, got '\\['"),
])
def test_typed_refuses(text, like, message):
    with pytest.raises(ValueError, match=message):
        notebooks.typed("x", text, like)


def test_plan_passes_what_each_notebook_declares(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    found = notebooks.find_notebooks(folder, [])
    first, second = notebooks.plan(found, folder.parent / "out", "tiny", {"lr": "2"}).values()
    assert first == {"preset": "tiny", "run_dir": "out"}
    steps, wandb = PRESETS["tiny"]["steps"], PRESETS["tiny"]["wandb"]
    assert second == {"preset": "tiny", "run_dir": "out", "steps": steps, "wandb": wandb, "lr": 2.0}


@pytest.mark.parametrize("given, message", [
    ("step=3", "mtx: unknown parameter 'step': no notebook to be run declares it; did you mean 'steps'?"),
    ("lr=abc", "mtx: parameter 'lr': expected float, got 'abc'"),
    ("wandb=on", "mtx: parameter 'wandb': expected one of off, offline, online, got 'on'"),
    ("preset=tiny", "mtx: parameter 'preset' is set by --preset"),
    ("steps", "mtx: parameter 'steps': expected int, got ''"),
    ("lr=nan", "mtx: parameter 'lr': expected a finite number, got nan"),
    ("rates=[inf]", "mtx: parameter 'rates': expected a finite number, got [inf]"),
    ("wandb=online", "mtx: parameter 'wandb': expected a login for online, found none; say `wandb login` first, or "
                     "wandb=offline"),
])
def test_run_refuses_before_anything_runs(folder, tmp_path, capsys, given, message, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    args = ["run", "--notebooks", str(folder), "--out", str(tmp_path / "out"), "-p", given]
    assert cli.main(args) == 2
    assert capsys.readouterr().err.strip() == message
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran.txt").exists()


def test_unknown_preset_notebook_and_unfit_folder_are_refused(folder, tmp_path, capsys):
    common = ["--notebooks", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(["run", "--preset", "tini", *common]) == 2
    assert "unknown preset 'tini'; did you mean 'tiny'?" in capsys.readouterr().err
    assert cli.main(["run", "03", *common]) == 2
    assert "expected one notebook for '03', got none" in capsys.readouterr().err
    assert cli.main(["run", *common[:2], "--out", str(folder)]) == 2
    assert "the executed copies would replace the notebooks" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for command in (["run", *common[:2]], ["sweep", str(sweep(tmp_path, "grid: {lr: [1]}")), *common[:2]]):
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            assert cli.main([*command, "--out", str(out)]) == 2
            assert f"--out {out}: expected a folder that can be written to" in capsys.readouterr().err


def test_a_login_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    notebooks.check_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ValueError, match="expected a login"):
        notebooks.check_login()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    notebooks.check_login()


def test_find_notebooks(folder):
    names = lambda *wanted: [path.stem for path in notebooks.find_notebooks(folder, list(wanted))]  # noqa: E731, short
    assert names() == ["01_data", "02_training"]
    assert names("07", "01") == ["01_data", "07_sweep"]
    assert names(str(folder / "02_training.ipynb"), "02") == ["02_training"]
    with pytest.raises(ValueError, match="expected one notebook for '0', got 01_data, 02_training, 07_sweep"):
        names("0")


def test_log_shows_a_bar_now_and_then_and_every_line(capsys):
    stream = notebooks.Stream()
    for i in range(100):
        stream.write(f"\rtraining {i}")
    stream.write("\n")
    stream.write("a warning\n  of two lines\n")
    assert capsys.readouterr().err == "training 0\na warning\n  of two lines\n"


def test_report_says_where_the_time_went(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / ".done").mkdir(parents=True)
    for stem, seconds in (("04_training", 200.4), ("01_data", 9.0)):
        (tmp_path / "out" / ".done" / f"{stem}.json").write_text(json.dumps({"seconds": seconds}))
    assert "seconds             209       01: 9, 04: 200\n" in notebooks.report(tmp_path / "out")


def test_report_shows_figures_and_bears_their_absence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    (out / "samples" / "a.mid").touch()
    assert "diagnosis           none: out/diagnosis.json" in notebooks.report(out)
    (out / "diagnosis.json").write_text(json.dumps({"verdict": "healthy", "rate_nats": 123.4567, "advice": "none"}))
    report = notebooks.report(out)
    assert "verdict             healthy\n" in report and "123.457   nats per window" in report
    assert "out/samples/*.mid (1)" in report and "advice" not in report


def test_the_recipe_for_weights_and_biases_is_a_command_that_mtx_takes(tmp_path):
    """Filled in by the functions of wandb's own agent, run by a shell that finds an `mtx` which notes what it gets."""
    from wandb.sdk.launch.sweeps import utils

    recipe = yaml.safe_load((ROOT / "docs" / "wandb.yaml").read_text())
    chosen = {"steps": 3, "lr": 1.5e-05, "latent_channels": 8, "dec_token_dropout": 0.25}
    assert set(recipe["parameters"]) == set(chosen)
    filled = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    command = [part for item in utils.create_sweep_command(recipe["command"])
               for part in (filled[item[2:-1]] if item.startswith("${") and item.endswith("}") else [item])]
    (tmp_path / "mtx").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > got.txt\n")
    (tmp_path / "mtx").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    args = cli.parser().parse_args((tmp_path / "got.txt").read_text().splitlines())
    found = notebooks.find_notebooks(notebooks.NOTEBOOKS, args.notebook)
    work = notebooks.plan(found, args.out, args.preset, dict(pair.split("=") for pair in args.p))
    [passed] = [passed for notebook, passed in work.items() if notebook.stem.startswith("04")]
    assert passed == {"run_dir": "outputs/wandb/abc", "wandb": "online", **chosen}


# Sweep files


def sweep(tmp_path: Path, text: str) -> Path:
    (tmp_path / "ablation.yaml").write_text(text)
    return tmp_path / "ablation.yaml"


def runs(file: Path, folder: Path) -> dict:
    return read_sweep(file, folder)[3]


def test_reconstruct_takes_a_file_through_the_latent(run_dir, pieces, tmp_path, capsys):
    from mtxlib.run import load_run

    original, out = pieces[0].path, tmp_path / "again.mid"
    assert cli.main(["reconstruct", str(original), str(out), "--run", str(run_dir)]) == 0
    load_run(run_dir, "cpu").reconstruct(original).dump_midi(tmp_path / "expected.mid")
    assert out.read_bytes() == (tmp_path / "expected.mid").read_bytes() and Score(out).note_num()
    assert "note-F1 0." in capsys.readouterr().out
    assert cli.main(["reconstruct", str(original), str(tmp_path / "a.musicxml"), "--run", str(run_dir)]) == 0
    assert "<score-partwise" in (tmp_path / "a.musicxml").read_text()


@pytest.mark.parametrize(("file", "out", "message"), [
    ("missing.mid", "out.mid", "missing.mid"), ("text.mid", "out.mid", "text.mid: not MIDI"),
    ("text.mid", "out.wav", "expected a name that ends in .mid or .musicxml")])
def test_reconstruct_refuses_in_one_sentence(file, out, message, run_dir, tmp_path, capsys):
    (tmp_path / "text.mid").write_text("no music")
    assert cli.main(["reconstruct", str(tmp_path / file), str(tmp_path / out), "--run", str(run_dir)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / out).exists()


def test_reconstruct_never_overwrites_what_it_reads_and_asks_first(pieces, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.mid"
    own.write_bytes(pieces[0].path.read_bytes())
    (tmp_path / "link.mid").symlink_to(own)
    (tmp_path / "folder.mid").mkdir()
    for out, message in (("own.mid", "is the file to be read"), ("link.mid", "is the file to be read"),
                         ("folder.mid/../own.mid", "is the file to be read"),
                         ("folder.mid", "expected a file's name in a folder that is there"),
                         ("missing/out.mid", "expected a file's name in a folder that is there")):
        assert cli.main(["reconstruct", str(own), out, "--run", "no run"]) == 2
        assert message in capsys.readouterr().err and own.read_bytes() == pieces[0].path.read_bytes()
    for temperature in ("-1", "nan"):
        assert cli.main(["reconstruct", "own.mid", "out.mid", "--run", "no run", "--temperature", temperature]) == 2
        assert "parameter 'temperature': expected" in capsys.readouterr().err


def test_the_notes_that_are_counted_are_those_of_the_file_and_what_was_given_up_is_said(
        run_dir, pieces, tmp_path, capsys):
    score = Score(pieces[0].path)
    given, out = score.note_num(), tmp_path / "again.mid"
    score.tracks[0].notes.append(score.tracks[0].notes[0])  # a double
    score.dump_midi(tmp_path / "a.mid")
    for file, notes in ((pieces[0].path, f"{given} notes\n"), (tmp_path / "a.mid", f"{given + 1} notes, 1 merged\n")):
        assert cli.main(["reconstruct", str(file), str(out), "--run", str(run_dir)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{out}: {Score(out).note_num()} notes, note-F1 ")
        assert said.endswith(f"; {file}: {notes}")


def test_the_shipped_run_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["app"], ["reconstruct", "a.mid", "b.mid"]):
        assert (cli.parser().parse_args(command).run / "model.safetensors").exists()



def test_grid_takes_all_combinations_over_the_common_parameters(folder, tmp_path):
    found = runs(sweep(tmp_path, "params: {steps: 5, lr: 3}\ngrid: {lr: [1e-3, 2], wandb: [off]}"), folder)
    assert found == {"lr=1e-3,wandb=off": {"steps": "5", "lr": "1e-3", "wandb": "off"},
                     "lr=2,wandb=off": {"steps": "5", "lr": "2", "wandb": "off"}}


def test_list_takes_names_or_makes_them(folder, tmp_path):
    found = runs(sweep(tmp_path, "list: [{name: ../my run, lr: 1}, {lr: 2, rates: [1, 2]}, {}]"), folder)
    assert list(found) == ["my-run", "lr=2,rates=1+2", "run"]
    assert found["my-run"] == {"lr": "1"}


def test_random_is_the_same_every_time_and_keeps_within_bounds(folder, tmp_path):
    space = "{lr: {log_uniform: [1e-4, 1e-2]}, steps: {uniform: [10, 20]}, wandb: {choice: [off, online]}}"
    first = runs(sweep(tmp_path, f"random: {{n: 20, seed: 1, space: {space}}}"), folder)
    more = runs(sweep(tmp_path, f"random: {{n: 40, seed: 1, space: {space}}}"), folder)
    other = runs(sweep(tmp_path, f"random: {{n: 20, seed: 2, space: {space}}}"), folder)
    assert list(more)[:20] == list(first) and not set(first) & set(other)
    rates = [float(given["lr"]) for given in more.values()]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and 10 <= sum(rate < 1e-3 for rate in rates) <= 30
    assert {int(given["steps"]) for given in more.values()} == set(range(10, 21))
    assert {given["wandb"] for given in more.values()} == {"off", "online"}


@pytest.mark.parametrize("text, message", [
    ("grids: {lr: [1]}", "unknown key 'grids', or not such a value; did you mean 'grid'"),
    ("grid: {lr: [1]}\nlist: [{lr: 1}]", "expected one of grid, list and random, got "),
    ("grid: {lr: 1}", "grid: expected a list of values for 'lr', got '1'"),
    ("grid: {step: [1]}", "unknown parameter 'step': no notebook to be run declares it; did you mean 'steps'"),
    ("grid: {steps: [1, 0.5]}", "parameter 'steps': expected int, got '0.5'"),
    ("params: {wandb: on}\ngrid: {steps: [1]}", "parameter 'wandb': expected one of off, offline, online, got 'on'"),
    ("list: [{steps: 1}, {steps: 1}]", "two runs are called 'steps=1'"),
    ("random: {n: 2}", "random: expected n, seed and space, got n"),
    ("random: {n: 2, space: {lr: {normal: [0, 1]}}}", "random: expected choice, uniform or log_uniform"),
    ("notebooks: ['05']\ngrid: {lr: [1]}", "expected one notebook for '05', got none"),
    ("preset: tini\ngrid: {lr: [1]}", "unknown preset 'tini'; did you mean 'tiny'"),
    ("grid: {", "while parsing"), ("- a", "A sweep looks like this"),
])
def test_sweep_refuses_before_anything_starts(folder, tmp_path, capsys, text, message):
    args = ["sweep", str(sweep(tmp_path, text)), "--notebooks", str(folder)]
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error and SWEEP_FORMAT in error
    assert not (tmp_path / "outputs").exists()


# With a kernel


def test_run_resumes_and_repeats_what_changed_and_all_after_it(folder, tmp_path, capsys, monkeypatch):
    wrong = tmp_path / "jupyter" / "kernels" / "python3"  # a kernel of another Python, found first
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    make(folder, "02_training", DEFAULTS + "\nsteps: int = 50", NOTE.format("02"), """
import json
from pathlib import Path
from tqdm.auto import tqdm
for _ in tqdm(range(steps), "training", mininterval=0):
    pass
Path(run_dir, "got.json").write_text(json.dumps([preset, run_dir, steps, os.getcwd(), sys.executable]))""")
    out = tmp_path / "outputs" / "a"

    def run(**given):
        notebooks.run_notebooks([], out, "tiny", given, folder)
        return capsys.readouterr()

    shown = run(steps="3")
    assert json.loads((out / "got.json").read_text()) == ["tiny", "outputs/a", 3, str(tmp_path), sys.executable]
    assert "training:   0%" in shown.err and "02_training " in shown.out
    copy = nbformat.read(out / "02_training.ipynb", 4)
    texts = [output.text for cell in copy.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert len(texts) == 1 and "100%" in texts[0] and " 0%" not in texts[0]  # the last state of the bar alone
    assert str(tmp_path) not in json.dumps(copy.metadata)
    assert ran(tmp_path) == ["01", "02"]

    shown = run(steps="3")
    assert "02_training: done already, " in shown.out and " s saved; --force repeats it" in shown.out
    assert ran(tmp_path) == ["01", "02"]

    with open(out / ".done" / "lock", "w") as lock:  # another process at work there is waited for
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=run, kwargs={"steps": "3"})
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(10)
    assert not second.is_alive()

    run(steps="4")
    assert ran(tmp_path) == ["01", "02", "02"]
    make(folder, "01_data", DEFAULTS, NOTE.format("01") + "# changed")
    run(steps="4")
    assert ran(tmp_path) == ["01", "02", "02", "01", "02"]


def test_first_failure_stops_with_cell_and_error_and_the_next_run_goes_on(folder, tmp_path, capsys):
    make(folder, "02_training", DEFAULTS, "def f(x):\n    return 1 / x", "# divide\nf(0)")
    make(folder, "03_model", DEFAULTS, NOTE.format("03"))
    args = ["run", "--notebooks", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert "02_training failed in cell [3]:" not in error  # papermill's own cell counts as one more
    assert "02_training failed in cell [4]:\n    # divide\n    f(0)\n" in error
    assert "ZeroDivisionError: division by zero" in error and "As far as it got: out/02_training.ipynb" in error
    assert "ZeroDivisionError" in (tmp_path / "out" / "02_training.ipynb").read_text()
    assert ran(tmp_path) == ["01"]
    make(folder, "02_training", DEFAULTS, "import os\nos._exit(9)")
    assert cli.main(args) == 1
    assert "02_training: the kernel died" in capsys.readouterr().err
    make(folder, "02_training", DEFAULTS, NOTE.format("02"))
    assert cli.main(args) == 0
    assert ran(tmp_path) == ["01", "02", "03"]
    assert "notebooks           " in capsys.readouterr().out


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_ending_a_run_lets_the_notebook_save_itself(tmp_path):
    make(tmp_path / "notebooks", "01_slow", DEFAULTS, """
import os, time
from pathlib import Path
Path("pid").write_text(str(os.getpid()))
try:
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1)
    Path("saved").touch()""")
    command = [sys.executable, "-m", "mtxlib.book.cli", "run", "--notebooks", "notebooks", "--out", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            time.sleep(0.3)
        finally:
            process.terminate()
        assert "stopped; the same command goes on from here" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert (tmp_path / "saved").exists() and not list(tmp_path.glob("out/.done/*.json"))
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_killed_sweep_repeats_no_finished_run_and_completes_its_table(tmp_path):
    make(tmp_path / "notebooks", "04_training", DEFAULTS + '\nseed: int = 0\nmood: str = "quick"', """
import json, os, time
from pathlib import Path
with open(f"{mood}.txt", "a") as f:
    f.write(f"{os.getpid()}\\n")
assert mood != "bad", "a bad mood"
while mood == "slow" and not Path("go").exists():
    time.sleep(0.1)
Path(run_dir, "diagnosis.json").write_text(json.dumps({"verdict": "healthy", "rate_nats": 100.0 + seed}))""")
    sweep(tmp_path, "notebooks: ['04']\nlist: [{mood: quick, seed: 1}, {mood: bad}, {mood: slow, seed: 2}]")
    command = [sys.executable, "-m", "mtxlib.book.cli", "sweep", "ablation.yaml", "--notebooks", "notebooks",
               "--workers", "2"]
    out = tmp_path / "outputs" / "sweeps" / "ablation"

    def table() -> dict[str, list[str]]:
        rows = csv.DictReader((out / "table.csv").read_text().splitlines())
        return {row["mood"]: [row["state"], row["verdict"], row["rate_nats"]] for row in rows}

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            wait_for(lambda: (tmp_path / "slow.txt").exists() and table()["quick"][0] == "done")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert table()["slow"] == ["running", "", ""]
    kernel = int((tmp_path / "slow.txt").read_text())
    wait_for(lambda: not is_alive(kernel), 20)

    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1, again.stderr
    assert table() == {"quick": ["done", "healthy", "101.0"], "bad": ["failed", "", ""],
                       "slow": ["done", "healthy", "102.0"]}
    times = {mood: len((tmp_path / f"{mood}.txt").read_text().split()) for mood in ("quick", "bad", "slow")}
    assert times == {"quick": 1, "bad": 2, "slow": 2}
    assert "mood=bad failed, see outputs/sweeps/ablation/mood=bad/log.txt" in again.stdout
    assert "a bad mood" in (out / "mood=bad" / "log.txt").read_text()
    assert "2 of 3 runs are done: outputs/sweeps/ablation/table.csv" in again.stdout
