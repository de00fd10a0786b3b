"""What a user may get wrong, through the command line: a clear message, and nothing lost.

Either the run goes on with every other image exactly once, or it is refused; then the data are as they were, and the
same command works once they are mended.
"""

import bz2
import hashlib
import io
import json
import logging
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from swav_testing.ranks import _CONTEXT
from swav_testing.runs import (
    arguments,
    assert_same_run,
    command_line,
    events,
    files_of_at_most,
    finish,
    make_scene,
    start,
    weights,
    write_scenes,
)
from swav_testing.shards import write_tar

from swav.data import write_shards
from swav.data.index import build_index, open_index
from swav.data.reader import ShardReader
from swav.data.source import open_dataset
from swav.pretrain import main
from swav.program import EXIT_FAILED, EXIT_REFUSED

ONE_EPOCH = ("optim.epochs=1", "optim.warmup_epochs=0", "data.lanes=4", "optim.global_batch=16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pretrain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs the main job on some data into ``tmp_path / "run"``: exit status, and what was said."""

    def call(data: Path | str, *overrides: str) -> tuple[int, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            status = main(arguments(data, tmp_path / "run", *ONE_EPOCH, *overrides))
        return status, caplog.text

    return call


def encode(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def scene(number: int, size: int = 24) -> Image.Image:
    return Image.open(io.BytesIO(make_scene(number % 3, number, size=size)))


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def scenes(number: int, *, first: int = 0) -> dict[str, bytes]:
    return {f"good-{i:03d}.jpg": make_scene(i % 3, i) for i in range(first, first + number)}


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder, to the byte."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def epochs(output: Path) -> list[tuple[int, int]]:
    """Images delivered and quarantined in each epoch."""
    return [(event["images"], event["quarantined"]) for event in events(output) if event.get("event") == "epoch"]


def quarantine(output: Path) -> dict[str, str]:
    """Reasons by the key of the sample, without its number."""
    records = [json.loads(path.read_text()) for path in (output / "quarantine").rglob("*.json")]
    return {
        record["name"].partition(":")[2].removeprefix(f"{record['sample_id']:09d}-"): record["reason"]
        for record in records
    }


def odd_images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    return {
        "1x1.jpg": encode(Image.new("RGB", (1, 1), (200, 100, 50))),
        "thin.jpg": encode(Image.new("RGB", (1, 500), (200, 100, 50))),
        "cmyk.jpg": encode(scene(1).convert("CMYK")),
        "palette.png": encode(scene(2).quantize(16), "PNG", transparency=0),
        "16-bit.png": encode(Image.fromarray(grey), "PNG"),
        "exif.jpg": encode(scene(4), exif=exif),
        "progressive.jpg": encode(scene(5), progressive=True),
        "grey.jpg": encode(scene(6).convert("L")),
        "alpha.webp": encode(scene(7).convert("RGBA"), "WEBP"),
        "moving.gif": encode(scene(8), "GIF", save_all=True, append_images=[scene(9)]),
        "windows.bmp": encode(scene(10), "BMP"),
        "a png.jpg": encode(scene(11), "PNG"),
        "with space ünd 漢字\n.jpg": make_scene(0, 12),
        "x" * 240 + ".jpg": make_scene(0, 13),
    }


BROKEN_IMAGES = {
    "cut_jpg": (make_scene(0, 0, size=200)[:-2000], "damaged JPEG: Premature end"),
    "empty_jpg": (b"", "the file is empty"),
    "text_jpg": (b"this is no image\n" * 9, "not an image: begins with b'this is no i'"),
    "cut_png": (encode(scene(1, 200), "PNG")[:500], "damaged image"),
    "huge_jpg": (
        make_scene(0, 0).replace(b"\x00\x18\x00\x18\x03\x01", b"\xff\xdc\xff\xdc\x03\x01"),
        "65500x65500 pixels are more than",
    ),
}


def test_broken_images_are_left_out_and_odd_ones_are_used(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]]
) -> None:
    broken = {f"{key}.{key[-3:]}": image for key, (image, _) in BROKEN_IMAGES.items()}
    data = write_images(tmp_path / "data", scenes(6) | odd_images() | broken)
    before = digests(data)
    status, said = pretrain(data)
    assert status == 0, said
    assert epochs(tmp_path / "run") == [(20, 5)]
    found = quarantine(tmp_path / "run")
    assert {key: found[key][: len(reason)] for key, (_, reason) in BROKEN_IMAGES.items()} == {
        key: reason for key, (_, reason) in BROKEN_IMAGES.items()
    }
    assert [key for key in found if key not in said] == []
    assert digests(data) == before


def test_one_broken_image_alone_in_its_shard_does_not_stop_the_run(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]]
) -> None:
    data = write_scenes(tmp_path / "data", (20, 1, 1), broken=(20,))
    status, said = pretrain(data)
    assert status == 0, said
    assert epochs(tmp_path / "run") == [(21, 1)]
    assert "sample 20 " in said
    assert "is left out of the evaluation: not an image" in said


