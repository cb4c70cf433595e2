"""What a codec, a source, a reducer or a reader must keep to, as functions that say which promise one breaks.

Each `check_…` returns nothing, and raises AssertionError with a sentence about what was promised and what was seen
instead. They need no test runner; this package's own tests use them, and a plug-in's can:

>>> from fmextract.storage.codecs import CODECS
>>> from fmextract.testing import check_codec
>>> check_codec(CODECS["gzip"])
"""

from __future__ import annotations

from fmextract.testing.codecs import check_codec
from fmextract.testing.outputs import make_file, make_shards
from fmextract.testing.readers import check_reader
from fmextract.testing.reducers import check_reducer
from fmextract.testing.sources import check_source

__all__ = ["check_codec", "check_reader", "check_reducer", "check_source", "make_file", "make_shards"]
