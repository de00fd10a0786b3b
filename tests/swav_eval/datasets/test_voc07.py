import json
import os
from collections import Counter
from pathlib import Path

import pytest
from swav_testing.public_data import VOC_SAMPLES, voc_annotation, voc_files, write_files
from swav_testing.s3 import moto_server
from swav_testing.shards import write_tar

from swav.data.image_source import ImageSource
from swav.data.reader import ShardReader
from swav.data.write_shards import write_images
from swav_eval.datasets.voc07 import CLASSES, classes_of, open_split

JSON = {
    "000005": {"present": ["chair"], "difficult": ["person"]},
    "000007": {"present": ["car"], "difficult": []},
    "000012": {"present": [], "difficult": []},
    "000019": {"present": ["cat", "dog"], "difficult": []},
}
SPLITS = {"train": ["000007", "000005"], "val": ["000012"], "trainval": ["000005", "000007", "000012"]}
LIST = "VOCdevkit/VOC2007/ImageSets/Main/train.txt"


def _samples(images: ImageSource) -> list[tuple[str, bytes, object]]:
    found = [images.load(number) for number in range(len(images))]
    assert all(members.keys() == {"jpg", "json"} for _, members in found)
    return [(stem, members["jpg"], json.loads(members["json"])) for stem, members in found]


def _expected(names: list[str]) -> list[tuple[str, bytes, object]]:
    return [(name, f"image {name}".encode(), JSON[name]) for name in names]


