"""fmextract: the activations of a vision network, streamed to HDF5.

    import fmextract as fm

    acts = fm.extract("photos/", "resnet50", "acts.h5", layers=["conv#0", "layer*"])
    acts = fm.open("acts.h5")

Importing this package, opening and reading files need neither torch nor torchvision. The logger `fmextract` tells what
a run does; it has no handler of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmextract.api.files import compare, export, open, pack, report, verify
from fmextract.api.pictures import show_depth, show_filters, show_maps, show_top, show_where
from fmextract.api.running import bench, extract, layers, plan
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
from fmextract.options import MapOptions, RunOptions
from fmextract.records import (
    Field,
    FileInfo,
    LayerSpec,
    ModuleRow,
    Preprocess,
    Progress,
    Result,
    Source,
    Status,
)

if TYPE_CHECKING:
    from fmextract.benchmark import Benchmark
    from fmextract.comparison import Comparison, linear_cka
    from fmextract.exporting.export import Exported
    from fmextract.planning import Plan
    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer
    from fmextract.run.describe import ModelLayers
    from fmextract.verification import Verification
    from fmextract.visual.report.report import Report

__version__ = "0.1.0"

# What costs an import of HDF5 or torch is imported when it is first used.
_LAZY = {
    "Activations": "fmextract.reading.activations",
    "Benchmark": "fmextract.benchmark",
    "Comparison": "fmextract.comparison",
    "Exported": "fmextract.exporting.export",
    "Layer": "fmextract.reading.layer",
    "ModelLayers": "fmextract.run.describe",
    "Plan": "fmextract.planning",
    "Report": "fmextract.visual.report.report",
    "Verification": "fmextract.verification",
    "linear_cka": "fmextract.comparison",
}

__all__ = [
    "Activations",
    "Benchmark",
    "CaptureError",
    "Comparison",
    "Config",
    "ConfigError",
    "DamagedError",
    "DeviceLost",
    "Exported",
    "Field",
    "FileInfo",
    "FmextractError",
    "FormatError",
    "Layer",
    "LayerError",
    "LayerSpec",
    "MapOptions",
    "MissingExtra",
    "ModelError",
    "ModelLayers",
    "ModuleRow",
    "NoSpace",
    "OutputError",
    "OutputLost",
    "Plan",
    "Preprocess",
    "Progress",
    "Report",
    "Result",
    "RunOptions",
    "RunStopped",
    "SampleError",
    "Source",
    "SourceError",
    "SourceLost",
    "Status",
    "TooManyFailures",
    "Verification",
    "__version__",
    "bench",
    "compare",
    "export",
    "extract",
    "layers",
    "linear_cka",
    "open",
    "pack",
    "plan",
    "report",
    "show_depth",
    "show_filters",
    "show_maps",
    "show_top",
    "show_where",
    "verify",
]


if not TYPE_CHECKING:  # type checkers know every name, and say so of one that there is not

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            # With these two, Python itself names the closest.
            raise AttributeError(f"module 'fmextract' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        found = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
