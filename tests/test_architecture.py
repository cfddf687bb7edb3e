"""Imports run one way, between the wings and inside each, and the training core runs where only torch is installed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtxlib

ORDER = (  # a file imports only from those above it
    "files", "config", "processes",
    "music.score", "music.normal", "music.readers", "music.corpus", "music.metrics", "music.notation", "music.display",
    "data.store", "data.tokens",
    "model.layers", "model.optim", "model.losses", "model.prior", "model.vae", "model.likelihood", "model.train",
    "train",
    "latent.decode", "latent.interpolate", "latent.compose", "latent.attributes", "latent.diagnose",
    "run",
    "book.setup", "book.notebooks", "book.cluster", "book.sweep", "book.widgets", "book.cli",
)
CORE = ("files", "config", "processes", "data.store", *(name for name in ORDER if name.startswith("model.")), "train")
CORE_MAY_IMPORT = {"mtxlib", "torch", "numpy", "safetensors", "tqdm", *sys.stdlib_module_names}
LAZY = {("model.train", "wandb")}  # imported inside a function, and only if asked for
MTXLIB = Path(mtxlib.__file__).parent
FILES = {".".join(file.relative_to(MTXLIB).with_suffix("").parts): file for file in sorted(MTXLIB.rglob("*.py"))}


def imported(file: Path) -> list[tuple[str, bool]]:
    """Full dotted names, with whether the import stands at the top of the file."""
    tree = ast.parse(file.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["mtxlib" * bool(node.level), node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node in tree.body) for name in names]
    return found


def ours(name: str) -> str:
    """The file of mtxlib that a dotted name lies in, as ORDER calls it; "" for all else."""
    inside = name.removeprefix("mtxlib.")
    return next((file for file in ORDER if f"{inside}.".startswith(f"{file}.")), "") if inside != name else ""


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    if name.endswith("__init__"):
        assert not [target for target, is_top in imported(FILES[name]) if is_top and target.startswith("mtxlib")]
        return
    assert name in ORDER, f"give {name} its place here"
    for target, _ in imported(FILES[name]):
        if ours(target):
            assert ORDER.index(ours(target)) < ORDER.index(name), f"{name} imports {target}, which comes after it"


def test_the_readme_shows_every_file_a_line_and_in_this_order():
    text = (MTXLIB.parent / "README.md").read_text()
    assert len(text.splitlines()) <= 150, "move what is no first screen to docs/"
    shown, wing = [], ""
    for line in text.split("\nmtxlib/\n")[1].split("\nbenchmarks/")[0].splitlines():
        indent, name = re.match(r"( +)([\w.]+/?) +\S", line).groups()
        wing = name.replace("/", ".") if name.endswith("/") else wing * (len(indent) > 2)
        shown += [wing + name.removesuffix(".py")] * name.endswith(".py")
    assert shown == [*ORDER]


@pytest.mark.parametrize("name", CORE)
def test_core_imports_little(name):
    for target, is_top in imported(FILES[name]):
        package = target.split(".")[0]
        is_lazy = (name, package) in LAZY and not is_top
        assert package in CORE_MAY_IMPORT or is_lazy, f"{name} imports {target}"
        if ours(target):
            assert ours(target) in CORE, f"{name} imports {target}"


def test_importing_the_core_loads_no_music_and_no_notebooks():
    code = f"import sys, {', '.join(f'mtxlib.{name}' for name in CORE)}; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(answer.stdout.split())
    assert "mtxlib.config" in loaded
    assert not loaded & {"miditok", "symusic", "music21", "wandb", "IPython", "ipywidgets", "pandas", "matplotlib"}


def test_the_house_stays_small():
    count = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    functions = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name, file in FILES.items()
                 for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert sum(count.values()) <= 6550, "it is to fall to 5,000, and never to grow"
    assert max(count.values()) <= 450, max(count, key=count.get)
    assert max(functions.values()) <= 60, max(functions, key=functions.get)
