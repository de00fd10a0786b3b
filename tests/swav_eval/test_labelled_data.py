from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from swav_testing.runs import write_scenes

from swav.config import COLOUR_MEAN, COLOUR_STD
from swav.data.batch import NO_LABEL
from swav.data.index import DatasetIndex
from swav.data.source import open_dataset
from swav_eval.config import LinearProtocol
from swav_eval.labelled_data import (
    FeatureBatches,
    LabelledBatch,
    OrderOfIds,
    check_num_broken,
    labelled_pipeline,
)
from swav_eval.recipes import configure

CPU = torch.device("cpu")
BROKEN = (3, 40, 102)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> DatasetIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWAV_CACHE", str(cache))
        return open_dataset(str(write_scenes(tmp_path_factory.mktemp("data"), broken=BROKEN)))


def protocol(*overrides: str) -> LinearProtocol:
    return configure("linear_imagenet", LinearProtocol, ["num_classes=3", "global_batch=24", *overrides])


def order(index: DatasetIndex, ids: list[int] | range, epoch: int = 0, *, batch: int = 24) -> OrderOfIds:
    return OrderOfIds(index, np.array(ids), seed=31, epoch=epoch, global_batch=batch)


@pytest.mark.parametrize("ids", [range(103), [0, 1, 39, 40, 69, 70, 102], list(range(0, 103, 2))])
def test_every_chosen_sample_comes_once_and_in_the_same_batches_whatever_the_ranks(
    index: DatasetIndex, ids: list[int] | range
) -> None:
    one = order(index, ids)
    assert one.num_samples == len(ids)
    batches = [one.rank_batch(step, 0, 1)[0].tolist() for step in range(one.num_steps)]
    assert sorted(chain(*batches)) == list(ids)
    assert [len(batch) for batch in batches] == [one.batch_size(step) for step in range(one.num_steps)]
    for world in (2, 3, 4):
        same = order(index, ids)
        parts = [[same.rank_batch(step, rank, world)[0] for rank in range(world)] for step in range(len(batches))]
        assert [np.concatenate(of_step).tolist() for of_step in parts] == batches
    other = order(index, ids, epoch=1)
    assert [other.rank_batch(step, 0, 1)[0].tolist() for step in range(one.num_steps)] != batches


def test_images_of_all_shards_and_classes_are_mixed(index: DatasetIndex) -> None:
    first = order(index, range(103)).rank_batch(0, 0, 1)[0]
    assert {int(shard) for shard in index.locate(first)[0]} == {0, 1, 2}


def test_fewer_images_than_a_batch_are_one_batch(index: DatasetIndex) -> None:
    few = order(index, [5, 50, 100], batch=256)
    assert (few.num_steps, few.batch_size(0)) == (1, 3)
    assert sorted(few.rank_batch(0, 0, 1)[0].tolist()) == [5, 50, 100]
    few.check_world(2)
    with pytest.raises(ValueError, match=r"3 samples .*too few for 3 ranks; use at most 2 ranks"):
        few.check_world(3)
    with pytest.raises(ValueError, match=r"25 ranks are more than .*; use at most 24"):
        order(index, range(103)).check_world(25)


def batches_of(index: DatasetIndex, ids: np.ndarray, epoch: int, *overrides: str) -> list[LabelledBatch]:
    with labelled_pipeline(index, ids, protocol(*overrides), crop_px=16, device=CPU, num_threads=2) as pipeline:
        assert pipeline.num_samples == len(ids)
        batches = list(pipeline.epoch(epoch, 0))
        assert len(batches) == pipeline.num_steps
        return batches


