from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swav_testing.s3 import moto_server

from swav.data.shard_writer import key_name
from swav_eval.name_list import NameList


def _list(folder: Path, *names: str) -> NameList:
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    return NameList(folder / "names.txt")


@pytest.mark.parametrize(
    "listed",
    [
        "n01440764_10026.JPEG",  # SimCLR's lists
        "n01440764_10026",
        "n01440764/n01440764_10026.JPEG",
        "/data/imagenet/train/n01440764/n01440764_10026.JPEG",
        "  n01440764_10026.jpeg \r",
    ],
)
@pytest.mark.parametrize(
    "member",
    [
        "000000017-n01440764_n01440764_10026.jpeg",  # our shards of folders of classes
        "000000017-n01440764_10026.jpeg",  # our shards of a flat folder, or of tars
        "n01440764_10026.JPEG",  # webdataset
        "n01440764_10026.jpg",
        "n01440764/n01440764_10026.JPEG",
    ],
)
def test_one_image_by_many_names(tmp_path: Path, listed: str, member: str) -> None:
    assert _list(tmp_path, listed).match(member) == listed.strip()


@pytest.mark.parametrize(
    ("listed", "member"),
    [
        ("n01440764_10026.JPEG", "n01440764_100260.JPEG"),
        ("n01440764_10026.JPEG", "1n01440764_10026.JPEG"),
        ("n01440764_10026.JPEG", "000000017-n01440764_n01440764_100260.jpeg"),
        ("10026.JPEG", "n01440764_10026.JPEG"),  # a webdataset key says where its folder ends
        ("cat/1.jpg", "dog/1.jpg"),
        ("cat/1.jpg", "000000000-dog_1.jpg"),
        ("cat/1.jpg", "000000000-bobcat_1.jpg"),
        ("photo", "photo.1.jpg"),
        ("a_b.jpg", "a b.jpg"),
        ("x" * 70 + ".jpg", "y" * 10 + "x" * 60 + ".jpg"),
    ],
)
def test_other_images(tmp_path: Path, listed: str, member: str) -> None:
    assert _list(tmp_path, listed).match(member) is None


@pytest.mark.parametrize(
    ("listed", "member"),
    [
        ("photo.1.JPG", "photo.1.jpg"),
        ("photo.1", "photo.1.jpg"),
        ("photo.1.JPG", "000000000-dog_photo_1.jpg"),
        ("10026.JPEG", "000000000-n01440764_10026.jpeg"),
        ("caf\xe9 au lait.jpg", "000000000-caf_au_lait.jpg"),
        ("train/cat/1.jpg", "000000000-cat_1.jpg"),
        ("1.jpg", "000000000-1.jpg"),
        ("x" * 70 + ".jpg", "000000000-" + "x" * 60 + ".jpg"),
        ("000000017-n01440764_10026", "000000017-n01440764_10026.jpeg"),  # our own keys
    ],
)
def test_unusual_names(tmp_path: Path, listed: str, member: str) -> None:
    assert _list(tmp_path, listed).match(member) == listed


def test_folders_tell_names_apart(tmp_path: Path) -> None:
    names = _list(tmp_path, "1.jpg", "dog/1.jpg", "cat/1.jpg", "cat/cat_1.jpg")
    members = ["000000000-dog_1.jpg", "cat/1.jpg", "000000000-cat_cat_1.jpg", "000000000-eel_1.jpg", "eel/1.jpg"]
    assert [names.match(member) for member in members] == ["dog/1.jpg", "cat/1.jpg", "cat/cat_1.jpg", "1.jpg", "1.jpg"]


PART = st.text("ab_1.- ", min_size=1, max_size=4).filter(lambda text: text.strip(". ") == text and text != "")


@given(st.lists(st.tuples(PART, PART), min_size=1, max_size=8, unique=True))
def test_a_full_path_finds_its_own_image(
    tmp_path_factory: pytest.TempPathFactory, paths: list[tuple[str, str]]
) -> None:
    """Whatever the names: of keys as they are always, of ours where no two come to the same."""
    listed = [f"{folder}/{name}.jpg" for folder, name in paths]
    names = _list(tmp_path_factory.getbasetemp(), *listed)
    assert [names.match(name) for name in listed] == listed
    keys = [key_name(name.removesuffix(".jpg")) for name in listed]
    found = {name: names.match(f"000000000-{key}.jpg") for name, key in zip(listed, keys, strict=True)}
    assert all(match is not None for match in found.values())
    assert all(match == name for name, match in found.items() if keys.count(key_name(name.removesuffix(".jpg"))) == 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.jpg\n\na.JPEG\n", r"names\.txt, line 3: a\.JPEG stands there a second time \(first: line 1\)"),
        (b"\xff\n", "is not UTF-8"),
        (b"\n \n/\n", "is empty; it names one image on each line"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        NameList(tmp_path / "names.txt")


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subset\.names: there is no .*none"):
        NameList(tmp_path / "none")


def test_a_list_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        server.put("bucket", "1percent.txt", b"n01440764_10026.JPEG\nn01440764_10027.JPEG\n")
        assert NameList("s3://bucket/1percent.txt").lines == {"n01440764_10026.JPEG": 1, "n01440764_10027.JPEG": 2}
