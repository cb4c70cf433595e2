"""What a user asked for: every option of the command line with its default, checked, and as JSON for the file."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fmextract.errors import ConfigError
from fmextract.options import (
    Dtype,
    EffectiveFields,
    JpegDecoder,
    MemoryFormat,
    Precision,
    WorkerKind,
    written_size,
)

PRECISIONS = get_args(Precision)
DTYPES = get_args(Dtype)
JPEG_DECODERS = get_args(JpegDecoder)
MEMORY_FORMATS = get_args(MemoryFormat)
EFFECTIVE_FIELDS = get_args(EffectiveFields)
WORKER_KINDS = get_args(WorkerKind)
RENAMED = {"decode": "jpeg_decoder", "store": "dtype", "top": "top_k", "workers": "num_workers"}
"""Options that had another name before: still accepted under it, and read so in files of then."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def by_present_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options, those with a former name under the one of today. Raises ConfigError for one under both."""
    for former, name in RENAMED.items():
        if former in options and name in options:
            raise ConfigError(f"{former} is the former name of {name}: give it once, as {name}")
    return {RENAMED.get(name, name): value for name, value in options.items()}


def parse_size(text: str | int, option: str) -> int:
    """`512MiB`, `2GB`, `4096` → bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r} is not a size; expected a number with a unit, as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_share(text: str | float, option: str) -> float:
    """`2%` or `0.02` → 0.02. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)\s*", str(text))
    if match is None:
        raise ConfigError(
            f"{option} {text!r} is not a share; expected a percentage such as 2% or a fraction such as 0.02"
        )
    return float(match[1]) / (100 if match[2] else 1)


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """How many images may fail: a count, or a share that is judged from the 200th image on.

    Below 200 images a share says little; then only a run in which everything fails is stopped.
    """

    count: int | None = None
    share: float | None = 0.05

    PROBATION = 200

    @classmethod
    def parse(cls, text: str | float | FailureBudget) -> FailureBudget:
        """`12` is a count, `5%` or `0.05` a share. Raises ConfigError."""
        if isinstance(text, FailureBudget):
            return text
        if isinstance(text, int) or re.fullmatch(r"\s*\d+\s*", str(text)):
            return cls(count=int(text), share=None)
        share = parse_share(text, "--max-failures")
        if share > 1:
            raise ConfigError(f"--max-failures {text!r} is more than all: expected at most 100%")
        return cls(share=share)

    def exceeded(self, failed: int, seen: int) -> bool:
        """Whether `failed` of the `seen` images so far are too many."""
        if self.count is not None:
            return failed > self.count
        assert self.share is not None
        return seen >= self.PROBATION and failed > self.share * seen

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{self.share:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run as it was asked for; every field is the option of the command line of the same name.

    `batch_size`, `num_workers` and `level` are None for "auto". Sizes are bytes, shares fractions of 1. What each
    option means stands in `RunOptions`.

    Raises:
        ConfigError: For values, and combinations of values, that cannot be carried out.

    Examples:
        >>> config = fm.Config.of(shard_size="512MiB", max_failures="5%", batch_size="auto")
        >>> config.shard_size, config.batch_size
        (536870912, None)
    """

    layers: tuple[str, ...] = ()
    weights: str = "default"
    preprocess: Any = "model"
    size: str | None = None
    exif: bool = False
    jpeg_decoder: str = "cpu"
    precision: str = "auto"
    max_error: float = 0.02
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    clip: bool = False
    keep_bits: int | None = None
    codec: str = "gzip"
    level: int | None = None
    memory_format: str = "auto"
    compile: bool = False
    shard_size: int | None = None
    num_workers: int | None = None
    worker_kind: str = "auto"
    dataset_workers: int = 0
    limit: int | None = None
    seed: int = 0
    top_k: int = 9
    effective_fields: str = "auto"
    max_failures: FailureBudget = dataclasses.field(default_factory=FailureBudget)
    key: Any = None
    label: Any = None
    hidden: bool = False
    allow_outside: bool = False
    recheck: bool = True
    ignore: tuple[str, ...] = ()
    keep_failures: bool = False
    overwrite: bool = False
    break_lock: bool = False

    def __post_init__(self) -> None:
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--jpeg-decoder", self.jpeg_decoder, JPEG_DECODERS)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--memory-format", self.memory_format, MEMORY_FORMATS)
        _one_of("--effective-fields", self.effective_fields, EFFECTIVE_FIELDS)
        _one_of("--worker-kind", self.worker_kind, WORKER_KINDS)
        self._check_types()
        for option, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--num-workers", self.num_workers, 1),
            ("--dataset-workers", self.dataset_workers, 0),
            ("--limit", self.limit, 1),
            ("--top-k", self.top_k, 0),
            ("--shard-size", self.shard_size, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: expected {least} or more")
        most = 23 if self.dtype == "float32" else 10
        if self.keep_bits is not None and not 1 <= self.keep_bits <= most:
            raise ConfigError(f"--keep-bits {self.keep_bits}: {self.dtype} has 1 to {most} mantissa bits to keep")
        if self.clip and self.dtype != "float16":
            raise ConfigError("--clip only means something with --dtype float16: float32 holds every value as it is")

    def _check_types(self) -> None:
        """Raise ConfigError for `"no"` where a truth is expected, and for 2.5 where a whole number is."""
        for field in dataclasses.fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{option} {value!r}: expected True or False")
            if field.type in ("int", "int | None") and value is not None and not _is_whole(value):
                raise ConfigError(f"{option} {value!r}: expected a whole number")

    @classmethod
    def of(cls, **options: Any) -> Config:
        """From options as users give them (`shard_size="512MiB"`, `max_failures="5%"`, `batch_size="auto"`).

        Former names are taken too. Raises ConfigError naming an unknown option.
        """
        options = by_present_names(options)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(options) - known
        if unknown:
            raise ConfigError(_unknown(sorted(unknown)[0], known))
        made = {name: _PARSERS.get(name, _same)(value) for name, value in options.items()}
        return cls(**made)

    def as_json(self) -> dict[str, Any]:
        """Everything needed to ask for the same run again."""
        made = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made["max_failures"] = str(self.max_failures)
        made["layers"], made["ignore"] = list(self.layers), list(self.ignore)
        if not isinstance(self.preprocess, str):
            made["preprocess"] = repr(self.preprocess)
        for option in ("key", "label"):
            made[option] = _shown(made[option])
        return made


def _shown(value: Any) -> str | None:
    """A column's name as it is; of a function or a list of the caller's only that there was one."""
    if value is None or isinstance(value, str):
        return value
    return f"a function {getattr(value, '__name__', '')}".strip() if callable(value) else f"a list of {len(value)}"


def _unknown(option: str, known: Collection[str]) -> str:
    """What is wrong, with the closest names: those that begin or end alike where nothing is spelled alike."""
    plain = option.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, known, n=3) or [n for n in sorted(known) if plain in n or n in plain]
    if close:
        return f"unknown option {option!r}; the closest: {', '.join(close[:3])}"
    return f"unknown option {option!r}; expected one of {', '.join(sorted(known))}"


def _same(value: Any) -> Any:
    return value


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _whole(value: Any) -> Any:
    """A number as plain Python, of numpy's and of text; what is none stays, and is refused as it was given."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    return operator.index(value) if _is_whole(value) else value


def _auto_int(option: str) -> Any:
    def parse(value: Any) -> int | None:
        if value is None or value == "auto":
            return None
        number = _whole(value)
        if not _is_whole(number):
            raise ConfigError(f"{option} {value!r}: expected a whole number or 'auto'")
        return int(number)

    return parse


def _type_name(value: Any) -> Any:
    """`float16` of numpy's and torch's types too."""
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


def _fields(value: Any) -> tuple[str, ...]:
    """Names of fields of a run, by their names of today."""
    return tuple(RENAMED.get(name, name) for name in _texts(value))


def _texts(value: Any) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    texts = tuple(value) if isinstance(value, Iterable) else ()
    if not isinstance(value, Iterable) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"expected a text or several, got {value!r:.80}")
    return texts


