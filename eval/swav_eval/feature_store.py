"""Features of a frozen network, computed once, in blocks that a restarted evaluation takes up again.

A block is ``BLOCK_SAMPLES`` consecutive sample ids, whatever the number of ranks, and its forward passes have fixed
bounds: a block has the same bits whoever computes it (on one kind of machine, with as many threads). In the work folder
it is one file, ``<name>-<digest>-<number>.safetensors``, whose digest covers everything that the features depend on, so
that another evaluation with the same work folder finds them, and never takes those of another network.
"""

import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swav.bars import progress_bar
from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.distributed import (
    all_reduce_max,
    all_reduce_sum,
    barrier,
    copy_from_first_rank,
    gather_rows,
    rank,
    world_size,
)
from swav.features import centre_crops, normalized
from swav.methods.base import autocast
from swav.partition import share
from swav.storage import Location, cache_folder, locked, open_atomic
from swav.watchdog import progress
from swav_eval.config import EvaluationRuntime
from swav_eval.feature_blocks import NO_LABEL, Block, BlockFolder, joined
from swav_eval.rounds import in_rounds

FORMAT = "swav.features/1"
BLOCK_SAMPLES = 4096

_DEFAULT_RUNTIME = EvaluationRuntime()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """Features of one data set, of which this rank holds some consecutive rows, in the order of the sample ids."""

    ids: NDArray[np.int64]  # [n], of this rank's rows
    labels: NDArray[np.int64]  # [n], NO_LABEL where a sample has no .cls
    offset: int  # of this rank's first row among all
    total: int  # rows of all ranks
    dim: int
    num_broken: int  # images of all ranks that could not be decoded; they have no row
    num_resumed: int  # blocks of all ranks that were there already
    _blocks: BlockFolder
    _in_memory: tuple[Block, ...]  # without a folder

    @property
    def values(self) -> Tensor:
        """float32 [n, dim] in memory, as the network gives them: no unit norm. From a folder they are read each time.

        Raises:
            RuntimeError, OSError: a block cannot be read, or is damaged.
        """
        whole = torch.empty(len(self.ids), self.dim)
        done = 0
        for block in self._own_blocks():
            whole[done : done + len(block.ids)] = torch.from_numpy(block.features).view(-1, self.dim)
            done += len(block.ids)
        assert done == len(self.ids)
        return whole

    def all_ids(self) -> NDArray[np.int64]:
        """int64 [total]: sample ids of the rows of all ranks, on every rank. Every rank must call it."""
        return self._all(self.ids)

    def all_labels(self) -> NDArray[np.int64]:
        """int64 [total]: labels of the rows of all ranks, on every rank. Every rank must call it."""
        return self._all(self.labels)

    def mapped(self) -> NDArray[np.float32]:
        """All rows of all ranks, float32 [total, dim], read-only. Every rank must call it.

        The ranks of a host share one file that is mapped into memory, in the features folder of the cache, made from
        the blocks by the first of them. It has no name any more when this returns, so that its space is free as soon as
        the last array is gone, however the processes end.

        Raises:
            ValueError: there are several ranks and no folder.
            RuntimeError: a block is not in the folder as this host sees it, or is damaged.
            OSError: the disk is full, or a block cannot be read.
        """
        if self._blocks.folder is None:
            if world_size() > 1:
                raise ValueError(f"{world_size()} ranks share all features through a folder; give --output or --work")
            whole = self.values.numpy()
            whole.flags.writeable = False
            return whole
        token = torch.tensor([secrets.randbits(62) if rank() == 0 else 0])
        copy_from_first_rank([token])
        folder = cache_folder() / "features"
        path = folder / f"{self._blocks.prefix}-{int(token):016x}.f32"
        with locked(folder / ".lock"):
            if not path.exists():
                # Whoever holds the lock is the only one that writes here: others' files are left from killed processes,
                # or some rank is about to map them, which then makes them again.
                for left in (*folder.glob("*.f32"), *folder.glob(".*.partial")):
                    left.unlink(missing_ok=True)
                self._assemble(path)
            rows: NDArray[np.float32] = np.memmap(path, dtype=np.float32, mode="r", shape=(self.total, self.dim))
        barrier()
        path.unlink(missing_ok=True)
        return rows

    def _assemble(self, path: Location) -> None:
        written = 0
        with (
            open_atomic(path) as file,
            progress_bar(
                total=self._blocks.num_blocks, desc="gathering features", unit=" blocks", disable=rank() != 0
            ) as bar,
        ):
            for number in range(self._blocks.num_blocks):
                block = self._blocks.load_again(number)
                file.write(block.features.data)
                written += len(block.ids)
                progress()
                bar.update()
            if written != self.total:
                raise RuntimeError(
                    f"the blocks in {self._blocks.folder} have {written} rows now, and had {self.total}: another "
                    "evaluation has written them; run again"
                )

    def _own_blocks(self) -> Iterator[Block]:
        if self._blocks.folder is None:
            yield from self._in_memory
            return
        for number in _own(self._blocks):
            progress()
            yield self._blocks.load_again(number)

    def _all(self, own: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = gather_rows(torch.from_numpy(own), dim=0, offset=self.offset, total=self.total)
        whole: NDArray[np.int64] = rows.numpy()
        return whole


def extract_features(  # noqa: PLR0913
    backbone: nn.Module,
    index: DatasetIndex,
    *,
    backbone_sha256: str,
    name: str,
    resize_px: int,
    crop_px: int,
    device: torch.device,
    precision: str,
    num_threads: int,
    runtime: EvaluationRuntime = _DEFAULT_RUNTIME,
    folder: Location | None,
) -> StoredFeatures:
    """Run every image of a data set through a network once, but for the blocks that the folder has. All ranks call it.

    Args:
        backbone: normalised images [B, 3, crop, crop] to features [B, dim]; used on the device, in evaluation mode.
        index: the data set.
        backbone_sha256: of the backbone's file: tells its features from others'.
        name: of the data set in the names of files: "train" or "test".
        resize_px: shorter side of the images (appendix A.5: 256).
        crop_px: centre crop of them (appendix A.5: 224).
        device: where to compute.
        precision: "fp32", "bf16" or "fp16", of the forward passes.
        num_threads: decoding threads of this rank.
        runtime: how shards in an object store are read.
        folder: for the blocks, local or ``s3://``; None keeps them in memory, and a restart begins anew.

    Raises:
        ValueError: no image can be decoded, or a label is no number.
        RuntimeError: features are not finite.
        OSError: an image, or the folder, cannot be read or written.
    """
    facts = {
        "format": FORMAT,
        "backbone": backbone_sha256,
        "data": index.identity,
        "resize_px": resize_px,
        "crop_px": crop_px,
        "precision": precision,
        "block_samples": BLOCK_SAMPLES,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    place = BlockFolder(f"{name}-{digest}", index.num_samples, BLOCK_SAMPLES, folder)
    blocks = _found(place)
    num_resumed = int(all_reduce_sum(torch.tensor([len(blocks)])))
    if num_resumed and rank() == 0:
        _logger.info("%d of %d blocks of features of %s images are in %s", num_resumed, place.num_blocks, name, folder)
    was_training = backbone.training
    backbone.to(device).eval()
    with (
        ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader,
        progress_bar(
            total=sum(map(place.size, _own(place))),
            initial=sum(map(place.size, blocks)),
            desc=f"features of {name} images",
            unit=" images",
            disable=rank() != 0,
        ) as bar,
    ):

        def work() -> Iterator[None]:
            for first, last in _runs([number for number in _own(place) if number not in blocks]):
                samples = place.samples(first)[0], place.samples(last - 1)[1]
                batches = centre_crops(reader, *samples, resize_px=resize_px, crop_px=crop_px, num_threads=num_threads)
                parts = []
                for ids, images, broken in batches:
                    parts.append(_forward(backbone, reader, ids, images, broken, device=device, precision=precision))
                    progress()
                    bar.update(parts[-1].num_samples)
                    if sum(part.num_samples for part in parts) == place.size(first):
                        blocks[first] = place.keep(first, joined(parts))
                        first, parts = first + 1, []
                    yield
                assert first == last, "a batch straddles two blocks"

        in_rounds(work())
    backbone.train(was_training)
    return _with_place(place, [blocks[number] for number in _own(place)], num_resumed)


@torch.no_grad()
def _forward(
    network: nn.Module,
    reader: ShardReader,
    ids: NDArray[np.int64],
    images: Tensor,
    num_broken: int,
    *,
    device: torch.device,
    precision: str,
) -> Block:
    """The features and labels of a batch of images [n, 3, crop, crop]."""
    if not len(ids):
        return Block(np.empty((0, 0), np.float32), ids, ids, num_broken)
    inputs = normalized(images, device)
    if device.type == "cuda":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with autocast(device, precision):
        features = network(inputs).float().cpu().numpy()
    if not np.isfinite(features).all():
        raise RuntimeError(
            f"the network's features of {reader.name(int(ids[0]))} and its neighbours are not finite; use "
            "runtime.precision=fp32, or another backbone"
        )
    labels = (reader.label(sample_id) for sample_id in ids.tolist())
    return Block(
        features, ids, np.array([NO_LABEL if label is None else label for label in labels], np.int64), num_broken
    )


def _own(place: BlockFolder) -> range:
    """Numbers of this rank's blocks."""
    return range(*share(place.num_blocks, rank(), world_size()))


def _found(place: BlockFolder) -> dict[int, Block]:
    """This rank's blocks that a folder has, without their rows; the damaged ones are left out."""
    blocks = {}
    for number in sorted(place.present().intersection(_own(place))):
        progress()
        try:
            blocks[number] = place.load(number).without_rows()
        except ValueError as error:
            _logger.warning("%s is damaged (%s): it is computed again", place.url(number), error)
    return blocks


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of neighbours."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1] + 1
            start = place


def _with_place(place: BlockFolder, blocks: list[Block], num_resumed: int) -> StoredFeatures:
    """Number the rows over all ranks; broken images have left gaps, and a rank may have none.

    Raises:
        ValueError: no rank has any.
    """
    dim = int(all_reduce_max(torch.tensor(max((block.features.shape[1] for block in blocks), default=0))))
    counts = torch.zeros(world_size() + 1, dtype=torch.int64)
    counts[rank()] = sum(len(block.ids) for block in blocks)
    counts[-1] = sum(block.num_broken for block in blocks)
    *rows, num_broken = all_reduce_sum(counts).tolist()
    if not sum(rows):
        raise ValueError(f"none of the {num_broken} images to evaluate on can be decoded; mend or replace them")
    none = np.empty(0, np.int64)
    return StoredFeatures(
        ids=np.concatenate([none, *(block.ids for block in blocks)]),
        labels=np.concatenate([none, *(block.labels for block in blocks)]),
        offset=sum(rows[: rank()]),
        total=sum(rows),
        dim=dim,
        num_broken=num_broken,
        num_resumed=num_resumed,
        _blocks=place,
        _in_memory=tuple(blocks) if place.folder is None else (),
    )
