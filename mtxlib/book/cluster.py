"""Where the runs of a sweep take place: processes of this command, or jobs of submitit.

A run is the command `mtx run`, which goes on from its done-files and its state.pt. So a job that was preempted, or came
to its time limit, only has to be queued again; warned by Slurm, with SIGUSR2, it first saves itself. submitit pickles a
job to `<run>/jobs/` and reads it there again; nothing from outside is loaded.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission

STOPPED = 130  # exit status of `mtx` after Ctrl-C or SIGTERM
OFTEN = 10_000  # times a job may come to its limit: each time it gets further


class Processes:
    """Runs as processes of this command, which stop and save themselves when it ends. As in `Jobs`, `states` has the
    runs that are not over: waiting or running."""

    seconds = 0.2  # between two looks

    def __init__(self, most: int):
        self.most, self.threads, self.processes = most, max(1, (os.cpu_count() or 1) // most), {}

    def start(self, out: Path, command: list[str]) -> None:
        env = {"OMP_NUM_THREADS": str(self.threads), **os.environ}  # or the workers fight for the cores
        with open(out / "log.txt", "a") as log:
            self.processes[out] = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def states(self) -> dict[Path, str]:
        return {out: "running" for out, process in self.processes.items() if process.poll() is None}

    def leave(self, active: int) -> None:
        for process in self.processes.values():  # the terminal has told them too: time for them to save
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.terminate()


class Jobs:
    """Runs as jobs that outlive this command: on Slurm, or (cluster `local`) in the background of this machine.

    `most` at a time; `gpus` a job; `minutes` until one on Slurm is saved and queued again; `sbatch`: other options by
    their long names. By a job's comment, its run folder, Slurm's queue tells those of an earlier command. Raises
    ValueError where Slurm is missing or refuses.
    """

    seconds = 5  # seldom enough for a controller that many ask

    def __init__(self, cluster: str, most: int, gpus: int, minutes: int, sbatch: dict[str, str]):
        if cluster == "slurm" and not shutil.which("squeue"):
            raise ValueError("--cluster slurm: expected Slurm's commands here, got no squeue: is this a login node?")
        self.cluster, self.most, self.jobs, self.queue = cluster, most, {}, None
        slurm = {"timeout_min": minutes, "slurm_additional_parameters": {"requeue": True, **sbatch}}
        self.options = slurm if cluster == "slurm" else {"timeout_min": 10**7}  # or submitit takes two minutes
        self.options |= {"gpus_per_node": gpus} if gpus else {}

    def start(self, out: Path, command: list[str]) -> None:
        executor = submitit.AutoExecutor(out / "jobs", self.cluster, slurm_max_num_timeout=OFTEN)
        executor.update_parameters(name=f"mtx {out.name}", slurm_comment=str(out), **self.options)
        at_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a local job inherits, and so outlives it
        try:
            self.jobs[out] = executor.submit(Job(command, out / "log.txt"))
        except FailedJobError as e:
            raise ValueError(f"Slurm refuses the job: {e}") from e
        finally:
            signal.signal(signal.SIGINT, at_ctrl_c)
        self.queue = {**(self.queue or {}), out: "waiting"}

    def states(self) -> dict[Path, str]:
        if self.cluster == "local":
            return {out: "running" for out, job in self.jobs.items() if not job.done()}
        answer = subprocess.run(["squeue", "--me", "--noheader", "--format=%T %k"], capture_output=True, text=True)
        if not answer.returncode:
            rows = (line.split(" ", 1) for line in answer.stdout.splitlines())
            self.queue = {Path(out): "waiting" if state == "PENDING" else "running" for state, out in rows}
        elif self.queue is None:
            raise ValueError(f"squeue: {answer.stderr.strip()}")
        return self.queue  # while Slurm does not answer, that of before

    def leave(self, active: int) -> None:
        if active:
            print(f"{active} jobs go on without this command; given again, it shows how they are")


@dataclass
class Job:
    """What submitit runs: `command`, with its output in `log`."""

    command: list[str]
    log: Path

    def __call__(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # Popen's wait holds a lock checkpoint needs
        code = self.process.wait()
        if code == STOPPED:  # by Slurm's SIGTERM to all of a job it will kill soon, and queue again if preempted
            time.sleep(3600)
        if code:
            raise RuntimeError(f"mtx run failed with {code}, see {self.log}")

    def checkpoint(self) -> DelayedSubmission:
        """At SIGUSR2: let the run save itself, and ask for the same again."""
        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(replace(self))
