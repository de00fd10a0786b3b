from pathlib import Path

import pytest
from swav_testing.shards import write_tar

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
