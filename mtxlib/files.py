"""Atomic writes: what a file held before is there until what comes after is whole."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then rename it to `path`.

    Raises OSError, saying what to do, when the disk is full or refuses; the old file then stays as it was.
    """
    path = Path(path)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
    os.close(fd)
    try:
        write(Path(name))
        os.chmod(name, 0o644)  # mkstemp, and safetensors, let only the owner read
        os.replace(name, path)
    except Exception as e:  # on a full disk torch raises RuntimeError, safetensors its own
        raise OSError(f"could not write {path} ({e}); what was there before is unharmed: free some space and run the "
                      "same command again") from e
    finally:
        Path(name).unlink(missing_ok=True)


def atomic_text(path: str | Path, text: str) -> None:
    atomic(path, lambda p: p.write_text(text))
