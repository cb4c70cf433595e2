"""Images and paths in the containers that people have them in: rows by position, keys that name files, or a refusal
that says what to give instead, before anything is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import PIL.Image
import pyarrow
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from fmextract.errors import ConfigError, SampleError, SourceError
from fmextract.inputs.files import FileSource
from fmextract.inputs.sources import open_source
from fmextract.records import Source

NAMES = ["cat/a.png", "cat/b.png", "dog/a.png", "dog/c.png", "elk/d.png"]
ORDER = [3, 0, 4, 2, 1]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """One grey picture a name, of a level of its own; the working directory."""
    for level, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (level, level, level)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(source: Source) -> list[str]:
    return [source.key(row) for row in range(len(source))]


def labels(source: Source) -> list[Any]:
    return [source.label(row) for row in range(len(source))]


class Items:
    """A map-style Dataset of whatever it is given."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


# ------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "container",
    [
        list,
        tuple,
        deque,
        lambda paths: list(map(Path, paths)),
        np.array,
        lambda paths: np.array(paths, object),
        lambda paths: np.array(paths, "S"),
        lambda paths: np.array(list(map(Path, paths)), object),
        pandas.Index,
        lambda paths: pandas.Series(NAMES)[ORDER],
        lambda paths: pandas.Series(paths, index=list("vwxyz")),
        lambda paths: pandas.Series(paths, index=[1, 1, 1, 1, 1]),
        lambda paths: pandas.Series(paths, dtype="category"),
        lambda paths: pandas.Series(paths, index=pandas.date_range("2020", periods=5)),
        pyarrow.array,
        lambda paths: pandas.DataFrame({"path": NAMES}).iloc[ORDER],
        lambda paths: pandas.DataFrame({"n": range(5), " Path": paths}, index=[5, 5, 1, 2, 0]),
        lambda paths: pandas.DataFrame({"image": list(map(Path, paths)), "width": 4}),
        lambda paths: pyarrow.table({"path": paths}),
    ],
)
def test_paths_are_rows_in_the_order_given(photos, container):
    given = [NAMES[row] for row in ORDER]
    source = open_source(container(given))
    assert keys(source) == given
    assert isinstance(source, FileSource)
    assert [bytes(source.load(row)) for row in range(5)] == [(photos / name).read_bytes() for name in given]
    assert keys(open_source(container(given), limit=2)) == given[:2]


def test_pairs_of_path_and_label(photos):
    source = open_source([(name, row / 2) for row, name in enumerate(NAMES)])
    assert keys(source) == NAMES
    assert labels(source) == [0, 0.5, 1, 1.5, 2]


def test_a_table_keeps_its_labels_and_other_columns(photos):
    table = pandas.DataFrame(
        {
            "path": NAMES,
            "Label": [0.5, None, 1, 2, 3],
            "condition": ["a", "b", None, "a", "b"],
            "subject": [7, 8, 9, 10, 11],
        }
    ).iloc[ORDER]
    source = open_source(table)
    assert keys(source) == [NAMES[row] for row in ORDER]
    np.testing.assert_array_equal(labels(source), [2, 0.5, 3, 1, np.nan])
    assert source.columns == {"condition": ["a", "a", "b", None, "b"], "subject": [10, 7, 11, 9, 8]}
    assert keys(open_source(table, key="subject", label="condition")) == ["10", "7", "11", "9", "8"]
    assert labels(open_source(table, key="subject", label="condition")) == ["a", "a", "b", None, "b"]
    with pytest.raises(SourceError, match=r"--label 'species' is no column; there are path, Label"):
        open_source(table, label="species")


def test_a_table_of_images(photos):
    table = pandas.DataFrame({"img": [IMAGE, IMAGE + 1], "label": ["x", "y"], "key": ["one", "two"]}, index=[3, 3])
    source = open_source(table)
    assert keys(source) == ["one", "two"]
    np.testing.assert_array_equal(source.load(1), IMAGE + 1)
    assert labels(source) == ["x", "y"]


def test_a_list_with_a_gap_is_refused_at_once(photos):
    with pytest.raises(SourceError, match="Series: row 1 has no path, but nan: leave such rows out"):
        open_source(pandas.Series(["cat/a.png", None, "dog/a.png"]).replace({None: np.nan}))


