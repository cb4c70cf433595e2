"""Find the image and the label in an item of a Dataset. No torch.

An item is an image, (image, label …), or a dict that names its parts. An image is encoded bytes, a path, a PIL image,
an array or a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmextract.errors import SampleError
from fmextract.records import Status

__all__ = ["Item", "UnclearItem", "is_pair", "is_path", "named", "split"]

IMAGE_NAMES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "picture", "photo")
PATH_NAMES = ("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name", "file")
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls")

_WANTED = (
    "An item is an image (an array, a tensor, a PIL image, encoded bytes or a path), (image, label), "
    "or a dict with `image` and, where there is one, `label`"
)


_NESTED = "an image of nested lists is given as an array, numpy.asarray(lists)"


class UnclearItem(SampleError):
    """An item in which no image can be found; the message says what to give instead."""

    def __init__(self, message: str) -> None:
        super().__init__(Status.UNREADABLE, f"{message}. {_WANTED}")


@dataclass(frozen=True, slots=True)
class Item:
    """The parts of one item. `rest` names what is neither the image nor the label."""

    image: Any
    label: Any = None
    rest: tuple[str, ...] = ()


def split(item: Any) -> Item:
    """Return the parts of an item. Raises UnclearItem, and SampleError for an item that is not there."""
    if isinstance(item, Mapping):
        found = _of_mapping(item)
    elif isinstance(item, (tuple, list)):
        found = _of_tuple(item)
    elif item is None or _is_image(item):
        found = Item(item)
    else:
        raise UnclearItem(f"an item is {_kind(item)}, in which there is no image")
    image = _encoded(found.image) if isinstance(found.image, Mapping) else found.image
    if image is None:
        raise SampleError(Status.UNREADABLE, "the Dataset gave None for it")
    return Item(image, found.label, found.rest)


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def is_pair(value: Any) -> bool:
    """Return (path, label): not (path, image), whose text is what the image is called."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and is_path(value[0]) and not _is_pixels(value[1])


def named(names: Sequence[Any], wanted: Sequence[str]) -> list[Any]:
    """Return those of `names` that are `wanted`, in that order, regardless of case and surrounding blanks."""
    plain = [(str(name).strip().lower(), name) for name in names]
    return [name for want in wanted for text, name in plain if text == want]


def _of_mapping(item: Mapping[Any, Any]) -> Item:
    if _is_encoded(item):
        return Item(item)
    image = _image_in(item)
    labels = [name for name in named(list(item), LABEL_NAMES) if name != image][:1]
    rest = tuple(str(name) for name in item if name != image and name not in labels)
    return Item(item[image], item[labels[0]] if labels else None, rest)


def _image_in(item: Mapping[Any, Any]) -> Any:
    """Return the name of the image in a dict: `image`, the one part that is called as an image is, or that is one."""
    if "image" in item:
        return "image"
    ways: tuple[Callable[[], list[Any]], ...] = (
        lambda: [name for name in named(list(item), IMAGE_NAMES) if item[name] is None or _is_image(item[name])],
        lambda: [name for name, part in item.items() if _is_pixels(part)],
        lambda: [name for name in named(list(item), PATH_NAMES) if is_path(item[name])],
    )
    for way in ways:
        found = way()
        if len(found) == 1:
            return found[0]
        if found:
            raise UnclearItem(f"an item has {' and '.join(map(repr, found))}, and each may be the image")
    parts = ", ".join(f"{name!r}: {_kind(part)}" for name, part in list(item.items())[:8])
    lists = any(isinstance(item[name], list) for name in named(list(item), IMAGE_NAMES))
    hint = f": {_NESTED}, as of Hugging Face's with_format('numpy')" if lists else ""
    raise UnclearItem(f"an item is a dict {{{parts}}}, in which no part is called an image{hint}")


def _of_tuple(item: Sequence[Any]) -> Item:
    if not item:
        raise UnclearItem("an item is empty")
    first, *others = item
    others_are_images = any(map(_is_pixels, others))
    if first is not None and (not _is_image(first) or (is_path(first) and others_are_images)):
        kinds = ", ".join(map(_kind, item[:6]))
        nested = isinstance(first, (list, int, float)) and not others_are_images
        hint = f": {_NESTED}" if nested else ""
        raise UnclearItem(f"an item is ({kinds}), whose first part is not the image{hint}")
    return Item(first, others[0] if others else None, tuple(f"part {n} of each item" for n in range(3, len(item) + 1)))


def _is_image(value: Any) -> bool:
    return is_path(value) or _is_pixels(value)


def _is_pixels(value: Any) -> bool:
    if isinstance(value, (bytes, bytearray, memoryview)) or (isinstance(value, Mapping) and _is_encoded(value)):
        return True
    if hasattr(value, "mode") and hasattr(value, "convert"):  # PIL's
        return True
    return hasattr(value, "dtype") and len(getattr(value, "shape", ())) >= 2


def _is_encoded(value: Mapping[Any, Any]) -> bool:
    """Return what Hugging Face's datasets give for an image that they were told not to decode."""
    return set(value) == {"bytes", "path"} and isinstance(value["bytes"], (bytes, type(None)))


def _encoded(value: Mapping[Any, Any]) -> Any:
    if not _is_encoded(value):
        raise UnclearItem(f"an item's image is a dict of {', '.join(map(repr, list(value)[:8]))}")
    return value["path"] if value["bytes"] is None else value["bytes"]


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "dtype") and hasattr(value, "shape") else ""
    return type(value).__name__ + shape
