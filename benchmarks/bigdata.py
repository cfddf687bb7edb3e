"""Time and memory of corpus, tokens and 50 steps of training: `python benchmarks/bigdata.py FOLDER DATA_DIR [N …]`.

FOLDER as `make_folk.py` makes it; N files of it (default 1000 and 10000). Peak memory is the resident set of the
process and all that it started, summed, so pages they share count more than once.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

SETTINGS = '{"source": "folder", "archive": %r, "data_dir": %r, "hop": 4, "steps": 50, "eval_every": 50, ' \
           '"eval_windows": 64, "wandb": "off"}'
PIECES = 'pieces = load_corpus("folder", c.data.data_dir, archive=c.data.archive)\n'
STAGES = {
    "corpus": PIECES,
    "tokens": PIECES + "from mtxlib.data.tokens import build_store\nstore = build_store(c, pieces)\n"
              "print(len(store), 'windows', int(store.offsets[-1]), 'tokens')",
    "training": PIECES + "from mtxlib.data.tokens import store_folder\nfrom mtxlib.model.train import train\n"
                "folder = store_folder(c, pieces)\n"
                "del pieces\ntrain(c.replace(store=str(folder)), sys.argv[1], 'cpu')"}


def measure(code: str, *args: str) -> tuple[float, float, float]:
    """Seconds, seconds of all cores, and the peak of the memory in GB."""
    begin, peak, before = time.monotonic(), 0, os.times()
    process = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends just now
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        time.sleep(0.05)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begin, cpu, peak / 1e9


def main(folder: Path, data_dir: Path, numbers: list[int]) -> None:
    for n in numbers:
        part = data_dir / f"folk{n}"
        part.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.rglob("*.mid"))[:n]:
            if not (part / file.name).exists():
                (part / file.name).hardlink_to(file)
        head = ("import sys\nfrom mtxlib.config import Config\nfrom mtxlib.music.corpus import load_corpus\n"
                f"c = Config.from_flat({SETTINGS % (str(part), str(data_dir / 'data'))})\n")
        for name, code in STAGES.items():
            seconds, cpu, gigabytes = measure(head + code, str(data_dir / f"run{n}"))
            print(f"{n} files, {name}: {seconds:.1f} s, {n / seconds:.0f} files/s, {cpu:.1f} s of cores, peak "
                  f"{gigabytes:.2f} GB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]] or [1000, 10_000])