def test_crops_have_their_labels_and_a_broken_image_none(index: DatasetIndex) -> None:
    ids = np.array([number for number in range(103) if number % 5 != 1])
    batches = batches_of(index, ids, 0)
    expected = order(index, ids.tolist())
    for step, batch in enumerate(batches):
        wanted = expected.rank_batch(step, 0, 1)[0].tolist()
        assert batch.labels.tolist() == [NO_LABEL if one in BROKEN else one % 3 for one in wanted]
        assert batch.inputs.shape == (len(wanted), 3, 16, 16)
        assert batch.global_size == len(wanted)
    assert sum(batch.num_broken for batch in batches) == 3
    again, other = batches_of(index, ids, 0), batches_of(index, ids, 1)
    assert all(torch.equal(one.inputs, two.inputs) for one, two in zip(batches, again, strict=True))
    assert not torch.equal(batches[0].inputs, other[0].inputs)


def test_crops_keep_the_colours_of_their_images(index: DatasetIndex) -> None:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (COLOUR_MEAN, COLOUR_STD))
    batches = batches_of(index, np.arange(103), 0)
    pixels = torch.cat([batch.inputs * std + mean for batch in batches])
    assert float(pixels.min()) >= -1e-5
    assert float(pixels.max()) <= 1 + 1e-5
    # A scene's colour is its class's: no jitter, no grey.
    labels = torch.cat([batch.labels for batch in batches])
    strongest = pixels.mean(dim=(2, 3)).argmax(dim=1)
    assert bool((strongest == labels)[labels >= 0].all())


def test_an_epoch_goes_on_from_any_step(index: DatasetIndex) -> None:
    whole = batches_of(index, np.arange(103), 2)
    with labelled_pipeline(index, np.arange(103), protocol(), crop_px=16, device=CPU, num_threads=1) as pipeline:
        rest = list(pipeline.epoch(2, 3))
        assert list(pipeline.epoch(2, pipeline.num_steps)) == []
    assert all(torch.equal(one.inputs, two.inputs) for one, two in zip(whole[3:], rest, strict=True))


def test_a_label_beyond_the_classes_stops_with_its_image(index: DatasetIndex) -> None:
    with pytest.raises(
        ValueError, match=r"shard-00000.\.tar:.* has the label 2, and with num_classes=2 labels are 0 to 1"
    ):
        batches_of(index, np.arange(103), 0, "num_classes=2")


def test_too_many_broken_images_stop_and_name_the_setting(tmp_path: Path) -> None:
    index = open_dataset(str(write_scenes(tmp_path / "data", (40,), broken=tuple(range(11)))))
    with pytest.raises(RuntimeError, match=r"11 broken images .* or raise runtime\.max_quarantined_fraction"):
        batches_of(index, np.arange(40), 0)
    assert (
        sum(batch.num_broken for batch in batches_of(index, np.arange(40), 0, "runtime.max_quarantined_fraction=0.3"))
        == 11
    )
    check_num_broken(10, 40, protocol())
    with pytest.raises(RuntimeError, match="11 of 40 images to train on are broken, more than the 10"):
        check_num_broken(11, 40, protocol())


def test_features_come_in_the_order_of_their_images(index: DatasetIndex) -> None:
    ids = np.array([number for number in range(103) if number not in BROKEN])
    values = np.stack([ids, ids % 3], axis=1).astype(np.float32)
    chosen = np.flatnonzero(ids % 4 != 0)
    features = FeatureBatches(index, ids, values, ids % 3, chosen=chosen, protocol=protocol(), device=CPU)
    expected = order(index, ids[chosen].tolist(), epoch=1)
    batches = list(features.epoch(1, 0))
    assert (features.num_samples, features.num_steps) == (len(chosen), len(batches))
    for step, batch in enumerate(batches):
        wanted = expected.rank_batch(step, 0, 1)[0]
        assert batch.inputs[:, 0].tolist() == wanted.tolist()
        assert batch.labels.tolist() == (wanted % 3).tolist()
        assert (batch.global_size, batch.num_broken) == (len(wanted), 0)
    assert [batch.labels.tolist() for batch in features.epoch(1, 2)] == [batch.labels.tolist() for batch in batches[2:]]
