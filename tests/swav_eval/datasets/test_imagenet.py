import gzip
import logging
from pathlib import Path

import numpy as np
import pytest
from swav_testing.public_data import (
    DEVKIT_IDS,
    TRUTH,
    WORDNET_IDS,
    devkit,
    imagenet_archives,
    imagenet_folders,
    meta_mat,
    tar_bytes,
    train_images,
    val_images,
    write_devkit,
    write_files,
)
from swav_testing.s3 import moto_server
from swav_testing.shards import write_tar

from swav.data.image_source import ImageSource
from swav.data.write_shards import write_images
from swav_eval.datasets.imagenet import open_split

KIT = "ILSVRC2012_devkit_t12/data"
TRUTH_FILE = f"{KIT}/ILSVRC2012_validation_ground_truth.txt"


def _samples(images: ImageSource) -> list[tuple[str, bytes, bytes]]:
    found = [images.load(number) for number in range(len(images))]
    return [(stem, members["jpeg"], members["cls"]) for stem, members in found]


@pytest.mark.parametrize("split", ["train", "val"])
def test_folders_and_archives_give_the_same_samples_in_the_same_order(tmp_path: Path, split: str) -> None:
    folders = open_split(str(imagenet_folders(tmp_path / "folders")), split)
    archives = open_split(str(imagenet_archives(tmp_path / "archives")), split)
    images = train_images() if split == "train" else val_images()
    expected = [
        (name.removesuffix(".JPEG"), data, b"%d" % WORDNET_IDS.index(name.partition("/")[0]))
        for name, data in sorted(images.items())
    ]
    assert _samples(archives.images) == _samples(folders.images) == expected
    assert archives.images.classes == folders.images.classes == list(WORDNET_IDS)
    assert (folders.url, archives.url) == (
        str(tmp_path / "folders" / split),
        str(tmp_path / "archives" / f"ILSVRC2012_img_{split}.tar"),
    )
    written = [
        write_images(images, images.digest(), url, str(tmp_path / f"out-{number}"))
        for number, (images, url) in enumerate((folders, archives))
    ]
    one, other = (Path(index.shard_url(0)).read_bytes() for index in written)
    assert one == other
    assert written[0].identity == written[1].identity  # so a subset of one is that of the other


def test_the_labels_of_the_validation_images_are_the_kits(tmp_path: Path) -> None:
    samples = _samples(open_split(str(imagenet_archives(tmp_path)), "val").images)
    by_number = {int(stem[-8:]): int(label) for stem, _, label in samples}
    # ILSVRC2012_IDs 1, 2, 3 are the third, the first and the second of the sorted WordNet ids
    assert [by_number[number] for number in range(1, 7)] == [{1: 2, 2: 0, 3: 1}[truth] for truth in TRUTH]


def test_archives_are_read_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = imagenet_archives(tmp_path / "archives")
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        url = server.upload_folder("bucket", "imagenet", local)
        for split in ("train", "val"):
            remote = open_split(url, split)
            assert _samples(remote.images) == _samples(open_split(str(local), split).images)
            write_images(remote.images, remote.images.digest(), remote.url, f"{url}/shards-{split}")
            assert f"imagenet/shards-{split}/index.json" in server.keys("bucket")
            assert open_split(url, split).images.digest() == remote.images.digest()


def test_fewer_classes_than_imagenet_has_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_split(str(imagenet_folders(tmp_path)), "train")
    assert "train has 3 classes, and ImageNet has 1000" in caplog.text


def test_the_digest_changes_with_an_archive(tmp_path: Path) -> None:
    folder = str(imagenet_archives(tmp_path))
    before = open_split(folder, "val").images.digest()
    assert open_split(folder, "val").images.digest() == before
    write_devkit(tmp_path, devkit(truth=(*TRUTH[:-1], 3)))
    assert open_split(folder, "val").images.digest() != before


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    members = [("n01440764_1.JPEG", b"x"), ("readme.txt", b"y")]
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [("n01440764.tar", tar_bytes(members))])
    images = open_split(str(tmp_path), "train").images
    assert (len(images), images.num_skipped) == (1, 1)


def test_an_archive_that_shrinks_is_noticed(tmp_path: Path) -> None:
    images = open_split(str(imagenet_archives(tmp_path)), "train").images
    with (tmp_path / "ILSVRC2012_img_train.tar").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(RuntimeError, match=r"train\.tar ends inside n02119789/n02119789_9\.JPEG: it has changed"):
        images.load(len(images) - 1)


def test_a_folder_that_holds_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither train, a folder .* nor ILSVRC2012_img_train\.tar"):
        open_split(str(tmp_path), "train")


def test_classes_that_differ_between_splits_are_refused(tmp_path: Path) -> None:
    imagenet_folders(tmp_path)
    write_files(tmp_path / "train" / "n09999999", [("a.JPEG", b"x")])
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="only one has images of n09999999, so a label would mean different"):
            open_split(str(tmp_path), split)


