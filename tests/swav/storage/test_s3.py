import logging
import random
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from swav_testing.faults import FaultProxy, Kind
from swav_testing.s3 import SECRET_KEY, S3Server, s3rver_server

from swav import storage
from swav.storage import s3 as s3_store
from swav.storage.attempts import Patience

VISIBLE = tuple(kind for kind in Kind if kind is not Kind.CORRUPT)  # corruption is the reader's to notice


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A new bucket."""
    name = f"test-{abs(hash(request.node.nodeid)):x}"
    s3.make_bucket(name)
    return name


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before the S3 server; harms what a test plans."""
    with FaultProxy(s3.endpoint_url, rate=0.0, slow_start_seconds=1.2, stall_seconds=20) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        yield faults


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where uploads wait."""
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path))
    return tmp_path


def test_an_object_is_written_found_read_and_removed(bucket: str, s3: S3Server) -> None:
    url = f"s3://{bucket}/folder/a b+ü%41.bin"
    storage.write_atomic(url, memoryview(b"0123456789"))
    assert s3.get(bucket, "folder/a b+ü%41.bin") == b"0123456789"
    found = storage.stat(url)
    assert found is not None
    assert (found.num_bytes, found.mtime_ns > 10**18, '"' in found.etag) == (10, True, False)
    assert storage.read(url) == b"0123456789"
    file = storage.readable(url)
    assert isinstance(file, BytesIO)
    assert file.getvalue() == b"0123456789"
    assert storage.open_file(url).read(2, 3) == b"234"
    storage.remove(url)
    storage.remove(url)
    assert storage.stat(url) is None


def test_an_empty_object_is_read(bucket: str) -> None:
    storage.write_atomic(f"s3://{bucket}/empty", b"")
    assert storage.read(f"s3://{bucket}/empty") == b""
    assert storage.open_file(f"s3://{bucket}/empty").read(0, 10) == b""


def test_listing_goes_on_over_pages_and_stays_in_the_folder(
    bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_PAGE_KEYS", 3)
    names = [f"{number:02} +ü%41.tar" for number in range(10)]
    for key in ("set/", *(f"set/{name}" for name in names), "set/deeper/x.tar", "setting/y.tar", "z.tar"):
        s3.put(bucket, key, b"")
    before = storage.counts()["requests"]
    assert storage.list_names(f"s3://{bucket}/set") == names
    assert storage.counts()["requests"] - before >= 4
    assert storage.list_names(f"s3://{bucket}/set/", "0[13]*") == [names[1], names[3]]
    assert storage.list_names(f"s3://{bucket}") == ["z.tar"]
    assert storage.list_names(f"s3://{bucket}/none") == []


def test_tars_are_listed_by_folder_pattern_range_and_name(bucket: str, s3: S3Server) -> None:
    for name in ("b.tar", "a.tar", "x[1].tar", "c.txt", ".hidden.tar", "deep/d.tar"):
        s3.put(bucket, f"set/{name}", b"")
    folder = f"s3://{bucket}/set"
    assert storage.list_tars(f"{folder}/") == [f"{folder}/{name}" for name in ("a.tar", "b.tar", "x[1].tar")]
    assert storage.list_tars(f"{folder}/[ab].tar") == [f"{folder}/a.tar", f"{folder}/b.tar"]
    assert storage.list_tars(f"{folder}/?.tar") == [f"{folder}/a.tar", f"{folder}/b.tar"]
    assert storage.list_tars(f"{folder}/{{b,a}}.tar") == [f"{folder}/a.tar", f"{folder}/b.tar"]
    assert storage.list_tars(f"{folder}/x[1].tar") == [f"{folder}/x[1].tar"]
    assert storage.list_tars(f"{folder}/none") == []
    with pytest.raises(ValueError, match=r"none\.tar: there is no such object"):
        storage.list_tars(f"{folder}/none.tar")


@pytest.mark.parametrize("kind", [Kind.DROP, Kind.LENGTH, Kind.SLOW_DOWN, Kind.ERROR_500, Kind.RESET, Kind.STALL])
def test_a_listing_that_is_spoiled_is_asked_for_again(
    bucket: str, s3: S3Server, proxy: FaultProxy, hasty: Patience, kind: Kind
) -> None:
    s3.put(bucket, "a.tar", b"")
    proxy.plan(kind, key="", at_byte=150, times=2)
    assert storage.list_names(f"s3://{bucket}") == ["a.tar"]
    proxy.settle()
    assert proxy.counts[kind] == 2


@pytest.mark.filterwarnings("ignore:tzname GM:")  # half a date, which botocore tries to read
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")  # then too
def test_nothing_in_a_head_that_was_cut_is_believed(
    bucket: str, s3: S3Server, proxy: FaultProxy, hasty: Patience
) -> None:
    data = bytes(range(256)) * 1200
    s3.put(bucket, "k", data)
    etag = storage.open_file(f"s3://{bucket}/k").stat.etag
    for cut in range(0, 400, 5):
        proxy.plan(Kind.DROP, key="k", at_byte=-cut, times=2)
        found = storage.stat(f"s3://{bucket}/k")
        assert found is not None
        assert found.num_bytes == len(data)
        proxy.plan(Kind.DROP, key="k", at_byte=-cut)
        file = storage.open_file(f"s3://{bucket}/k", etag=etag)
        assert file.read(100, 50) == data[100:150]
        assert file.num_bytes() == len(data)
    proxy.settle()
    assert proxy.counts[Kind.DROP] == 3 * 80


def test_large_files_are_written_in_parts(bucket: str, s3: S3Server, proxy: FaultProxy, cache: Path) -> None:
    data = random.Random(1).randbytes(20 << 20)
    with storage.open_atomic(f"s3://{bucket}/large") as file:
        file.write(data)
        assert s3.keys(bucket) == []
    assert storage.read(f"s3://{bucket}/large") == data
    assert [answered.request.method for answered in proxy.log].count("PUT") == 3
    storage.write_atomic(f"s3://{bucket}/large", memoryview(data)[: 9 << 20])
    assert storage.read(f"s3://{bucket}/large") == data[: 9 << 20]
    assert list(cache.iterdir()) == []


def test_an_upload_that_fails_leaves_nothing(
    bucket: str, s3: S3Server, proxy: FaultProxy, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_WRITE_ATTEMPTS", 1)
    s3.put(bucket, "large", b"old")
    proxy.plan(None, method="PUT")
    proxy.plan(Kind.SLOW_DOWN, method="PUT", times=5)
    with (
        pytest.raises(OSError, match=r"large was not written: the store answered 503 SlowDown"),
        storage.open_atomic(f"s3://{bucket}/large") as file,
    ):
        file.write(bytes(20 << 20))
    assert s3.get(bucket, "large") == b"old"
    client = boto3.client("s3", endpoint_url=s3.endpoint_url)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    client.close()
    assert list(cache.iterdir()) == []


def test_a_write_is_tried_again(bucket: str, s3: S3Server, proxy: FaultProxy) -> None:
    proxy.plan(Kind.ERROR_500, method="PUT")
    before = storage.counts()
    storage.write_atomic(f"s3://{bucket}/a", b"data")
    assert s3.get(bucket, "a") == b"data"
    after = storage.counts()
    assert (after["requests"] - before["requests"], after["retries"] - before["retries"]) == (2, 1)


def test_a_block_that_raises_writes_nothing(bucket: str, s3: S3Server, cache: Path) -> None:
    with pytest.raises(TypeError), storage.open_atomic(f"s3://{bucket}/a") as file:
        file.writelines([b"half", 1])  # type: ignore[list-item]
    assert s3.keys(bucket) == []


def test_a_thousand_ranges_through_every_fault_are_the_files_bytes(
    bucket: str, s3: S3Server, proxy: FaultProxy, hasty: Patience
) -> None:
    data = random.Random(2).randbytes(3 << 20)
    s3.put(bucket, "a.tar", data)
    proxy.kinds, proxy.rate = VISIBLE, 0.1
    url, wrong = f"s3://{bucket}/a.tar", []
    before = storage.counts()

    def work(seed: int) -> None:
        draws = random.Random(seed)
        file = storage.open_file(url)
        for number in range(125):
            start, size = draws.randrange(len(data)), min(int(draws.paretovariate(0.5)), 1 << 20)
            part = file.read(start, size) if number % 2 else b"".join(file.stream(start, size))
            if part != data[start : start + size]:
                wrong.append((seed, start, size))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    gained = {name: number - before[name] for name, number in storage.counts().items()}
    assert gained["requests"] > 1008
    assert gained["retries"] > 40
    assert gained["resumed_streams"] > 0
    assert set(proxy.counts) == set(VISIBLE)


def test_a_store_without_conditions_and_with_kept_connections(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with s3rver_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = server.make_bucket("kept") + "/folder/a.tar"
        data = random.Random(3).randbytes(9 << 20)
        with storage.open_atomic(url) as new:
            new.write(data)
        file = storage.open_file(url)
        assert [file.read(start, 5000) for start in range(9)] == [data[start : start + 5000] for start in range(9)]
        assert storage.list_tars("s3://kept/folder") == [url]
        server.put("kept", "folder/a.tar", data[1:])
        with pytest.raises(storage.ChangedError, match=r"was replaced \(its ETag"):
            file.read(0, 10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_store_that_is_not_there_is_named_with_the_remedy(
    s3: S3Server, hasty: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{_free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConnectionError, match=r"s3://data/a: .*gave up after 5 attempts.*AWS_ENDPOINT_URL") as caught:
        storage.stat("s3://data/a")
    assert endpoint in str(caught.value)


def test_no_credentials_are_an_error_and_public_buckets_need_none(
    bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(bucket, "a", b"data")
    s3.put(bucket, "private", b"data")
    boto3.client("s3", endpoint_url=s3.endpoint_url).put_object_acl(Bucket=bucket, Key="a", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="SWAV_S3_UNSIGNED=1"):
        storage.read(f"s3://{bucket}/a")
    monkeypatch.setenv("SWAV_S3_UNSIGNED", "1")
    assert storage.read(f"s3://{bucket}/a") == b"data"
    with pytest.raises(PermissionError, match=r"/private: the store answered 403.*may not do this"):
        storage.read(f"s3://{bucket}/private")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: storage.read("s3://no-such-bucket/a"), ValueError, "no such bucket; check the name"),
        (lambda: storage.list_names("s3://no-such-bucket"), ValueError, "no such bucket"),
        (lambda: storage.write_atomic("s3://no-such-bucket/a", b""), ValueError, "no such bucket"),
        (lambda: storage.read("s3://bad bucket/a"), ValueError, "bad bucket/a: no bucket can have that name"),
        (lambda: storage.read("s3://bucket"), ValueError, "s3://bucket names a bucket; write s3://bucket/key"),
        (lambda: storage.read("s3:///key"), ValueError, "there is no bucket"),
    ],
)
def test_what_a_user_wrote_wrong_is_said(
    s3: S3Server, call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_an_endpoint_without_a_scheme_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(ValueError, match=r"Invalid endpoint: 127\.0\.0\.1:9; write AWS_ENDPOINT_URL as https://host"):
        storage.read("s3://bucket/key")


def test_no_secret_is_in_a_log_or_an_error(
    bucket: str,
    s3: S3Server,
    proxy: FaultProxy,
    hasty: Patience,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = "canary-session-token-5d1e"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    monkeypatch.setattr(s3_store, "_WRITE_ATTEMPTS", 1)
    s3_store._clients.clear()
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    s3.put(bucket, "a", bytes(100))
    caplog.set_level(logging.DEBUG)
    proxy.plan(Kind.SLOW_DOWN, key="a", times=99)
    proxy.plan(Kind.RESET, key="b", times=99)
    proxy.plan(Kind.RESET, key="b", method="PUT", times=99)
    proxy.plan(Kind.DROP, key="", times=99, at_byte=10)
    texts = []
    for call in (
        lambda: storage.read(f"s3://{bucket}/a"),
        lambda: storage.read(f"s3://{bucket}/b"),
        lambda: storage.read(f"s3://{bucket}/none"),
        lambda: storage.write_atomic(f"s3://{bucket}/b", b"data"),
        lambda: storage.list_names(f"s3://{bucket}"),
        lambda: storage.read(f"s3://user:{token}@{bucket}/a"),
        lambda: storage.read(f"s3://{bucket}/a?X-Amz-Signature={token}"),
    ):
        with pytest.raises((OSError, ValueError)) as caught:
            call()
        texts.append("".join(traceback.format_exception(caught.value)))
    assert "gave up after 5 attempts" in texts[0]
    for text in (*texts, caplog.text):
        assert SECRET_KEY not in text
        assert token not in text.replace("storage.read(f", "")
        assert "Signature=" not in text.replace("X-Amz-Signature={token}", "")
    assert "attempt 2 of 5" in caplog.text
