"""Sweeps as jobs that outlive the command: on a Slurm of one node, made here, and in the background of this machine."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks_run import DEFAULTS, make, sweep, wait_for

from mtxlib.book import cli
from mtxlib.book.cluster import Jobs

# Each start is noted with the steps it goes on from. A slow one takes steps until it is told to go.
NOTEBOOK = """
import time
from pathlib import Path
from mtxlib.files import atomic_text
state = Path(run_dir, "steps")
steps = int(state.read_text()) if state.exists() else 0
with open(f"{mood}.txt", "a") as f:
    f.write(f"{steps}\\n")
assert mood != "bad", "a bad mood"
while mood != "quick" and not Path("go").exists():
    time.sleep(0.05)
    steps += 1
    atomic_text(state, str(steps))
atomic_text(Path(run_dir, "diagnosis.json"), '{"verdict": "healthy"}')"""

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:4
PartitionName=low Nodes={host} Default=YES GraceTime=5
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF
"""  # GraceTime: seconds from the warning of a preempted job to its end; cred_expire: before a requeued one starts
DAEMONS = ("munged", "slurmctld", "slurmd")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that calls one of Slurm's commands; it knows where Slurm is by the environment."""
    if missing := [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("only root can start slurmd")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [s.getsockname()[1] for s in (a, b)]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, folder=folder))
    for number in range(4):
        (folder / f"gpu{number}").symlink_to("/dev/null")  # GPUs in name only
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    munged = ["munged", "--force", "--foreground", f"--key-file={folder}/key", f"--socket={folder}/munge.socket",
              *(f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed"))]

    def call(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        daemons = []
        try:
            for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
                with open(folder / f"{command[0]}.out", "w") as log:
                    daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                wait_for((folder / "munge.socket").exists)
            sinfo = ["sinfo", "--noheader", "--format=%T"]
            wait_for(lambda: "idle" in subprocess.run(sinfo, capture_output=True, text=True).stdout)
            yield call
            call("scancel", "--user=root")
            wait_for(lambda: not call("squeue", "--noheader"))
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


class Sweep:
    """`mtx sweep` of runs that are named by their moods, as a process of its own."""

    def __init__(self, folder: Path, moods: tuple[str, ...], options: tuple[str, ...]):
        make(folder / "notebooks", "04_training", DEFAULTS + '\nmood: str = "quick"', NOTEBOOK)
        sweep(folder, f"notebooks: ['04']\nlist: [{', '.join(f'{{name: {mood}, mood: {mood}}}' for mood in moods)}]")
        self.folder, self.out = folder, folder / "outputs" / "sweeps" / "ablation"
        self.command = [sys.executable, "-m", "mtxlib.book.cli", "sweep", "ablation.yaml", "--notebooks", "notebooks",
                        *options]
        self.processes = []

    def start(self) -> None:
        with open(self.folder / "said.txt", "w") as said:  # no pipe: a job in the background would hold it
            self.processes.append(subprocess.Popen(
                self.command, cwd=self.folder, stdout=said, stderr=said, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))  # a shell's `&` has it ignored

    def end(self) -> tuple[int, str]:
        """Exit status and all that was said."""
        status = self.processes[-1].wait(90)
        return status, (self.folder / "said.txt").read_text()

    def ctrl_c(self) -> str:
        """A terminal sends it to all processes of the group."""
        os.killpg(self.processes[-1].pid, signal.SIGINT)
        status, said = self.end()
        assert status == 130 and "stopped; the same command goes on from here" in said, said
        return said

    def table(self) -> dict[str, str]:
        file = self.out / "table.csv"
        return {row["run"]: row["state"] for row in csv.DictReader(file.open())} if file.exists() else {}

    def starts(self, mood: str) -> list[int]:
        """The steps from which each start of a run went on."""
        file = self.folder / f"{mood}.txt"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture
def sweep_of(tmp_path):
    made = []

    def start(*moods: str, options: tuple[str, ...]) -> Sweep:
        made.append(Sweep(tmp_path, moods, options))
        made[0].start()
        return made[0]

    yield start
    (tmp_path / "go").touch()
    for process in made[0].processes:
        process.kill()


def job_of(slurm, run: Path) -> str:
    [job] = [line for line in slurm("squeue", "--noheader", "--format=%i %k").splitlines() if line.endswith(str(run))]
    return job.split(" ")[0]


def test_a_sweep_on_slurm(slurm, sweep_of, tmp_path):
    """Done and failed are told apart; Ctrl-C leaves the jobs, the same command finds them; a requeued job goes on."""
    ours = sweep_of("quick", "bad", "slow", options=(
        "--cluster", "slurm", "--partition", "low", "--gpus", "1", "--time", "01:30:00", "--slurm", "nice=7"))
    wait_for(lambda: ours.table() == {"quick": "done", "bad": "failed", "slow": "running"}, 90)
    wait_for(lambda: ours.starts("slow"))
    assert "1 jobs go on without this command" in ours.ctrl_c()
    job = job_of(slurm, ours.out / "slow")
    asked = slurm("scontrol", "show", "job", job).split()
    assert {"JobName=mtx", "Partition=low", "TimeLimit=01:30:00", "Nice=7", "TresPerNode=gres:gpu:1"} <= set(asked)
    ours.start()
    wait_for(lambda: len(ours.starts("bad")) == 2)  # which it tries again
    assert job_of(slurm, ours.out / "slow") == job
    slurm("scontrol", "requeue", job)
    wait_for(lambda: len(ours.starts("slow")) == 2)
    (tmp_path / "go").touch()
    status, said = ours.end()
    assert status == 1 and "2 of 3 runs are done: outputs/sweeps/ablation/table.csv" in said
    assert ours.table() == {"quick": "done", "bad": "failed", "slow": "done"}
    assert ours.starts("quick") == [0] and ours.starts("slow")[1] > 0
    assert "bad failed, see outputs/sweeps/ablation/bad/log.txt" in said
    assert "a bad mood" in (ours.out / "bad" / "log.txt").read_text()


def test_a_job_at_its_time_limit_and_a_preempted_one_save_themselves_and_go_on(slurm, sweep_of, tmp_path):
    """Slurm looks at the time every half minute, and warns 90 s before the end."""
    ours = sweep_of("slow", options=("--cluster", "slurm", "--time", "1"))
    log = ours.out / "slow" / "log.txt"
    wait_for(lambda: len(ours.starts("slow")) == 2, 90)
    assert log.read_text().count("stopped; the same command goes on from here") == 1
    slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: len(ours.starts("slow")) == 3, 90)
    assert log.read_text().count("stopped; the same command goes on from here") == 2
    (tmp_path / "go").touch()
    status, said = ours.end()
    assert status == 0 and ours.table() == {"slow": "done"}, said
    assert ours.starts("slow") == sorted(set(ours.starts("slow"))), "each later than the one before"


def test_what_slurm_refuses_is_told(slurm, sweep_of):
    status, said = sweep_of("quick", options=("--cluster", "slurm", "--partition", "none")).end()
    assert status == 2 and "mtx: Slurm refuses the job" in said and "invalid partition" in said
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_sweep_in_the_background(sweep_of, tmp_path):
    """The same by submitit's local executor: a job that is warned goes on, and outlives the command that began it."""
    ours = sweep_of("quick", "bad", "slow", options=("--cluster", "local", "--workers", "3"))
    wait_for(lambda: ours.table() == {"quick": "done", "bad": "failed", "slow": "running"})
    wait_for(lambda: ours.starts("slow"))
    [pickled] = (ours.out / "slow" / "jobs").glob("*_submitted.pkl")
    controller = pickled.name.split("_")[0]
    [job] = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(job), signal.SIGUSR2)
    wait_for(lambda: len(ours.starts("slow")) == 2)
    assert "1 jobs go on without this command" in ours.ctrl_c()
    ours.start()
    wait_for(lambda: "waiting for another process at work" in (ours.out / "slow" / "log.txt").read_text())
    (tmp_path / "go").touch()
    status, said = ours.end()
    assert status == 1 and ours.table() == {"quick": "done", "bad": "failed", "slow": "done"}, said
    assert len(ours.starts("slow")) == 2 and ours.starts("slow")[1] > 0 and ours.starts("quick") == [0]


def test_while_slurm_does_not_answer_all_is_as_before(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncat queue.txt\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    jobs = Jobs("slurm", 1, 0, 60, {})
    with pytest.raises(ValueError, match="squeue: .*queue.txt"):
        jobs.states()
    Path("queue.txt").write_text("PENDING /runs/a\nRUNNING /runs/b b\nCOMPLETING /runs/c\nRUNNING (null)\n")
    queue = jobs.states()
    assert {run: queue[Path("/runs", run)] for run in ("a", "b b", "c")} == {"a": "waiting", "b b": "running",
                                                                             "c": "running"}
    Path("queue.txt").unlink()
    assert jobs.states() == queue


@pytest.mark.parametrize(("options", "message"), [
    (["--partition", "a"], "--partition: expected --cluster slurm with it, got none"),
    (["--gpus", "1"], "--gpus: expected --cluster slurm or local with it, got none"),
    (["--cluster", "local", "--time", "5"], "--time: expected --cluster slurm with it, got local"),
    (["--workers", "0"], "--workers: expected 1 or more, got 0"),
    (["--cluster", "slurm"], "--cluster slurm: expected Slurm's commands here, got no squeue"),
])
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["sweep", str(tmp_path / "any.yaml"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"mtx: {message}")


@pytest.mark.parametrize(("limit", "expected"), [("90", 90), ("01:30:00", 90), ("0:00:30", 1), ("48:00:00", 2880)])
def test_time_limits(limit, expected):
    assert cli.minutes(limit) == expected


@pytest.mark.parametrize("limit", ["1:30", "0", "a day"])
def test_a_time_limit_that_is_unclear_is_refused(limit, capsys):
    """Slurm itself reads 1:30 as minutes and seconds, and 0 as no limit."""
    with pytest.raises(SystemExit):
        cli.main(["sweep", "any.yaml", "--time", limit])
    assert f"argument --time: invalid minutes value: '{limit}'" in capsys.readouterr().err
