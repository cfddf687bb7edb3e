"""The `mtx` command: runs the numbered notebooks through papermill, once (`mtx run`) or many times (`mtx sweep`), and
takes a file through the latent (`mtx reconstruct`), serves the widgets as a page (`mtx app`).

What papermill leaves open is settled here. It only warns about a misspelt parameter: `mtx` refuses it before anything
runs. It has no resume: `<out>/.done/<notebook>.json` holds a digest of the notebook's code, its parameters and the done
files before it, so a notebook is repeated when any of these changed, and everything after it too. It takes whichever
`python3` kernel is registered first: here the kernel is always the Python that runs `mtx`.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets import Float, default

from mtxlib import ROOT
from mtxlib.cluster import Jobs, Processes
from mtxlib.config import PRESETS, Config, flat_names, nearest, preset_values
from mtxlib.files import atomic_text

NOTEBOOKS = ROOT / "notebooks"
KERNEL_OPTIONS = [
    "--IPKernelApp.log_level=CRITICAL",  # or it says at each start that it listens, and at some ends that it stopped
    # a bar of tqdm.auto is text, which a terminal and a reader of the executed copy can see, and no widget
    "--IPKernelApp.exec_lines=import sys; sys.modules['tqdm.notebook'] = None",
]
NOT_BY_DEFAULT = "07"  # 07_sweep reads the runs of a sweep
SET_BY = {"preset": "--preset", "run_dir": "--out"}
FIGURES = {  # the keys of diagnosis.json that the tables show, with their units
    "verdict": "", "delta_nll_shuffled": "nats per token", "active_units": "share of latent dimensions",
    "rate_nats": "nats per window", "recon_nats": "nats per window", "recon_per_token": "nats per token",
    "note_f1": "greedy, from z alone",
    "prior_wellformed": "share of prior samples", "n_windows": "windows judged",
}
SWEEP_FORMAT = """\
name: ablation            # of the folder in outputs/sweeps; optional
notebooks: ["04", "05"]   # optional: 01 to 06
preset: quick             # optional
params: {steps: 500}      # the same in all runs; optional
# and one of these three: all combinations, runs one by one (named, or called by what they set), or drawn at random
grid: {beta_max: [0.5, 1.0], seed: [0, 1]}
list: [{name: plain}, {beta_max: 0.5, free_bits: 0.1}]
random: {n: 8, seed: 0, space: {lr: {log_uniform: [1e-4, 1e-2]}, beta_max: {uniform: [0, 1]}, steps: {choice: [50]}}}
"""


class NotebookFailed(RuntimeError):
    """A cell raised or the kernel died; the message says where, why and how to go on."""


class NoneRegistered(KernelSpecManager):
    """Finds no kernel, so that `python3` means sys.executable."""

    @default("kernel_dirs")
    def _nowhere(self):
        return []


class ThisPython(AsyncKernelManager):
    shutdown_wait_time = Float(20.0)  # seconds, of which training gets half to save itself at Ctrl-C

    @default("kernel_spec_manager")
    def _none_registered(self):
        return NoneRegistered()


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


# Notebooks and their parameters


def find_notebooks(folder: Path, names: list[str]) -> list[Path]:
    """Numbered notebooks in order: all but 07, or those named by a path or by how they start (`05`)."""
    numbered = sorted(folder.resolve().glob("[0-9][0-9]_*.ipynb"))
    found = set() if names else {path for path in numbered if not path.name.startswith(NOT_BY_DEFAULT)}
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
    """Names and defaults in the cell tagged `parameters`; a default annotated float is one. Raises ValueError.

    Read with ast: papermill's own reader drops a line whose comment holds a second equals sign.
    """
    cells = [code for code, tags in code_cells(notebook) if "parameters" in tags]
    found = {}
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


def plan(notebooks: list[Path], out: Path, preset: str, given: dict[str, str | list]) -> dict[Path, dict]:
    """What each notebook is passed: of preset, run_dir, the preset's values and the given ones those that it declares.

    Raises ValueError where no notebook declares a given name, a type is wrong, or the config refuses a value.
    """
    names = {path: declared(path) for path in notebooks}
    likes = {name: like for found in names.values() for name, like in found.items()}
    for name in given:
        if name in SET_BY:
            raise ValueError(f"parameter {name!r} is set by {SET_BY[name]}")
        if name not in likes:
            raise ValueError(f"unknown parameter {name!r}: no notebook to be run declares it{nearest(name, likes)}")
    values = {name: typed(name, text, likes[name]) for name, text in given.items()}
    Config.from_flat({"preset": preset, **{name: values[name] for name in values if name in flat_names()}})
    values = {**preset_values(preset), **values, "preset": preset, "run_dir": shown(out)}
    return {path: {name: values[name] for name in names[path] if name in values} for path in notebooks}


# One run


def done_file(notebook: Path, out: Path) -> Path:
    return out / ".done" / f"{notebook.stem}.json"


def digest(notebook: Path, passed: dict, out: Path) -> str:
    """Of all that the result rests on: the code, the parameters, and the done files of the notebooks before it."""
    code = [code for code, _ in code_cells(notebook)]
    before = [path.read_text() for path in sorted((out / ".done").glob("*.json")) if path.stem < notebook.stem]
    return hashlib.sha256(json.dumps([code, passed, before]).encode()).hexdigest()


def seconds_done(notebook: Path, passed: dict, out: Path) -> float | None:
    """How long the finished notebook took; None while it is still to do."""
    if not (done_file(notebook, out).exists() and (out / notebook.name).exists()):
        return None
    record = json.loads(done_file(notebook, out).read_text())
    return record["seconds"] if record["digest"] == digest(notebook, passed, out) else None


def run_notebooks(names: list[str], out: Path, preset: str = "quick", given: dict | None = None,
                  folder: Path = NOTEBOOKS, force: bool = False) -> None:
    """Run notebooks in order into `out`, in the folder above theirs; what is done is skipped unless `force`.

    Raises ValueError before anything runs where a name or value is refused, NotebookFailed at the first failure.
    """
    notebooks, out = find_notebooks(folder, names), Path(out).resolve()
    if out in [notebook.parent for notebook in notebooks]:
        raise ValueError(f"expected a run folder, got {out}: the executed copies would replace the notebooks")
    with contextlib.chdir(folder.resolve().parent):
        work = plan(notebooks, out, preset, given or {})
        (out / ".done").mkdir(parents=True, exist_ok=True)
        with open(out / ".done" / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # such as the worker that a killed sweep left behind
                print(f"waiting for another mtx run in {shown(out)}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if force and any(notebook.stem.startswith("04") for notebook in work):
                (out / "state.pt").unlink(missing_ok=True)  # or training would only go on from its end
            for notebook, passed in work.items():
                seconds = None if force else seconds_done(notebook, passed, out)
                if seconds is not None:
                    print(f"{notebook.stem}: done already, {seconds:.0f} s saved; --force repeats it", flush=True)
                    continue
                done_file(notebook, out).unlink(missing_ok=True)
                key, start = digest(notebook, passed, out), time.time()
                execute(notebook, passed, out / notebook.name)
                record = {"digest": key, "seconds": time.time() - start, "finished": time.time()}
                atomic_text(done_file(notebook, out), json.dumps(record))
                print(f"{notebook.stem:<32}{record['seconds']:6.0f} s", flush=True)


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
        lines = [*e.source.splitlines()[:6], "raised:", *trace[-8:]]
        raise NotebookFailed("\n    ".join([f"{notebook.stem} failed in cell [{e.exec_count}]:", *lines])
                             + f"\n{go_on}") from None
    except DeadKernelError as e:
        raise NotebookFailed(f"{notebook.stem}: the kernel died ({e}). Was it out of memory?\n{go_on}") from None


def figures(out: Path) -> dict[str, object]:
    """The main figures of `out/diagnosis.json`; none where there is no such file."""
    path = out / "diagnosis.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {key: found[key] for key in FIGURES if key in found}


def report(out: Path) -> str:
    rows = [(key, f"{f'{value:.3f}' if isinstance(value, float) else value:<10}{FIGURES[key]}")
            for key, value in figures(out).items()]
    rows = rows or [("diagnosis", f"none: {shown(out / 'diagnosis.json')} is written by 05_latent_space")]
    rows += [("notebooks", f"{shown(out)}/*.ipynb ({len(list(out.glob('*.ipynb')))})"),
             ("MIDI", f"{shown(out)}/samples/*.mid ({len(list(out.glob('samples/*.mid')))})"),
             ("checkpoint", f"{shown(out)}/model.safetensors" if (out / "model.safetensors").exists() else "none")]
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows)


# Many runs


def read_sweep(file: Path, folder: Path) -> tuple[str, str, list[Path], dict[str, dict]]:
    """Its name, preset and notebooks, and what is given to each run, by the run's name. Raises ValueError."""
    try:
        spec = yaml.load(file.read_text(), yaml.BaseLoader)  # strings only: the notebooks say what type each has
        known = yaml.load(SWEEP_FORMAT, yaml.BaseLoader)
        if bad := [key for key, value in spec.items() if type(value) is not type(known.get(key))]:
            raise ValueError(f"unknown key {bad[0]!r}, or not such a value{nearest(bad[0], known)}")
        if len(kinds := {"grid", "list", "random"} & set(spec)) != 1:
            raise ValueError(f"expected one of grid, list and random, got {' and '.join(kinds) or 'none'}")
        notebooks, preset, runs = find_notebooks(folder, spec.get("notebooks", [])), spec.get("preset", "quick"), {}
        likes = {name: like for path in notebooks for name, like in declared(path).items()}
        for given in points(*kinds, spec[min(kinds)], likes):
            name = given.pop("name", "")
            said = (f"{key}={value if isinstance(value, str) else '+'.join(value)}" for key, value in given.items())
            name = folder_name(name or ",".join(said))
            if name in runs and "random" not in kinds:  # a repeated draw is no mistake, one run does for both
                raise ValueError(f"two runs are called {name!r}")
            runs[name] = {**spec.get("params", {}), **given}
            plan(notebooks, file, preset, runs[name])  # refuses what no notebook can take
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"{shown(file)}: {e}\nA sweep looks like this:\n\n{SWEEP_FORMAT}") from e
    return folder_name(spec.get("name", file.stem)), preset, notebooks, runs