_PARSERS: Mapping[str, Any] = {
    "layers": _texts,
    "ignore": _fields,
    "batch_size": _auto_int("--batch-size"),
    "num_workers": _auto_int("--num-workers"),
    "level": _auto_int("--level"),
    "dataset_workers": lambda value: _auto_int("--dataset-workers")(value) or 0,
    "shard_size": lambda value: None if value in (None, "auto") else parse_size(value, "--shard-size"),
    "max_error": lambda value: parse_share(value, "--max-error"),
    "max_failures": FailureBudget.parse,
    "keep_bits": _whole,
    "limit": _whole,
    "seed": _whole,
    "top_k": _whole,
    "size": written_size,
    "dtype": _type_name,
    "device": str,
    "weights": str,
}


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} {value!r}: expected one of {', '.join(allowed)}")


_OTHER_FORMATS = frozenset(
    [
        ".bin",
        ".csv",
        ".gz",
        ".h5ad",
        ".hdf",
        ".hf",
        ".jpg",
        ".json",
        ".jsonl",
        ".mat",
        ".npy",
        ".npz",
        ".onnx",
        ".parquet",
        ".pdf",
        ".pickle",
        ".pkl",
        ".png",
        ".pt",
        ".pth",
        ".safetensors",
        ".svg",
        ".tar",
        ".txt",
        ".xlsx",
        ".yaml",
        ".zarr",
        ".zip",
    ]
)


def check_out(out: Path) -> None:
    """Raises ConfigError for an output that is named like a file of another format, and is not there yet."""
    if out.suffix.lower() in _OTHER_FORMATS and not out.exists():
        raise ConfigError(
            f"-o {out}: an output is one HDF5 file (name.h5, name.hdf5 or name.nc) or a directory of shards, which is"
            f" not named like a {out.suffix} file. For other formats: fmextract export"
        )


def is_single_file(out: Path) -> bool:
    """Whether `-o` names one file (`.h5`, `.hdf5`, `.nc`) rather than a directory of shards."""
    return out.suffix.lower() in (".h5", ".hdf5", ".nc")
