"""``python -m fastprune``."""

import sys

from fastprune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