def points(kind: str, rule: dict | list, likes: dict) -> list[dict]:
    """What is given to each run beside the common `params`."""
    if kind == "list":
        return [{**given} for given in rule]
    if kind == "grid":
        if bad := [name for name, values in rule.items() if not isinstance(values, list)]:
            raise ValueError(f"grid: expected a list of values for {bad[0]!r}, got {rule[bad[0]]!r}")
        return [dict(zip(rule, point, strict=True)) for point in itertools.product(*rule.values())]
    if set(rule) | {"seed"} != {"n", "seed", "space"}:
        raise ValueError(f"random: expected n, seed and space, got {', '.join(rule)}")
    rng, runs = random.Random(int(rule.get("seed", 0))), range(int(rule["n"]))
    return [{name: draw(rng, how, likes.get(name)) for name, how in rule["space"].items()} for _ in runs]


def draw(rng: random.Random, how: dict, like: object) -> str | list:
    match how:
        case {"choice": [*values]}:
            return rng.choice(values)
        case {"uniform": [low, high]}:
            value = rng.uniform(float(low), float(high))
        case {"log_uniform": [low, high]}:
            value = math.exp(rng.uniform(math.log(float(low)), math.log(float(high))))
        case _:
            raise ValueError(f"random: expected choice, uniform or log_uniform and its values, got {how!r}")
    return str(round(value)) if type(like) is int else f"{value:.4g}"


