import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from swav_testing.shards import write_dataset, write_tar

from swav.data.index import build_index, main, open_index
from swav.program import EXIT_REFUSED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_first_use_indexes_into_the_cache_only(tmp_path: Path, cache: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 1, 5])
    before = _files(data)
    index = open_index(str(data))
    assert (index.num_samples, index.row_offsets.tolist()) == (9, [0, 3, 4, 9])
    assert _files(data) == before
    assert any(name.endswith("index.json") for name in _files(cache))


def test_a_cached_index_is_used_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    first = open_index(f"file://{data}")
    with monkeypatch.context() as patched:
        patched.setattr("swav.data.index_build.scan", lambda *_, **__: pytest.fail("indexed twice"))
        assert open_index(str(data)).table.tolist() == first.table.tolist()
    os.utime(data / "shard-000000.tar", ns=(1, 1))
    assert open_index(str(data)).shard(0).mtime_ns == 1
    write_tar(data / "shard-000001.tar", [("only.jpg", b"x")])
    assert open_index(str(data)).rows_per_shard.tolist() == [3, 1]
    (data / "shard-000000.tar").unlink()
    assert open_index(str(data)).rows_per_shard.tolist() == [1]


def test_locate_finds_shard_and_row(tmp_path: Path) -> None:
    index = open_index(str(write_dataset(tmp_path / "data", [3, 1, 5])))
    shards, rows = index.locate(np.arange(9))
    assert shards.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert rows.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert [index.locate_one(i) for i in range(9)] == list(zip(shards.tolist(), rows.tolist(), strict=True))
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match="inside the index's 9"):
            index.locate(np.array([0, wrong]))
        with pytest.raises(ValueError, match="inside the index's 9"):
            index.locate_one(wrong)


def test_an_index_beside_the_shards_moves_with_them(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    built = build_index(str(data), str(data))
    shutil.copytree(data, tmp_path / "copy")  # other modification times
    moved = open_index(str(tmp_path / "copy"))
    assert moved.folder == str(tmp_path / "copy")
    assert moved.identity == built.identity == open_index(str(data)).identity
    assert moved.rows(0).tolist() == built.rows(0).tolist()


def test_an_index_may_stand_apart_from_the_shards(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    build_index(str(data), str(tmp_path / "apart"))
    assert open_index(str(tmp_path / "apart")).shard_url(1) == str(data / "shard-000001.tar")


def test_patterns_and_single_tars_choose_shards(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2, 4])
    for beside in (False, True):
        if beside:
            build_index(str(data), str(data))
        assert open_index(str(data / "shard-*[12].tar")).rows_per_shard.tolist() == [2, 4]
        assert open_index(str(data / "shard-000002.tar")).rows_per_shard.tolist() == [4]


def test_a_stale_index_beside_the_shards_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    build_index(str(data), str(data))
    shard = data / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    with pytest.raises(
        RuntimeError,
        match=rf"shard-000001.tar has {len(content) + 512} bytes and had {len(content)} when .*index again",
    ):
        open_index(str(data))
    shard.unlink()
    with pytest.raises(RuntimeError, match=r"the shard shard-000001\.tar is missing.*index again"):
        open_index(str(data))
    shard.write_bytes(content)
    write_tar(data / "shard-000002.tar", [("x.jpg", b"x")])
    with pytest.raises(RuntimeError, match=r"lacks 1 shards that are there: .*shard-000002\.tar; .* --append"):
        open_index(str(data))


def test_a_foreign_index_json_is_left_alone(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3])
    (data / "index.json").write_text('{"version": 2, "shards": []}')
    assert open_index(str(data)).num_samples == 3
    (data / "index.json").write_text('{"format": "swav.index/9"}')
    with pytest.raises(RuntimeError, match=r"format swav\.index/9, this version reads swav\.index/2"):
        open_index(str(data))


def test_a_folder_without_tars_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"there is no \.tar; .*write_shards"):
        open_index(str(tmp_path / "data"))


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "x.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match="no image in 1 tars; known extensions: bmp, "):
        open_index(str(tmp_path / "data"))


def test_keys_without_an_image_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "data" / "a.tar", [("a.jpg", b"x"), ("b.xml", b"x")])
    write_tar(tmp_path / "data" / "b.tar", [("c.xml", b"x")])
    with caplog.at_level(logging.WARNING):
        index = open_index(str(tmp_path / "data"))
    assert index.rows_per_shard.tolist() == [1, 0]
    assert [len(index.rows(0)), len(index.rows(1))] == [1, 0]
    assert "2 keys have no image and are passed over; 1 samples remain" in caplog.text


def test_a_damaged_tar_leaves_no_index(tmp_path: Path, cache: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    shard = data / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:2000])
    with pytest.raises(RuntimeError, match=r"shard-000001\.tar is cut in the middle"):
        open_index(str(data))
    assert not any(name.endswith("index.json") for name in _files(cache))
    shard.write_bytes(content)
    assert open_index(str(data)).num_samples == 5


def test_a_lost_table_is_named(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3])
    index = build_index(str(data), str(data))
    (data / "index" / "shard-000000.tar.npy").unlink()
    with pytest.raises(RuntimeError, match=r"table of the shard shard-000000\.tar cannot be read"):
        index.rows(0)


def test_the_command_line_writes_beside_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    assert main([str(data)]) == 0
    assert "5 samples in 2 tars" in capsys.readouterr().out
    assert json.loads((data / "index.json").read_text())["format"] == "swav.index/2"
    assert main([str(tmp_path / "none")]) == EXIT_REFUSED
    assert re.search("error: .*no such file or folder", caplog.text)


def test_the_index_and_the_order_do_not_need_torch() -> None:
    code = "import sys, swav.data.index, swav.data.order, swav.data.reader; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("record", ['{"format": "swav.index/2"}', '{"format": "swav.index/2", "num_'])
def test_a_damaged_index_json_is_named(tmp_path: Path, record: str) -> None:
    data = write_dataset(tmp_path / "data", [3])
    (data / "index.json").write_text(record)
    with pytest.raises(RuntimeError, match=r"index\.json is damaged .*index again"):
        open_index(str(data))


def test_a_full_disk_names_the_table(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [300])
    code = (
        "import resource, sys; from swav.data.index import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(data)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 27] File too large")
    assert "index/shard-000000.tar.npy" in done.stderr
    assert [path.name for path in data.iterdir() if path.is_file()] == ["shard-000000.tar"]


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3])
    folder = Path(open_index(str(data)).folder)
    (folder / "index.json").unlink()
    for name in (".index.json.0a0b0c0d.partial", "index/.shard-000000.tar.npy.0a0b0c0d.partial"):
        (folder / name).touch()
    assert open_index(str(data)).num_samples == 3
    assert list(folder.rglob("*.partial")) == []
