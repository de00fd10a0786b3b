import json
from pathlib import Path
from typing import Any

import pytest
from swav_testing.public_data import write_files

from swav_eval.datasets.inat18 import open_split

NAMES = ("train_val2018/Plantae/7477/a.jpg", "train_val2018/Aves/1/b.jpg", "train_val2018/Aves/1/c.jpg")
RECORD: dict[str, Any] = {
    "info": {"year": 2018},
    "images": [{"id": 10 * n, "file_name": name, "width": 8} for n, name in enumerate(NAMES)],
    "annotations": [  # in another order than the images
        {"id": 1, "image_id": 20, "category_id": 8141},
        {"id": 2, "image_id": 0, "category_id": 7477},
        {"id": 3, "image_id": 10, "category_id": 0},
    ],
}


def _write(folder: Path, record: Any, split: str = "train") -> Path:
    return write_files(folder, {**{name: name.encode() for name in NAMES}, f"{split}2018.json": _text(record)}.items())


def _text(record: Any) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_is_its_list(tmp_path: Path, split: str) -> None:
    images, url = open_split(str(_write(tmp_path, RECORD, split)), split)
    assert [images.load(number) for number in range(len(images))] == [
        (name.removesuffix(".jpg"), {"jpg": name.encode(), "cls": label})
        for name, label in zip(NAMES, (b"7477", b"0", b"8141"), strict=True)
    ]
    assert url == str(tmp_path / f"{split}2018.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", r"train2018\.json is no JSON"),
        (b"\xff", r"train2018\.json is no JSON"),
        ([], "images and annotations; annotations is no such list"),
        ({**RECORD, "images": []}, "images and annotations; images is no such list"),
        ({**RECORD, "images": [7]}, r"images\[0\] must be an object with id of type int; it has None"),
        ({**RECORD, "images": [{"id": 0}]}, r"images\[0\] must be an object with file_name of type str; it has None"),
        (
            {**RECORD, "annotations": RECORD["annotations"][:2]},
            r"images\[1\]: train_val2018/Aves/1/b.jpg has no annotation with its id",
        ),
        (
            {**RECORD, "annotations": [*RECORD["annotations"], {"image_id": 20, "category_id": 3}]},
            r"annotations\[3\]: image 20 has a category already",
        ),
        ({**RECORD, "images": RECORD["images"][1:]}, "has 1 annotations of images that it lacks; first: 0"),
        ({**RECORD, "annotations": [{"image_id": 0, "category_id": -1}]}, r"annotations\[0\]: category_id -1 is below"),
        ({**RECORD, "annotations": [{"image_id": 0, "category_id": "x"}]}, r"category_id of type int; it has 'x'"),
        (
            {
                "images": [RECORD["images"][0], {"id": 5, "file_name": NAMES[0]}],
                "annotations": [{"image_id": 0, "category_id": 1}, {"image_id": 5, "category_id": 1}],
            },
            r"images\[1\]: train_val2018/Plantae/7477/a.jpg stands there a second time \(first: images\[0\]\)",
        ),
        (
            {"images": [{"id": 1, "file_name": "train_val2018/x.jpg"}], "annotations": RECORD["annotations"][:1]},
            r"images\[0\]: train_val2018/x.jpg has no annotation with its id",
        ),
        (
            {
                "images": [{"id": 1, "file_name": "train_val2018/x.jpg"}],
                "annotations": [{"image_id": 1, "category_id": 1}],
            },
            r"images\[0\]: there is no file .*/train_val2018/x.jpg; unpack the images there",
        ),
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_split(str(_write(tmp_path, record)), "train")


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*val2018\.json; iNaturalist 2018's lists stand beside"):
        open_split(str(tmp_path), "val")