def folder_name(name: str) -> str:
    """Readable, always the same, and safe as the name of a folder."""
    return re.sub(r"[^\w.,=+-]+", "-", name).strip(".-") or "run"


def run_sweep(file: Path, place: Processes | Jobs, out: Path | None = None, folder: Path = NOTEBOOKS) -> int:
    """Run in `place` what is not done yet; returns how many runs failed.

    Runs that `place` holds from an earlier command are watched, not started again. `out/table.csv` is written anew at
    every change of state. Raises ValueError before anything starts.
    """
    file, out, folder = file.resolve(), out and out.resolve(), folder.resolve()
    with contextlib.chdir(folder.parent):
        sweep, preset, notebooks, runs = read_sweep(file, folder)
        out = out or folder.parent / "outputs" / "sweeps" / sweep
        rows = {name: {"run": name, "state": "waiting", "seconds": 0, **given} for name, given in runs.items()}

        def look(name: str, otherwise: str) -> None:
            work = plan(notebooks, out / name, preset, runs[name])
            spent = [seconds_done(notebook, passed, out / name) for notebook, passed in work.items()]
            rows[name] |= {"state": otherwise if None in spent else "done",
                           "seconds": round(sum(seconds or 0 for seconds in spent)), **figures(out / name)}

        for name in runs:
            look(name, "waiting")
        queue = place.states()
        active = [name for name in rows if out / name in queue]
        waiting = [name for name in rows if rows[name]["state"] == "waiting" and name not in active]
        try:
            while waiting or active:
                changed = waiting[:max(0, place.most - len(active))]
                for name in changed:
                    (out / name).mkdir(parents=True, exist_ok=True)
                    place.start(out / name, command(notebooks, out / name, preset, runs[name]))
                    active.append(waiting.pop(0))
                time.sleep(place.seconds)
                queue = place.states()
                changed = [name for name in active if queue.get(out / name) != rows[name]["state"] or name in changed]
                for name in changed:
                    if out / name in queue:
                        rows[name]["state"] = queue[out / name]
                    else:
                        active.remove(name)
                        look(name, "failed")
                show_table(rows, out, changed)
        finally:
            place.leave(len(active))
        show_table(rows, out, list(rows))
        failed = [name for name in rows if rows[name]["state"] == "failed"]
        for name in failed:
            print(f"{name} failed, see {shown(out / name / 'log.txt')}; the same command tries it again")
        print(f"{len(rows) - len(failed)} of {len(rows)} runs are done: {shown(out / 'table.csv')}", flush=True)
    return len(failed)


