from pathlib import Path

import pytest

from swav.data.image_list import read_list


def test_entries_have_their_lines(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b'\xef\xbb\xbflabel,path\r\n1,a.jpg\r\n,"b,\nc.jpg"\r\n')
    assert read_list(str(tmp_path / "l.csv")) == [(2, "a.jpg", "1"), (4, "b,\nc.jpg", None)]
    (tmp_path / "l.jsonl").write_text('{"path": "s3://bucket/a.jpg", "label": 0}\n\n{"path": "b"}')
    assert read_list(str(tmp_path / "l.jsonl")) == [(1, "s3://bucket/a.jpg", "0"), (3, "b", None)]


def test_a_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("path,label\na.jpg,h\xf6he\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"l\.csv is not UTF-8 \(.* at byte 18\); save it as UTF-8"):
        read_list(str(tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.jpg,1\n", "must name the columns, path and perhaps label; it is 'a.jpg,1'"),
        ("l.csv", "", "must name the columns, path and perhaps label; it is ''"),
        ("l.csv", "path\n", "lists no images; write one per line"),
        ("l.csv", "path\n" + "x" * 200_000, r"is no CSV \(field larger than"),
        ("l.jsonl", "{\n", "line 1 is no JSON"),
        ("l.jsonl", '{"path": 3}', "line 1 must be an object like"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(str(tmp_path / name))


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such list"):
        read_list(str(tmp_path / "l.csv"))
