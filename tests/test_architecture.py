"""A file of mtxlib imports only from lower floors, and the training core runs where only torch is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtxlib

FLOORS = (
    ("cluster", "config", "files", "layers", "losses", "processes"),
    ("corpus", "data", "model"),
    ("tokens", "generate", "measure"),
    ("diagnose", "judge", "show", "train"),
    ("prior",),
    ("walk",),
    ("run",),
    ("morph", "workbook"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
CORE = ("config", "files", "layers", "losses", "data", "model", "measure", "train")
CORE_MAY_IMPORT = {"mtxlib", "torch", "numpy", "safetensors", "tqdm", *sys.stdlib_module_names}
LAZY = {("train", "wandb")}  # imported inside a function, and only if asked for
FILES = sorted(Path(mtxlib.__file__).parent.glob("*.py"))


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_only_from_lower_floors(file):
    if file.stem == "__init__":
        assert not [name for name, is_top in imported(file) if is_top and name.startswith("mtxlib")]
        return
    assert file.stem in FLOOR, f"give {file.stem} a floor in DESIGN and here"
    for name, _ in imported(file):
        target = name.split(".")[1] if name.startswith("mtxlib.") else None
        if target in FLOOR:
            assert FLOOR[target] < FLOOR[file.stem], f"{file.stem} imports {target}, which is no lower"


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in CORE], ids=lambda file: file.stem)
def test_core_imports_little(file):
    for name, is_top in imported(file):
        package = name.split(".")[0]
        is_lazy = (file.stem, package) in LAZY and not is_top
        assert package in CORE_MAY_IMPORT or is_lazy, f"{file.stem} imports {name}"
        if package == "mtxlib" and name.split(".")[1] in FLOOR:
            assert name.split(".")[1] in CORE, f"{file.stem} imports {name}"


def test_importing_the_core_loads_no_music_and_no_notebooks():
    core = ", ".join(f"mtxlib.{file.stem}" for file in FILES if file.stem in CORE)
    code = f"import sys, {core}; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(answer.stdout.split())
    assert "mtxlib.config" in loaded
    assert not loaded & {"miditok", "symusic", "music21", "wandb", "IPython", "ipywidgets", "pandas", "matplotlib"}
