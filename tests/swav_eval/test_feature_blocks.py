from pathlib import Path

import numpy as np
import pytest

from swav_eval.feature_blocks import Block, BlockFolder, joined


def block(ids: list[int], num_broken: int = 0, *, dim: int = 3) -> Block:
    draws = np.random.default_rng(len(ids))
    rows = np.array(ids, np.int64)
    features = draws.standard_normal((len(ids), dim)).astype(np.float32) if ids else np.empty((0, 0), np.float32)
    return Block(features, rows, rows % 3, num_broken)


def test_blocks_tile_the_samples(tmp_path: Path) -> None:
    place = BlockFolder("train-1", 10, 4, tmp_path)
    assert [place.samples(number) for number in range(place.num_blocks)] == [(0, 4), (4, 8), (8, 10)]
    assert [place.size(number) for number in range(3)] == [4, 4, 2]
    assert BlockFolder("train-1", 8, 4, tmp_path).num_blocks == 2


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    place = BlockFolder("train-1", 10, 4, tmp_path / "work")
    assert place.present() == set()
    for number, written in ((1, block([4, 7], 2)), (2, block([], 2))):
        kept = place.keep(number, written)
        assert (len(kept.features), kept.features.shape[1]) == (0, written.features.shape[1])
        assert kept.ids.tolist() == written.ids.tolist()
        found = place.load(number)
        assert np.array_equal(found.features, written.features)
        assert (found.ids.tolist(), found.labels.tolist()) == (written.ids.tolist(), written.labels.tolist())
        assert (found.num_broken, found.num_samples) == (2, len(written.ids) + 2)
    (tmp_path / "work" / "train-1-000009.safetensors").write_bytes(b"beyond the end")
    (tmp_path / "work" / "train-11-000000.safetensors").write_bytes(b"of other features")
    assert place.present() == {1, 2}


@pytest.mark.parametrize("wrong", [block([0, 1, 2]), block([0, 1, 2, 3]), block([4, 5, 6, 8]), block([4, 5, 5, 6])])
def test_a_block_of_other_samples_is_none(tmp_path: Path, wrong: Block) -> None:
    place = BlockFolder("train-1", 10, 4, tmp_path)
    place.keep(1, wrong)
    with pytest.raises(ValueError, match="it is another block"):
        place.load(1)


def test_every_byte_is_verified(tmp_path: Path) -> None:
    place = BlockFolder("train-1", 10, 4, tmp_path)
    place.keep(0, block([0, 1, 3], 1))
    path = Path(place.url(0))
    good = path.read_bytes()
    for number in range(len(good)):
        path.write_bytes(good[:number] + bytes([good[number] ^ 0x10]) + good[number + 1 :])
        try:
            found = place.load(0)
        except ValueError:
            continue
        # Names and spaces in the header that change nothing.
        assert np.array_equal(found.features, block([0, 1, 3], 1).features)
        assert (found.ids.tolist(), found.labels.tolist(), found.num_broken) == ([0, 1, 3], [0, 1, 0], 1)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="it is no block of features"):
            place.load(0)


def test_a_block_that_has_gone_is_named(tmp_path: Path) -> None:
    place = BlockFolder("train-1", 10, 4, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"train-1-000000\.safetensors is not there.*all hosts must share the folder"
    ):
        place.load_again(0)
    Path(place.url(0)).write_bytes(b"")
    with pytest.raises(RuntimeError, match="run again, and it is computed again"):
        place.load_again(0)


def test_parts_are_joined() -> None:
    whole = joined([block([], 2), block([5, 6], 0), block([8], 1)])
    assert (whole.ids.tolist(), whole.num_broken, whole.features.shape) == ([5, 6, 8], 3, (3, 3))
    assert joined([block([], 2), block([], 1)]).features.shape == (0, 0)
