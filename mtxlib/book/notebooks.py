"""The numbered notebooks, run in order through papermill.

What papermill leaves open is settled here. It only warns about a misspelt parameter: `mtx` refuses it before anything
runs, and takes paths from where it was called. It has no resume: here `<out>/.done/<notebook>.json` says what a result
rests on and what was made. It takes whichever `python3` kernel is registered first: here it is the Python of `mtx`.
"""

import ast
import contextlib
import hashlib
import io
import json
import netrc
import os
import re
import sys
import time
from pathlib import Path

import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets import Float, Instance, List

from mtxlib import ROOT
from mtxlib.config import Config, archive_paths, check_value, flat_names, nearest, preset_values
from mtxlib.files import atomic_text, locked

NOTEBOOKS = ROOT / "notebooks"
KERNEL_OPTIONS = [
    "--IPKernelApp.log_level=CRITICAL",  # or it says at each start that it listens, and at some ends that it stopped
    # a bar of tqdm.auto is text, which a terminal and a reader of the executed copy can see, and no widget
    "--IPKernelApp.exec_lines=import sys; sys.modules['tqdm.notebook'] = None",
]
READ = ("archive", "archives", "my_file", "table")  # parameters that are paths of files that may change between runs
PATHS = (*READ, "data_dir", "floor_run")
PRODUCTS = ("*.json", "*.jsonl", "*.safetensors")  # what a run folder has to keep
SET_BY = {"preset": "--preset", "run_dir": "--out"}
FIGURES = {  # the keys of diagnosis.json that the tables show, with their units
    "verdict": "", "delta_nll_shuffled": "nats per token", "active_units": "share of latent dimensions",
    "rate_nats": "nats per window", "recon_nats": "nats per window", "recon_per_token": "nats per token",
    "note_f1": "greedy, from z alone", "prior_wellformed": "share of prior samples", "n_windows": "windows judged",
}


class NotebookFailed(RuntimeError):
    """A cell raised or the kernel died; the message says where, why and how to go on."""


class NoneRegistered(KernelSpecManager):
    """Looks for kernels nowhere, so that `python3` means sys.executable."""

    kernel_dirs = List([])


class ThisPython(AsyncKernelManager):
    kernel_spec_manager = Instance(NoneRegistered, ())
    shutdown_wait_time = Float(20.0)  # seconds, of which training gets half to save itself at Ctrl-C


class Stream(io.TextIOBase):
    """Shows what a kernel prints: as it is on a terminal; in a log a progress bar gets one line in 15 s."""

    is_fresh, next_bar = True, 0.0

    def write(self, text: str) -> None:
        if sys.stderr.isatty():  # a new line begins over papermill's own bar; \x1b[K clears what was there
            sys.stderr.write(("\r" * self.is_fresh + text).replace("\r", "\r\x1b[K"))
            self.is_fresh = text.endswith("\n")
            return
        for line in filter(str.strip, text.split("\n")):
            if not line.startswith("\r") or time.monotonic() > self.next_bar:
                self.next_bar = time.monotonic() + 15 if line.startswith("\r") else self.next_bar
                sys.stderr.write(line.rstrip("\r").rpartition("\r")[2] + "\n")


