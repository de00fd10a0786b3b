from pathlib import Path

import pytest
from swav_testing.public_data import write_files
from swav_testing.s3 import moto_server

from swav_eval.datasets.places205 import open_split

TRAIN = b"a/abbey/gsun_x.jpg 0\na/airport terminal/gsun_y.jpg 1\nz/zoo/outdoor/gsun_z.jpg 204\n"
IMAGES = {
    "images256/a/abbey/gsun_x.jpg": b"x",
    "images256/a/airport terminal/gsun_y.jpg": b"y",
    "images256/z/zoo/outdoor/gsun_z.jpg": b"z",
    "images256/a/abbey/gsun_v.jpg": b"v",
}
FILES = {**IMAGES, "train_places205.csv": TRAIN, "val_places205.csv": b"a/abbey/gsun_v.jpg 0\r\n"}


def test_a_split_is_its_list(tmp_path: Path) -> None:
    write_files(tmp_path, FILES.items())
    train, url = open_split(str(tmp_path), "train")
    assert [train.load(number) for number in range(len(train))] == [
        ("a/abbey/gsun_x", {"jpg": b"x", "cls": b"0"}),
        ("a/airport terminal/gsun_y", {"jpg": b"y", "cls": b"1"}),
        ("z/zoo/outdoor/gsun_z", {"jpg": b"z", "cls": b"204"}),
    ]
    assert (url, train.classes) == (str(tmp_path / "train_places205.csv"), None)
    val = open_split(str(tmp_path), "val").images
    assert [val.load(number) for number in range(len(val))] == [("a/abbey/gsun_v", {"jpg": b"v", "cls": b"0"})]


def test_a_store_serves_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        images = open_split(server.upload_folder("bucket", "p", write_files(tmp_path, FILES.items())), "train").images
        assert images.load(1) == ("a/airport terminal/gsun_y", {"jpg": b"y", "cls": b"1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a/abbey/gsun_x.jpg\n", r"train_places205\.csv, line 1 must be a path and a label, .* 'a/abbey/gsun_x\.jpg'"),
        (b"a/abbey/gsun_x.jpg -1\n", "line 1 must be a path and a label"),
        (b"a/abbey/gsun_x.jpg 0\n\na/abbey/gsun_x.jpg 1\n", r"line 3: .*second time \(first: line 1\)"),
        (b"a/abbey/gsun_x.jpg 0\na/abbey/none.jpg 0\n", r"line 2: there is no file .*images256/a/abbey/none\.jpg"),
        (b"a/abbey/gsun_x.txt 0\n", r"line 1: .*gsun_x\.txt is no image by its name"),
        (b"a\xff.jpg 0\n", "is not UTF-8"),
        (b"\n", "is empty"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    write_files(tmp_path, {**FILES, "train_places205.csv": text}.items())
    with pytest.raises(ValueError, match=message):
        open_split(str(tmp_path), "train")


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no .*val_places205\.csv; Places205's lists stand beside .*images256"
    ):
        open_split(str(tmp_path), "val")
