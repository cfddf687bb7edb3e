"""A transformer variational autoencoder for MIDI whose latent matrix is used, with the numbers that show it.

Importing the package loads nothing else, so that the training core runs where only torch is installed.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parents[1]  # of the checkout: `data/`, `notebooks/` and `outputs/` lie in it


LAZY = {"load_run": "mtxlib.run", "read_score": "mtxlib.music.readers", "bar_starts": "mtxlib.music.score"}


def __getattr__(name: str):
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
