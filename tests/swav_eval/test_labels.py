import os
from pathlib import Path

import numpy as np
import pytest
from swav_testing.ranks import run_ranks
from swav_testing.runs import make_scene, write_scenes
from swav_testing.shards import write_tar

from swav.data.source import open_dataset
from swav_eval.config import LinearProtocol
from swav_eval.labels import check_labelled, check_labels, check_stored_labels
from swav_eval.recipes import configure


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


def protocol(num_classes: int = 3) -> LinearProtocol:
    return configure("linear_imagenet", LinearProtocol, [f"num_classes={num_classes}"])


def labelled(folder: Path, labels: list[bytes | None]) -> Path:
    members = []
    for number, label in enumerate(labels):
        members.append((f"{number:03d}.jpg", make_scene(0, number)))
        if label is not None:
            members.append((f"{number:03d}.cls", label))
    write_tar(folder / "shard-000000.tar", members)
    return folder


def test_labels_of_classes_pass(tmp_path: Path) -> None:
    check_labels(open_dataset(str(write_scenes(tmp_path / "data"))), protocol())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [b"0", b"2", b"1"],
            r"shard-000000.tar:001 has the label 2, and with num_classes=2 labels are 0 to 1; set num_c",
        ),
        ([b"0", b"-1", b"1"], r"shard-000000.tar:001 has the label -1; number the classes from 0"),
        ([b"0", None, b"1"], r"shard-000000.tar:001 has no label \(\.cls\), and 2 of 3 samples have one; label all"),
        ([None, None], r"has no labels \(\.cls\), and a classifier needs labelled images; give a folder per class"),
        ([b"0", b"cat", b"1"], r"shard-000000.tar:001.cls holds b'cat', and a label is a number"),
    ],
)
def test_other_labels_are_refused_with_the_image(tmp_path: Path, labels: list[bytes | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(open_dataset(str(labelled(tmp_path / "data", labels))), protocol(2))


def test_unlabelled_images_are_refused_by_the_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a classifier needs labelled images"):
        check_labelled(open_dataset(str(write_scenes(tmp_path / "data", (4,), labelled=False))))


def refused(data: str, cache: str) -> str:
    os.environ["SWAV_CACHE"] = cache
    try:
        check_labels(open_dataset(data), protocol(3))
    except ValueError as error:
        return str(error)
    return ""


def test_all_ranks_end_alike(tmp_path: Path, cache: Path) -> None:
    data = labelled(tmp_path / "data", [b"0", b"1", b"2", b"1", b"7"])
    open_dataset(str(data))
    one, two = run_ranks(2, refused, str(data), str(cache))
    assert one == two
    assert "shard-000000.tar:004 has the label 7, and with num_classes=3" in one


def test_labels_stored_with_features_are_checked_too(tmp_path: Path) -> None:
    index = open_dataset(str(labelled(tmp_path / "data", [b"0", b"5", b"1"])))
    ids = np.array([0, 1, 2])
    check_stored_labels(index, ids, np.array([0, 5, 1]), 6)
    with pytest.raises(ValueError, match=r"shard-000000\.tar:001 has the label 5, and with num_classes=3"):
        check_stored_labels(index, ids, np.array([0, 5, 1]), 3)
