"""Whole runs on data in a real object store: faults and kills change nothing, and secrets stay where they were."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from swav_testing.faults import FaultProxy, Kind
from swav_testing.runs import (
    NUM_STEPS,
    ROWS_PER_SHARD,
    arguments,
    assert_same_run,
    command_line,
    events,
    finish,
    kill_tree,
    last_step,
    make_scene,
    run,
)
from swav_testing.s3 import SECRET_KEY, S3Server, environment, moto_server

from swav.data.write_shards import write_shards

NUM_SAMPLES = sum(ROWS_PER_SHARD)
NUM_SHARDS = 52
SETTINGS = ("runtime.fetch_bytes=3000", "runtime.loader_threads=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images in each shard; the index knows their checksums."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(NUM_SAMPLES):
        path = folder / "images" / f"class-{number % 3}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_scene(number % 3, number))
    index = write_shards(str(folder / "images"), str(folder / "shards"), samples_per_shard=2)
    assert index.num_shards == NUM_SHARDS
    return folder / "shards"


@pytest.fixture(scope="module")
def reference(shards: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on the local copy."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run(arguments(shards, output, *SETTINGS), cache)
    return output


@pytest.fixture(scope="module")
def server(shards: Path) -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("bucket")
        server.upload_folder("bucket", "data", shards)
        yield server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url, rate=0, slow_start_seconds=2.5) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_through_faults_is_the_run_on_the_local_copy(proxy: FaultProxy, reference: Path, tmp_path: Path) -> None:
    proxy.rate = 0.1
    output, cache = tmp_path / "run", tmp_path / "cache"
    status, out, err = finish(
        command_line("swav.pretrain", *arguments("s3://bucket/data", output, *SETTINGS), cache=cache)
    )
    assert status == 0, err
    assert_same_run(output, reference)
    proxy.settle()
    assert len(proxy.counts) > 5
    costs = [event for event in events(output) if event.get("event") == "storage"]
    assert sum(event["requests"] for event in costs) > NUM_SHARDS
    assert sum(event["retries"] for event in costs) > 0
    assert (output / "checkpoints").is_dir()
    assert files_with("s3://bucket/data", output)  # the search finds what is there
    assert files_with(SECRET_KEY, tmp_path) == []
    assert SECRET_KEY not in out + err
    assert list((cache / "blocks").glob("*.partial")) == []


def test_ranks_share_what_was_fetched(proxy: FaultProxy, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = arguments("s3://bucket/data", output, *SETTINGS)
    status, _, err = finish(command_line("swav.pretrain", *words, cache=tmp_path / "cache", ranks=2))
    assert status == 0, err
    fetched = Counter(
        (answered.request.key, answered.request.range)
        for answered in proxy.log
        if answered.request.is_object and answered.request.range != "bytes=0-0"  # by which each rank asks for a size
    )
    assert {key for key, _ in fetched if key.endswith(".tar")} == {
        f"data/shard-{number:06d}.tar" for number in range(NUM_SHARDS)
    }
    again = [block for block, times in fetched.items() if block[0].endswith((".tar", ".npy")) and times > 1]
    assert len(again) < 5  # a request is sent a second time where the machine is slow


def test_a_run_that_was_killed_while_it_fetched_leaves_a_sound_cache(
    proxy: FaultProxy, reference: Path, tmp_path: Path
) -> None:
    output, cache = tmp_path / "run", tmp_path / "cache"
    for number in range(0, NUM_SHARDS, 2):
        proxy.plan(Kind.TRICKLE, key=f"data/shard-{number:06d}.tar", times=10)
    words = arguments("s3://bucket/data", output, *SETTINGS)
    process = command_line("swav.pretrain", *words, cache=cache)
    while len(list((cache / "blocks").glob("*.partial"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    kill_tree(process.pid)
    finish(process)
    assert list((cache / "blocks").glob("*.partial"))
    assert last_step(output) < NUM_STEPS
    proxy.behaviour.trickle_bytes_per_second = 10**6
    status, _, err = finish(command_line("swav.pretrain", *words, cache=cache))
    assert status == 0, err
    assert_same_run(output, reference)
    assert list((cache / "blocks").glob("*.partial")) == []
    blocks = [path.stat().st_size for path in (cache / "blocks").glob("*.block")]
    assert int.from_bytes((cache / "blocks" / "usage").read_bytes(), "little") == sum(blocks)
