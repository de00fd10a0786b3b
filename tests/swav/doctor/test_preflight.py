"""The whole preflight, in this process and on ranks of their own, with real stores and real faults."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from swav_testing.agents import agents
from swav_testing.runs import ROOT
from swav_testing.s3 import S3Server, environment, moto_server
from swav_testing.shards import write_dataset

from swav.data.index import build_index
from swav.data.index_build import Building
from swav.doctor.command import main
from swav.storage import remote
from swav.storage import s3 as s3_store

SMALL = ["--object-mb", "0.1,1", "--min-free-disk-gb", "0", "--device", "cpu"]
# Runs the preflight on ranks some of which have been spoilt.
SPOILT = """
import os, runpy, sys, time
rank = int(os.environ["RANK"])
{spoil}
runpy.run_module("swav.doctor", run_name="__main__")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    for name in ("WORLD_SIZE", "RANK", "SWAV_IMAGE", "POD_NAME", "NODE_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


def dataset(folder: Path, rows: tuple[int, ...] = (6, 5)) -> Path:
    """Images with an index that has their checksums."""
    write_dataset(folder, rows, jpeg=True)
    build_index(str(folder), str(folder), Building(checksums=True))
    return folder


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["status"] for finding in report["findings"]}


def reason(report: dict[str, Any], name: str) -> str:
    return next(finding["reason"] for finding in report["findings"] if finding["name"] == name)


def failures(report: dict[str, Any]) -> set[str]:
    return {name for name, status in statuses(report).items() if status == "fail"}


def test_one_process_and_folders(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(place / "data")
    report_file = place / "report.json"
    words = ["--output", str(place / "run"), "--data", str(data), "--report", str(report_file)]
    assert main([*words, *SMALL]) == 0
    report = json.loads(report_file.read_text())
    assert report["format"] == "swav-doctor-1"
    assert report["passed"]
    assert (report["world_size"], report["device"], report["data"]) == (1, "cpu", str(data))
    assert list((place / "run").iterdir()) == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["CHECK", "RESULT", "MEASURED", "LIMIT"]
    assert printed[-1].endswith("0 failed, 8 skipped")
    assert [line.split()[0] for line in printed if line.startswith("data.")] == [
        "data.index",
        "data.read",
        "data.decode",
        "data.lanes",
    ]


def test_each_check_fails_for_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run").write_text("a file in place of the folder")
    report_file = place / "report.json"
    words = ["--output", str(place / "run"), "--data", str(place / "nothing"), "--report", str(report_file), *SMALL]
    assert main([*words, "--min-free-disk-gb", "1e9", "--min-shm-mb", "1e12"]) == 1
    report = json.loads(report_file.read_text())
    assert failures(report) == {"storage.write", "data.index", "host.cache_disk", "host.shared_memory"}
    assert statuses(report)["storage.read"] == statuses(report)["data.read"] == "skipped"
    assert statuses(report)["collectives.sum"] == "pass"
    assert "there is no such file or folder" in reason(report, "data.index")
    assert str(place / "cache") in reason(report, "host.cache_disk")
    assert capsys.readouterr().out.count("    do:  ") == 4


def test_a_store_that_is_not_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3_store, "_WRITE_ATTEMPTS", 2)
    monkeypatch.setattr(remote, "PATIENCE", replace(remote.PATIENCE, attempts=2, backoff_seconds=0.01))
    for name, value in environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    assert main(["--output", "s3://bucket/run", "--data", "s3://bucket/data", *SMALL]) == 1
    failed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if " FAIL " in line}
    assert failed == {"storage.write", "data.index", "clock.store"}
    assert "the report was not written to s3://bucket/run/doctor.json" in caplog.text