def test_more_broken_images_than_the_budget_stop_the_run(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]]
) -> None:
    data = write_scenes(tmp_path / "data", (30,), broken=tuple(range(12)), labelled=False)
    status, said = pretrain(data)
    assert status == 1
    assert "broken images in one epoch are more than the 10 that are admitted" in said
    assert "mend the data, or raise data.max_quarantined_fraction" in said
    assert len(quarantine(tmp_path / "run")) > 10
    (tmp_path / "run").rename(tmp_path / "old")
    assert pretrain(data, "data.max_quarantined_fraction=0.4")[0] == 0
    assert epochs(tmp_path / "run") == [(18, 12)]


@pytest.mark.parametrize(
    ("number", "message"), [(8, "no image can be decoded: all 8 that were tried"), (40, "more than the 10")]
)
def test_data_without_a_sound_image_stop_the_run(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]], number: int, message: str
) -> None:
    data = write_images(tmp_path / "data", {f"{i}.jpg": b"text" for i in range(number)})
    status, said = pretrain(data)
    assert status == 1
    assert message in said
    assert "mend the data" in said


@pytest.mark.parametrize("number", [1, 5, 9])
def test_few_images_are_used_once_each(tmp_path: Path, pretrain: Callable[..., tuple[int, str]], number: int) -> None:
    status, said = pretrain(write_images(tmp_path / "data", scenes(number)))
    assert status == 0, said
    assert "has no labels, so there will be no k-NN accuracy" in said
    assert epochs(tmp_path / "run") == [(number, 0)]


def test_a_tar_that_changes_between_runs_is_indexed_again(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]]
) -> None:
    data = write_scenes(tmp_path / "data", (6, 6))
    assert pretrain(data)[0] == 0
    write_scenes(tmp_path / "more", (9,), first_seed=50)
    (tmp_path / "more" / "shard-000000.tar").rename(data / "shard-000001.tar")
    status, said = pretrain(data)
    assert status == EXIT_REFUSED
    assert "shard-000001.tar was written since" in said or "shard-000001.tar has" in said
    assert "trained on other data" in said
    assert "give the same data, or another --output" in said
    (tmp_path / "run").rename(tmp_path / "old")
    assert pretrain(data)[0] == 0
    assert epochs(tmp_path / "run") == [(15, 0)]


