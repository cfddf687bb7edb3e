"""`python -m mtxlib.train outputs/<run>/config.json`: the door of `mtxlib.model.train`, where the loop lives."""

import sys

from mtxlib.processes import share_cores

if __name__ == "__main__":
    share_cores()
    from mtxlib.model.train import main
    sys.exit(main())
