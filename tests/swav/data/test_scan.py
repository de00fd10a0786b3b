from pathlib import Path

import google_crc32c
import pytest
from swav_testing.shards import CountingFile, make_jpeg, write_tar

from swav.data.scan import ROW_DTYPE, scan
from swav.storage import open_file


def test_members_are_grouped_by_key(tmp_path: Path) -> None:
    members = [
        ("a/x.JPG", b"image x"),
        ("a/x.cls", b"3"),
        ("b/x.json", b"{}"),
        ("b/x.png", b""),
        ("LICENSE", b"text"),
        ("._b.jpg", b"of macOS"),
        ("c.mask.png", b"mask"),
        ("c.jpg", b"image c"),
        ("c.txt", b"text"),
        ("d.v2.jpeg", b"image d"),
        ("notes.txt", b"no image"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    content = path.read_bytes()
    rows, without = scan(open_file(path))

    def member(row: int, kind: str) -> bytes | None:
        offset = int(rows[f"{kind}_offset"][row])
        return content[offset : offset + int(rows[f"{kind}_bytes"][row])] if offset else None

    assert rows.dtype == ROW_DTYPE
    found = [tuple(member(row, kind) for kind in ("image", "cls", "json")) for row in range(len(rows))]
    assert found == [
        (b"image x", b"3", None),
        (b"", None, b"{}"),
        (b"image c", None, None),
        (b"image d", None, None),
    ]
    assert without == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.cls"], "sample 'b' has a label and no image"),
        (["a.jpg", "a.png"], r"sample 'a' has 2 images \(jpg, png\)"),
        (["img.1.jpg", "img.2.jpg"], r"sample 'img' has 2 images .*first dot"),
        (["a.jpg", "a.JPG"], r"sample 'a' has two members \.jpg"),
    ],
)
def test_samples_that_cannot_be_meant_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    path = write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    with pytest.raises(ValueError, match=rf"x\.tar: the {message}"):
        scan(open_file(path))


def test_checksums_are_those_of_the_members(tmp_path: Path) -> None:
    members = [("a.jpg", b"a" * 3_000_000), ("a.cls", b"1"), ("a.txt", b"x"), ("b.png", b""), ("b.json", b"{}")]
    path = write_tar(tmp_path / "x.tar", members)
    rows, _ = scan(open_file(path), checksums=True)
    plain, _ = scan(open_file(path))
    data = dict(members)
    crc32c = [[google_crc32c.value(data.get(f"{key}.{kind}", b"")) for kind in ("cls", "json")] for key in "ab"]
    assert rows["image_crc32c"].tolist() == [google_crc32c.value(data["a.jpg"]), 0]
    assert [[int(row["cls_crc32c"]), int(row["json_crc32c"])] for row in rows] == crc32c
    for kind in ("image", "cls", "json"):
        assert plain[f"{kind}_crc32c"].tolist() == [0, 0]
        assert plain[f"{kind}_offset"].tolist() == rows[f"{kind}_offset"].tolist()


class _Flaky(CountingFile):
    """Spoils every read but the last of so many in a row."""

    def __init__(self, path: Path, reads: int) -> None:
        super().__init__(path)
        self.reads, self.count = reads, 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        data = bytearray(super().read(offset, num_bytes))
        self.count += 1
        if self.count % self.reads and data:
            data[min(100, len(data) - 1)] ^= 4
        return bytes(data)


def test_a_header_that_is_spoilt_on_the_way_is_read_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", make_jpeg(i, width=300, height=200)) for i in range(5)])
    expected, _ = scan(open_file(path))
    found, _ = scan(_Flaky(path, 2))
    assert found.tolist() == expected.tolist()
    with pytest.raises(RuntimeError, match="bad header at byte 0"):
        scan(_Flaky(path, 10))


def test_large_images_are_not_read_for_their_headers(tmp_path: Path) -> None:
    images = [make_jpeg(i, width=400, height=300) for i in range(20)]
    assert min(map(len, images)) > 100_000
    members = [
        (f"{i:03d}.{kind}", data)
        for i, image in enumerate(images)
        for kind, data in (("cls", b"%d" % i), ("jpg", image), ("json", b"{}" * 500))
    ]
    file = CountingFile(write_tar(tmp_path / "x.tar", members))
    rows, _ = scan(file)
    assert len(rows) == 20
    assert len(file.ranges) <= 23
    windows = sum(end - start for start, end in file.ranges)
    assert windows <= 23 * 4096 + 10_752  # the last holds the end-of-archive marker and its padding


def test_small_images_are_read_many_at_once(tmp_path: Path) -> None:
    members = [(f"{i:04d}.{kind}", b"x" * size) for i in range(1000) for kind, size in (("cls", 1), ("jpg", 3000))]
    file = CountingFile(write_tar(tmp_path / "x.tar", members))
    rows, _ = scan(file)
    assert len(rows) == 1000
    assert len(file.ranges) < 30
