"""Two processes on parts of a batch train what one does on the whole: noise, free bits, held rates and all."""

import signal
import subprocess
import sys

import pytest
import torch
from test_train import ENVIRONMENT, lines, state, write_config

from mtxlib.model.train import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# AdamW, since the bf16 inside Muon makes differences of rounding a thousand times larger
NOISY = {"steps": 14, "optimizer": "adamw", "enc_token_dropout": 0.1, "dropout_kind": "random", "ema": 0.9}
RUNS = {  # the three objectives that are no mean over the windows
    "free bits": {"free_bits": 0.05, "accumulate": 2},
    "steered": {"beta_schedule": "rate", "target_rate": 20.0},
    "held": {"target_rate": 30.0, "target_start": 60.0, "recon_scale": "token"},
}
# The second run is told to stop by a signal to one of the two, and goes on; the third is killed, and does not.
TOGETHER = """
import os, signal, sys
from contextlib import suppress
import torch.distributed as dist
from mtxlib.config import Config
from mtxlib.model.train import Trainer, train

dist.init_process_group("gloo")
update, done = Trainer.update, set()
def patched(self, batch):
    name = self.run_dir.name
    if name == "steered" and self.step == 8 and self.rank == 1 and not done:
        done.add(signal.raise_signal(signal.SIGINT))
    if name == "held" and self.step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)
Trainer.update = patched
for folder in sys.argv[1:]:
    config = Config.load(folder + "/config.json")
    with suppress(KeyboardInterrupt):
        train(config, folder, "cpu")
    train(config, folder, "cpu")
"""


@pytest.fixture(scope="module")
def configs(run_config):
    return {name: run_config.replace(**NOISY, **changes) for name, changes in RUNS.items()}


@pytest.fixture(scope="module")
def together(configs, tmp_path_factory):
    """The folders of runs by two processes, and what these said."""
    folder = tmp_path_factory.mktemp("together")
    paths = [write_config(config, folder / name) for name, config in configs.items()]
    (folder / "together.py").write_text(TOGETHER)
    command = [*TORCHRUN, str(folder / "together.py"), *(str(path.parent) for path in paths)]
    first = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert first.returncode and f"exitcode  : -{signal.SIGKILL:d}" in first.stderr, first.stderr
    assert state(folder / "held")["step"] == 6
    second = subprocess.run([*TORCHRUN, "-m", "mtxlib.train", str(paths[2]), "--device", "cpu"], env=ENVIRONMENT,
                            capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    return folder, first.stdout + second.stdout


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_of_one_process(name, configs, together, tmp_path):
    train(configs[name], tmp_path, "cpu")
    ours, alone = lines(together[0] / name), lines(tmp_path)
    assert [(r["step"], r["split"]) for r in ours] == [(6, "train"), (6, "valid"), (10, "train"), (12, "train"),
                                                       (12, "valid"), (14, "train"), (14, "valid")]
    for a, b in zip(ours, alone, strict=True):
        assert a.pop("split") == b.pop("split") and a.pop("precision", None) == b.pop("precision", None)
        assert a == pytest.approx(b, rel=1e-5)
    ours, alone = state(together[0] / name), state(tmp_path)
    assert torch.equal(ours["rng"], alone["rng"])
    for key, value in alone["average"].items():
        torch.testing.assert_close(ours["average"][key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_all_stop_where_one_is_told_to(together):
    said = together[1]
    assert said.count("stopped at step 9 of 14; run the same command again to go on") == 1, "one of the two speaks"
    assert said.count("going on from step 9 of 14") == said.count("going on from step 6 of 14") == 1
    assert said.count("model.safetensors") == 1


def test_a_batch_that_cannot_be_divided_is_refused(run_config, tmp_path):
    path = write_config(run_config.replace(batch_size=6, accumulate=2), tmp_path)
    done = subprocess.run([*TORCHRUN, "-m", "mtxlib.train", str(path)], env=ENVIRONMENT, capture_output=True, text=True)
    expected = "error: parameter 'batch_size': expected a multiple of accumulate 2 x 2 processes, got 6"
    assert done.returncode and expected in done.stderr and not (tmp_path / "metrics.jsonl").exists()
