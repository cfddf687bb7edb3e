"""Two processes that would write one thing: the second waits."""

import json
import os
import subprocess
import sys
import threading

import mtxlib
from mtxlib.files import locked


def test_the_second_waits_and_says_so(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with locked(tmp_path / "lock"):
            entered.set()

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(20)
    assert entered.is_set() and f"waiting for another process at work in {tmp_path}" in capsys.readouterr().out


def test_two_trainings_in_one_folder_write_each_line_once(run_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(run_config.to_dict()))
    command = [sys.executable, "-m", "mtxlib.train", str(tmp_path / "config.json"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(mtxlib.ROOT), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("waiting for another process" in text for text in said) <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    places = [(line["step"], line["split"]) for line in lines]
    assert sorted(places) == sorted(set(places)) and (run_config.train.steps, "valid") in places
