"""`python -m fmextract`."""

import sys

from fmextract.cli import main

if __name__ == "__main__":
    sys.exit(main())