# --------------------------------------------------------------------------------- keys of other people's Datasets


def test_subsets_of_folders_keep_file_names(photos):
    folder = ImageFolder(str(photos))
    subset = Subset(folder, ORDER)
    assert keys(open_source(subset)) == [NAMES[row] for row in ORDER]
    assert labels(open_source(subset)) == [folder.targets[row] for row in ORDER]
    assert keys(open_source(Subset(subset, [1, 0]))) == [NAMES[ORDER[1]], NAMES[ORDER[0]]]
    split = torch.utils.data.random_split(folder, [2, 3], torch.Generator().manual_seed(1))
    assert [keys(open_source(part)) for part in split] == [[NAMES[row] for row in part.indices] for part in split]
    joined = ConcatDataset([Subset(folder, [4]), Subset(folder, [0, 2])])
    assert keys(open_source(joined)) == ["elk/d.png", "cat/a.png", "dog/a.png"]
    source = open_source(joined)
    assert [np.asarray(source.load(row))[0, 0, 0] for row in range(3)] == [4, 0, 2]


def test_folders_with_the_same_names_are_told_apart(photos):
    (photos / "more" / "cat").mkdir(parents=True)
    PIL.Image.new("RGB", (4, 4)).save(photos / "more" / "cat" / "a.png")
    one, other = ImageFolder(str(photos), allow_empty=True), ImageFolder(str(photos / "more"))
    source = open_source(ConcatDataset([Subset(one, [0]), other]))
    assert keys(source) == ["cat/a.png", "more/cat/a.png"]


def test_repeated_items_are_numbered_and_said(photos):
    folder = ImageFolder(str(photos))
    for data in (Subset(folder, [2, 2]), ConcatDataset([Subset(folder, [2]), Subset(folder, [2])])):
        source = open_source(data)
        assert keys(source) == ["000000", "000001"]
        assert labels(source) == [1, 1]
        assert "numbered" in source.notes[0]
        assert "key=" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", [1, 2]),
        ("samples", np.zeros((2, 5))),
        ("samples", [("a.png", 1)]),
        ("samples", [("a.png", 1), ("a.png", 2)]),
        ("ids", ["x", "x"]),
        ("ids", [None, None]),
        ("ids", np.zeros((2, 2))),
        ("ids", {"a": 1, "b": 2}),
        ("ids", lambda: 1),
        ("keys", "ab"),
        ("imgs", {1: "x", 2: "y"}),
        ("root", 7),
        ("labels", ["only one"]),
        ("labels", "ab"),
        ("targets", {"a": 1, "b": 2}),
        ("targets", pandas.Series([5, 6], index=[1, 0])),
        ("labels", property(lambda self: 1 / 0)),
        ("samples", property(lambda self: 1 / 0)),
    ],
)
def test_attributes_that_mean_something_else(name, value):
    class Theirs(Items):
        pass

    setattr(Theirs, name, value)
    source = open_source(Theirs((IMAGE, 3), (IMAGE, 4)))
    assert keys(source) == ["000000", "000001"]
    for row in range(2):
        source.load(row)
    assert labels(source) == [3, 4]


def test_a_root_that_holds_no_sample_is_left_alone():
    class Theirs(Items):
        samples = (("a.png", 1), ("sub/b.png", 2))
        root = "/somewhere/else"

    assert keys(open_source(Theirs(IMAGE, IMAGE))) == ["a.png", "sub/b.png"]


def test_labels_of_the_items_win_over_a_list_that_differs(photos):
    """As with a target_transform, which ImageFolder's `targets` know nothing of."""
    folder = ImageFolder(str(photos), target_transform=lambda target: target * 10.5)
    source = open_source(folder)
    for row in range(5):
        source.load(row)
    assert labels(source) == [0, 0, 10.5, 10.5, 21]