def _tar(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """Three shards, the second of them damaged."""
    write_scenes(folder, (6, 6, 6))
    path = folder / "shard-000001.tar"
    path.write_bytes(change(path.read_bytes()))
    return folder


def _cut_between_members(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[6].offset]


def _flip_in_a_later_header(content: bytes) -> bytes:
    place = len(_cut_between_members(content)) + 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _add_member(name: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        stream = io.BytesIO(content)
        with tarfile.open(fileobj=stream, mode="a") as archive:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
        return stream.getvalue()

    return change


DAMAGED_TARS = {
    "zero bytes": (lambda _: b"", "is empty (0 bytes); write it again"),
    "no members": (lambda _: bytes(10240), "is a tar without members; remove it"),
    "cut in a member": (lambda content: content[: len(content) // 2 + 77], "is cut in the middle"),
    "cut between members": (_cut_between_members, "without the end-of-archive marker, so members may be missing"),
    "a bad later header": (_flip_in_a_later_header, "damaged or no tar; copy or write it again"),
    "compressed": (bz2.compress, "is compressed; unpack it with bunzip2"),
    "text": (lambda _: b"<html>404</html>" * 99, "has a bad header at byte 0: damaged or no tar"),
    "joined": (lambda content: content * 2, "goes on after its end-of-archive marker"),
}


@pytest.mark.parametrize("damage", DAMAGED_TARS)
def test_a_damaged_tar_is_refused_before_anything_is_written(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]], damage: str
) -> None:
    change, message = DAMAGED_TARS[damage]
    data = _tar(tmp_path / "data", change)
    before = digests(data)
    status, said = pretrain(data)
    assert status == 1
    assert message in said
    assert str(data / "shard-000001.tar") in said
    assert not (tmp_path / "run").exists()
    assert digests(data) == before
    write_scenes(data, (6, 6, 6))  # mended
    assert pretrain(data)[0] == 0
    assert epochs(tmp_path / "run") == [(18, 0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("000011.jpg", "the sample '000011' has two members .jpg; keys must be unique"),
        ("000011.png", "the sample '000011' has 2 images"),
        ("lost.cls", "the sample 'lost' has a label and no image"),
    ],
)
def test_samples_that_cannot_be_meant_are_refused(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]], name: str, message: str
) -> None:
    status, said = pretrain(_tar(tmp_path / "data", _add_member(name)))
    assert status == EXIT_REFUSED
    assert message in said
    assert not (tmp_path / "run").exists()


def _mixed(folder: Path) -> Path:
    write_images(folder, scenes(3))
    return write_images(folder / "cat", scenes(3)).parent


def _tars_beside_images(folder: Path) -> Path:
    return write_images(write_scenes(folder, (3,)), scenes(3))


def _stale_index(folder: Path) -> Path:
    write_scenes(folder, (3, 3))
    build_index(str(folder), str(folder))
    (folder / "shard-000001.tar").unlink()
    return folder


def _list_of(text: bytes, name: str = "list.csv") -> Callable[[Path], Path]:
    return lambda folder: write_images(folder, {"a.jpg": make_scene(0, 0), name: text}) / name


def _link_to_nothing(folder: Path) -> Path:
    write_images(folder, scenes(3))
    (folder / "link.jpg").symlink_to("none.jpg")
    return folder


def _pipe(folder: Path) -> Path:
    os.mkfifo(write_images(folder, scenes(3)) / "pipe.jpg")
    return folder


REFUSED_DATA: dict[str, tuple[Callable[[Path], Path | str], list[str]]] = {
    "missing": (lambda folder: folder / "none", ["none: there is no such file or folder"]),
    "empty": (lambda folder: write_images(folder, {".hidden": b""}), ["no images found", "extensions: bmp, gif"]),
    "text only": (lambda folder: write_images(folder, {"a.txt": b"x", "b.md": b"x"}), ["2 other files: 1 .txt, 1 .md"]),
    "images and subfolders": (_mixed, ["3 images (first: good-000.jpg) and 3 images in subfolders", "put one kind"]),
    "images and tars": (_tars_beside_images, ["1 tars (first: shard-000000.tar) and 3 images", "name the tars alone"]),
    "splits": (
        lambda folder: write_images(folder, {"train/a.jpg": b"x", "val/b.jpg": b"x"}),
        ["train, val, which look like splits", "name one of them"],
    ),
    "tars in subfolders": (
        lambda folder: write_scenes(folder / "train", (3,)).parent,
        ["1 other files: 1 .tar; to use tars, name their folder, here train"],
    ),
    "one image": (lambda folder: write_images(folder, scenes(1)) / "good-000.jpg", ["is no .tar by name; give a"]),
    "a tar without images": (
        lambda folder: write_tar(folder / "x.tar", [("a.txt", b"x")]).parent,
        ["no image in 1 tars; known extensions"],
    ),
    "a list with a missing file": (_list_of(b"path\na.jpg\nb.jpg\n"), ["line 3: there is no file", "relative to the"]),
    "a list without columns": (_list_of(b"a.jpg,1\n"), ["the first line must name the columns", "it is 'a.jpg,1'"]),
    "a list labelled in part": (_list_of(b"path,label\na.jpg,1\na.jpg,\n"), ["line 3 has no label", "all images or"]),
    "a list in Latin-1": (_list_of(b"path,label\na.jpg,h\xf6he\n"), ["list.csv is not UTF-8", "save it as UTF-8"]),
    "a list that is no JSON": (_list_of(b"{path}\n", "list.jsonl"), ["list.jsonl, line 1 is no JSON"]),
    "a link to nothing": (_link_to_nothing, ["link.jpg is a link to nothing", "remove it, or mend the link"]),
    "a pipe": (_pipe, ["pipe.jpg is no regular file", "remove it"]),
}


