"""``python -m fastprune.cli``."""

import sys

from fastprune.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