def shown(path: Path) -> str:
    """Relative to the working directory where it lies inside, so that executed notebooks hold no machine's paths."""
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def find_notebooks(folder: Path, names: list[str]) -> list[Path]:
    """Numbered notebooks in order: all but 07, which reads a sweep, or those named by a path or their start (`05`)."""
    numbered = sorted(folder.resolve().glob("[0-9][0-9]_*.ipynb"))
    found = set() if names else {path for path in numbered if not path.name.startswith("07")}
    for name in names:
        hits = [Path(name).resolve()] if Path(name).is_file() else [p for p in numbered if p.name.startswith(name)]
        if len(hits) != 1:
            raise ValueError(f"expected one notebook for {name!r}, got {', '.join(p.stem for p in hits) or 'none'}"
                             + nearest(name, [p.stem for p in numbered]))
        found.update(hits)
    if not found:
        raise ValueError(f"expected notebooks such as 01_data.ipynb in {folder}, got none; see --notebooks")
    return sorted(found, key=lambda path: path.name)


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    """Source and tags of each; read as JSON, since nbformat takes longer to import than `mtx` to refuse a parameter."""
    return [("".join(cell["source"]), cell["metadata"].get("tags", []))
            for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def declared(notebook: Path) -> dict[str, object]:
    """Names and defaults in the cell tagged `parameters`; a default annotated float is one. Raises ValueError. Not by
    papermill's reader, which drops a line whose comment holds a second equals sign."""
    cells, found = [code for code, tags in code_cells(notebook) if "parameters" in tags], {}
    try:
        for line in ast.parse(*cells).body:
            value, kind = ast.literal_eval(line.value), getattr(line, "annotation", None)
            name = (line.target if kind else line.targets[0]).id
            found[name] = float(value) if kind and ast.unparse(kind) == "float" else value
    except (AttributeError, SyntaxError, TypeError, ValueError) as e:
        raise ValueError(f"{notebook.name}: expected one cell tagged 'parameters', of lines `name: type = literal`, "
                         f"got {cells}") from e
    return found


def typed(name: str, text: str | list, like: object) -> object:
    """`text`, as YAML's BaseLoader leaves it (strings and lists of strings), in the type of the default `like`."""
    with contextlib.suppress(KeyError, ValueError, yaml.YAMLError):
        if isinstance(like, list) and isinstance(text, str):
            text = yaml.load(text, yaml.BaseLoader)
        elif isinstance(text, str):
            return {"true": True, "false": False}[text.lower()] if isinstance(like, bool) else type(like)(text)
    if isinstance(like, list) and isinstance(text, list):
        return [typed(name, item, like[0]) if like else yaml.safe_load(item) for item in text]
    raise ValueError(f"parameter {name!r}: expected {type(like).__name__}, got {text!r}")


def from_here(given: dict[str, str | list]) -> dict[str, str | list]:
    """With its paths made absolute: they are meant from the folder in which the command is given."""
    return {name: archive_paths(value, os.path.abspath) if name in PATHS and isinstance(value, str) else value
            for name, value in given.items()}


def plan(notebooks: list[Path], out: Path, preset: str, given: dict[str, str | list]) -> dict[Path, dict]:
    """What each notebook is passed: of preset, run_dir, the preset's values and the given ones those that it declares.
    Raises ValueError where no notebook declares a given name, a type is wrong, or the config refuses a value."""
    names = {path: declared(path) for path in notebooks}
    likes = {name: like for found in names.values() for name, like in found.items()}
    for name in given:
        if name in SET_BY:
            raise ValueError(f"parameter {name!r} is set by {SET_BY[name]}")
        if name not in likes:
            raise ValueError(f"unknown parameter {name!r}: no notebook to be run declares it{nearest(name, likes)}")
    values = {name: typed(name, text, likes[name]) for name, text in given.items()}
    for name, value in values.items():
        check_value(name, value)
        if name in PATHS:
            values[name] = archive_paths(value, lambda path: shown(Path(path)))
    Config.from_flat({"preset": preset, **{name: values[name] for name in values if name in flat_names()}})
    values = {**preset_values(preset), **values, "preset": preset, "run_dir": shown(out)}
    return {path: {name: values[name] for name in names[path] if name in values} for path in notebooks}


def done_file(notebook: Path, out: Path) -> Path:
    return out / ".done" / f"{notebook.stem}.json"


def rests_on(notebook: Path, passed: dict, out: Path) -> dict[str, str]:
    """Digests of all that the result rests on, and of the `source` alone: name, size and time of each file that the
    parameters, or else the run's config, name as something to read."""
    from mtxlib.music.corpus import files_of

    archives, paths = [passed[name] for name in READ if name in passed], []
    if "archive" not in declared(notebook) and (out / "config.json").exists():
        archives.append(Config.load(out / "config.json").data.archive)
    for archive in archives:
        archive_paths(archive, paths.append)
    files = {str(file): file.stat() for path in paths for file in files_of(Path(path))}
    source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()]
    before = [path.read_text() for path in sorted((out / ".done").glob("*.json")) if path.stem < notebook.stem]
    parts = {"digest": ([code for code, _ in code_cells(notebook)], passed, source, before), "source": (source,)}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def seconds_done(notebook: Path, passed: dict, out: Path) -> float | None:
    """How long the finished notebook took; None while it is still to do."""
    if not (done_file(notebook, out).exists() and (out / notebook.name).exists()):
        return None
    record = json.loads(done_file(notebook, out).read_text())
    is_whole = all((out / name).exists() for name in record["products"])
    return record["seconds"] if is_whole and record.items() >= rests_on(notebook, passed, out).items() else None


def products(notebook: Path, out: Path) -> list[str]:
    """The names of what lies in the run folder and no other notebook has made."""
    others = [path for path in (out / ".done").glob("*.json") if path.stem != notebook.stem]
    theirs = {name for path in others for name in json.loads(path.read_text())["products"]}
    return sorted({path.name for pattern in PRODUCTS for path in out.glob(pattern)} - theirs)


