"""`python -m qat` is `qat`."""

import sys

from qat.cli import main

if __name__ == "__main__":
    sys.exit(main())
