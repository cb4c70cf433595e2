"""fmextract: the activations of a vision network, streamed to HDF5.

>>> import fmextract as fm
>>> acts = fm.extract("photos/", model="resnet50", layers=["conv#0", "layer*"], out="acts.h5")
>>> acts = fm.open("acts.h5")

Importing this package, opening and reading files need neither torch nor torchvision.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmextract.config import Config
from fmextract.errors import (
    CaptureError,
    ConfigError,
    DamagedError,
    DeviceLost,
    FmextractError,
    FormatError,
    LayerError,
    MissingExtra,
    ModelError,
    NoSpace,
    OutputError,
    OutputLost,
    RunStopped,
    SampleError,
    SourceError,
    SourceLost,
    TooManyFailures,
)
from fmextract.records import Field, FileInfo, LayerSpec, Preprocess, Result, Source, Status

if TYPE_CHECKING:
    from fmextract.comparison import compare, linear_cka
    from fmextract.exporting.export import export
    from fmextract.planning import Plan
    from fmextract.reading.activations import Activations, open
    from fmextract.reading.layer import Layer
    from fmextract.run.describe import describe
    from fmextract.run.extract import extract
    from fmextract.run.extract import make_plan as plan

__version__ = "0.1.0"

# What costs an import of HDF5 or torch is imported when it is first used.
_LAZY = {
    "Activations": ("fmextract.reading.activations", "Activations"),
    "Layer": ("fmextract.reading.layer", "Layer"),
    "Plan": ("fmextract.planning", "Plan"),
    "compare": ("fmextract.comparison", "compare"),
    "describe": ("fmextract.run.describe", "describe"),
    "export": ("fmextract.exporting.export", "export"),
    "extract": ("fmextract.run.extract", "extract"),
    "linear_cka": ("fmextract.comparison", "linear_cka"),
    "open": ("fmextract.reading.activations", "open"),
    "plan": ("fmextract.run.extract", "make_plan"),
}

__all__ = [
    "Activations",
    "CaptureError",
    "Config",
    "ConfigError",
    "DamagedError",
    "DeviceLost",
    "Field",
    "FileInfo",
    "FmextractError",
    "FormatError",
    "Layer",
    "LayerError",
    "LayerSpec",
    "MissingExtra",
    "ModelError",
    "NoSpace",
    "OutputError",
    "OutputLost",
    "Plan",
    "Preprocess",
    "Result",
    "RunStopped",
    "SampleError",
    "Source",
    "SourceError",
    "SourceLost",
    "Status",
    "TooManyFailures",
    "__version__",
    "compare",
    "describe",
    "export",
    "extract",
    "linear_cka",
    "open",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fmextract' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
