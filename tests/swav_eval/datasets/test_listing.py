from pathlib import Path

import numpy as np
import pytest
from swav_testing.public_data import write_files

from swav.storage import open_file
from swav_eval.datasets.listing import ArchivedImages, Entry, is_image, listed_files, numbered_lines, text_lines


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    assert list(numbered_lines("x", b"\xef\xbb\xbfa b \r\n\n  c\n")) == [(1, "a b"), (3, "c")]
    (tmp_path / "list").write_text("a\n")
    assert list(text_lines(str(tmp_path / "list"), remedy="no")) == [(1, "a")]
    with pytest.raises(ValueError, match=r"there is no .*none; do this"):
        text_lines(str(tmp_path / "none"), remedy="do this")


def test_images_by_name() -> None:
    assert [is_image(name) for name in ("a.JPEG", "a.v2.png", "a.txt", "jpg", "b/.jpg")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_files_are_in_the_order_of_the_list(tmp_path: Path) -> None:
    write_files(tmp_path, [("b.jpg", b"b"), ("a.jpg", b"a")])
    found = listed_files("list", str(tmp_path), [Entry("1", "b.jpg", 4), Entry("2", "a.jpg", 0)])
    assert [found.load(number) for number in range(2)] == [
        ("b", {"jpg": b"b", "cls": b"4"}),
        ("a", {"jpg": b"a", "cls": b"0"}),
    ]


def test_archived_images(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    spans = np.array([[1, 2], [4, 3]], dtype=np.int64)
    file = open_file(str(tmp_path / "x"))
    plain = ArchivedImages(file, ["a/x.v1.JPG", "b.png"], spans, None, None, 0)
    assert [plain.load(number) for number in range(2)] == [("a/x.v1", {"jpg": b"12"}), ("b", {"png": b"456"})]
    labelled = ArchivedImages(file, plain.names, spans, [3, 5], ["c"], 2)
    assert labelled.load(1) == ("b", {"png": b"456", "cls": b"5"})
    moved = ArchivedImages(file, plain.names, spans + 1, [3, 5], ["c"], 2)
    assert len({images.digest() for images in (plain, labelled, moved)}) == len(plain) + 1 == 3
