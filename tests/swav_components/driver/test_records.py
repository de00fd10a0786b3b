from pathlib import Path

import pytest

from swav_components.driver.records import INTENTS, End, Record, RunFolder, from_json, record_of


def test_a_record_is_read_as_it_was_written() -> None:
    record = Record("photos-1-knn-1", "knn-1", 1, "knn --train x", vanished=2, ended=End.FAILED, why="it ended")
    record = record.with_call("a", 1, made=1).with_call("b", 2, made=1).with_call("a", 1, returned=1)
    assert from_json(record.to_json()) == record
    assert [(calls.holder, calls.fencing, calls.made, calls.returned) for calls in record.calls] == [
        ("b", 2, 1, 0),
        ("a", 1, 1, 1),
    ]
    assert record.in_doubt
    assert not record.with_call("b", 2, returned=1).in_doubt


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"calls": [], "ended": "so"}'])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a record of a job"):
        from_json(data)


def test_a_runs_folder_has_files_that_are_written_on_condition(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    assert list(folder.names(INTENTS)) == []
    assert not folder.exists(record_of("a"))
    tag = folder.write(record_of("a"), b"1", None)
    assert tag is not None
    assert folder.write(record_of("a"), b"2", None) is None
    assert folder.exists(record_of("a"))
    assert list(folder.names(INTENTS)) == ["a.json"]
    found = folder.read(record_of("a"))
    assert found is not None
    assert (found.data, found.tag) == (b"1", tag)
