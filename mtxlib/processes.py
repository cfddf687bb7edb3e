"""Work in processes of its own, several at once: one that hangs or crashes costs only what it was at.

They are started as `python -c`, not by multiprocessing, so scripts need no `__main__` guard and kernels no fork.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

AHEAD = 16  # tasks a process, given out before the first of them is answered for


def share_cores() -> None:
    """Let OpenMP's threads, whose waiting for each other keeps the cores, go to sleep sooner: beside one other busy
    process training is twice as fast so, alone as fast as ever. Call it before torch is imported; processes inherit it.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "4000"  # of 300,000


def cores() -> int:
    return min(os.cpu_count() or 1, 16)


def apart(function: str, tasks: Iterable[tuple], workers: int | None = None,
          seconds: Callable[[tuple], float] = lambda task: threading.TIMEOUT_MAX) -> Iterator[tuple[object, str]]:
    """`function` ("module:name") of each task in `workers` processes, one a core by default: in order, (its result,
    "") or (None, why there is none). One that takes longer than `seconds` of its task is killed, one that ends is
    replaced. Tasks and results are JSON. What `function` raises is raised here, as OSError or RuntimeError.
    """
    here, processes, n = threading.local(), [], workers or cores()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                   "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # the cores are shared out already
    command = [sys.executable, "-c", "import sys; from mtxlib.processes import serve; serve(sys.argv[1])", function]

    def one(task: tuple) -> tuple[object, str]:
        if not hasattr(here, "process"):
            here.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            processes.append(here.process)
            here.process.stdout.readline()  # it is ready: its imports must not count against the first task
        limit, begin = seconds(task), time.monotonic()
        timer = threading.Timer(limit, here.process.kill)
        timer.start()
        try:
            print(json.dumps(task), file=here.process.stdin, flush=True)
            result, error, what = json.loads(here.process.stdout.readline())
        except (OSError, ValueError):
            code = here.process.wait()
            del here.process
            late = time.monotonic() - begin >= limit
            return None, f"timed out: {limit:g} s" if late else f"crashed its process: {code}"
        finally:
            timer.cancel()
        if error:
            raise {"OSError": OSError}.get(error, RuntimeError)(what)
        return result, ""

    pool, waiting = ThreadPoolExecutor(n), deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(one, task))
            if len(waiting) > AHEAD * n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.wait()


def serve(name: str) -> None:
    """Such a process: a task a line in, an answer a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a parser prints must not pass for an answer
    module, _, function = name.partition(":")
    function = getattr(importlib.import_module(module), function)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = function(*json.loads(line)), "", ""
        except OSError as e:
            answer = None, "OSError", str(e)
        except Exception as e:
            answer = None, "RuntimeError", f"{name}: {type(e).__name__}: {e}"
        print(json.dumps(answer), file=answers, flush=True)
