from pathlib import Path

import numpy as np
import torch

from swav.data.decode import decode_image
from swav.data.demo import SHAPES, draw_image, write_demo_shards
from swav.data.index import open_index
from swav.data.reader import ShardReader
from swav.ops.knn import knn_predict


def test_the_same_number_is_always_the_same_image() -> None:
    assert np.array_equal(np.asarray(draw_image(17, 7)), np.asarray(draw_image(17, 7)))
    assert not np.array_equal(np.asarray(draw_image(17, 7)), np.asarray(draw_image(27, 7)))


def test_the_shape_alone_follows_the_label() -> None:
    """Two labels under one number share background and clutter, so their images differ in few pixels."""
    one, other = (np.asarray(draw_image(3, label), dtype=np.int64) for label in (0, 1))
    assert 0.05 < (np.abs(one - other).max(axis=-1) > 20).mean() < 0.5


def test_shards_are_whole_balanced_and_say_nothing_by_their_pixels(tmp_path: Path) -> None:
    write_demo_shards(tmp_path / "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    pixels, labels = {}, {}
    for split, expected in (("train", 4000), ("test", 1000)):
        with ShardReader(open_index(str(tmp_path / "demo" / split))) as reader:
            assert reader.index.num_samples == expected
            labels[split] = torch.from_numpy(reader.labels())
            images = [decode_image(reader.image(number)) for number in range(expected)]
        assert {image.shape for image in images} == {(64, 64, 3)}
        assert labels[split].bincount().tolist() == [expected // len(SHAPES)] * len(SHAPES)
        small = torch.from_numpy(np.stack(images))[:, ::2, ::2].flatten(1).float()
        pixels[split] = torch.nn.functional.normalize(small - small.mean(), dim=1)
    found = knn_predict(pixels["train"], labels["train"], pixels["test"], num_neighbors=(20,), temperature=0.07)
    assert (found[20] == labels["test"]).float().mean() < 0.3  # chance is 0.1
