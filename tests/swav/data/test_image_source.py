import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from swav_testing.shards import write_dataset

from swav.data.image_source import ImageSource, find_images


def _make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def _samples(source: ImageSource) -> list[tuple[str, dict[str, bytes]]]:
    return [source.load(number) for number in range(len(source))]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    found = find_images(str(_make(tmp_path, "b.JPG", "a.png", "notes.txt", ".DS_Store", "a.v2.webp")))
    assert _samples(found) == [("a", {"png": b"a.png"}), ("a.v2", {"webp": b"a.v2.webp"}), ("b", {"jpg": b"b.JPG"})]
    assert (found.classes, found.num_skipped) == (None, 1)


def test_a_subfolder_is_a_class(tmp_path: Path) -> None:
    _make(tmp_path, "dog/x.jpg", "cat/deep/y.jpg", "cat/.hidden.jpg", "empty/readme.md", "readme.md")
    found = find_images(str(tmp_path))
    assert found.classes == ["cat", "dog"]
    assert _samples(found) == [
        ("cat/deep/y", {"jpg": b"cat/deep/y.jpg", "cls": b"0"}),
        ("dog/x", {"jpg": b"dog/x.jpg", "cls": b"1"}),
    ]
    assert found.num_skipped == 2


def test_numbered_and_named_labels_of_a_csv_list(tmp_path: Path) -> None:
    _make(tmp_path, "in/a.jpg", "in/b.jpg", "in/c.txt")
    (tmp_path / "list.csv").write_text("path,label\nin/b.jpg,7\nin/a.jpg,3\nin/c.txt,3\n")
    found = find_images(str(tmp_path / "list.csv"))
    assert [sample[1]["cls"] for sample in _samples(found)] == [b"7", b"3"]  # the list's order
    assert (found.classes, found.num_skipped) == (None, 1)
    (tmp_path / "list.csv").write_text("label,path\nzebra,in/b.jpg\nant,in/a.jpg\n")
    found = find_images(str(tmp_path / "list.csv"))
    assert [sample[1]["cls"] for sample in _samples(found)] == [b"1", b"0"]
    assert found.classes == ["ant", "zebra"]


def test_a_jsonl_list(tmp_path: Path) -> None:
    _make(tmp_path, "a.jpg")
    absolute = str(tmp_path / "a.jpg")
    records = [{"path": "a.jpg", "label": 0}, {"path": absolute, "label": 5}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert [sample[1]["cls"] for sample in _samples(find_images(str(tmp_path / "list.jsonl")))] == [b"0", b"5"]
    (tmp_path / "list.jsonl").write_text('{"path": "a.jpg"}\n')
    assert _samples(find_images(str(tmp_path / "list.jsonl"))) == [("a", {"jpg": b"a.jpg"})]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "l.csv",
            "file,label\na.jpg,1\n",
            "first line must name the columns, path and perhaps label; it is 'file,label'",
        ),
        ("l.csv", "path\nnone.jpg\n", "line 2: there is no file .*none.jpg"),
        ("l.csv", "path,label\na.jpg,1\na.jpg,\n", "line 3 has no label and others have one"),
        ("l.jsonl", "{\n", "line 1 is no JSON"),
        ("l.jsonl", '["a.jpg"]\n', "line 1 must be an object like"),
        ("l.csv", "path\n", "lists no images"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    _make(tmp_path, "a.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_images(str(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "dog/b.jpg"], r"1 images \(first: a.jpg\) and 1 images in subfolders \(first: dog/b.jpg\)"),
        (["a.jpg", "x.tar"], r"1 tars \(first: x.tar\) and 1 images"),
        (["train/dog/a.jpg", "val/dog/b.jpg"], "train, val, which look like splits .*for example .*/train"),
        (["notes.txt", "a.heic", "b.heic"], r"no images found \(3 other files: 2 \.heic, 1 \.txt\)"),
        (["train/a.tar", "val/b.tar"], r"no images found \(2 other files: 2 \.tar; to use tars, name .* here train\)"),
        (["one\ntwo/a.jpg"], "a folder named 'one.ntwo', which is no line of text"),
    ],
)
def test_folders_that_could_mean_two_things_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_images(str(_make(tmp_path, *names)))


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        find_images(str(tmp_path / "none"))


def test_the_digest_changes_with_the_images(tmp_path: Path) -> None:
    _make(tmp_path, "a/x.jpg", "b/y.jpg")
    digests = [find_images(str(tmp_path)).digest()]
    assert find_images(str(tmp_path)).digest() == digests[0]
    (tmp_path / "a/x.jpg").write_bytes(b"longer than before")
    digests.append(find_images(str(tmp_path)).digest())
    (tmp_path / "b").rename(tmp_path / "c")
    digests.append(find_images(str(tmp_path)).digest())
    assert len(set(digests)) == 3


def test_tars_keep_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    found = find_images(str(write_dataset(tmp_path / "data", [1, 2])))
    assert _samples(found) == [(f"{i:06d}", {"jpg": b"image-%d" % i, "cls": b"%d" % i}) for i in range(3)]


def test_a_folder_may_look_like_a_pattern(tmp_path: Path) -> None:
    for name in ("[raw] photos?", "set {1..3}", "list.csv"):
        assert len(find_images(str(_make(tmp_path / name, "a.jpg")))) == 1


def test_links_to_nothing_and_to_themselves_are_refused(tmp_path: Path) -> None:
    _make(tmp_path / "one", "a.jpg")
    (tmp_path / "one" / "b.jpg").symlink_to("none.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg is a link to nothing"):
        find_images(str(tmp_path / "one")).digest()
    _make(tmp_path / "two", "cat/a.jpg", "cat/deep/b.jpg")
    (tmp_path / "two" / "cat" / "deep" / "loop").symlink_to(tmp_path / "two")
    with pytest.raises(ValueError, match=r"deep/loop is a link to a folder that it is in"):
        find_images(str(tmp_path / "two"))


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    _make(tmp_path / "elsewhere", "a.jpg")
    _make(tmp_path / "data", "cat/b.jpg")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    assert find_images(str(tmp_path / "data")).classes == ["cat", "dog"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(_make(tmp_path, "a.jpg") / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg is no regular file"):
        find_images(str(tmp_path)).digest()


def test_an_unreadable_folder_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, "cat/a.jpg", "dog/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # the tests may run as root, who may read all
    with pytest.raises(RuntimeError, match=r"folder .*/dog cannot be read \(Permission denied\); make it readable"):
        find_images(str(tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    found = find_images(str(_make(tmp_path, "a.jpg", "b.jpg")))
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(RuntimeError, match=r"b\.jpg cannot be read \(No such file or directory\)"):
        found.load(1)
