import errno
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from swav import storage


def test_plain_paths_and_file_urls_are_the_same() -> None:
    assert storage.local_path("/a/b c.tar") == storage.local_path("file:///a/b%20c.tar") == Path("/a/b c.tar")


@pytest.mark.parametrize("url", ["s3://bucket/x", "https://host/x", "file://host/x"])
def test_other_schemes_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=url.split("/x", maxsplit=1)[0]):
        storage.local_path(url)


def test_tars_are_listed_in_name_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "test.tar", "c.txt", ".hidden.tar"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    assert storage.list_tars(str(tmp_path)) == [str(tmp_path / name) for name in ("a.tar", "b.tar", "test.tar")]
    assert storage.list_tars(str(tmp_path / "[ab].tar")) == [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    assert storage.list_tars(str(tmp_path / "a.tar")) == [str(tmp_path / "a.tar")]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        storage.list_tars(str(tmp_path / "none"))


def test_braces_stand_for_tars_that_may_be_missing(tmp_path: Path) -> None:
    urls = [str(tmp_path / f"train-{number:03}.tar") for number in range(8, 12)]
    assert storage.has_pattern(str(tmp_path / "train-{008..011}.tar"))
    assert storage.list_tars(str(tmp_path / "train-{008..011}.tar")) == urls
    with pytest.raises(ValueError, match=r"stands for .*a0\.jpg, which is no \.tar"):
        storage.list_tars(str(tmp_path / "a{0..1}.jpg"))


def test_ranges_end_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    file = storage.open_file(str(tmp_path / "x"))
    assert (file.num_bytes(), file.read(2, 3), file.read(8, 5), file.read(99, 1)) == (10, b"234", b"89", b"")


def test_a_missing_file_has_no_stat(tmp_path: Path) -> None:
    assert storage.stat(str(tmp_path / "x")) is None


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "new" / "x", b"old")
    with pytest.raises(TypeError), storage.open_atomic(tmp_path / "new" / "x") as file:
        file.writelines([b"half", 1])  # type: ignore[list-item]
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("x", b"old")]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*weights\.pt"):
        storage.write_atomic(tmp_path / "weights.pt", b"data")
    assert list(tmp_path.iterdir()) == []


def _append(path: Path) -> None:
    for _ in range(50):
        with storage.locked(path.with_suffix(".lock")):
            path.write_text(str(int(path.read_text()) + 1))


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text() == "150"


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[set] {1..3}"
    folder.mkdir()
    (folder / "a[1].tar").touch()
    assert storage.list_tars(str(folder)) == storage.list_tars(str(folder / "a[1].tar")) == [str(folder / "a[1].tar")]


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a\.jpg is no \.tar by name; give a folder"):
        storage.list_tars(str(tmp_path / "a.jpg"))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "new" / "cache"))
    assert storage.cache_folder().is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file/cache cannot be written \(Not a directory\); set SWAV_CACHE"):
        storage.cache_folder()
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"Permission denied"):
        storage.cache_folder()