@pytest.mark.parametrize("what", REFUSED_DATA)
def test_data_that_cannot_be_meant_are_refused_before_anything_is_written(
    tmp_path: Path, pretrain: Callable[..., tuple[int, str]], what: str
) -> None:
    make, messages = REFUSED_DATA[what]
    data = make(tmp_path / "data")
    before = digests(tmp_path / "data") if what != "a pipe" else {}
    status, said = pretrain(data)
    assert status == EXIT_REFUSED
    assert [message for message in messages if message not in said] == [], said
    assert not (tmp_path / "run").exists()
    assert what == "a pipe" or digests(tmp_path / "data") == before


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, pretrain: Callable[..., tuple[int, str]]) -> None:
    status, said = pretrain(_stale_index(tmp_path / "data"))
    assert status == 1
    assert "does not fit its shards any more: the shard shard-000001.tar is missing; delete" in said
    assert "index again with `python -m swav.data.index`" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "dmeo"], "unknown recipe 'dmeo'; the nearest of"),
        (["--recipe", "demo", "optim.epoch=3"], "unknown setting 'optim.epoch'; the nearest is 'optim.epochs'"),
        (["--recipe", "demo", "optim.epochs=three"], "optim.epochs='three': Input should be a valid integer"),
        (["--recipe", "demo", "optim.epochs"], "is not of the form key=value, for example optim.epochs=2"),
        (["--recipe", "swav_r18_cifar10_200ep"], "has no images of its own; give a folder of images or shards"),
    ],
)
def test_a_wrong_command_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str], message: str
) -> None:
    assert main([*words, "--output", str(tmp_path / "run")]) == EXIT_REFUSED
    assert message in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_words_as_labels_are_refused_before_training(tmp_path: Path, pretrain: Callable[..., tuple[int, str]]) -> None:
    members = [(f"{i}.{kind}", data) for i in range(8) for kind, data in (("jpg", make_scene(0, i)), ("cls", b"dog"))]
    write_tar(tmp_path / "data" / "x.tar", members)
    status, said = pretrain(tmp_path / "data")
    assert status == EXIT_REFUSED
    assert "x.tar:0.cls holds b'dog', and a label is a number such as 7; number the classes" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrain: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "file"))
    status, said = pretrain(write_images(tmp_path / "data", scenes(3)))
    assert status == EXIT_REFUSED
    assert f"the cache folder {tmp_path / 'file'} cannot be written" in said
    assert "set SWAV_CACHE" in said


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_a_full_disk_while_data_are_prepared(
    tmp_path: Path, cache: Path, pretrain: Callable[..., tuple[int, str]], kind: str
) -> None:
    if kind == "images":
        data, limit = write_images(tmp_path / "data", scenes(100)), 60_000
    else:
        data, limit = write_scenes(tmp_path / "data", (100,)), 3_000
    with files_of_at_most(limit):
        status, said = pretrain(data)
    assert status == 1
    assert "File too large" in said
    assert f"free space in {cache}, or set SWAV_CACHE to a larger folder, then run the same command again" in said
    assert not (tmp_path / "run").exists()
    assert list(cache.rglob("*.partial")) == []
    status, said = pretrain(data)
    assert status == 0, said
    assert epochs(tmp_path / "run") == [(100, 0)]


