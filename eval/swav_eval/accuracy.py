"""How many images a classifier gets right: each counts once, whatever the number of ranks.

Shape letters: ``H`` heads, ``B`` samples of a block, ``C`` classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.distributed import all_reduce_sum, rank, world_size
from swav.features import centre_crops_of, normalized
from swav.methods.base import autocast
from swav.partition import share
from swav_eval.classifier import Classifier
from swav_eval.config import FinetuneProtocol, LinearProtocol
from swav_eval.labels import label_of_class
from swav_eval.rounds import in_rounds

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Some samples that are judged, on the device."""

    inputs: Tensor  # float32 [n, 3, crop, crop] or [n, dim]
    labels: Tensor  # int64 [n]
    num_broken: int  # images that cannot be decoded, besides these


def image_blocks(
    index: DatasetIndex,
    ids: Sequence[int],
    protocol: LinearProtocol | FinetuneProtocol,
    *,
    resize_px: int,
    crop_px: int,
    device: torch.device,
    num_threads: int,
) -> Iterator[Block]:
    """Centre crops of this rank's share of some images (appendix A.5); shares are uneven, and no image comes twice."""
    first, last = share(len(ids), rank(), world_size())
    runtime = protocol.runtime
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        for found, images, num_broken in centre_crops_of(
            reader, ids[first:last], resize_px=resize_px, crop_px=crop_px, num_threads=num_threads
        ):
            labels = [label_of_class(reader, sample_id, protocol.num_classes) for sample_id in found.tolist()]
            inputs = normalized(images, device)
            if device.type == "cuda":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield Block(inputs, torch.tensor(labels, dtype=torch.int64, device=device), num_broken)


def feature_blocks(
    values: NDArray[np.float32], labels: NDArray[np.int64], rows: NDArray[np.int64], *, device: torch.device
) -> Iterator[Block]:
    """Some rows of features, all of them this rank's."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        yield Block(torch.from_numpy(values[part]).to(device), torch.from_numpy(labels[part]).to(device), num_broken=0)


@torch.no_grad()
def evaluate_classifier(
    classifier: Classifier, blocks: Iterable[Block], *, num_classes: int, precision: str
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Count how many images each head classifies right. Every rank must call it, with blocks of its own.

    Args:
        classifier: the same on every rank; is left in evaluation mode.
        blocks: what to classify; the ranks' blocks together hold every image once.
        num_classes: with more than five, whether the class is among the five with the highest scores counts too.
        precision: of the trunk.

    Returns:
        Of each head, shares of the images in [0, 1]: ``{"top1": ..., "top5": ...}``; and how many "images" were
        classified and how many were "broken". Equal on every rank.

    Raises:
        ValueError: no image can be decoded.
    """
    classifier.eval()
    names = {"top1": 1} | ({"top5": 5} if num_classes > 5 else {})
    right = torch.zeros(len(classifier.heads), len(names), dtype=torch.int64)
    seen = torch.zeros(2, dtype=torch.int64)

    def count() -> Iterator[None]:
        for block in blocks:
            seen.add_(torch.tensor([len(block.labels), block.num_broken]))
            if len(block.labels):
                with autocast(block.inputs.device, precision):
                    scores_HBC = classifier(block.inputs)
                best = scores_HBC.topk(max(names.values()), dim=-1).indices == block.labels[None, :, None]
                right.add_(torch.stack([best[..., :k].sum(dim=(1, 2)) for k in names.values()], dim=1).cpu())
            yield

    in_rounds(count())
    num_images, num_broken = all_reduce_sum(seen).tolist()
    if not num_images:
        raise ValueError(f"none of the {num_broken} images to evaluate on can be decoded; mend or replace them")
    shares = (all_reduce_sum(right).double() / num_images).tolist()
    return [dict(zip(names, row, strict=True)) for row in shares], {"images": num_images, "broken": num_broken}
