from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numpy.typing import NDArray

from swav.bank.files import (
    DamagedError,
    bank_folder,
    checksum_of,
    labels_folder,
    read_array,
    read_manifest,
    write_array,
    write_manifest,
)

ARRAY = np.arange(24, dtype=np.float16).reshape(2, 3, 4)


@pytest.mark.parametrize("array", [ARRAY, ARRAY[:, ::2], ARRAY.transpose(2, 0, 1), ARRAY[:0], np.array([True, False])])
def test_arrays_come_back_as_they_were(tmp_path: Path, array: NDArray[Any]) -> None:
    url = str(tmp_path / "folder" / "x.npy")
    checksum = write_array(url, array)
    found, found_checksum = read_array(url)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tolist() == array.tolist()
    assert checksum == found_checksum == checksum_of(url) == google_crc32c.value(Path(url).read_bytes()[:-4])


def test_numpy_reads_the_file_as_it_is(tmp_path: Path) -> None:
    write_array(str(tmp_path / "x.npy"), ARRAY)
    assert np.load(tmp_path / "x.npy").tolist() == ARRAY.tolist()


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    write_array(str(path), ARRAY)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"x\.npy does not have its checksum"):
            read_array(str(path))


def test_a_file_that_is_cut_anywhere_or_has_more_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    write_array(str(path), ARRAY)
    whole = path.read_bytes()
    for data in [*(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            read_array(str(path))


@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_checksum_of_a_file_that_has_none_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "x.npy").write_bytes(bytes(length))
    with pytest.raises((OSError, DamagedError)):
        checksum_of(str(tmp_path / "x.npy"))


def test_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    url = str(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="Object arrays"):
        write_array(url, np.array([{}], dtype=object))
    assert not Path(url).exists()


def test_a_manifest_says_what_is_there_and_its_absence_that_nothing_is(tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    assert read_manifest(folder, "form/1") is None
    write_manifest(folder, {"format": "form/1", "number": 3})
    assert read_manifest(folder, "form/1") == {"format": "form/1", "number": 3}
    with pytest.raises(DamagedError, match="of the format 'form/1', this version reads 'form/2'"):
        read_manifest(folder, "form/2")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", "\xff"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match=r"manifest\.json is no manifest"):
        read_manifest(str(tmp_path), "form/1")


def test_folders_of_epochs_are_apart_and_sort_by_their_names(tmp_path: Path) -> None:
    folders = [make(tmp_path, epoch) for make in (bank_folder, labels_folder) for epoch in (0, 9, 10, 100_000)]
    assert len(set(folders)) == len(folders)
    assert folders[:4] == sorted(folders[:4])
    assert bank_folder("s3://bucket/run", 7) == "s3://bucket/run/bank/000007"