def command(notebooks: list[Path], out: Path, preset: str, given: dict) -> list[str]:
    """That of one run of a sweep."""
    pairs = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return [sys.executable, "-m", "mtxlib.workbook", "run", *map(str, notebooks), "--preset", preset, "--out", str(out),
            "--notebooks", str(notebooks[0].parent), *(part for pair in pairs for part in ("-p", pair))]


def show_table(rows: dict[str, dict], out: Path, changed: list[str]) -> None:
    """All rows, on a cleared terminal, and a line for each changed one elsewhere; `out/table.csv` with parameters."""
    import pandas

    if changed:
        out.mkdir(parents=True, exist_ok=True)
        table = pandas.DataFrame(rows.values())
        atomic_text(out / "table.csv", table.to_csv(index=False))
        table = table.set_index("run")[["state", "seconds", *(key for key in FIGURES if key in table)]]
        if sys.stdout.isatty() or len(changed) == len(rows):
            text = table.to_string(na_rep="", float_format="%.3f", index_names=False)
            print("\x1b[2J\x1b[H" * sys.stdout.isatty() + text, flush=True)
        else:
            print(*(f"{rows[name]['state']:<8} {name}" for name in changed), sep="\n", flush=True)


# The command


def run_command(args: argparse.Namespace) -> int:
    given = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in args.p)
    run_notebooks(args.notebook, args.out, args.preset, given, args.notebooks, args.force)
    print("\n" + report(args.out))
    return 0


def minutes(limit: str) -> int:
    """A time limit in two of the ways Slurm has: minutes, or hours:minutes:seconds."""
    match [int(part) for part in limit.split(":")]:
        case [minutes] if minutes > 0:
            return minutes
        case [hours, minutes, seconds]:
            return 60 * hours + minutes + (seconds > 0)
    raise ValueError(limit)


def sweep_command(args: argparse.Namespace) -> int:
    for flag, cluster in {"partition": "slurm", "time": "slurm", "slurm": "slurm", "gpus": "slurm or local"}.items():
        if getattr(args, flag) and (args.cluster or "none") not in cluster:
            raise ValueError(f"--{flag}: expected --cluster {cluster} with it, got {args.cluster or 'none'}")
    workers = args.workers if args.workers is not None else 10_000 if args.cluster == "slurm" else 1
    if workers < 1:
        raise ValueError(f"--workers: expected 1 or more, got {workers}")
    if args.cluster:
        sbatch = dict(pair.split("=", 1) if "=" in pair else (pair, True) for pair in args.slurm)
        sbatch |= {"partition": args.partition} if args.partition else {}
        place = Jobs(args.cluster, workers, args.gpus, args.time or 60, sbatch)
    else:
        place = Processes(workers)
    return 1 if run_sweep(args.file, place, args.out, args.notebooks) else 0


def reconstruct_command(args: argparse.Namespace) -> int:
    from mtxlib.run import load_run  # torch takes seconds to import, and `mtx` has to refuse at once
    from mtxlib.show import save
    from mtxlib.walk import note_f1

    if args.out.suffix not in (".mid", ".midi", ".musicxml"):
        raise ValueError(f"{args.out}: expected a name that ends in .mid or .musicxml")
    run = load_run(args.run)
    again = run.reconstruct(args.file, args.temperature)
    save(again, args.out)
    given = run.score(args.file)
    print(f"{args.out}: {again.note_num()} notes, {given.note_num()} in {args.file}; "
          f"note-F1 {note_f1(given, again):.3f}")
    return 0


