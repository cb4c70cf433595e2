"""`python -m fmextract`."""

import sys

from fmextract.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
