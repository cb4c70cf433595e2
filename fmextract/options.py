"""What a run may be asked for, as a user writes it: the keywords of `extract`, `plan` and `bench`, typed.

`Config` holds the same with every value parsed; the command line has an option for each. Their names, choices and
defaults agree (tests/test_api.py).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

from fmextract.records import Label, Preprocess, Source

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # comes with torch

if TYPE_CHECKING:
    import PIL.Image
    import torch

__all__ = [
    "Codec",
    "Dtype",
    "EffectiveFields",
    "HowToPreprocess",
    "Images",
    "JpegDecoder",
    "MapOptions",
    "MemoryFormat",
    "PathLike",
    "Precision",
    "RunOptions",
    "Size",
    "Theme",
    "Unpack",
    "WorkerKind",
    "as_parameters",
    "listed",
    "with_options",
    "written_size",
]

PathLike: TypeAlias = str | os.PathLike[str]
Precision: TypeAlias = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Dtype: TypeAlias = Literal["float32", "float16"]
JpegDecoder: TypeAlias = Literal["cpu", "device"]
Codec: TypeAlias = Literal["gzip", "zstd", "lz4", "none"]
MemoryFormat: TypeAlias = Literal["auto", "channels_last", "contiguous"]
EffectiveFields: TypeAlias = Literal["auto", "always", "never"]
WorkerKind: TypeAlias = Literal["auto", "threads", "processes"]
Theme: TypeAlias = Literal["dark", "light"]
Size: TypeAlias = int | str | tuple[int, int] | None
HowToPreprocess: TypeAlias = "str | Preprocess | Callable[[PIL.Image.Image], torch.Tensor] | None"


class Rows(Protocol):
    """Images by their number: a map-style Dataset, a list, an array."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...


Images: TypeAlias = PathLike | Rows | Source
ByRow: TypeAlias = "str | Sequence[Any] | Callable[[int], Label] | Callable[[int, Any], Label] | None"


class RunOptions(TypedDict, total=False):
    """The options of a run, each of them optional.

    They have the names of the command line's options (`--batch-size` is `batch_size`), and its defaults.
    """

    weights: PathLike
    """`"default"`, the name of a set of weights, `"random:SEED"`, or a file (.safetensors, .pth). Default: default."""
    preprocess: HowToPreprocess
    """`"model"` (that of its weights), the name of another model, `"module:callable"`, words as
    `"size=256,crop=224,mean=0.5,std=0.5"`, a `Preprocess`, or a callable from a PIL image to a float tensor
    (channel, y, x); None or `"none"`: images are the model's inputs already. Default: model."""
    size: Size
    """Exact size of the model's input in pixels: N, `"HxW"` or (height, width). Default: the preprocessing's."""
    exif: bool
    """Turn photos as their EXIF orientation says. Default: False."""
    jpeg_decoder: JpegDecoder
    """Where JPEGs become pixels; `"device"`: plain ones on CUDA (torchcodec, a few levels off). Default: cpu."""
    precision: Precision
    """Of the forward pass; `"auto"` takes the fastest whose measured error stays under `max_error`. Default: auto."""
    max_error: float | str
    """Relative L2 error against fp32, median of the layers, that `"auto"` may cost: 0.02 or `"2%"`. Default: 0.02."""
    batch_size: int | Literal["auto"] | None
    """Images per batch; `"auto"` measures. Default: auto."""
    device: str | torch.device
    """`"auto"`, `"cpu"`, `"cuda"`, `"cuda:0"` or `"mps"`. Default: auto."""
    dtype: Dtype
    """Type of the values on disk; not every reader opens float16. Default: float32."""
    clip: bool
    """With `dtype="float16"`: clip what would overflow, instead of stopping. Default: False."""
    keep_bits: int | None
    """Mantissa bits that are kept; the rest is rounded away. Default: all there are."""
    codec: Codec
    """Compression; readers of zstd and lz4 need a plugin of HDF5. Default: gzip."""
    level: int | Literal["auto"] | None
    """Level of the codec; `"auto"` is its fastest. Default: auto."""
    memory_format: MemoryFormat
    """Of the forward pass; changes the last bits of a convolution. Default: auto."""
    compile: bool
    """Run the model through torch.compile: a wait at the start, then passes that are as fast or faster.
    Default: False."""
    shard_size: int | str | None
    """Bytes of values, before compression, that one shard holds about: a number or `"512MiB"`. Default: auto."""
    num_workers: int | Literal["auto"] | None
    """How many decode and compress at once; `"auto"` goes by the CPUs. Default: auto."""
    worker_kind: WorkerKind
    """Threads, or processes, which do not wait for each other; `"auto"`: from 5 on in long runs. Default: auto."""
    dataset_workers: int
    """Processes that read a Dataset, and run a preprocessing of your own; 0: one thread does. Default: 0."""
    limit: int | None
    """Only the first so many images. Default: all."""
    seed: int
    """What is random begins from this number: in a forward pass, and in each row. Default: 0."""
    top_k: int
    """Strongest images that are kept for each channel. Default: 9."""
    effective_fields: EffectiveFields
    """Measure effective receptive fields; `"auto"` does where it takes little of the run. Default: auto."""
    max_failures: int | float | str
    """Failed images allowed: a count, or a share (0.05, `"5%"`) that is judged from 200 images on. Default: 5%."""
    key: ByRow
    """What names the images: a column of a manifest, a list with one entry per image, or a function of the row (or of
    the row and its item). Default: the column `key`, else their paths."""
    label: ByRow
    """What labels the images: a column of a manifest, `"folder"`, a list, or a function as in `key`.
    Default: the column `label`."""
    hidden: bool
    """Take hidden files and folders too, and what computers put beside photos (@eaDir). Default: False."""
    allow_outside: bool
    """Let a manifest name files that are not below its own folder. Default: False."""
    recheck: bool
    """Run some stored rows again before an earlier output is taken up or called complete. Default: True."""
    ignore: str | Sequence[str]
    """Fields of an earlier run that may differ, as a refusal names them; stored rows are still compared.
    Default: none."""
    keep_failures: bool
    """Leave images that failed in an earlier run; else they are tried again. Default: False."""
    overwrite: bool
    """Replace an earlier output of fmextract; without it the same call resumes. Default: False."""
    break_lock: bool
    """Take over an output that another run, which is surely dead, still holds. Default: False."""


