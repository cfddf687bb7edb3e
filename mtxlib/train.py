"""`python -m mtxlib.train outputs/<run>/config.json`: the door of `mtxlib.model.train`, where the loop lives."""

import sys

from mtxlib.model.train import main

if __name__ == "__main__":
    sys.exit(main())
