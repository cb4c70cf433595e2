"""Files for tests, as `fmextract.testing` writes them, and what rows say of the files that they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from fmextract.records import FileStamp
from fmextract.testing.outputs import AXES, INFO, make_file, make_shards, make_spec, write_layers

__all__ = ["AXES", "COLUMNS", "INFO", "make_file", "make_shards", "make_spec", "stamps_of", "write_layers"]

COLUMNS = ("sample", "key", "status", "message", "height", "width", "file_size", "file_digest")


def stamps_of(folder: Path, keys: Sequence[str]) -> list[FileStamp]:
    """What rows say of the files in `folder` that they were made of; of one that is not there, that there was none."""
    contents = [(folder / key).read_bytes() if (folder / key).is_file() else None for key in keys]
    return [FileStamp() if c is None else FileStamp(len(c), xxhash.xxh3_128_hexdigest(c)) for c in contents]