class MapOptions(TypedDict, total=False):
    """How `show_maps` draws, each of them optional."""

    layers: Sequence[str] | str | None
    """Names or selectors. Default: every layer with maps."""
    count: int
    """Channels per layer. Default: 16."""
    order: Literal["strongest", "first"]
    """Channels that vary most over this image, or the first ones. Default: strongest."""
    channels: Sequence[int]
    """Channels by number, instead of `count` and `order`. Default: none."""
    scale: Literal["each", "shared"]
    """Dark to bright for each map, or for all of a picture. Default: each."""
    overlay: bool
    """Lay the maps over the photo, each cell where it looks. Default: False."""
    format: Literal["png", "pdf", "svg"] | None
    """Of the pictures in a folder. Default: png."""
    theme: Theme
    """Of the picture; light for paper. Default: dark."""
    dpi: int
    """Pixels per inch. Default: 150."""
    cmap: str | None
    """A colour map of matplotlib. Default: magma."""


MAP_DEFAULTS: dict[str, Any] = {
    "layers": None,
    "count": 16,
    "order": "strongest",
    "channels": (),
    "scale": "each",
    "overlay": False,
    "format": None,
    "theme": "dark",
    "dpi": 150,
    "cmap": None,
}


def listed(layers: Sequence[str] | str | None) -> tuple[str, ...]:
    """Selectors as they are given: one, several, or none."""
    return (layers,) if isinstance(layers, str) else tuple(layers or ())


def written_size(size: Size) -> str | None:
    """Return a size as the command line takes it: `224`, or `192x256` (height x width)."""
    if size is None:
        return None
    return "x".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def as_parameters(options: type, defaults: Callable[[str], Any]) -> list[inspect.Parameter]:
    """Every key of a TypedDict as a keyword-only parameter with its type, choices spelled out, and its default."""
    kinds = {name: kind.__forward_arg__ for name, kind in options.__annotations__.items()}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=_spelled_out(kind), default=defaults(name))
        for name, kind in kinds.items()
    ]


def _spelled_out(kind: str) -> Any:
    """A type by its name; the name itself where that speaks of torch or PIL, which are not imported for it."""
    try:
        return eval(kind, globals())
    except NameError:
        return kind


def with_options(function: _Function, options: Iterable[inspect.Parameter]) -> _Function:
    """`function` as `inspect.signature` and `help` see it: with these parameters in the place of its `**options`."""
    own = inspect.signature(function)
    *before, last = own.parameters.values()
    assert last.kind is last.VAR_KEYWORD
    positional = [parameter for parameter in before if parameter.kind is not parameter.KEYWORD_ONLY]
    keywords = [parameter for parameter in before if parameter.kind is parameter.KEYWORD_ONLY]
    function.__signature__ = own.replace(parameters=[*positional, *keywords, *options])  # type: ignore[attr-defined]
    return function
