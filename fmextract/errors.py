"""Every error a user can cause, and the exit code that the command line gives it.

* FmextractError                     1  the root; never raised itself
  x ConfigError                      2  an option or a combination of options
    - ModelError                     2  unknown model, weights that do not load, a failed download
    - LayerError                     2  a selector that matches nothing, a tap that cannot be stored row by row
    - SourceError                    2  no such folder, no images, duplicate keys
    - OutputError                    2  the output exists and is something else, cannot be written, is in use
    - MissingExtra                   2  an optional library is not installed
  x FormatError                      2  a file that is not ours, is newer than we know, or is damaged
    - DamagedError                   5  what is read differs from what was written
  x RunStopped                       4  stopped before the end; what is done is kept, the same command resumes
    - TooManyFailures                4
    - NoSpace                        4
    - OutputLost                     4  the output became read-only, went away or stopped taking data during the run
    - DeviceLost                     4
    - CaptureError                   4  a forward pass did not do what the probe saw
    - SourceLost                     4  a process that reads the images ended
  x SampleError                      -  one image failed; becomes the status and message of its row

A message says what was wrong, where (image key, layer, file), and what to do.
"""

from __future__ import annotations


class FmextractError(Exception):
    """Root of all errors that fmextract raises on purpose."""

    exit_code = 1


class ConfigError(FmextractError):
    """An option, or a combination of options, that cannot be carried out."""

    exit_code = 2


class ModelError(ConfigError):
    """A model that cannot be built or whose weights cannot be loaded."""


class LayerError(ConfigError):
    """A selector that matches nothing, or a tap whose rows would not belong to one image each."""


class SourceError(ConfigError):
    """A source of images that cannot be listed."""


class OutputError(ConfigError):
    """An output path that cannot be written or holds something else."""


class MissingExtra(ConfigError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library {library!r}, which is not installed. "
            f"Install it with: pip install 'fmextract[{extra}]'"
        )


class FormatError(FmextractError):
    """A file that is not an fmextract file, or is of a version this program does not know."""

    exit_code = 2


class DamagedError(FormatError):
    """A file whose content is not what was written."""

    exit_code = 5


class RunStopped(FmextractError):
    """The run ended before its last image; finished shards are kept and the same command resumes."""

    exit_code = 4


class TooManyFailures(RunStopped):
    """More images failed than --max-failures allows."""


class NoSpace(RunStopped):
    """The disk is full."""


class OutputLost(RunStopped):
    """The output was writable when the run began, and is not any more."""


class DeviceLost(RunStopped):
    """The device stopped answering or ran out of memory at the smallest batch."""


class CaptureError(RunStopped):
    """A forward pass did something else than the probe saw: the rows cannot be trusted."""


class SourceLost(RunStopped):
    """A process that was reading a Dataset ended before its time."""


class SampleError(FmextractError):
    """One image failed. `status` is the code of the row (see `records.Status`)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[SampleError], tuple[int, str]]:
        return SampleError, (self.status, str(self))
