import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from swav_testing.public_data import imagenet_archives, train_images, voc_files, write_files
from swav_testing.runs import ROOT
from swav_testing.s3 import moto_server
from swav_testing.shards import write_tar

from swav.data.index import open_index
from swav.data.reader import ShardReader
from swav.program import EXIT_FAILED, EXIT_REFUSED
from swav_eval.datasets.__main__ import DATA_SETS, main
from swav_eval.datasets.listing import ArchivedImages


def test_every_data_set_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet_archives(tmp_path / "imagenet")
    write_files(tmp_path / "places205", [("images256/a/x.jpg", b"x"), ("train_places205.csv", b"a/x.jpg 3\n")])
    record = {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [{"image_id": 1, "category_id": 2}]}
    write_files(tmp_path / "inat18", [("x.jpg", b"x"), ("train2018.json", json.dumps(record).encode())])
    write_files(tmp_path / "voc07", voc_files().items())
    sizes = {}
    for name in DATA_SETS:
        assert main([name, str(tmp_path / name), str(tmp_path / f"{name}-out"), "--split", "train"]) == 0
        sizes[name] = open_index(str(tmp_path / f"{name}-out")).num_samples
    assert sizes == {"imagenet": 9, "places205": 1, "inat18": 1, "voc07": 2}
    assert "imagenet-out: 9 samples in 1 shards" in capsys.readouterr().out


def test_the_options_are_those_of_write_shards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["imagenet", str(imagenet_archives(tmp_path / "in")), str(out), "--split", "train"]
    assert main([*command, "--samples-per-shard", "4", "--shuffle", "3"]) == 0
    index = open_index(str(out))
    assert index.rows_per_shard.tolist() == [4, 4, 1]
    assert index.written_from is not None
    assert index.written_from["source"] == str(tmp_path / "in" / "ILSVRC2012_img_train.tar")
    assert index.written_from["options"] == [4, 256_000_000, 3]
    with ShardReader(index) as reader:
        assert sorted(reader.image(number) for number in range(9)) == sorted(train_images().values())
        assert sorted(reader.labels().tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert main(command) == EXIT_REFUSED  # other options, same folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DATA SET"),
        (["cifar10", "in", "out", "--split", "train"], "invalid choice: 'cifar10'"),
        (["imagenet", "in", "out"], "--split"),
        (["imagenet", "in", "out", "--split", "test"], "invalid choice: 'test'"),
        (["imagenet", "in", "out", "--split", "val", "--samples-per-shard", "0"], "at least 1 sample and 1 byte"),
        (["voc07", "/none/here", "out", "--split", "val"], r"/none/here has no ImageSets/Main/val.txt"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == EXIT_REFUSED
    assert message in capsys.readouterr().err + caplog.text


def test_an_archive_that_cannot_be_read_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = ArchivedImages.load

    def broken(self: ArchivedImages, number: int) -> Any:
        if number == 5:
            raise OSError(errno.EIO, "Input/output error", "the disk")
        return load(self, number)

    command = ["imagenet", str(imagenet_archives(tmp_path / "in")), str(tmp_path / "out"), "--split", "train"]
    command += ["--samples-per-shard", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(ArchivedImages, "load", broken)
        assert main(command) == EXIT_FAILED
    assert "Input/output error" in caplog.text
    before = (tmp_path / "out" / "shard-000001.tar").stat().st_mtime_ns
    assert main(command) == 0  # goes on
    assert (tmp_path / "out" / "shard-000001.tar").stat().st_mtime_ns == before
    assert open_index(str(tmp_path / "out")).num_samples == 9


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    files = voc_files("VOC2007")
    names = [f"{number:06d}" for number in range(400)]
    for name in names:
        files[f"VOC2007/JPEGImages/{name}.jpg"] = name.encode() * 100
        files[f"VOC2007/Annotations/{name}.xml"] = files["VOC2007/Annotations/000005.xml"]
    files["VOC2007/ImageSets/Main/test.txt"] = "\n".join(names).encode()
    source, out = write_tar(tmp_path / "voc.tar", files.items()), tmp_path / "out"
    arguments = ["voc07", str(source), str(out), "--split", "test", "--samples-per-shard", "1"]
    command = [sys.executable, "-m", "swav_eval.datasets", *arguments]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"}
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (out / "index" / "shard-000010.tar.json").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (out / "index.json").exists()
    kept = (out / "shard-000005.tar").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "shard-000005.tar").stat().st_mtime_ns == kept
    with ShardReader(open_index(str(out))) as reader:
        assert [reader.image(number) for number in range(400)] == [name.encode() * 100 for name in names]
    assert list(out.glob(".*")) == []


def test_a_store_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        source = write_tar(tmp_path / "voc.tar", voc_files().items())
        assert main(["voc07", str(source), "s3://bucket/voc", "--split", "trainval"]) == 0
        server.put("bucket", "voc.tar", source.read_bytes())
        assert main(["voc07", "s3://bucket/voc.tar", "s3://bucket/again", "--split", "trainval"]) == 0
        assert server.get("bucket", "again/shard-000000.tar") == server.get("bucket", "voc/shard-000000.tar")
        assert server.get("bucket", "voc/classes.txt").startswith(b"aeroplane\nbicycle\n")
        with ShardReader(open_index("s3://bucket/voc")) as reader:
            assert json.loads(reader.member(0, "json") or b"") == {"present": ["chair"], "difficult": ["person"]}
