"""One thread for torch's own operations, in the tests and in the processes they start.

The networks here are tiny, and on a machine that is busy two threads that wait for each other at every operation take
fifty times as long as one. Values do not depend on it: what is compared runs on as many threads on both sides.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