# --------------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize(
    "item",
    [
        IMAGE,
        (IMAGE,),
        (IMAGE, 3),
        [IMAGE, 3],
        {"image": IMAGE, "label": 3},
        {"img": IMAGE, "labels": 3},
        {"pixel_values": IMAGE, "labels": 3},
        {"Image": IMAGE, "target": 3},
        {"jpg": IMAGE, "cls": 3, "__key__": "x"},
        {"photograph": IMAGE, "label": 3},
        {"image": IMAGE, "mask": IMAGE, "label": 3},
    ],
)
def test_the_image_of_an_item(item):
    source = open_source(Items(item, item))
    assert source.load(1) is IMAGE
    assert source.label(1) == (3 if len(item) > 1 and item is not IMAGE else None)


def test_what_is_left_of_an_item_is_said():
    source = open_source(Items({"img": IMAGE, "fine_label": 3, "coarse_label": 1}))
    source.load(0)
    assert source.label(0) is None
    assert "not fine_label, coarse_label" in source.notes[0]
    source = open_source(Items({"img": IMAGE, "fine_label": 3, "coarse_label": 1}), label="fine_label")
    source.load(0)
    assert source.label(0) == 3
    source = open_source(Items((IMAGE, 3, "by whom")))
    source.load(0)
    assert "not part 3" in source.notes[0]


def test_images_that_hugging_face_did_not_decode(photos):
    data = Items(
        {"image": {"bytes": b"encoded", "path": None}, "label": 1},
        {"image": {"bytes": None, "path": "cat/a.png"}, "label": 2},
        {"bytes": b"encoded", "path": "x.png"},
    )
    source = open_source(data)
    assert source.load(0) == source.load(2) == b"encoded"
    assert source.load(1) == (photos / "cat/a.png").read_bytes()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"a": 1, "b": "text"}, "a dict {'a': int, 'b': str}, in which no part is called an image"),
        ({"left": IMAGE, "right": IMAGE}, "'left' and 'right', and each may be the image"),
        ({"img": IMAGE, "pixel_values": IMAGE}, "'img' and 'pixel_values', and each may be the image"),
        ((3, IMAGE), r"\(int, ndarray of shape \(4, 4, 3\)\), whose first part is not the image"),
        (("a caption", IMAGE), "whose first part is not the image"),
        ([[[1, 2, 3], [4, 5, 6]]], r"nested lists is given as an array, numpy\.asarray"),
        ({"pixel_values": [[1, 2], [3, 4]]}, r"nested lists is given as an array, .*with_format\('numpy'\)"),
        (7, "an item is int, in which there is no image"),
        (np.zeros(784, np.uint8), "in which there is no image"),
        ((), "an item is empty"),
    ],
)
def test_items_in_which_nobody_can_tell_the_image(item, message):
    """One message, at the first item: not a failure for every image of the run."""
    with pytest.raises(SourceError, match=rf"Items: .*{message}.* An item is an image"):
        open_source(Items(item, item)).load(0)


def test_an_item_that_is_not_there_is_one_failed_row():
    source = open_source(Items(None, (IMAGE, 1), (None, 2), 7))
    for row, message in ((0, "gave None"), (2, "gave None"), (3, "no image")):
        source.load(1)
        with pytest.raises(SampleError, match=message):
            source.load(row)


# ---------------------------------------------------------------------------------------------------- refusals


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):
        return iter([IMAGE])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(TensorDataset(torch.zeros(2, 3, 4, 4))), r"Give its Dataset \(loader\.dataset\)"),
        ((image for image in [IMAGE]), r"got generator\. .*Give list\(…\)"),
        (iter([IMAGE]), r"got list_iterator\. .*Give list\(…\)"),
        (Stream(), r"got Stream\. .*Give list\(…\)"),
        (map(str, [1]), r"got map\. .*Give list\(…\)"),
        ({"a": IMAGE}, r"got dict\. .*list\(d\.values\(\)\), and its names as key=list\(d\)"),
        ({"a.png", "b.png"}, r"got set\. A set has no order"),
        (np.uint8(3), r"got uint8\. .*give a list of them"),
        (np.zeros((), np.uint8), r"got ndarray\."),
        (pandas.DataFrame({"x": [1]}), "expected a column `path` of files, or `image` of images, found 'x'"),
        (pandas.DataFrame({"img": ["a"], "file": ["b"]}), "'img' and 'file' may each be the images"),
        (pandas.DataFrame({"path": []}), "is empty"),
        (pandas.Series([], dtype=object), "is empty"),
    ],
)
def test_what_cannot_be_asked_for_a_row_says_what_to_give(data, message):
    with pytest.raises(SourceError, match=message):
        open_source(data)


