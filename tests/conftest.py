"""What holds for all tests.

In CI hypothesis draws the same examples every time, so that a change is judged by what it changed; elsewhere it goes on
looking for new ones.

One thread for torch's own operations, in the tests and in the processes they start: the networks here are tiny, and on
a busy machine two threads that wait for each other at every operation take fifty times as long as one. Values do not
depend on it: what is compared runs on as many threads on both sides.
"""

from __future__ import annotations

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell starts in the background ignores Ctrl-C, and so would the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", derandomize=True, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
