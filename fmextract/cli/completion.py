"""What a shell completes: models, layers of a file, reducers, and the words that an option's values are named by.

It is asked for at every press of a key: nothing here imports torch.
"""

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.errors import FmextractError

_REGISTERED = re.compile(r"^@register_model(?:\((?:name=\"(\w+)\")?\))?\n(?:@.*\n(?:[ )].*\n)*)*def (\w+)\(", re.M)
"""In the source of torchvision's and timm's models: the name that one is registered under, or its function's."""
_FILES = ("acts", "a")
"""How commands call the file that they read layers of."""


def choices(metavar: str | None) -> Callable[[str], list[str]] | None:
    """Complete what stands in a metavar as it is to be typed, in lower case: `auto` of `N|auto`."""
    words = [word for word in (metavar or "").split("|") if word and word == word.lower()]
    return one_of(words) if words else None


def one_of(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Complete one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def models(incomplete: str) -> list[str]:
    """Names of torchvision, and after `timm:` those of timm."""
    if incomplete.startswith("timm:"):
        names = [f"timm:{name}" for name in _registered("timm")]
    else:
        names = [*_registered("torchvision"), "timm:"]
    return [name for name in names if name.startswith(incomplete)]


def _registered(library: str) -> list[str]:
    """The models of a library, out of its source: to import it takes seconds."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return []
    files = Path(spec.origin).parent.joinpath("models").rglob("*.py")
    sources = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return sorted({named or function for source in sources for named, function in _REGISTERED.findall(source)})


def layers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Layers of the file that stands on the command line before."""
    from fmextract.reading import activations

    path = next((path for name in _FILES if (path := ctx.params.get(name))), None)
    if path is None:
        return []
    with contextlib.suppress(FmextractError, OSError), activations.open(path) as acts:
        return [name for name in acts.layers if name.startswith(incomplete)]
    return []


def reducers(incomplete: str) -> list[str]:
    """Reducers, behind the `=` of a selector."""
    selector, equals, begun = incomplete.rpartition("=")
    return [f"{selector}={name}" for name in REDUCER_HELP if name.startswith(begun)] if equals else []
