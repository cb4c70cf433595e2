"""Tell what machine figures come from: processor, cores, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Return system, processor, cores, accelerator and versions."""
    libraries = ("fmextract", "torch", "torchvision", "numpy", "h5py", "isal", "simplejpeg")
    versions: dict[str, Any] = {name: metadata.version(name) for name in libraries}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