@pytest.mark.parametrize("source", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_a_split_of_a_folder(tmp_path: Path, source: str, split: str) -> None:
    write_files(tmp_path, voc_files().items())
    images, url = open_split(str(tmp_path / source), split)
    assert _samples(images) == _expected(SPLITS.get(split, ["000019"]))
    assert images.classes == list(CLASSES)
    assert url == str(tmp_path / f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt")


@pytest.mark.parametrize("root", ["VOCdevkit/VOC2007", "BCCD", "./VOC2007", ""])
def test_a_split_of_a_tar(tmp_path: Path, root: str) -> None:
    files = {name.lstrip("/") if not root else name: data for name, data in voc_files(root).items()}
    images, _ = open_split(str(write_tar(tmp_path / "voc.tar", files.items())), "trainval")
    assert _samples(images) == _expected(SPLITS["trainval"])


def test_the_classes_are_those_of_voc_in_its_order() -> None:
    assert len(CLASSES) == 20
    assert list(CLASSES) == sorted(CLASSES)


def test_a_store_serves_as_a_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(write_files(tmp_path / "in", voc_files().items()) / "voc.tar", voc_files("BCCD").items())
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        url = server.upload_folder("bucket", "voc", tmp_path / "in")
        for source in (url, f"{url}/voc.tar"):
            images, _ = open_split(source, "train")
            assert _samples(images) == _expected(SPLITS["train"])
        with pytest.raises(ValueError, match=r"no ImageSets/Main/val\.txt: it has no split"):
            open_split(f"{url}/VOCdevkit/VOC2007/JPEGImages", "val")


def test_the_digest_changes_with_annotations_and_images(tmp_path: Path) -> None:
    write_files(tmp_path, voc_files().items())
    digests = [open_split(str(tmp_path), split).images.digest() for split in ("train", "trainval", "train")]
    assert digests[0] == digests[2] != digests[1]
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000007.xml").write_bytes(voc_annotation(("cow", 0)))
    digests.append(open_split(str(tmp_path), "train").images.digest())
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000007.jpg").write_bytes(b"longer than before")
    digests.append(open_split(str(tmp_path), "train").images.digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({LIST: b"000005\n000006\n"}, r"train\.txt, line 2: there is no .*Annotations/000006\.xml"),
        ({LIST: b"000005\n000007\n\n000005\n"}, r"line 4: 000005 stands there a second time \(first: line 1\)"),
        ({LIST: b"000005 -1\n"}, "line 1 must be the name of one image, such as 000005; it is '000005 -1'"),
        ({LIST: b"../../000005\n"}, "line 1 must be the name of one image"),
        ({LIST: b""}, r"train\.txt is empty"),
        ({LIST: b"\xff\n"}, r"train\.txt is not UTF-8"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    files = voc_files() | files
    with pytest.raises(ValueError, match=message):
        open_split(str(write_files(tmp_path / "folder", files.items())), "train")
    with pytest.raises(ValueError, match=message):
        open_split(str(write_tar(tmp_path / "voc.tar", files.items())), "train")


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    files = voc_files()
    del files["VOCdevkit/VOC2007/JPEGImages/000005.jpg"]
    for source in (write_files(tmp_path / "folder", files.items()), write_tar(tmp_path / "voc.tar", files.items())):
        with pytest.raises(ValueError, match=r"train\.txt, line 2: there is no .*000005\.jpg.*; unpack the data set"):
            open_split(str(source), "train")


def test_a_missing_split_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    files = {name: data for name, data in voc_files().items() if not name.endswith("test.txt")}
    for source in (write_files(tmp_path / "folder", files.items()), write_tar(tmp_path / "voc.tar", files.items())):
        with pytest.raises(ValueError, match=r"no ImageSets/Main/test\.txt: it has train, val, trainval"):
            open_split(str(source), "test")
    with pytest.raises(ValueError, match="it has no split; Pascal VOC's folder or tar was expected"):
        open_split(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"there is no .*none\.tar; a folder or a tar of Pascal VOC"):
        open_split(str(tmp_path / "none.tar"), "test")


def test_a_tar_of_two_data_sets_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "voc.tar", [*voc_files("VOC2007").items(), *voc_files("VOC2012").items()])
    with pytest.raises(ValueError, match=r"holds VOC2007/.*train\.txt and VOC2012/.*train\.txt; unpack it"):
        open_split(str(path), "train")


def test_present_and_difficult_classes() -> None:
    for name, objects in VOC_SAMPLES.items():
        assert classes_of("x.xml", voc_annotation(*objects)) == JSON[name]
    only_difficult = classes_of("x.xml", voc_annotation(("dog", 1), ("dog", 1), ("cat", 1), ("cat", 0)))
    assert only_difficult == {"present": ["cat"], "difficult": ["dog"]}
    without = b"\xef\xbb\xbf<annotation><object><name> dog </name></object></annotation>"  # as some tools write it
    assert classes_of("x.xml", without) == {"present": ["dog"], "difficult": []}


BOMB = """<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]>
<annotation><object><name>&c;</name></object></annotation>"""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOMB.encode(), "x.xml declares a document type or entities"),
        (BOMB.encode("utf-16"), "x.xml is no XML in UTF-8"),
        (b'<?xml version="1.0" encoding="utf-7"?><annotation>+ADw-object/+AD4-</annotation>', None),
        (b"<annotation><object>", "x.xml is no XML in UTF-8"),
        (b"", "x.xml is no XML in UTF-8"),
        (b"<html/>", "x.xml must be an <annotation>, .*; it is a <html>"),
        (b"<annotation><object/></annotation>", "an object needs a name, and difficult as 0 or 1; it has '', '0'"),
        (voc_annotation(("dog", 2)), "it has 'dog', '2'"),
        (voc_annotation(("a\nb", 0)), "an object needs a name"),
    ],
)
def test_annotations_of_another_kind_are_refused(data: bytes, message: str | None) -> None:
    if message is None:  # the encoding that is declared is not believed, so nothing hides in it
        assert classes_of("x.xml", data) == {"present": [], "difficult": []}
        return
    with pytest.raises(ValueError, match=message):
        classes_of("x.xml", data)


def test_blood_cells(tmp_path: Path) -> None:
    repository = Path(__file__).parents[3]
    path = Path(os.environ.get("SWAV_SHARED", repository.parent / "shared")) / "data" / "bccd-voc.tar"
    if not path.is_file():
        pytest.skip(f"no {path}; set SWAV_SHARED")
    total, counts = 0, Counter[str]()
    for split, size in (("train", 205), ("val", 87), ("test", 72), ("trainval", 292)):
        images, url = open_split(str(path), split)
        index = write_images(images, images.digest(), url, str(tmp_path / split))
        assert (index.num_samples, index.table["labelled"].tolist()) == (size, [0])
        assert (tmp_path / split / "classes.txt").read_text() == "Platelets\nRBC\nWBC\n"
        with ShardReader(index) as reader:
            assert reader.image(0).startswith(b"\xff\xd8")
            if split != "trainval":
                total += index.num_samples
                for sample_id in range(index.num_samples):
                    counts.update(json.loads(reader.member(sample_id, "json") or b"")["present"])
    assert total == 364
    assert counts.keys() == {"Platelets", "RBC", "WBC"}
    assert counts["RBC"] > 300
