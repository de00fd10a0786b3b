import hashlib
from pathlib import Path

import pytest

from swav.export.publish import ALONE, check_place, publish


def test_files_are_written_and_the_same_again_is_left(tmp_path: Path) -> None:
    files = {"weights": b"12", "README.md": b"34"}
    expected = {f"{tmp_path}/new/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert publish(files, tmp_path / "new") == expected
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "new").iterdir())]
    assert publish(files, tmp_path / "new") == expected
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "new").iterdir())] == times


def test_an_interrupted_call_is_completed(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12")
    publish({"weights": b"12", "README.md": b"34"}, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"34"


@pytest.mark.parametrize("there", [b"xx", b"longer"])
def test_nothing_is_written_over_something_else(tmp_path: Path, there: bytes) -> None:
    (tmp_path / "README.md").write_bytes(there)
    with pytest.raises(ValueError, match=r"README.md is there already and is not this export; name another --output"):
        publish({"weights": b"12", "README.md": b"34"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == there


def test_one_file_alone(tmp_path: Path) -> None:
    assert list(publish({ALONE: b"1"}, tmp_path / "a" / "b.pth")) == [str(tmp_path / "a" / "b.pth")]
    assert (tmp_path / "a" / "b.pth").read_bytes() == b"1"


def test_places_that_cannot_take_an_export_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").touch()
    check_place(tmp_path / "new.pth", (".pth", ".pt"))
    check_place("s3://bucket/new.pt", (".pth", ".pt"))
    check_place(tmp_path / "new", ())
    check_place(tmp_path / "folder.pth", ())
    refused: list[tuple[Path | str, tuple[str, ...], str]] = [
        (tmp_path / "folder.pth", (".pth",), "is a folder; name the file"),
        (tmp_path / "file", (), "is a file, and this format is a folder"),
        (tmp_path / "x.bin", (".pth", ".pt"), "readers of this format know it by its name; end it with .pth"),
        ("https://host/x.pth", (".pth",), "a web server is only read"),
    ]
    for place, endings, message in refused:
        with pytest.raises(ValueError, match=message):
            check_place(place, endings)
