import io
from pathlib import Path

import numpy as np
import pytest

from swav.data.scan import ROW_DTYPE, scan
from swav.data.shard_writer import KEY_NAME_LENGTH, Sample, key_name, write_shard
from swav.storage import open_file

SAMPLES: list[Sample] = [
    ("dog/a.v2", {"jpg": b"a" * 700, "cls": b"3"}),
    ("x" * 100, {"png": b"", "json": b"{}" * 400}),
    ("caf\xe9", {"webp": b"c", "cls": b"1", "json": b"[]"}),
]


def test_the_rows_are_those_of_a_full_pass(tmp_path: Path) -> None:
    file = io.BytesIO()
    rows = list(write_shard(file, iter(SAMPLES), 7, 10, 10**9))
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    found, without = scan(open_file(tmp_path / "x.tar"), checksums=True)
    assert np.array(rows, dtype=ROW_DTYPE).tolist() == found.tolist()
    assert without == 0


@pytest.mark.parametrize(("end", "num_bytes", "expected"), [(10, 10**9, 3), (9, 10**9, 2), (10, 701, 1), (10, 702, 2)])
def test_a_shard_ends_at_its_samples_or_its_bytes(end: int, num_bytes: int, expected: int) -> None:
    samples = iter(SAMPLES)
    assert len(list(write_shard(io.BytesIO(), samples, 7, end, num_bytes))) == expected
    assert len(list(samples)) == 3 - expected  # none is taken and dropped


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("n01440764/n01440764_10026", "n01440764_n01440764_10026"),
        ("a b/c.v2", "a_b_c_v2"),
        ("000000012-dog_a", "dog_a"),  # of an earlier key
        ("x" + "y" * 60, "y" * 60),
    ],
)
def test_what_a_key_says_of_a_path(stem: str, expected: str) -> None:
    assert key_name(stem) == expected
    assert len(expected) <= KEY_NAME_LENGTH
