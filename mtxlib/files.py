"""Atomic writes: what a file held before is there until what comes after is whole; lines added to a log; locks; errors
in a few words."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within it, an error becomes an OSError that says what to do."""
    try:
        yield
    except Exception as e:  # on a full disk torch raises RuntimeError, safetensors its own
        raise OSError(f"could not write {path} ({e}); what was there before is unharmed: free some space and run the "
                      "same command again") from e


def atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then rename it to `path`.

    Raises OSError, saying what to do, when the disk is full or refuses; the old file then stays as it was.
    """
    path = Path(path)
    with writing(path):
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
        os.close(fd)
        try:
            write(Path(name))
            os.chmod(name, 0o644)  # mkstemp, and safetensors, let only the owner read
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def atomic_text(path: str | Path, text: str) -> None:
    atomic(path, lambda p: p.write_text(text))


@contextmanager
def locked(path: str | Path, waiting: str = "") -> Iterator[None]:
    """Within it, no other process is inside a `locked` of this file; one that is, is waited for, which is said. The
    system lets go of the lock when the process ends, however that happens."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting or f"waiting for another process at work in {Path(path).parent}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to a log. A full disk may leave a part of one: readers skip a last line without its end."""
    with writing(path), Path(path).open("a") as f:
        f.writelines(f"{line}\n" for line in lines)


def brief(e: BaseException) -> str:
    """The kind and the first words of an error, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
