"""What a user may name as data, and how it is refused."""

import errno
from pathlib import Path
from typing import Any

import pytest
from swav_testing.shards import make_jpeg, write_dataset, write_tar

from swav.data.index import open_index
from swav.data.source import has_labels, open_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_images_become_shards_in_the_cache_and_tars_stay_where_they_are(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(make_jpeg(0))
    (tmp_path / "list.csv").write_text("path\nimages/a.jpg\n")
    for name in ("images", "list.csv"):
        index = open_dataset(str(tmp_path / name))
        assert (index.num_samples, Path(index.folder).parent) == (1, cache / "shards")
    data = write_dataset(tmp_path / "data", [3, 2])
    assert open_dataset(str(data)).shard_url(1) == str(data / "shard-000001.tar")
    assert sorted(path.name for path in data.iterdir()) == ["shard-000000.tar", "shard-000001.tar"]


@pytest.mark.parametrize("name", ["a.jpg", "dog/a.jpg"])
def test_images_beside_tars_are_not_forgotten(tmp_path: Path, name: str) -> None:
    data = write_dataset(tmp_path / "data", [3])
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_bytes(make_jpeg(0))
    with pytest.raises(
        ValueError, match=rf"holds 1 tars .* and 1 images .*{name}.*name the tars alone as '.*/\*\.tar'"
    ):
        open_dataset(str(data))
    assert open_dataset(str(data / "*.tar")).num_samples == 3


def test_a_full_cache_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(make_jpeg(0))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RuntimeError, match=r"No space left on device.*free space in .*/cache, or set SWAV_CACHE"):
        open_dataset(str(tmp_path / "images"))
    monkeypatch.undo()
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    assert open_dataset(str(tmp_path / "images")).num_samples == 1


@pytest.mark.parametrize(("labels", "expected"), [(["1", "2"], True), ([None, None], False)])
def test_labels_are_looked_for_in_all_samples(tmp_path: Path, labels: list[str | None], expected: bool) -> None:
    _write(tmp_path / "data", labels)
    assert has_labels(open_index(str(tmp_path / "data"))) is expected


@pytest.mark.parametrize(("labels", "missing"), [(["1", None], 1), ([None, "1"], 0), ([None, None, "5"], 0)])
def test_data_that_is_labelled_in_part_is_refused(tmp_path: Path, labels: list[str | None], missing: int) -> None:
    _write(tmp_path / "data", labels)
    with pytest.raises(ValueError, match=rf"{missing}\.tar:{missing} has no label .* label all or none"):
        has_labels(open_index(str(tmp_path / "data")))


def test_a_first_label_that_is_a_word_is_found_early(tmp_path: Path) -> None:
    _write(tmp_path / "data", ["dog", "cat"])
    with pytest.raises(ValueError, match="holds b'dog', and a label is a number"):
        has_labels(open_index(str(tmp_path / "data")))


def _write(folder: Path, labels: list[str | None]) -> None:
    """A shard for each sample, after one without any."""
    write_tar(folder / "!.tar", [("readme.txt", b"text")])
    for number, label in enumerate(labels):
        members = [(f"{number}.jpg", b"image")] + ([] if label is None else [(f"{number}.cls", label.encode())])
        write_tar(folder / f"{number}.tar", members)
