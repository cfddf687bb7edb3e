"""One notebook run many times: what a sweep file may say, and the table of its runs."""

import contextlib
import itertools
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import yaml

from mtxlib.book import notebooks as books
from mtxlib.book.cluster import Jobs, Processes
from mtxlib.book.notebooks import FIGURES, NOTEBOOKS, find_notebooks, plan, shown
from mtxlib.config import nearest
from mtxlib.files import atomic_text

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
        likes = {name: like for path in notebooks for name, like in books.declared(path).items()}
        for given in points(*kinds, spec[min(kinds)], likes):
            name = given.pop("name", "")
            said = (f"{key}={value if isinstance(value, str) else '+'.join(value)}" for key, value in given.items())
            name = folder_name(name or ",".join(said))
            if name in runs and "random" not in kinds:  # a repeated draw is no mistake, one run does for both
                raise ValueError(f"two runs are called {name!r}")
            runs[name] = books.from_here({**spec.get("params", {}), **given})
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
    """Run in `place` what is not done yet; returns how many runs failed. Those that `place` holds from an earlier
    command are watched, not started again. Raises ValueError before anything starts."""
    file, out, folder = file.resolve(), out and out.resolve(), folder.resolve()
    sweep, preset, notebooks, runs = read_sweep(file, folder)
    books.check_folder(out or folder)
    with contextlib.chdir(folder.parent):
        out = out or folder.parent / "outputs" / "sweeps" / sweep
        rows = {name: {"run": name, "state": "waiting", "seconds": 0, **given} for name, given in runs.items()}

        def look(name: str, otherwise: str) -> None:
            work = plan(notebooks, out / name, preset, runs[name])
            spent = [books.seconds_done(notebook, passed, out / name) for notebook, passed in work.items()]
            rows[name] |= {"state": otherwise if None in spent else "done", "seconds": round(sum(filter(None, spent))),
                           **books.figures(out / name)}

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
    return [sys.executable, "-m", "mtxlib.book.cli", "run", *map(str, notebooks), "--preset", preset, "--out", str(out),
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
