"""Choose the device of a run, and explain the errors of devices."""

from __future__ import annotations

import torch

from fmextract.errors import ConfigError, DeviceLost


def pick(text: str) -> torch.device:
    """Return the device that `--device` names; `auto` is the accelerator of this machine, else the CPU.

    Raises ConfigError when it is not there.
    """
    if text == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(found.type, 0) if found is not None else torch.device("cpu")
    if "," in text:
        raise ConfigError(f"--device {text!r}: one device per run in this version; start one run per device")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"--device {text!r}: expected auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cpu":
        return device
    present = torch.accelerator.current_accelerator(check_available=True)
    if present is None or present.type != device.type:
        have = present.type if present is not None else "only a CPU"
        raise ConfigError(f"--device {text!r}: this machine has {have} as far as torch {torch.__version__} can see")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(f"--device {text!r}: this machine has {count} of them, numbered from 0")
    return torch.device(device.type, device.index or 0)


TOO_SMALL = "the device has not enough memory for one image: {}. Ask for fewer layers, or use --device cpu."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a forward pass ran out of memory.

    On a CPU, on MPS and in the libraries of CUDA that is a plain RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def lost(error: BaseException) -> DeviceLost | None:
    """Explain an error of an accelerator, or of its memory, that no image caused; return None for any other error.

    Such errors surface late, in the next call that waits for the device.
    """
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceLost(
            f"the device has no memory left: {said} What is done is kept, and the same command goes on from there; a"
            " new run (--overwrite) needs less of it with a smaller --batch-size, fewer layers or reducers."
        )
    kind = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    if (kind is not None and isinstance(error, kind)) or (isinstance(error, RuntimeError) and "CUDA error" in said):
        return DeviceLost(f"the device failed: {said}. What is done is kept: the same command goes on from there.")
    return None
