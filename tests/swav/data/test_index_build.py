import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swav_testing.s3 import S3Server, moto_server
from swav_testing.shards import make_jpeg, write_dataset, write_tar

from swav import storage
from swav.data.index import build_index, main, open_index
from swav.data.index_build import Building, chunk_rows_for
from swav.program import EXIT_FAILED, EXIT_REFUSED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


def _contents(folder: Path) -> dict[str, bytes]:
    """All files but the shards."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tar")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _put(server: S3Server, folder: Path, prefix: str) -> str:
    for path in folder.glob("*.tar"):
        server.put("bucket", f"{prefix}/{path.name}", path.read_bytes())
    return f"s3://bucket/{prefix}"


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(1, 1), (16_383, 1), (16_384, 2), (50_000, 4), (524_287, 32), (524_288, 64), (1_281_167, 64), (10**9, 64)],
)
def test_small_datasets_are_shuffled_in_small_chunks(num_samples: int, expected: int) -> None:
    assert chunk_rows_for(num_samples, 110_000 * num_samples) == expected


@pytest.mark.parametrize(
    ("num_samples", "image_bytes", "expected"),
    [
        (2**21, 100, 256),
        (2**21 - 1, 100, 128),
        *((10**9, 32_768, 256), (10**9, 32_769, 128), (10**9, 75_000, 64), (10**9, 110_000, 64)),
        *((10**9, 200_000, 32), (10**9, 500_000, 16), (10**9, 10**7, 16)),
    ],
)
def test_a_chunk_of_many_samples_is_one_request(num_samples: int, image_bytes: int, expected: int) -> None:
    assert chunk_rows_for(num_samples, image_bytes * num_samples) == expected


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 1, 5, 2, 4] * 4)
    build_index(str(data), str(tmp_path / "one"), Building(processes=1))
    build_index(str(data), str(tmp_path / "two"), Building(processes=2))
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_an_error_in_a_process_is_the_caller_s(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3] * 20)
    (data / "shard-000007.tar").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"shard-000007\.tar is empty"):
        build_index(str(data), str(data), Building(processes=2))
    write_tar(data / "shard-000007.tar", [("a.cls", b"1")])
    with pytest.raises(ValueError, match="has a label and no image"):
        build_index(str(data), str(data), Building(processes=2))
    assert not (data / "index.json").exists()


def test_parts_on_several_hosts_give_what_one_build_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", [3, 1, 5, 2, 4, 6, 1])
    build_index(str(data), str(tmp_path / "one"))
    for part in (3, 1):
        main([str(data), "--out", str(tmp_path / "parts"), "--part", f"{part}/3", "--processes", "1"])
        assert not (tmp_path / "parts" / "index.json").exists()
    assert "part 1 of 3: 3 tars are indexed" in capsys.readouterr().out
    opened = _opened_shards(monkeypatch)
    main([str(data), "--out", str(tmp_path / "parts"), "--processes", "1"])
    assert sorted(opened) == ["shard-000001.tar", "shard-000004.tar"]  # the second part was never done
    assert _contents(tmp_path / "one") == _contents(tmp_path / "parts")


def _opened_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real = storage.open_file

    def open_file(url: str, *, etag: str = "") -> storage.RangeFile:
        opened.append(storage.name_of(url))
        return real(url, etag=etag)

    monkeypatch.setattr("swav.storage.open_file", open_file)
    return opened


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "/"])
def test_a_part_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["/data", "--part", text])
    assert "is no part such as 2/8" in capsys.readouterr().err


def test_shards_added_later_keep_all_ids(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    before = build_index(str(data), str(data))
    write_tar(data / "another.tar", [("x.jpg", b"x")])  # first by its name
    write_tar(data / "shard-000009.tar", [("y.jpg", b"y"), ("z.jpg", b"z")])
    with pytest.raises(RuntimeError, match=r"lacks 2 shards that are there.*index --append "):
        open_index(str(data))
    main([str(data), "--append"])
    after = open_index(str(data))
    assert [after.shard(n).name for n in range(4)] == [
        "shard-000000.tar", "shard-000001.tar", "another.tar", "shard-000009.tar",
    ]  # fmt: skip
    assert after.row_offsets.tolist() == [0, 3, 5, 6, 8]
    assert (after.chunk_rows, after.table[:2].tolist()) == (before.chunk_rows, before.table.tolist())
    assert after.identity != before.identity
    assert len(list(data.glob("shards-*.npy"))) == 1
    main([str(data)])  # appends too, and finds nothing new
    assert open_index(str(data)).table.tolist() == after.table.tolist()


def test_chunks_stay_as_they_were_when_shards_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    build_index(str(data), str(data))
    write_tar(data / "x.tar", [("x.jpg", b"x")])
    monkeypatch.setattr("swav.data.index_build.chunk_rows_for", lambda *_: pytest.fail("chunks must not change"))
    assert build_index(str(data), str(data), Building(append=True)).chunk_rows == 1


def test_appending_refuses_changed_and_missing_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    assert main([str(data), "--append"]) == EXIT_REFUSED
    assert re.search(r"there is no .*index\.json to append to", caplog.text)
    build_index(str(data), str(data))
    write_tar(data / "shard-000001.tar", [("x.jpg", bytes(20_000))])
    before = _contents(data)
    assert main([str(data), "--append"]) == EXIT_FAILED
    assert re.search(r"the shard shard-000001\.tar has .* bytes and had .*restore it, or", caplog.text)
    (data / "shard-000001.tar").unlink()
    assert main([str(data)]) == EXIT_FAILED
    assert "the shard shard-000001.tar is missing; restore it, or" in caplog.text
    assert _contents(data) == before


def test_checksums_come_from_a_full_pass_on_demand(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    headers = build_index(str(data), str(data))
    assert headers.rows(0)["image_crc32c"].tolist() == [0, 0, 0]
    main([str(data), "--checksums"])
    index = open_index(str(data))
    assert index.shard(0).has_checksums
    assert index.identity == headers.identity
    assert 0 not in index.rows(0)["image_crc32c"]
    assert sorted(path.name for path in (data / "index").glob("*.npy")) == [
        "shard-000000.tar.crc32c.npy", "shard-000001.tar.crc32c.npy",
    ]  # fmt: skip
    main([str(data)])  # what is known stays
    assert open_index(str(data)).shard(1).has_checksums


def _run(data: Path, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "swav.data.index", str(data), "--out", str(out), "--processes", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)


def test_sigkill_at_any_time_loses_nothing_but_time(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    draw = random.Random(seed)
    data = write_dataset(tmp_path / "data", [60] * 40)
    undisturbed = tmp_path / "undisturbed"
    main([str(data), "--out", str(undisturbed)])
    out, records, children = tmp_path / "out", 0, set[int]()
    for _ in range(3):
        process = _run(data, out)
        stop = draw.randrange(records, 41)
        while process.poll() is None and len(list(out.glob("index/[!.]*.json"))) < stop:
            children |= _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = len(list(out.glob("index/[!.]*.json")))
        assert found >= records
        records = found
    assert _run(data, out).wait() == 0
    assert _contents(out) == _contents(undisturbed)
    _wait_for_end(children)


def _children(pid: int) -> set[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return set()
    return set(map(int, text.split()))


def _wait_for_end(pids: set[int]) -> None:
    """Processes of a killed build end by themselves."""
    for _ in range(300):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("a process outlived the build that started it")


def test_an_index_of_a_store_stands_beside_its_shards(
    tmp_path: Path, store: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_dataset(tmp_path / "data", [30, 20, 5])
    url = _put(store, data, "beside")
    main([url, "--processes", "1"])
    index, local = open_index(url), build_index(str(data), str(tmp_path / "local"))
    assert (index.folder, index.shard_url(2)) == (url, f"{url}/shard-000002.tar")
    assert index.identity == local.identity
    assert [index.rows(n).tolist() for n in range(3)] == [local.rows(n).tolist() for n in range(3)]
    assert index.shard(0).etag
    write_tar(tmp_path / "more" / "a.tar", [("x.jpg", b"x")])
    _put(store, tmp_path / "more", "beside")
    main([url, "--append", "--checksums", "--processes", "1"])
    after = open_index(url)
    assert after.row_offsets.tolist() == [0, 30, 50, 55, 56]
    assert 0 not in after.rows(3)["image_crc32c"]
    # of its size
    store.put("bucket", "beside/shard-000001.tar", (data / "shard-000001.tar").read_bytes()[:-1] + b"\1")
    assert main([url]) == EXIT_FAILED
    assert "shard-000001.tar was written since (its ETag is" in caplog.text


def test_shards_of_a_store_are_indexed_in_the_cache(tmp_path: Path, store: S3Server) -> None:
    url = _put(store, write_dataset(tmp_path / "data", [3, 2]), "cached")
    index = open_index(url)
    assert index.folder.startswith(str(tmp_path / "cache"))
    assert index.shard_url(1) == f"{url}/shard-000001.tar"
    assert storage.list_names(url) == ["shard-000000.tar", "shard-000001.tar"]
    before = storage.counts()["requests"]
    assert open_index(url).table.tolist() == index.table.tolist()
    assert storage.counts()["requests"] - before <= 4  # index.json, a listing, two shards
    write_tar(tmp_path / "data" / "shard-000001.tar", [("x.jpg", b"x")])
    _put(store, tmp_path / "data", "cached")
    assert open_index(url).rows_per_shard.tolist() == [3, 1]
    assert open_index(f"{url}/shard-*1.tar").rows_per_shard.tolist() == [1]


def test_headers_of_large_images_take_few_requests_and_few_bytes(tmp_path: Path, store: S3Server) -> None:
    images = [make_jpeg(i, width=300, height=200) for i in range(40)]
    assert min(map(len, images)) > 50_000
    members = [(f"{i:03d}.{kind}", data) for i in range(40) for kind, data in (("cls", b"1"), ("jpg", images[i]))]
    write_tar(tmp_path / "data" / "x.tar", members)
    url = _put(store, tmp_path / "data", "large")
    before = storage.counts()
    index = open_index(url)
    after = storage.counts()
    assert index.num_samples == 40
    assert after["requests"] - before["requests"] < 40 * 1.5
    assert after["bytes_received"] - before["bytes_received"] < 45 * 4096


def test_a_write_of_the_index_that_is_cut_off_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", [3, 2])
    before = build_index(str(data), str(data))
    write_tar(data / "x.tar", [("x.jpg", b"x")])
    write = storage.write_atomic

    def cut_off(url: str, content: bytes) -> None:
        if url.endswith("/index.json"):
            raise KeyboardInterrupt
        write(url, content)

    with monkeypatch.context() as patched:
        patched.setattr("swav.storage.write_atomic", cut_off)
        with pytest.raises(KeyboardInterrupt):
            build_index(str(data), str(data), Building(append=True))
    os.rename(data / "x.tar", tmp_path / "x.tar")  # noqa: PTH104
    assert open_index(str(data)).table.tolist() == before.table.tolist()
    os.rename(tmp_path / "x.tar", data / "x.tar")  # noqa: PTH104
    assert build_index(str(data), str(data), Building(append=True)).num_samples == 6
