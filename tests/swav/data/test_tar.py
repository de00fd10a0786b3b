import bz2
import gzip
import lzma
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from swav_testing.shards import write_tar

from swav.data import tar
from swav.storage import open_file

LONG = "folder/" * 30 + "photo.jpg"


def _walk(path: Path) -> list[tar.TarMember]:
    return list(tar.walk(open_file(str(path))))


def _random_members(seed: int) -> list[tuple[str, bytes]]:
    draw = random.Random(seed)
    sizes = [0, 1, 511, 512, 513, draw.randrange(5000)]
    names = ["a.jpg", "p/" * 60 + "prefix.jpg", LONG, "unicode-é漢.jpg", "sp ace.cls", "x" * 100, "y" * 101]
    return [(f"{number}-{draw.choice(names)}", draw.randbytes(draw.choice(sizes))) for number in range(12)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(5))
def test_walk_finds_what_tarfile_finds(tmp_path: Path, tar_format: int, seed: int) -> None:
    members = _random_members(seed)
    if tar_format == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name) <= 100]
    path = write_tar(tmp_path / "x.tar", members, tar_format=tar_format)
    content = path.read_bytes()
    found = _walk(path)
    assert [(m.name, content[m.offset : m.offset + m.num_bytes]) for m in found] == members
    with tarfile.open(path) as archive:
        assert [(m.header_offset, m.offset) for m in found] == [(i.offset, i.offset_data) for i in archive]
    assert [tar.member_at(open_file(str(path)), m.header_offset) for m in found] == found


def test_tars_of_gnu_tar_with_folders_and_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / ("n" * 150 + ".jpg")).write_bytes(b"long")
    (source / "a.jpg").write_bytes(b"a" * 700)
    (source / "soft.jpg").symlink_to("a.jpg")
    os.link(source / "a.jpg", source / "hard.jpg")
    for form in ("gnu", "pax", "ustar", "v7"):
        path = tmp_path / f"{form}.tar"
        exclude = ["--exclude=deep"] if form in ("ustar", "v7") else []
        subprocess.run(
            ["tar", f"--format={form}", *exclude, "--sort=name", "-cf", str(path), "-C", str(source), "."], check=True
        )
        found = _walk(path)
        assert [m.name for m in found if m.num_bytes == 700] == ["./a.jpg"]
        assert len(found) == (1 if exclude else 2)


def test_base_256_sizes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"abc"), ("b.jpg", b"de")])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (3).to_bytes(11, "big")
    content[148:156] = b"%06o\0 " % (sum(content[:512]) - sum(content[148:156]) + 256)
    path.write_bytes(content)
    assert [(m.name, m.num_bytes) for m in _walk(path)] == [("a.jpg", 3), ("b.jpg", 2)]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    with pytest.raises(RuntimeError, match=r"x\.tar is empty \(0 bytes\)"):
        _walk(tmp_path / "x.tar")


def test_a_tar_without_members_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"x\.tar is a tar without members"):
        _walk(write_tar(tmp_path / "x.tar", []))


def test_a_cut_is_found_at_every_byte(tmp_path: Path) -> None:
    members = [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 300), ("c.jpg", b"")]
    path = write_tar(tmp_path / "x.tar", members)
    end = 512 * (1 + 2 + 1 + 1 + 1)
    content = path.read_bytes()
    for size in [512, 513, 1212, 1535, 1536, 1537, 2048, 2348, 2560, 3071, 3072, 3500]:
        path.write_bytes(content[:size])
        if size < end + 512:
            with pytest.raises(RuntimeError, match=r"x\.tar is cut in the middle|x\.tar has a bad header"):
                _walk(path)
    path.write_bytes(content[: end + 512])  # half of the end marker: nothing is lost
    assert len(_walk(path)) == 3


def test_a_cut_inside_a_member_gives_the_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 3000)])
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(
        RuntimeError, match=r"cut in the middle: member 1 needs bytes 2048\.\.5048 and the file has 4000"
    ):
        _walk(path)


def test_a_bad_later_header_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a"), ("b.jpg", b"b"), ("c.jpg", b"c")])
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 1  # the trap: tarfile loses two members without a word
    with pytest.raises(RuntimeError, match="bad header at byte 1024"):
        _walk(path)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a")])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(RuntimeError, match="goes on after its end-of-archive marker"):
        _walk(path)


def test_compressed_tars_are_named_as_such(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes() + bytes(1000))
    with pytest.raises(RuntimeError, match=r"x\.tar is compressed; unpack it with gunzip"):
        _walk(tmp_path / "x.tar")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_small_compressed_tar_is_no_cut_one(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a")])
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(RuntimeError, match="is compressed; unpack it with"):
        _walk(path)


@pytest.mark.parametrize("size", [1, 100, 511])
def test_a_file_shorter_than_a_header_is_no_tar(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.tar").write_bytes(b"<" * size)
    with pytest.raises(RuntimeError, match=rf"x\.tar is no tar: its {size} bytes"):
        _walk(tmp_path / "x.tar")
