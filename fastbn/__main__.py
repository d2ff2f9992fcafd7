"""``python -m fastbn`` is the command ``fastbn``."""

import sys

from fastbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
