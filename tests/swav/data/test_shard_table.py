import os
from dataclasses import replace

import numpy as np
import pytest

from swav.data.shard_table import Shard, identity_of, is_table, pack, shard_from_json, shard_to_json, unpack
from swav.storage import FileStat

SHARD = Shard("a/shard-0.tar", 5_000_000_000, 1_700_000_000_123_456_789, "etag-1", 10_000, 7, 3, True, 0xFFFFFFFF)
ODD = Shard(os.fsdecode(b"caf\xe9 \xc3\xa9.tar"), 0, 0, "", 0, 0, 0, False, 0)


def test_a_table_gives_back_what_was_put_in() -> None:
    table = pack([SHARD, ODD])
    assert is_table(table)
    assert [unpack(row) for row in table] == [SHARD, ODD]
    assert not is_table(table[["name", "rows"]])
    assert not is_table(np.zeros(3))


def test_a_record_gives_back_what_was_put_in() -> None:
    for shard in (SHARD, ODD):
        assert shard_from_json(shard_to_json(shard)) == shard
    for damaged in (b"", b'{"name": "x"}', b"[]", shard_to_json(SHARD)[:40]):
        assert shard_from_json(damaged) is None


def test_the_identity_is_of_names_sizes_and_rows() -> None:
    same = [
        replace(SHARD, name="s3://elsewhere/shard-0.tar"),
        replace(SHARD, etag="", mtime_ns=1, table_crc32c=0, has_checksums=False),
    ]
    other = [replace(SHARD, name="a/shard-1.tar"), replace(SHARD, num_bytes=1), replace(SHARD, rows=1)]
    expected = identity_of(pack([SHARD, ODD]))
    assert {identity_of(pack([shard, ODD])) for shard in same} == {expected}
    assert expected not in {identity_of(pack([shard, ODD])) for shard in other}
    assert expected != identity_of(pack([ODD, SHARD]))


@pytest.mark.parametrize(
    ("found", "exact_times", "message"),
    [
        (None, False, "is missing"),
        (FileStat(1, SHARD.mtime_ns, "etag-1"), False, "has 1 bytes and had 5000000000 when it was indexed"),
        (FileStat(SHARD.num_bytes, 0, "etag-2"), False, "was written since (its ETag is etag-2 and was etag-1)"),
        (FileStat(SHARD.num_bytes, 0, "etag-1"), True, None),  # a store's time says less than its ETag
        (FileStat(SHARD.num_bytes, 0, ""), False, None),
        (FileStat(SHARD.num_bytes, 0, ""), True, "was written since"),
    ],
)
def test_a_changed_shard_is_noticed(found: FileStat | None, exact_times: bool, message: str | None) -> None:
    change = SHARD.change_since(found, exact_times=exact_times)
    assert change == (None if message is None else f"the shard a/shard-0.tar {message}")
