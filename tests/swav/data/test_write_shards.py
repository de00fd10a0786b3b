import json
import multiprocessing
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from swav_testing.s3 import S3Server, moto_server
from swav_testing.shards import make_jpeg, write_dataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from swav import storage
from swav.data.image_source import FileSource
from swav.data.index import DatasetIndex, open_index
from swav.data.reader import ShardReader
from swav.data.scan import scan
from swav.data.write_shards import main, write_shards
from swav.program import EXIT_REFUSED
from swav.storage import open_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))


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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(10):
        path = tmp_path / "images" / f"class-{number % 3}" / f"photo.{number}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(number))
    return tmp_path / "images"


def _contents(index: DatasetIndex) -> list[tuple[bytes, int | None]]:
    with ShardReader(index) as reader:
        return [(reader.image(i), reader.label(i)) for i in range(index.num_samples)]


def test_files_arrive_byte_for_byte_with_labels(images: Path, tmp_path: Path) -> None:
    index = write_shards(str(images), str(tmp_path / "out"), samples_per_shard=4)
    expected = [
        (make_jpeg(number), number % 3) for number in sorted(range(10), key=lambda number: (number % 3, number))
    ]
    assert _contents(index) == expected
    assert index.rows_per_shard.tolist() == [4, 4, 2]
    assert (tmp_path / "out" / "classes.txt").read_text() == "class-0\nclass-1\nclass-2\n"
    assert open_index(str(tmp_path / "out")).table.tolist() == index.table.tolist()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:-1] == [
        "classes.txt", "index", "index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip
    assert names[-1].startswith("shards-")


def test_other_readers_see_plain_shards(images: Path, tmp_path: Path) -> None:
    index = write_shards(str(images), str(tmp_path / "out"))
    with Path(index.shard_url(0)).open("rb") as file:  # WebDataset itself would leave it open
        samples = list(group_by_keys(tar_file_expander([{"url": "shard", "stream": file}])))
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == _contents(index)
    keys = [sample["__key__"] for sample in samples]
    assert keys[:2] == ["000000000-class-0_photo_0", "000000001-class-0_photo_3"]
    with tarfile.open(index.shard_url(0)) as archive:
        assert {(member.mtime, tuple(member.pax_headers)) for member in archive} == {(0, ())}


def test_the_index_has_the_checksum_of_each_member(images: Path, tmp_path: Path) -> None:
    index = write_shards(str(images), str(tmp_path / "out"), samples_per_shard=4)
    (images / "class-1" / "photo.json").write_text("no member")
    again = write_shards(str(tmp_path / "out"), str(tmp_path / "again"))
    for written in (index, again):
        for number in range(written.num_shards):
            rows, _ = scan(open_file(written.shard_url(number)), checksums=True)
            assert written.rows(number).tolist() == rows.tolist()
            assert written.shard(number).has_checksums
            assert 0 not in rows["image_crc32c"]


def test_bytes_per_shard_ends_a_shard(images: Path, tmp_path: Path) -> None:
    index = write_shards(str(images), str(tmp_path / "out"), bytes_per_shard=1)
    assert index.rows_per_shard.tolist() == [1] * 10


def test_a_shuffle_is_a_function_of_its_seed(images: Path, tmp_path: Path) -> None:
    one, same, other, plain = (
        _contents(write_shards(str(images), str(tmp_path / f"out-{number}"), shuffle=seed))
        for number, seed in enumerate([1, 1, 2, None])
    )
    assert one == same
    assert one not in (other, plain)
    assert sorted(one) == sorted(plain)


def test_tars_are_written_again_with_labels_and_classes(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "data", [3, 1, 5])
    (source / "classes.txt").write_text("a\nb\nc\n")
    index = write_shards(str(source), str(tmp_path / "out"), samples_per_shard=5)
    assert _contents(index) == [(b"image-%d" % i, i % 3) for i in range(9)]
    assert index.rows_per_shard.tolist() == [5, 4]
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\nb\nc\n"
    again = write_shards(str(tmp_path / "out"), str(tmp_path / "again"))
    with ShardReader(again) as reader:
        assert reader.name(8) == "shard-000000.tar:000000008-000008"  # one number, not two


def test_broken_images_are_copied_and_other_files_counted(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "class-0" / "text.jpg").write_text("no image")
    (images / "class-0" / "empty.jpg").touch()
    (images / "class-0" / "notes.txt").write_text("text")
    index = write_shards(str(images), str(tmp_path / "out"))
    assert {b"no image", b""} <= {image for image, _ in _contents(index)}
    assert "1 files are no images by their name" in caplog.text


def test_a_finished_folder_is_recognised(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_shards(str(images), str(tmp_path / "out"))
    monkeypatch.setattr(FileSource, "load", lambda *_: pytest.fail("written twice"))
    assert write_shards(str(images), str(tmp_path / "out")).identity == first.identity
    moved = images.rename(tmp_path / "moved")
    assert write_shards(str(moved), str(tmp_path / "out")).identity == first.identity
    moved.rename(images)
    with pytest.raises(ValueError, match="shards of this source, but the options have changed since"):
        write_shards(str(images), str(tmp_path / "out"), samples_per_shard=3)
    (images / "class-0" / "new.jpg").write_bytes(b"new")
    with pytest.raises(ValueError, match="shards of this source, but the source has changed since"):
        write_shards(str(images), str(tmp_path / "out"))


def test_a_folder_that_holds_something_else_is_refused(images: Path, tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "out", [2])
    with pytest.raises(ValueError, match=r"is not empty \(it holds shard-000000\.tar\)"):
        write_shards(str(images), str(out))
    write_shards(str(out), str(tmp_path / "shards"))
    with pytest.raises(ValueError, match=f"already holds shards of {out}; choose another folder"):
        write_shards(str(images), str(tmp_path / "shards"))
    assert len(list(out.iterdir())) == 1


def test_an_interrupted_call_is_no_dataset_and_starts_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, load = tmp_path / "out", FileSource.load

    def interrupted(self: FileSource, number: int) -> Any:
        if number == 6:
            raise KeyboardInterrupt
        return load(self, number)

    monkeypatch.setattr(FileSource, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(str(images), str(out), samples_per_shard=2)
    (out / ".shard-000003.tar.0a0b0c0d.partial").touch()  # as a killed process leaves it
    (out / "index" / ".shard-000003.tar.json.0a0b0c0d.partial").touch()
    with pytest.raises(RuntimeError, match="are not all written; run write_shards again"):
        open_index(str(out))
    monkeypatch.undo()
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    index = write_shards(str(images), str(out), samples_per_shard=5)
    assert index.rows_per_shard.tolist() == [5, 5]
    assert sorted(path.name for path in out.glob("*shard-*")) == ["shard-000000.tar", "shard-000001.tar"]
    assert list(out.glob(".*")) == []


def _interrupt(images: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a call at the eighth image, in the fourth shard."""
    load = FileSource.load

    def interrupted(self: FileSource, number: int) -> Any:
        if number == 7:
            raise KeyboardInterrupt
        return load(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(FileSource, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shards(str(images), out, samples_per_shard=2)


def test_an_interrupted_call_goes_on_after_the_last_whole_shard(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_shards(str(images), str(tmp_path / "undisturbed"), samples_per_shard=2)
    out, load, loaded = tmp_path / "out", FileSource.load, list[int]()

    _interrupt(images, str(out), monkeypatch)
    (out / "index" / "shard-000002.tar.json").unlink()  # as if killed before it
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert len(before) == 3

    def counted(self: FileSource, number: int) -> Any:
        loaded.append(number)
        return load(self, number)

    monkeypatch.setattr(FileSource, "load", counted)
    index = write_shards(str(images), str(out), samples_per_shard=2)
    assert sorted(loaded) == [4, 5, 6, 7, 8, 9]
    assert {name: Path(out, name).stat().st_mtime_ns == time for name, time in before.items()} == {
        "shard-000000.tar": True, "shard-000001.tar": True, "shard-000002.tar": False,
    }  # fmt: skip
    assert _contents(index) == _contents(expected)
    assert index.identity == expected.identity
    for number in range(5):
        assert Path(index.shard_url(number)).read_bytes() == Path(expected.shard_url(number)).read_bytes()


def test_a_store_is_written_and_read_like_a_folder(
    images: Path, tmp_path: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_shards(str(images), str(tmp_path / "local"), samples_per_shard=4)
    index = write_shards(str(images), "s3://bucket/set", samples_per_shard=4)
    names = ["classes.txt", "index.json", *(f"shard-{n:06d}.tar" for n in range(3))]
    assert storage.list_names("s3://bucket/set")[:-1] == names
    assert (index.identity, _contents(index)) == (local.identity, _contents(local))
    monkeypatch.setattr(FileSource, "load", lambda *_: pytest.fail("written twice"))
    assert write_shards(str(images), "s3://bucket/set", samples_per_shard=4).identity == index.identity
    for name in ("index.json", "shard-000002.tar"):
        store.delete("bucket", f"set/{name}")
    with pytest.raises(ValueError, match=r"s3://bucket/set is not empty \(it holds classes\.txt\)"):
        write_shards(str(images), "s3://bucket/set", samples_per_shard=4)
    again = write_shards("s3://bucket/set/shard-00000[01].tar", str(tmp_path / "again"))
    assert _contents(again) == _contents(local)[:8]
    assert (tmp_path / "again" / "classes.txt").read_text() == "class-0\nclass-1\nclass-2\n"


def test_a_call_into_a_store_goes_on(
    images: Path, tmp_path: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(images, "s3://bucket/goes-on", monkeypatch)
    with pytest.raises(RuntimeError, match="are not all written; run write_shards again"):
        open_index("s3://bucket/goes-on")
    before = storage.stat("s3://bucket/goes-on/shard-000000.tar")
    index = write_shards(str(images), "s3://bucket/goes-on", samples_per_shard=2)
    assert storage.stat("s3://bucket/goes-on/shard-000000.tar") == before
    assert _contents(index) == _contents(write_shards(str(images), str(tmp_path / "local")))
    assert storage.stat("s3://bucket/goes-on/write_shards.json") is None


def test_a_list_may_name_files_of_a_store(tmp_path: Path, store: S3Server) -> None:
    for number in range(40):
        store.put("bucket", f"raw/{number:03d}.jpg", make_jpeg(number))
    (tmp_path / "here.jpg").write_bytes(b"here")
    lines = [f"s3://bucket/raw/{number:03d}.jpg,{number % 3}" for number in range(40)] + ["here.jpg,2"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    index = write_shards(str(tmp_path / "list.csv"), str(tmp_path / "out"))
    assert _contents(index) == [(make_jpeg(number), number % 3) for number in range(40)] + [(b"here", 2)]
    store.put("bucket", "raw/list.jsonl", b'{"path": "001.jpg"}\n{"path": "gone.jpg"}\n')
    with pytest.raises(RuntimeError, match=r"s3://bucket/raw/gone\.jpg cannot be read \(.*no such object"):
        write_shards("s3://bucket/raw/list.jsonl", str(tmp_path / "out-2"))
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such list"):
        write_shards("s3://bucket/raw/none.jsonl", str(tmp_path / "out-2"))


def test_options_below_one_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 sample and 1 byte, got 0 and 5"):
        write_shards(str(images), str(tmp_path / "out"), samples_per_shard=0, bytes_per_shard=5)


def test_the_command_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(images), str(tmp_path / "out"), "--samples-per-shard", "6", "--shuffle", "3"]) == 0
    assert "10 samples in 2 shards" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "index.json").read_text())["written_from"]
    assert record["options"] == [6, 256_000_000, 3]
    assert main([str(tmp_path / "none"), str(tmp_path / "other")]) == EXIT_REFUSED
    assert re.search("error: .*no such folder", caplog.text)


def test_keys_lead_back_to_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b", "long" * 30):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "0001.jpg").write_bytes(b"x")
    with ShardReader(write_shards(str(tmp_path / "images"), str(tmp_path / "out"))) as reader:
        names = [reader.name(i).partition(":")[2] for i in range(3)]
    assert names == ["000000000-a_0001", "000000001-b_0001", "000000002-" + ("long" * 30)[-55:] + "_0001"]


def test_class_names_that_are_no_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/images/caf\xe9"
    os.makedirs(folder)  # noqa: PTH103
    Path(os.fsdecode(folder), "a.jpg").write_bytes(b"x")
    write_shards(str(tmp_path / "images"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "classes.txt").read_bytes() == b"caf\xe9\n"
    assert write_shards(str(tmp_path / "out"), str(tmp_path / "again")).num_samples == 1
    assert (tmp_path / "again" / "classes.txt").read_bytes() == b"caf\xe9\n"


@pytest.mark.parametrize("name", [".write_shards.json.0a0b0c0d.partial", ".write_shards.lock"])
def test_a_call_that_was_killed_at_once_starts_again(images: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    assert write_shards(str(images), str(tmp_path / "out")).num_samples == 10
    assert list((tmp_path / "out").glob(".*")) == []


def test_a_call_that_was_killed_at_the_very_end_is_finished(images: Path, tmp_path: Path) -> None:
    first = write_shards(str(images), str(tmp_path / "out"))
    (tmp_path / "out" / "write_shards.json").write_text("{}")
    assert write_shards(str(images), str(tmp_path / "out")).identity == first.identity
    assert not (tmp_path / "out" / "write_shards.json").exists()


def _write(source: Path, out: Path, gate: Any, results: Any) -> None:
    gate.wait()
    try:
        results.put(write_shards(str(source), str(out), samples_per_shard=5).num_samples)
    except Exception as error:
        results.put(repr(error))


def test_of_two_calls_at_once_one_writes_and_one_waits(tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(100):
        (source / f"{number:03d}.jpg").write_bytes(b"image-%d" % number)
    context = multiprocessing.get_context("fork")
    for trial in range(3):
        gate, results = context.Barrier(3), context.Queue()
        out = tmp_path / f"out-{trial}"
        processes = [context.Process(target=_write, args=(source, out, gate, results)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [results.get() for _ in processes] == [100, 100, 100]
        for process in processes:
            process.join()
        assert _contents(open_index(str(out))) == [(b"image-%d" % i, None) for i in range(100)]
        assert list(out.glob(".*")) == []
