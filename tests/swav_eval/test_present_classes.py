import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swav_testing.shards import make_jpeg, write_tar

from swav.data.source import open_dataset
from swav_eval.config import EvaluationRuntime
from swav_eval.present_classes import Presence, check_counts, read_presence

RUNTIME = EvaluationRuntime()


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


def says(present: list[str], difficult: list[str] | None = None) -> dict[str, bytes]:
    return {
        "json": json.dumps({"present": present} | ({"difficult": difficult} if difficult is not None else {})).encode()
    }


def shards(folder: Path, samples: list[dict[str, bytes]], classes: list[str] | None = None) -> Path:
    members = []
    for number, sample in enumerate(samples):
        members.append((f"{number}.jpg", make_jpeg(number)))
        members += [(f"{number}.{kind}", data) for kind, data in sample.items()]
    write_tar(folder / "shard-0.tar", members)
    if classes is not None:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return folder


def found(**folders: Path) -> tuple[tuple[str, ...], dict[str, Presence]]:
    indices = {name: open_dataset(str(folder)) for name, folder in folders.items()}
    samples = {name: (index, np.arange(index.num_samples)) for name, index in indices.items()}
    return read_presence(samples, RUNTIME)


def test_classes_of_images_by_name(tmp_path: Path) -> None:
    train = shards(tmp_path / "train", [says(["dog", "cat"], ["person"]), says([]), says(["person"], [])])
    test = shards(tmp_path / "test", [says(["emu"]), says(["cat"], ["dog", "emu"])])
    classes, presence = found(train=train, test=test)
    assert classes == ("cat", "dog", "emu", "person")
    assert presence["train"].present.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert presence["train"].ignored.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert presence["test"].present.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert presence["test"].ignored.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]


def test_only_the_samples_that_are_asked_for_count(tmp_path: Path) -> None:
    index = open_dataset(str(shards(tmp_path, [says(["a"]), says(["b"]), says(["c"])])))
    classes, presence = read_presence({"train": (index, np.array([0, 2]))}, RUNTIME)
    assert classes == ("a", "c")
    assert presence["train"].present.tolist() == [[1, 0], [0, 1]]


def test_the_order_is_that_of_classes_txt(tmp_path: Path) -> None:
    train = shards(tmp_path / "train", [says(["a"]), says(["b"])], ["b", "a"])
    test = shards(tmp_path / "test", [says(["c"])], ["c", "a"])  # a split may lack a class of the other
    classes, presence = found(train=train, test=test)
    assert classes == ("b", "a", "c")
    assert presence["test"].present.tolist() == [[0, 0, 1]]
    bare = shards(tmp_path / "bare", [says(["a"])])
    assert found(train=train, test=bare)[0] == ("b", "a")


def test_labels_are_one_class_each(tmp_path: Path) -> None:
    samples = [{"cls": b"10"}, {"cls": b"2"}, {"cls": b"2", "json": b'{"width": 3}'}, {"cls": b"7", **says(["2"])}]
    classes, presence = found(train=shards(tmp_path / "bare", samples))
    assert classes == ("2", "10")
    assert presence["train"].present.tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]
    named = shards(tmp_path / "named", [{"cls": b"1"}], ["x", "y"])
    classes, presence = found(train=named, test=named)
    assert classes == ("x", "y")
    assert presence["test"].present.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("sample", "classes", "message"),
    [
        ({"json": b"{"}, None, r"shard-0\.tar:0\.json is no JSON"),
        ({"json": b"\xff"}, None, "is no JSON"),
        ({"json": b"[]"}, None, "says nothing of classes, and there is no .cls"),
        ({"json": b"{}"}, None, "says nothing of classes, and there is no .cls"),
        ({"json": b'{"present": "dog"}'}, None, "must have lists of names"),
        ({"json": b'{"present": [1]}'}, None, "must have lists of names"),
        ({"json": b'{"present": [""]}'}, None, "must have lists of names"),
        ({"json": b'{"present": [], "difficult": null}'}, None, "must have lists of names"),
        (says(["dog"], ["dog"]), None, "has 'dog' as present and as difficult"),
        (
            says(["dgo"]),
            ["cat", "dog"],
            "the class 'dgo', which is not in classes.txt; the nearest of 2 there is 'dog'",
        ),
        (says([], ["dgo"]), ["cat", "dog"], "the class 'dgo'"),
        ({}, None, r"has no label \(\.cls\)"),
        ({"cls": b"2"}, ["cat", "dog"], r"has the label 2, and classes\.txt has 2 lines, from 0"),
        ({"cls": b"-1"}, None, "number the classes from 0"),
        ({"cls": b"cat"}, None, "a label is a number"),
        (says(["cat"]), ["cat", "cat"], "one name per line, each once"),
        (says(["cat"]), ["cat", "", "dog"], "one name per line, each once"),
    ],
)
def test_what_cannot_be_understood_is_refused(
    tmp_path: Path, sample: dict[str, bytes], classes: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        found(train=shards(tmp_path, [sample], classes))


def test_labels_that_count_different_lists_are_refused(tmp_path: Path) -> None:
    train = shards(tmp_path / "train", [{"cls": b"1"}], ["x", "y"])
    test = shards(tmp_path / "test", [{"cls": b"1"}], ["y", "x"])
    with pytest.raises(
        ValueError, match=r"train and test images have labels \(\.cls\) that count the lines of different"
    ):
        found(train=train, test=test)


@pytest.mark.parametrize(
    ("present", "ignored", "message"),
    [
        ([1, 1, 0, 0], [0, 0, 0, 0], None),
        ([1, 0, 0, 0], [0, 0, 0, 0], "1 have the class 'dog' and 3 have not .* num_folds=2 needs as many of each"),
        ([1, 1, 1, 0], [0, 0, 0, 0], "3 have the class 'dog' and 1 have not"),
        ([1, 1, 0, 0], [0, 0, 1, 0], "2 have the class 'dog' and 1 have not"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "0 have the class 'dog' and 4 have not"),
    ],
)
def test_classes_with_too_few_images_are_refused(present: Any, ignored: Any, message: str | None) -> None:
    train = Presence(np.array(present, bool)[:, None], np.array(ignored, bool)[:, None])
    test = Presence(np.ones((1, 1), bool), np.zeros((1, 1), bool))
    if message is None:
        check_counts(("dog",), train, test, num_folds=2)
        with pytest.raises(ValueError, match="no test image has any of the 1 classes"):
            check_counts(("dog",), train, Presence(~test.present, test.ignored), num_folds=2)
        return
    with pytest.raises(ValueError, match=message):
        check_counts(("dog",), train, test, num_folds=2)
