from pathlib import Path

from swav import storage


def test_urls_are_joined_as_paths_are(tmp_path: Path) -> None:
    assert storage.join("s3://bucket/set/", "index", "a.npy") == "s3://bucket/set/index/a.npy"
    assert storage.join("s3://bucket/set", "/data/a.tar") == "/data/a.tar"
    assert storage.absolute("s3://bucket/set/") == "s3://bucket/set"
    assert storage.name_of("https://host/a/b.tar") == "b.tar"
    assert storage.list_names(tmp_path / "none") == []


def test_a_local_file_is_given_to_other_libraries_as_it_is(tmp_path: Path) -> None:
    assert storage.readable(f"file://{tmp_path}/a.pt") == tmp_path / "a.pt"
