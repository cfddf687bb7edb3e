"""How each notebook begins: `begin(globals())`, after its parameters."""

import os

from mtxlib import ROOT
from mtxlib.config import Config, flat_names
from mtxlib.music.display import set_style


def begin(names: dict) -> Config:
    """The run's config from a notebook's names: those that are dials count, all others keep their defaults. From here
    on paths are relative to the repository, and figures have one look. ValueError where a dial cannot be so."""
    os.chdir(ROOT)
    set_style()
    return Config.from_flat({name: value for name, value in names.items() if name in flat_names()})
