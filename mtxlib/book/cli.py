"""The `mtx` command: `run` notebooks, `sweep` them, take a file through the latent, serve the widgets as a page."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mtxlib import ROOT
from mtxlib.book.cluster import Jobs, Processes
from mtxlib.book.notebooks import NOTEBOOKS, NotebookFailed, report, run_notebooks
from mtxlib.book.sweep import SWEEP_FORMAT, run_sweep
from mtxlib.config import PRESETS, check_value
from mtxlib.processes import share_cores

SHIPPED = ROOT / "outputs" / "reference"


def run_command(args: argparse.Namespace) -> int:
    given = {name: value for name, _, value in (pair.partition("=") for pair in args.p)}
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
    partition = [f"partition={args.partition}"] if args.partition else []
    sbatch = {name: value or True for name, _, value in (pair.partition("=") for pair in args.slurm + partition)}
    place = Jobs(args.cluster, workers, args.gpus, args.time or 60, sbatch) if args.cluster else Processes(workers)
    return 1 if run_sweep(args.file, place, args.out, args.notebooks) else 0


def reconstruct_command(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".mid", ".midi", ".musicxml"):
        raise ValueError(f"{args.out}: expected a name that ends in .mid or .musicxml")
    if not args.file.is_file():
        raise FileNotFoundError(f"{args.file}: expected a MIDI or MusicXML file, found none")
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"{args.out}: expected a file's name in a folder that is there and can be written to")
    if args.out.exists() and args.out.samefile(args.file):
        raise ValueError(f"{args.out} is the file to be read: give the reconstruction another name")
    check_value("temperature", args.temperature)
    from mtxlib.music.display import save  # torch takes seconds to import, and `mtx` has to refuse at once
    from mtxlib.music.readers import read_counted, told
    from mtxlib.music.score import note_f1
    from mtxlib.run import load_run

    run = load_run(args.run)
    again = run.reconstruct(args.file, args.temperature)
    save(again, args.out)
    given, losses = read_counted(args.file, **run.config.data.form)
    print(f"{args.out}: {again.note_num():,} notes, note-F1 {note_f1(given, again):.3f}; {args.file}: {told(losses)}")
    return 0


def app_command(args: argparse.Namespace) -> int:
    """Serve the widgets of notebook 06. Voilà's page asks others for fonts: the policy forbids it."""
    if not (args.run / "model.safetensors").exists():
        raise FileNotFoundError(f"{args.run} is not a finished run; train one first (`mtx run`)")
    import nbformat.v4 as nb

    code = f"from mtxlib.book.widgets import app\napp({str(args.run.resolve())!r})"
    page = nb.new_notebook(cells=[nb.new_markdown_cell("# Morph, compose, steer"), nb.new_code_cell(code)])
    policy = f"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws://127.0.0.1:{args.port}"
    settings = {
        "Voila": {"ip": "127.0.0.1", "port": args.port, "open_browser": not args.no_browser,
                  "tornado_settings": {"headers": {"Content-Security-Policy": policy}}},
        "VoilaConfiguration": {"kernel_spec_manager_class": "mtxlib.book.notebooks.NoneRegistered"}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mtx.ipynb").write_text(json.dumps(page))
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
    sweep = commands.add_parser("sweep", help="run notebooks with many settings; the same command resumes",
                                formatter_class=argparse.RawDescriptionHelpFormatter, epilog=SWEEP_FORMAT)
    sweep.add_argument("file", type=Path, metavar="SWEEP.YAML", help="what to run, see below")
    sweep.add_argument("--out", type=Path, help="folder of the runs and table.csv; default outputs/sweeps/<name>")
    sweep.add_argument("--workers", type=int, metavar="N", help="runs at a time; default 1, on Slurm all")
    sweep.add_argument("--cluster", choices=["slurm", "local"], help="runs as jobs that outlive this command, on Slurm "
                       "or in the background of this machine")
    sweep.add_argument("--gpus", type=int, default=0, metavar="N", help="of a job; default none")
    sweep.add_argument("--partition", metavar="NAME", help="of Slurm")
    sweep.add_argument("--time", type=minutes, metavar="LIMIT", help="minutes or HH:MM:SS until Slurm has a job save "
                       "itself and queue again; default 60")
    sweep.add_argument("--slurm", action="append", default=[], metavar="OPTION[=VALUE]",
                       help="any other of sbatch: account=me, constraint=a100, cpus-per-task=8, exclusive")
    again = commands.add_parser("reconstruct", help="a piece of any length through the latent of a run, and back")
    again.add_argument("file", type=Path, help="MIDI or MusicXML")
    again.add_argument("out", type=Path, help="the reconstruction, .mid or .musicxml")
    again.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    app = commands.add_parser("app", help="the widgets of notebook 06 as a page on this machine, without Jupyter")
    app.add_argument("--port", type=int, default=8866, help="default %(default)s")
    app.add_argument("--no-browser", action="store_true", help="only print the address")
    calls = {run: run_command, sweep: sweep_command, again: reconstruct_command, app: app_command}
    for command, call in calls.items():
        command.set_defaults(call=call)
    for command in (run, sweep):
        command.add_argument("--notebooks", type=Path, default=NOTEBOOKS, metavar="DIR", help="folder of the notebooks")
    for command in (again, app):
        command.add_argument("--run", type=Path, default=SHIPPED, help="run folder; default the one that comes along")
    return top


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ending a job stops its kernel as Ctrl-C does
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process of a job with it, see mtxlib.book.cluster
    share_cores()
    args = parser().parse_args(argv)
    try:
        return args.call(args)
    except (ValueError, OSError, NotebookFailed) as e:
        print(f"mtx: {e}", file=sys.stderr)
        return 1 if isinstance(e, NotebookFailed) else 2
    except KeyboardInterrupt:
        print("\nmtx: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
