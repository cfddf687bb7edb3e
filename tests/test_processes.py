"""Functions of this file in processes of their own."""

import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from mtxlib.processes import AHEAD, apart, share_cores


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def square(x):
    print("noise on stdout")
    time.sleep(0.01 * (x % 3))
    return x * x


def act(how):
    if how == "crash":
        os._exit(9)
    if how == "hang":
        time.sleep(60)
    return how


def fail(error):
    raise {"OSError": OSError(28, "No space left on device"), "KeyError": KeyError("x")}[error]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    assert list(apart("test_processes:square", [(x,) for x in range(20)], workers)) == [(x * x, "") for x in range(20)]


def test_one_that_hangs_or_crashes_costs_itself_only():
    tasks = [("a",), ("crash",), ("b",), ("hang",), ("c",)]
    limit = {"hang": 0.5}
    results = list(apart("test_processes:act", tasks, 1, lambda task: limit.get(task[0], 20)))
    assert results == [("a", ""), (None, "crashed its process: 9"), ("b", ""), (None, "timed out: 0.5 s"), ("c", "")]


def test_what_is_raised_there_is_raised_here():
    with pytest.raises(OSError, match="No space left"):
        list(apart("test_processes:fail", [("OSError",)], 1))
    with pytest.raises(RuntimeError, match="test_processes:fail: KeyError: 'x'"):
        list(apart("test_processes:fail", [("KeyError",)], 1))


def test_tasks_are_given_out_as_they_are_needed():
    """So that a million of them need no memory; and what is left over when the reader stops ends."""
    given = count()
    results = apart("test_processes:square", ((next(given),) for _ in range(10**9)), 2)
    assert [next(results) for _ in range(5)] == [(x * x, "") for x in range(5)]
    results.close()
    assert next(given) <= 2 * AHEAD + 6


def test_scripts_need_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('once')\nfrom mtxlib.processes import apart\n"
                      "print(list(apart('operator:add', [(1, 2), (3, 4)], 2)))\n")


    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}).stdout
    assert out == "once\n[(3, ''), (7, '')]\n"


@pytest.mark.parametrize("given, expected", [
    ({}, {"GOMP_SPINCOUNT": "4000"}), ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"})], ids=str)
def test_threads_wait_as_the_user_says(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    share_cores()
    assert given == expected


@pytest.mark.parametrize("command", [["-m", "mtxlib.train", "--help"], ["-m", "mtxlib.book.cli", "--help"]], ids=str)
def test_commands_set_the_waiting_policy_before_torch_has_threads(command):
    """A hook of the interpreter looks at the environment when torch is first imported, or at the end."""
    look = ("import atexit, os, sys, runpy\n"
            "class Look:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'torch': print('import', os.environ.get('GOMP_SPINCOUNT'))\n"
            "sys.meta_path.insert(0, Look())\n"
            "atexit.register(lambda: print('end', os.environ.get('GOMP_SPINCOUNT')))\n"
            f"sys.argv = {command[1:]}; runpy.run_module({command[1]!r}, run_name='__main__')")
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True)
    seen = [line for line in done.stdout.splitlines() if line.startswith(("import ", "end "))]
    assert seen and {line.split()[1] for line in seen} == {"4000"}, done.stderr