def app_command(args: argparse.Namespace) -> int:
    """Serve the cells of notebook 06 tagged `app`. Voilà's page asks others for fonts: the policy forbids it."""
    import nbformat

    if not (args.run / "model.safetensors").exists():
        raise FileNotFoundError(f"{args.run} is not a finished run; train one first (`mtx run`)")
    book = nbformat.read(find_notebooks(args.notebooks, ["06"])[0], 4)
    *cells, widget = [cell for cell in book.cells if {"parameters", "app"} & {*cell.metadata.get("tags", [])}]
    cells[0].source += f"\nrun_dir = {str(args.run.resolve())!r}"
    for cell in cells:
        cell.source = f"%%capture\n{cell.source}"
    book.cells = [nbformat.v4.new_markdown_cell("# Morph, compose, steer"), *cells, widget]
    policy = f"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws://127.0.0.1:{args.port}"
    settings = {
        "Voila": {"ip": "127.0.0.1", "port": args.port, "open_browser": not args.no_browser,
                  "tornado_settings": {"headers": {"Content-Security-Policy": policy}}},
        "VoilaConfiguration": {"kernel_spec_manager_class": "mtxlib.workbook.NoneRegistered"}}
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(book, Path(folder, "mtx.ipynb"))
        Path(folder, "voila.json").write_text(json.dumps(settings))
        return subprocess.call([sys.executable, "-m", "voila", "mtx.ipynb"], cwd=folder)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mtx", description="Runs the notebooks of the workbook, once or many times.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run notebooks in order into one folder; what is done is skipped")
    run.add_argument("notebook", nargs="*", metavar="NOTEBOOK", help="its first letters (05) or a path; else 01 to 06")
    run.add_argument("--preset", default="quick", metavar="NAME", help=f"{', '.join(PRESETS)}; default %(default)s")
    run.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="run folder; default %(default)s")
    run.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="set a notebook parameter")
    run.add_argument("--force", action="store_true", help="repeat what is done")
    run.set_defaults(call=run_command)
    sweep = commands.add_parser("sweep", help="run notebooks with many settings; the same command resumes",
                                formatter_class=argparse.RawDescriptionHelpFormatter, epilog=SWEEP_FORMAT)
    sweep.add_argument("file", type=Path, metavar="SWEEP.YAML", help="what to run, see below")
    sweep.add_argument("--out", type=Path, help="folder of the runs and table.csv; default outputs/sweeps/<name>")
    sweep.add_argument("--workers", type=int, metavar="N", help="runs at a time; default 1, on Slurm all")
    sweep.add_argument("--cluster", choices=["slurm", "local"], help="each run as a job that outlives this command, "
                       "through submitit: on Slurm, or in the background of this machine")
    sweep.add_argument("--gpus", type=int, default=0, metavar="N", help="of a job; default none")
    sweep.add_argument("--partition", metavar="NAME", help="of Slurm")
    sweep.add_argument("--time", type=minutes, metavar="LIMIT", help="minutes or HH:MM:SS until Slurm has a job save "
                       "itself and queue again; default 60")
    sweep.add_argument("--slurm", action="append", default=[], metavar="OPTION[=VALUE]",
                       help="any other of sbatch: account=me, constraint=a100, cpus-per-task=8, exclusive")
    sweep.set_defaults(call=sweep_command)
    again = commands.add_parser("reconstruct", help="a piece of any length through the latent of a run, and back")
    again.add_argument("file", type=Path, help="MIDI or MusicXML")
    again.add_argument("out", type=Path, help="the reconstruction, .mid or .musicxml")
    again.add_argument("--run", type=Path, default=Path("outputs/reference"), help="run folder; default %(default)s")
    again.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    again.set_defaults(call=reconstruct_command)
    app = commands.add_parser("app", help="the widgets of notebook 06 as a page on this machine, without Jupyter")
    app.add_argument("--run", type=Path, default=Path("outputs/reference"), help="run folder; default %(default)s")
    app.add_argument("--port", type=int, default=8866, help="default %(default)s")
    app.add_argument("--no-browser", action="store_true", help="only print the address")
    app.set_defaults(call=app_command)
    for command in (run, sweep, app):
        command.add_argument("--notebooks", type=Path, default=NOTEBOOKS, metavar="DIR", help="folder of the notebooks")
    return top


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ending a job stops its kernel as Ctrl-C does
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process of a job with it, see mtxlib.cluster
    args = parser().parse_args(argv)
    try:
        return args.call(args)
    except (ValueError, FileNotFoundError, NotebookFailed) as e:
        print(f"mtx: {e}", file=sys.stderr)
        return 1 if isinstance(e, NotebookFailed) else 2
    except KeyboardInterrupt:
        print("\nmtx: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
