"""What is said about installing, running and licensing holds together."""

import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mtxlib import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def recipes() -> dict[str, str]:
    parts = re.split(r"(?m)^([.\w/-]+):(?!=)", (ROOT / "Makefile").read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_environment_lists_nothing_but_python_and_this_project():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [part for part in conda if isinstance(part, dict)] == [{"pip": ["-e ."]}]
    named = [re.split(r"[<>= ]", part)[0] for part in conda if isinstance(part, str)]
    assert named == ["python", "pip"]
    assert f"python{PROJECT['requires-python']}" in conda


def test_nothing_is_listed_twice():
    for listed in (DIRECT, PINS):
        names = [canonicalize_name(requirement.name) for requirement in listed]
        assert sorted(names) == sorted(set(names))


def test_each_dependency_is_pinned_within_its_bounds():
    pins = {canonicalize_name(pin.name): pin for pin in PINS}
    for requirement in DIRECT:
        specifier, = pins[canonicalize_name(requirement.name)].specifier
        assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), requirement


def test_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines and "symusic==0.5.9" in lines
    assert not [pin.name for pin in PINS if re.search("nvidia|cuda|triton", pin.name)]
    assert not [pin for pin in PINS if pin.url] and not [line for line in lines if line.startswith("-")]


@pytest.mark.parametrize("target", ["run", "test", "lab", "app", "bench", "lint", "clean"])
def test_make_target(target):
    assert target in recipes()


def test_commands_for_people_and_for_continuous_integration():
    assert "mtx run --preset quick --out outputs/quickstart $(ARGS)" in recipes()["run"]
    assert "-m pytest" in recipes()["test"] and "--ip=127.0.0.1" in recipes()["lab"]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in script
    made = [line.split(" | ")[0] for line in script if line.startswith("make ")]
    assert made == ["make lint", "make test", "make run"]
    assert PROJECT["scripts"] == {"mtx": "mtxlib.book.cli:main"}


HEALTHY = """verdict             healthy
note_f1             0.880     greedy, from z alone
notebooks           outputs/quickstart/*.ipynb (6)
"""


@pytest.mark.parametrize(("table", "is_good"), [
    (HEALTHY, True), (HEALTHY.replace("healthy", "weak"), False), (HEALTHY.replace("0.880", "0.849"), False),
    (HEALTHY.replace("(6)", "(5)"), False), ("", False), (HEALTHY.replace("note_f1", "note_f2"), False)])
def test_continuous_integration_checks_the_last_table(table, is_good, tmp_path):
    """The script's last part, with a `make` that says what the run would."""
    script = (ROOT / ".ci" / "run").read_text()
    (tmp_path / "make").write_text(f"#!/bin/sh\ncat <<'E'\n{table}E\n")
    (tmp_path / "make").chmod(0o755)
    part = "set -euo pipefail\n" + script[script.index("began="):]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", part], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == is_good and "make run took 0 s" in done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git, and this is no checkout")
@pytest.mark.parametrize("path, is_kept", [
    ("outputs/reference/model.safetensors", True), ("outputs/reference/samples/a.mid", True), ("data/README.md", True),
    ("outputs/reference/state.pt", False), ("outputs/reference/.done/04.json", False), ("outputs/quickstart/a", False),
    ("data/bach/a.mid", False), (".venv/installed", False),
])
def test_git_keeps_the_reference_run_alone(path, is_kept):
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == int(is_kept)


def test_clean_spares_the_reference_run(tmp_path):
    for folder in ("outputs/reference", "outputs/quickstart", "data/bach", ".venv/__pycache__", "mtxlib/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "README.md").touch()
    subprocess.run(["make", "-s", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"outputs", "outputs/reference", "data", "data/README.md", ".venv", ".venv/__pycache__", "mtxlib"}


def test_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "MIT" and text.startswith("MIT License\n") and "free of charge" in text
