"""The program in docs/format.md runs as it is printed, and the document names what the file has."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import shardfiles
from shardfiles import layer, table, values

from fmextract.records import Field
from fmextract.storage import codecs, digest, schema

DOC = (Path(__file__).parents[2] / "docs/reference/format.md").read_text(encoding="utf-8")
CONV = layer(
    "conv/0",
    (3, 4, 5),
    "channel y x",
    field=Field((7.0, 7.0), (2.0, 2.0), (0.5, 0.5)),
    rel_error=0.01,
    member="0",
    reducer="pool:4",
    mantissa=7,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "acts.h5"
    stats = {CONV.name: {"zero_fraction": np.array([0.5, 1.0, 0.0]), "top_value": np.zeros((3, 2))}}
    shardfiles.write(path, {CONV: values(CONV, 5)}, samples=table(range(5), labels=[1] * 5), stats=stats)
    return path


def test_the_reader_in_the_document_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert len(program.splitlines()) <= 20
    assert re.findall(r"^import (\w+)", program, re.MULTILINE) == ["h5py", "numpy"]
    monkeypatch.chdir(path.parent)
    seen: dict[str, object] = {}
    exec(program, seen)  # the document is ours
    assert capsys.readouterr().out == "conv/0 {'sample': 5, 'channel': 3, 'y': 4, 'x': 5} float32\n"
    np.testing.assert_array_equal(seen["first"], values(CONV, 5)[0])
    np.testing.assert_array_equal(seen["dead"], [1])
    np.testing.assert_array_equal(seen["y"], [0.5, 2.5, 4.5, 6.5])


def test_every_name_in_a_file_is_documented(path: Path) -> None:
    names: set[str] = set()
    with h5py.File(path) as file:
        names.update(file.attrs, file, file["layers/conv%2F0"], file["layers/conv%2F0"].attrs)
        names.update(file["layers/conv%2F0/stats"])
    words = set(re.findall(r"\w+", DOC))
    assert not names - words


def test_every_codec_and_its_filters_are_documented() -> None:
    for name, codec in codecs.CODECS.items():
        (row,) = re.findall(rf"^\| `{name}`.*$", DOC, re.MULTILINE)
        for number, _ in codec.filters(4):
            assert re.search(rf"\b{number}\b", row), (name, number)


def test_the_digest_is_as_documented(path: Path) -> None:
    assert "BLAKE2b (32 bytes, hex)" in DOC
    assert len(bytes.fromhex(digest.content_digest(path))) == 32


@pytest.mark.parametrize(("then", "now"), [(False, []), (True, []), ([["conv1", "bn1"]], [["conv1", "bn1"]])])
def test_what_was_fused_is_read_as_the_first_files_said_it_too(then: object, now: object) -> None:
    assert schema.CONFIG({"fused": then})["fused"] == now