def test_folders_of_other_classes_or_of_none_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "one" / "train", [("cat/a.JPEG", b"x")])
    with pytest.raises(ValueError, match=r"has a folder cat, which is no WordNet id .*swav\.data\.write_shards"):
        open_split(str(tmp_path / "one"), "train")
    write_files(tmp_path / "two" / "val", [("ILSVRC2012_val_00000001.JPEG", b"x")])
    with pytest.raises(ValueError, match=r"without folders of classes.*put ILSVRC2012_img_val\.tar .*devkit_t12"):
        open_split(str(tmp_path / "two"), "val")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("n01440764_1.JPEG", b"x")], r"for each class, once, not n01440764_1\.JPEG"),
        ([("n01440764.tar", tar_bytes([("a.JPEG", b"x")]))] * 2, r"for each class, once, not n01440764\.tar"),
        ([("n01440764.tar", tar_bytes([("a.JPEG", b"x")] * 2))], r"n01440764\.tar holds n01440764/a\.JPEG twice"),
    ],
)
def test_a_train_archive_of_another_kind_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", members)
    with pytest.raises(ValueError, match=message):
        open_split(str(tmp_path), "train")


def test_a_class_tar_that_is_cut_is_refused(tmp_path: Path) -> None:
    cut = tar_bytes([("a.JPEG", b"x" * 600), ("b.JPEG", b"x")])[:2048]
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [("n01440764.tar", cut)])
    with pytest.raises(RuntimeError, match=r"train\.tar:n01440764\.tar is cut in the middle"):
        open_split(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({TRUTH_FILE: b"3\n1\n"}, "has 2 lines and .*img_val.tar has 6 files; they do not belong together"),
        ({TRUTH_FILE: b"3\n1\nx\n2\n3\n2\n"}, r"ground_truth\.txt, line 3: 'x' is no ILSVRC2012_ID of a class"),
        ({TRUTH_FILE: b"3\n1\n1\n2\n3\n1001\n"}, "line 6: '1001' is no ILSVRC2012_ID of a class in meta.mat"),
        ({TRUTH_FILE: b"\xff\n"}, "is not UTF-8"),
        ({TRUTH_FILE: b""}, "is empty"),
        ({f"{KIT}/meta.mat": b"no such thing"}, "meta.mat is not the development kit's"),
        ({f"{KIT}/meta.mat": b""}, "meta.mat is not the development kit's"),
        ({f"{KIT}/meta.mat": meta_mat((*DEVKIT_IDS, ("n01440764", 4, 0)))}, "no classes, or one of them twice"),
        ({f"{KIT}/meta.mat": meta_mat((*DEVKIT_IDS, ("n09999999", 1, 0)))}, "no classes, or one of them twice"),
        ({f"{KIT}/meta.mat": meta_mat(DEVKIT_IDS[3:])}, "no classes, or one of them twice"),
    ],
)
def test_a_kit_that_does_not_fit_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    write_devkit(imagenet_archives(tmp_path), devkit() | files)
    with pytest.raises(ValueError, match=message):
        open_split(str(tmp_path), "val")


def test_a_damaged_kit_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    kit = imagenet_archives(tmp_path) / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()
    flipped = [
        bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]]) for place in range(20, len(whole) - 4, 97)
    ]
    without = gzip.compress(tar_bytes([("ILSVRC2012_devkit_t12/readme.txt", b"x")]))
    for data in (b"", b"text", whole[:-9], whole[: len(whole) // 2], gzip.compress(b"text"), without, *flipped):
        kit.write_bytes(data)
        with pytest.raises(ValueError, match=r"tar\.gz cannot be read as the development kit \(.*; download it again"):
            open_split(str(tmp_path), "val")


def test_a_missing_kit_and_a_missing_image_are_refused(tmp_path: Path) -> None:
    imagenet_archives(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"there is no .*devkit_t12\.tar\.gz; the labels of ImageNet's validation"):
        open_split(str(tmp_path), "val")
    write_devkit(tmp_path, devkit(truth=(1, 2)))
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{n:08d}.JPEG", b"x") for n in (1, 3)])
    with pytest.raises(ValueError, match=r"img_val\.tar lacks ILSVRC2012_val_00000002\.JPEG"):
        open_split(str(tmp_path), "val")


def test_every_span_of_an_archive_is_an_image(tmp_path: Path) -> None:
    images = open_split(str(imagenet_archives(tmp_path)), "train").images
    data = (tmp_path / "ILSVRC2012_img_train.tar").read_bytes()
    spans = np.asarray(images.spans)  # type: ignore[attr-defined]
    assert sorted(data[start : start + size] for start, size in spans.tolist()) == sorted(train_images().values())