def run_notebooks(names: list[str], out: Path, preset: str = "quick", given: dict | None = None,
                  folder: Path = NOTEBOOKS, force: bool = False) -> None:
    """Run notebooks in order into `out`, in the folder above theirs; what is done is skipped unless `force`. Raises
    ValueError before anything runs where a name or value is refused, NotebookFailed at the first failure."""
    notebooks, out, given = find_notebooks(folder, names), Path(out).resolve(), from_here(given or {})
    if out in [notebook.parent for notebook in notebooks]:
        raise ValueError(f"expected a run folder, got {out}: the executed copies would replace the notebooks")
    check_folder(out)
    with contextlib.chdir(folder.resolve().parent):
        work = plan(notebooks, out, preset, given)
        if "online" in [passed.get("wandb") for passed in work.values()]:
            check_login()
        (out / ".done").mkdir(parents=True, exist_ok=True)
        with locked(out / ".done" / "lock"):  # such as the worker that a killed sweep left behind
            for notebook, passed in work.items():
                seconds = None if force else seconds_done(notebook, passed, out)
                if seconds is not None:
                    print(f"{notebook.stem}: done already, {seconds:.0f} s saved; --force repeats it", flush=True)
                    continue
                rests, start = rests_on(notebook, passed, out), time.time()
                if notebook.stem.startswith("04") and (force or is_stale(out, done_file(notebook, out), rests)):
                    (out / "state.pt").unlink(missing_ok=True)  # or training would only go on from its end
                done_file(notebook, out).unlink(missing_ok=True)
                execute(notebook, passed, out / notebook.name)
                record = {**rests, "seconds": time.time() - start, "finished": time.time(),
                          "products": products(notebook, out)}
                atomic_text(done_file(notebook, out), json.dumps(record))
                print(f"{notebook.stem:<32}{record['seconds']:6.0f} s", flush=True)


def is_stale(out: Path, done: Path, rests: dict[str, str]) -> bool:
    """Whether a finished training has lost its weights, or its source is another now."""
    return done.exists() and (not (out / "model.safetensors").exists()
                              or json.loads(done.read_text())["source"] != rests["source"])


def check_folder(out: Path) -> None:
    """Raises ValueError where there can be no folder `out`."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: expected a folder that can be written to, {there} is none")


def check_login() -> None:
    """Raises ValueError where Weights & Biases would ask for a key."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if "WANDB_API_KEY" not in os.environ and not (file.exists() and netrc.netrc(file).authenticators(host)):
        raise ValueError("parameter 'wandb': expected a login for online, found none; say `wandb login` first, or "
                         "wandb=offline")


def execute(notebook: Path, passed: dict, copy: Path) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    go_on = f"As far as it got: {shown(copy)}\nPut it right, then give the same command: what is done is kept."
    try:
        papermill.execute_notebook(
            shown(notebook), shown(copy), passed, kernel_name="python3", language="python",
            kernel_manager_class=ThisPython, extra_arguments=KERNEL_OPTIONS,
            progress_bar={"desc": notebook.stem, "leave": False, "disable": not sys.stderr.isatty()},
            stderr_file=Stream(), coalesce_streams=True)
    except papermill.PapermillExecutionError as e:
        trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(e.traceback)).splitlines()
        where, code = f"{notebook.stem} failed in cell [{e.exec_count}]:", e.source.splitlines()[:6]
        raise NotebookFailed("\n    ".join([where, *code, "raised:", *trace[-8:]]) + f"\n{go_on}") from None
    except DeadKernelError as e:
        raise NotebookFailed(f"{notebook.stem}: the kernel died ({e}). Was it out of memory?\n{go_on}") from None


def figures(out: Path) -> dict[str, object]:
    """The main figures of `out/diagnosis.json`; none where there is no such file."""
    path = out / "diagnosis.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {key: found[key] for key in FIGURES if key in found}


def report(out: Path) -> str:
    rows = {key: f"{f'{value:.3f}' if isinstance(value, float) else value:<10}{FIGURES[key]}"
            for key, value in figures(out).items()}
    rows = rows or {"diagnosis": f"none: {shown(out / 'diagnosis.json')} is written by 05_latent_space"}
    seconds = {path.stem[:2]: json.loads(path.read_text())["seconds"] for path in sorted(out.glob(".done/*.json"))}
    spent = ", ".join(f"{number}: {took:.0f}" for number, took in seconds.items())
    rows |= {"seconds": f"{f'{sum(seconds.values()):.0f}':<10}{spent}",
             "notebooks": f"{shown(out)}/*.ipynb ({len(list(out.glob('*.ipynb')))})",
             "MIDI": f"{shown(out)}/samples/*.mid ({len(list(out.glob('samples/*.mid')))})",
             "checkpoint": f"{shown(out)}/model.safetensors" if (out / "model.safetensors").exists() else "none"}
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows.items())