def test_an_iterator_is_not_consumed():
    data = iter([IMAGE, IMAGE])
    with pytest.raises(SourceError):
        open_source(data)
    assert len(list(data)) == 2


# ---------------------------------------------------------------------------------------- key= and label=


@pytest.mark.parametrize("data", [NAMES, FakeData(5, (3, 4, 4)), np.zeros((5, 4, 4, 3), np.uint8)])
def test_keys_and_labels_as_lists_and_functions(photos, data):
    letters = list("vwxyz")
    for key in (letters, tuple(letters), np.array(letters), pandas.Series(letters, index=[1] * 5), letters.__getitem__):
        assert keys(open_source(data, key=key)) == letters
    assert keys(open_source(data, key=[5, 4, 3, 2, 1])) == list("54321")
    for label in ([0, 1.5, 2, None, 4], lambda row: [0, 1.5, 2, None, 4][row]):
        source = open_source(data, label=label)
        source.load(1)
        assert labels(source) == [0, 1.5, 2, None, 4]
    assert keys(open_source(data, key=letters, limit=2)) == ["v", "w"]


def test_labels_taken_out_of_items():
    source = open_source(FakeData(3, (3, 4, 4)), label=lambda row, item: [row, item[0].size[0]])
    for row in range(3):
        source.load(row)
    assert labels(source) == [[0, 4], [1, 4], [2, 4]]
    files = open_source(["b/x.png", "a/y.png"], label=lambda row, path: path[0])
    assert labels(files) == ["b", "a"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": list("abc")}, SourceError, "key= has 3 entries for 5 images"),
        ({"label": [1] * 6}, SourceError, "label= has 6 entries for 5 images"),
        ({"key": list("abcda")}, SourceError, "rows 0 and 4 have the same key 'a'"),
        ({"key": [1.5] * 5}, ConfigError, "key= gives 1.5: expected a text or a whole number"),
        ({"key": lambda: 1}, ConfigError, "not of 0 arguments"),
        ({"key": lambda row: 1 / 0}, ConfigError, "given as key= raised ZeroDivisionError"),
        ({"key": 3}, ConfigError, "key= takes a list, a function or the name of a column, not int"),
        ({"label": [object()] * 5}, ConfigError, "label= gives a value of type object"),
        ({"key": "stimulus"}, SourceError, "--key 'stimulus' names a column of a manifest or a table"),
        ({"label": "species"}, SourceError, "--label 'species' names a column"),
    ],
)
def test_keys_and_labels_that_do_not_fit(photos, options, error, message):
    with pytest.raises(error, match=message):
        open_source(NAMES, **options)


def test_folders_as_labels(photos):
    classes = [name.partition("/")[0] for name in NAMES]
    assert labels(open_source(photos, label="folder")) == classes
    assert labels(open_source(NAMES, label="folder")) == classes
    assert labels(open_source("*/*.png", label="folder")) == classes
    folder = ImageFolder(str(photos))
    numbers = np.unique(classes, return_inverse=True)[1]
    assert numbers.tolist() == folder.targets
    source = open_source(photos)
    assert labels(source) == [None] * 5
    assert source.notes == ["the 3 folders that the images lie in are not stored as labels: --label folder takes them"]
    assert open_source(photos / "cat").notes == []


class Loads(Sequence[Any]):
    """A sequence of the user's that makes an image for each item, and not always."""

    def __init__(self, fails: int) -> None:
        self.fails, self.read = fails, list[int]()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < 6:
            raise IndexError(row)
        self.read.append(row)
        if row == self.fails:
            raise OSError("not there")
        return np.full((8, 8, 3), 9 * row, np.uint8)


@pytest.mark.parametrize("fails", [0, 3])
def test_a_sequence_that_loads_images_is_not_read_to_see_whether_it_holds_paths(fails: int) -> None:
    data = Loads(fails)
    source = open_source(data)
    assert len(source) == 6
    assert set(data.read) <= {0}
