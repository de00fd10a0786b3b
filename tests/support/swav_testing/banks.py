"""Features of samples that nobody computed, and the banks that runs would have written of them."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from swav_testing.runs import tiny_config

from swav.bank import layout as layout_module
from swav.bank.layout import BankLayout, bank_layout
from swav.bank.writer import BankWriter
from swav.config import DeepClusterV2Config, MethodConfig, PretrainConfig
from swav.data.batch import RawBatch
from swav.data.index import DatasetIndex
from swav.data.shard_table import Shard, pack
from swav.distributed import rank, world_size

Features = NDArray[np.float32]  # [crops, samples, dim]

ROWS = (40, 0, 30, 33)  # 103 samples in batches of 24: five steps, the last two smaller
NUM_SAMPLES, NUM_STEPS, NUM_CROPS, DIM = 103, 5, 2, 16


def make_index(rows_per_shard: tuple[int, ...] = ROWS, *, identity: str = "images of a test") -> DatasetIndex:
    """An index of shards that are not there."""
    shards = [
        Shard(f"{number:06d}.tar", 10_000, 0, "", rows, 0, 0, False, 0) for number, rows in enumerate(rows_per_shard)
    ]
    return DatasetIndex("/nowhere", pack(shards), 4, identity)


def make_config(
    method: MethodConfig | None = None, *overrides: str, data: Path | str = "nowhere", num_crops: int = NUM_CROPS
) -> PretrainConfig:
    """A tiny run of DeepCluster-v2, or another method."""
    config = tiny_config(data, *overrides)
    crops = (replace(config.crops[0], num_crops=num_crops), *config.crops[1:])
    return replace(config, method=method or DeepClusterV2Config(num_prototypes=5), crops=crops)


def make_layout(
    index: DatasetIndex | None = None, config: PretrainConfig | None = None, *, epoch: int = 0, steps: int = 2
) -> BankLayout:
    """The layout of an epoch, with short blocks."""
    with mock.patch.object(layout_module, "_MAX_STEPS", steps):
        return bank_layout(config or make_config(), index or make_index(), epoch)


def make_features(
    num_samples: int = NUM_SAMPLES, *, num_crops: int = NUM_CROPS, dim: int = DIM, seed: int = 0, clusters: int = 6
) -> Features:
    """Unit vectors around some centres, exactly as float16 has them; crops of a sample are near one another."""
    draws = np.random.default_rng(seed)
    centres = 2 * draws.standard_normal((clusters, dim))[draws.integers(0, clusters, num_samples)]
    samples = centres + draws.standard_normal((num_samples, dim))
    features = samples + 0.3 * draws.standard_normal((num_crops, num_samples, dim))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    return features.astype(np.float16).astype(np.float32)


def fill(
    writer: BankWriter, layout: BankLayout, features: Features, steps: range, broken: tuple[int, ...] = ()
) -> None:
    """Append this rank's part of some steps."""
    for step in steps:
        ids, offset = layout.order.rank_batch(step, rank(), world_size())
        substituted = np.isin(ids, broken)
        raw = RawBatch([], ids, substituted, 0, step, offset, layout.order.batch_size(step))
        writer.append(raw, torch.from_numpy(features[:, ids]))


def write_bank(
    folder: Path | str,
    layout: BankLayout,
    features: Features,
    *,
    broken: tuple[int, ...] = (),
    prototypes: Features | None = None,
    identity: str = "images of a test",
) -> None:
    """Write and publish a whole epoch, each rank its part."""
    with BankWriter(str(folder), layout, start_step=0, facts={"data_identity": identity}) as writer:
        fill(writer, layout, features, range(layout.order.num_steps), broken)
        writer.publish(prototypes)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder and of those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
