"""Write docs/reference/refused.md: what the package refuses, with which exit code, and why.

A message stands in the code as an f-string; what it fills in is shown as `…`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import fmextract
from fmextract import errors

PACKAGE = Path(fmextract.__file__).parent

HEAD = """\
# What is refused, and why

Written by `scripts/docs` from the refusals in the code; what a message fills in is shown as `…`.

A wrong value without a word is the worst thing that this program could do; an unfair refusal is the second. So a run is
refused where its rows could hold something else than they say, before it begins wherever that is known. Everything
else that was asked for is still done. A refusal is one message: what, where (image, layer, file), and what to do.
`--debug` shows the traceback.
"""

# The sections in the order in which a newcomer meets them, each with why such things are refused at all.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Models": (
        (
            "A model is built from what it says it is, with weights that fit exactly. No pickle is executed, and "
            "nothing that a file or a hub names is run without your word."
        ),
        ("ModelError",),
    ),
    "Layers": (
        (
            "A row must hold what one image made, and nothing of another's. What does not follow the batch, is "
            "not a tensor, or cannot be watched has no rows. Where noise and real images do not show it, it is "
            "not guessed."
        ),
        (
            "LayerError",
            "Refused",
        ),
    ),
    "Sources of images": (
        (
            "Rows keep the order in which they were given, each with a key of its own. So a source without order or "
            "length, or with two equal keys, is refused before the run."
        ),
        ("SourceError",),
    ),
    "Single images": (
        (
            "A bad image never ends a run: its row says what was wrong. Pictures that a decoder could only guess at "
            "fail, and formats that start a foreign program are not opened."
        ),
        ("SampleError",),
    ),
    "Options": (
        ("An option that cannot be carried out is refused rather than adjusted."),
        (
            "ConfigError",
            "MissingExtra",
            "BadParameter",
        ),
    ),
    "Outputs": (
        ("Nothing that fmextract did not write is replaced, and two runs that differ never share an output."),
        (
            "OutputError",
            "disk_error",
        ),
    ),
    "Runs that stop": (
        (
            "What is finished is kept, and the same command goes on. A forward pass that differs from what the probe "
            "saw stops the run, since its rows cannot be trusted."
        ),
        (
            "CaptureError",
            "DeviceLost",
            "NoSpace",
            "OutputLost",
            "SourceLost",
            "TooManyFailures",
            "RunStopped",
        ),
    ),
    "Files that are read": (
        (
            "A file may come from a stranger or from a broken disk: every attribute and data set is checked "
            "against what the format says before it is used."
        ),
        (
            "FormatError",
            "DamagedError",
        ),
    ),
}


def refusals() -> str:
    """Return the text of refused.md."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        for kind, message in _messages(ast.parse(path.read_text(encoding="utf-8"))):
            found[kind].add(message)
    parts = [HEAD]
    for title, (why, kinds) in SECTIONS.items():
        parts += [f"## {title}", "", why, ""]
        for kind in kinds:
            lines = sorted(found.get(kind, ()), key=str.lower)
            if lines:
                parts += [_exit(kind), "", *(f"- {line}" for line in lines), ""]
    return "\n".join(parts)


def _exit(kind: str) -> str:
    """What the messages below it are, and the exit code of a command that ends with one."""
    error = getattr(errors, kind, None)
    if not (inspect.isclass(error) and issubclass(error, errors.FmextractError)):
        return "Left out with this as a note where a pattern matches the layer, refused where it is named by itself:"
    if issubclass(error, errors.SampleError):
        return "The message of the row, which has a status other than 0:"
    return f"`{kind}`, exit code {error.exit_code}:"


def _messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, message) of everything that is refused in a module."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        kind = ast.unparse(call.func).rpartition(".")[2]
        if isinstance(node, ast.Raise) or kind == "Refused":
            texts = [text for text in map(_text, call.args) if text]
            if texts and any(letter.isalpha() for letter in texts[-1]):
                yield kind, texts[-1]


def _text(node: ast.expr) -> str:
    """A string of the code as people would read it; "" for what is put together elsewhere."""
    if isinstance(node, ast.Constant):
        return " ".join(str(node.value).split()).replace("*", "\\*") if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        filled = "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
        return re.sub("…[. ]*…", "…", " ".join(filled.split())).replace("*", "\\*")
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""