def test_where_logs_are_json_so_is_the_answer(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("swav.doctor.command.start_logging", lambda: None)  # it would change this process's own
    monkeypatch.setenv("SWAV_LOG_FORMAT", "json")
    assert main(["--output", str(place / "run"), *SMALL]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["message"] == "the preflight passed"
    assert record["findings"] == json.loads((place / "run" / "doctor.json").read_text())["findings"]


def test_a_store_that_is_too_slow(place: Path) -> None:
    words = ["--output", str(place / "run"), *SMALL, "--min-read-mb-per-second", "1e9"]
    assert main([*words, "--min-write-mb-per-second", "1e9"]) == 1
    assert failures(json.loads((place / "run" / "doctor.json").read_text())) == {"storage.write", "storage.read"}


def test_two_nodes_and_a_bucket(moto: S3Server, place: Path) -> None:
    url = moto.upload_folder("bucket", "data", dataset(place / "data", (12, 12)))
    words = ["-m", "swav.doctor", "--output", "s3://bucket/run", "--recipe", "demo", "--data", url, *SMALL]
    words += ["optim.global_batch=8", "--max-clock-skew-seconds", "30"]  # other programs may hold the processor
    settings = {**moto.env, "SWAV_IMAGE": "swav-pretrain@sha256:1"}
    with agents(place, place / "cache", words, nodes="2", options=("--max-restarts=0",), environment=settings) as nodes:
        for _ in range(2):
            nodes.start()
        assert nodes.statuses() == [0, 0], nodes.printed()
        printed = nodes.printed()
    report = json.loads(moto.get("bucket", "run/doctor.json"))
    assert report["world_size"] == 2
    assert failures(report) == set()
    left_out = {name for name, status in statuses(report).items() if status == "skipped"}
    assert left_out == {"identity.gpu", "identity.gpu_memory"}
    assert sorted(rank["rank"] for rank in report["ranks"]) == [0, 1]
    assert moto.keys("bucket", "run") == ["run/doctor.json"]
    assert printed.count("identity.image") == 1
    measured = {finding["name"]: finding["measured"] for finding in report["findings"]}
    assert measured["collectives.bandwidth"] > 0 < measured["collectives.latency"]
    assert measured["data.lanes"] == "8 lanes"


def spoilt(place: Path, spoil: str) -> str:
    script = place / "spoilt.py"
    script.write_text(SPOILT.format(spoil=spoil))
    return str(script)


def test_a_node_that_is_wrong_in_every_way_is_named_in_every_way(place: Path) -> None:
    """The second rank has an older package, another image, other data, and a clock that is fast."""
    shutil.copytree(ROOT / "swav", place / "old" / "swav", ignore=shutil.ignore_patterns("__pycache__"))
    with (place / "old" / "swav" / "rng.py").open("a") as file:
        file.write("# changed\n")
    dataset(place / "data-0")
    dataset(place / "data-1", (6, 4))
    script = spoilt(
        place,
        f"""
sys.argv += ["--data", {str(place)!r} + f"/data-{{rank}}"]
os.environ["SWAV_IMAGE"] = f"swav-pretrain@sha256:{{rank}}"
os.environ["POD_NAME"], os.environ["NODE_NAME"] = f"pod-{{rank}}", f"node-{{rank}}"
if rank == 1:
    sys.path.insert(0, {str(place / "old")!r})
    from swav.doctor import command
    class Fast(command.Clock):
        def now(self):
            return super().now() + 100
    command.Clock = Fast
""",
    )
    words = [script, "--output", str(place / "run"), *SMALL, "--max-clock-skew-seconds", "30"]
    with agents(place, place / "cache", words, nodes="2", options=("--max-restarts=0",)) as nodes:
        for _ in range(2):
            nodes.start()
        assert nodes.statuses() == [1, 1], nodes.printed()
    report = json.loads((place / "run" / "doctor.json").read_text())
    named = ("identity.package", "identity.image", "data.index", "clock.nodes")
    assert failures(report) == set(named), nodes.printed()
    assert "pod-1 on node-1" in reason(report, "clock.nodes")
    assert "ahead of rank 0's" in reason(report, "clock.nodes")
    for name in named[:3]:  # of two, either may be the one that differs
        assert "on node-" in reason(report, name)
    assert sorted(path.name for path in (place / "run").iterdir()) == ["doctor.json"]


def test_a_peer_that_is_silent_in_collectives_hides_nothing_else(place: Path) -> None:
    script = spoilt(
        place,
        """
if rank == 1:
    from swav.doctor import collectives
    collectives.Rehearsal.measure = lambda self: {}
""",
    )
    words = [script, "--output", str(place / "run"), *SMALL, "--collective-timeout-seconds", "5"]
    with agents(place, place / "cache", words, ranks_per_node=2, options=("--max-restarts=0",)) as node:
        node.start()
        assert node.statuses() == [1], node.printed()
    report = json.loads((place / "run" / "doctor.json").read_text())
    assert failures(report) == {"collectives.sum"}
    assert reason(report, "collectives.sum").startswith("rank 0 (host ")
    assert "joining the process group" in reason(report, "collectives.sum")
    assert statuses(report)["storage.read"] == "pass"


def test_a_peer_that_stands_still_is_named(place: Path) -> None:
    script = spoilt(
        place,
        """
if rank == 1:
    from swav.doctor import storage_check
    storage_check.Trial.write = lambda self: time.sleep(1000)
""",
    )
    words = [script, "--output", str(place / "run"), *SMALL, "--timeout-seconds", "30"]
    with agents(place, place / "cache", words, ranks_per_node=2, options=("--max-restarts=0",)) as node:
        node.start()
        assert node.statuses() == [1], node.printed()
    report = json.loads((place / "run" / "doctor.json").read_text())
    assert "ranks" in failures(report)
    assert reason(report, "ranks").startswith("rank 1 did not come to the check storage.read in 30 s; rank 1 (host ")
    assert statuses(report)["storage.write"] == statuses(report)["host.cache_disk"] == "pass"
    assert sorted(path.name for path in (place / "run").iterdir()) == ["doctor.json"]