def test_a_full_disk_at_checkpoint_time_loses_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_scenes(tmp_path / "data")
    assert main(arguments(data, tmp_path / "reference")) == 0
    words = arguments(data, tmp_path / "run")
    with files_of_at_most(100_000):
        assert main(words) == EXIT_FAILED
    assert "those already there are intact. Free space" in caplog.text
    assert "could not be written" in caplog.text
    assert "training goes on, earlier checkpoints are intact; free space or mend the storage" in caplog.text
    assert "failure 3" in caplog.text
    assert main(words) == 0
    assert_same_run(tmp_path / "run", tmp_path / "reference")
    assert weights(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "overrides", "message"),
    [
        (8, ("data.lanes=1",), "2 ranks are more than 1 lanes; raise data.lanes"),
        (1, (), "too few for 2 ranks; use at most 1 ranks"),
    ],
)
def test_too_many_ranks_are_refused_before_anything_is_written(
    tmp_path: Path, cache: Path, number: int, overrides: tuple[str, ...], message: str
) -> None:
    data = write_images(tmp_path / "data", scenes(number))
    words = arguments(data, tmp_path / "run", *ONE_EPOCH, *overrides)
    status, _, said = finish(command_line("swav.pretrain", *words, cache=cache, ranks=2))
    assert status == 1  # torchrun's own
    assert message in said
    assert not (tmp_path / "run").exists()


def _write_shards(source: Path, out: Path) -> None:
    write_shards.main([str(source), str(out), "--samples-per-shard", "5"])


def _open(source: Path, cache: Path, found: Any = None) -> None:
    os.environ["SWAV_CACHE"] = str(cache)
    index = open_dataset(str(source))
    if found is not None:
        found.put(_images(index.folder))


def _images(folder: Path | str) -> list[bytes]:
    with ShardReader(open_index(str(folder))) as reader:
        return [reader.image(sample) for sample in range(reader.index.num_samples)]


def test_sigkill_while_shards_are_written_loses_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    draw = random.Random(seed)
    source = write_images(tmp_path / "data", {f"{i:04d}.jpg": b"image-%d" % i for i in range(300)})
    kills = 0
    for trial in range(3):
        out = tmp_path / f"out-{trial}"
        for _ in range(4):
            process = _CONTEXT.Process(target=_write_shards, args=(source, out))
            process.start()
            written = draw.randrange(40)  # of 60 shards
            while process.is_alive() and len(list(out.glob("shard-*.tar"))) < written:
                pass
            process.kill()
            process.join()
            kills += process.exitcode != 0
        _write_shards(source, out)
        assert _images(out) == [b"image-%d" % i for i in range(300)]
        assert [path.name for path in out.rglob("*") if "partial" in path.name or path.name.startswith(".")] == []
    assert kills


def test_sigkill_while_data_are_indexed_loses_nothing(tmp_path: Path, cache: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    draw = random.Random(seed)
    for shard in range(30):
        write_tar(tmp_path / "data" / f"{shard:03d}.tar", [(f"{i}.jpg", b"%d-%d" % (shard, i)) for i in range(20)])
    for _ in range(6):
        process = _CONTEXT.Process(target=_open, args=(tmp_path / "data", cache))
        process.start()
        process.join(draw.uniform(0.02, 0.4))
        process.kill()
        process.join()
        index = open_dataset(str(tmp_path / "data"))
        assert index.num_samples == 600
        assert _images(tmp_path / "data") == [b"%d-%d" % (shard, i) for shard in range(30) for i in range(20)]
        assert list(cache.rglob("*.partial")) == []
        Path(index.folder, "index.json").unlink()


def test_two_runs_that_start_at_once_share_one_preparation(tmp_path: Path, cache: Path) -> None:
    data = write_images(tmp_path / "data", scenes(60))
    processes = [start(arguments(data, tmp_path / f"run-{i}", *ONE_EPOCH), cache) for i in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [epochs(tmp_path / f"run-{i}") for i in range(2)] == [[(60, 0)]] * 2
    assert len([path for path in (cache / "shards").iterdir() if path.is_dir()]) == 1
