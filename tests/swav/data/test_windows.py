import random
from pathlib import Path

import pytest
from swav_testing.shards import CountingFile

from swav.data.windows import Windows


def _file(path: Path, num_bytes: int) -> tuple[CountingFile, bytes]:
    content = random.Random(0).randbytes(num_bytes)
    path.write_bytes(content)
    return CountingFile(path), content


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_read_is_what_is_there(tmp_path: Path, seed: int, whole: bool) -> None:
    file, content = _file(tmp_path / "x", 600_000)
    windows, draw, position = Windows(file, whole=whole), random.Random(seed), 0
    while position < len(content) + 2000:
        wanted = draw.choice([0, 6, 512, 512, 5000, 300_000 if draw.random() < 0.1 else 1])
        assert windows.read(position, wanted) == content[position : position + wanted]
        position += draw.choice([0, wanted, wanted, draw.randrange(100_000)])
    assert windows.num_bytes() == len(content)


def test_headers_far_apart_take_one_small_request_each(tmp_path: Path) -> None:
    file, _ = _file(tmp_path / "x", 1_000_000)
    windows = Windows(file)
    for position in range(0, 1_000_000, 50_000):
        for step in (0, 512, 1024, 3000):
            windows.read(position + step, 512)
    assert file.ranges == [(position, position + 4096) for position in range(0, 1_000_000, 50_000)]


def test_headers_near_one_another_take_large_requests_and_no_byte_twice(tmp_path: Path) -> None:
    file, _ = _file(tmp_path / "x", 3_000_000)
    windows = Windows(file)
    for position in range(0, 3_000_000, 1000):
        windows.read(position, 512)
    assert len(file.ranges) <= 18
    assert max(end - start for start, end in file.ranges) <= 256 << 10
    assert all(before[1] <= after[0] for before, after in zip(file.ranges, file.ranges[1:], strict=False))


def test_a_whole_file_is_read_once(tmp_path: Path) -> None:
    file, content = _file(tmp_path / "x", 20_000_000)
    windows = Windows(file, whole=True)
    assert b"".join(windows.read(start, 700_000) for start in range(0, len(content), 700_000)) == content
    assert len(file.ranges) == 3
    assert sum(end - start for start, end in file.ranges) == len(content)
