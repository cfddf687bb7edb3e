"""Time and memory of corpus, tokens and 50 steps of training: `python benchmarks/bigdata.py FOLDER DATA_DIR [N …]`.

FOLDER as `make_folk.py` makes it; N files of it (default 1000 and 10000). Peak memory is the resident set of the
process and all that it started, summed, so pages they share count more than once.
"""

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
    "tokens": PIECES + "from mtxlib.tokens import build_store\nstore = build_store(c, pieces)\n"
              "print(len(store), 'windows', int(store.offsets[-1]), 'tokens')",
    "training": PIECES + "from mtxlib.tokens import store_folder\nfrom mtxlib.train import train\n"
                "folder = store_folder(c, pieces)\n"
                "del pieces\ntrain(c.replace(store=str(folder)), sys.argv[1], 'cpu')"}


def measure(code: str, *args: str) -> tuple[float, float]:
    """Seconds, and the peak of the memory in GB."""
    begin, peak = time.monotonic(), 0
    process = psutil.Process(subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.DEVNULL).pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for p in [process, *process.children(recursive=True)]:
            try:
                total += p.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        peak = max(peak, total)
        time.sleep(0.05)
    return time.monotonic() - begin, peak / 1e9


def main(folder: Path, data_dir: Path, numbers: list[int]) -> None:
    for n in numbers:
        part = data_dir / f"folk{n}"
        part.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.rglob("*.mid"))[:n]:
            if not (part / file.name).exists():
                (part / file.name).hardlink_to(file)
        head = ("import sys\nfrom mtxlib.config import Config\nfrom mtxlib.corpus import load_corpus\n"
                f"c = Config.from_flat({SETTINGS % (str(part), str(data_dir / 'data'))})\n")
        for name, code in STAGES.items():
            seconds, gigabytes = measure(head + code, str(data_dir / f"run{n}"))
            print(f"{n} files, {name}: {seconds:.1f} s, {n / seconds:.0f} files/s, peak {gigabytes:.2f} GB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]] or [1000, 10_000])
