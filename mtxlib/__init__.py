"""A transformer variational autoencoder for MIDI whose latent matrix is used, with the numbers that show it.

Importing the package loads nothing else, so that the training core runs where only torch is installed.
"""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parents[1]  # of the checkout: `data/`, `notebooks/` and `outputs/` lie in it


def __getattr__(name: str):
    if name == "load_run":
        from mtxlib.run import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
