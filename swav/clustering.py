"""The assignment phase: k-means and equal partitions of an epoch's features, segment by segment (appendix D.2).

A worker holds one segment of the features per thread, the prototypes and sums over them; neither all features nor their
scores. Sums are exact, so any number of workers finds the same to the bit, on one kind of device. After each iteration
the state is saved, so that a phase that is killed goes on from there.

Shapes: H sets, K prototypes of each, D dimensions, B rows of a block, A crops.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav import rng, storage, telemetry
from swav.bank.files import read_array, write_array
from swav.bank.reader import BankReader, with_features
from swav.config import DeepClusterV2Config, SelaV2Config
from swav.data import feistel
from swav.distributed import all_reduce_max, all_reduce_sum, rank
from swav.ops.equipartition import SUM_UNIT, equal_labels, next_log_scales, prototype_sums
from swav.ops.kmeans import ClusterSums, nearest_centroids
from swav.watchdog import progress

_BLOCK_ROWS = 512  # whose scores a thread holds
_STATE = re.compile(r"state-(?P<iteration>[0-9]{6})\.npy")

_logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Solution:
    """What labels follow from. Sets take turns on the crops."""

    prototypes: Tensor  # float32 [H, K, D], centroids or the model's
    log_scales: Tensor | None  # float64 [H, K]; None for k-means
    epsilon: float
    facts: list[dict[str, Any]]  # of each set

    def labels(self, crops: list[Tensor], number: int) -> NDArray[np.int64]:
        """The labels of a segment's rows in a set, int64 [B]."""
        features_BD, prototypes_KD = crops[number % len(crops)], self.prototypes[number]
        if self.log_scales is None:
            return nearest_centroids(features_BD, prototypes_KD)[0].cpu().numpy()
        log_scales_K = self.log_scales[number]
        labels = [
            equal_labels(_scores(block, prototypes_KD), log_scales_K, epsilon=self.epsilon)
            for block in features_BD.split(_BLOCK_ROWS)
        ]
        return torch.cat(labels).cpu().numpy()


@dataclass(frozen=True)
class Workshop:
    """What a phase works with."""

    bank: BankReader
    folder: str  # of the labels: takes the state
    device: torch.device
    num_threads: int
    first_step: int  # of the phase, for a launcher that counts them

    def over_segments(self, body: Callable[[Iterable[int]], T]) -> list[T]:
        """Call ``body`` with some of this worker's segments on each thread; returns what they return."""
        own = self.bank.own_segments
        stop = threading.Event()

        def until_stopped(segments: range) -> Iterator[int]:
            for segment in segments:
                if stop.is_set():
                    return
                yield segment
                progress()

        with ThreadPoolExecutor(self.num_threads) as pool:
            try:
                parts = [until_stopped(own[number :: self.num_threads]) for number in range(self.num_threads)]
                return list(pool.map(body, parts))
            finally:
                stop.set()  # where one has failed, or this worker is asked to stop, the others need not go on

    def features(self, segment: int) -> tuple[list[Tensor], NDArray[np.bool_]]:
        """The features of a segment, of each crop float16 [B, D], without the rows that have none; and which have."""
        features = self.bank.segment(segment)
        found = with_features(features[0])
        return [torch.from_numpy(crop[found]).to(self.device) for crop in features], found

    def load_state(self) -> tuple[int, NDArray[Any]] | None:
        """The last iteration that is done, and what it left; the same on every worker."""
        found = _states(self.folder) if rank() == 0 else []
        iteration = int(all_reduce_max(torch.tensor(max(found, default=-1))))
        if iteration < 0:
            return None
        _logger.info("going on after iteration %d", iteration)
        return iteration, read_array(_state_url(self.folder, iteration))[0]

    def save_state(self, iteration: int, state: NDArray[Any]) -> None:
        """Keep what an iteration left; older states go."""
        progress(self.first_step + iteration)
        telemetry.show(assign_iteration=iteration)
        if rank() == 0:
            write_array(_state_url(self.folder, iteration), state)
            remove_states(self.folder, before=iteration)


def cluster(work: Workshop, config: DeepClusterV2Config, *, seed: int, epoch: int) -> Solution:
    """DeepCluster-v2's clusters: spherical k-means from random samples, for a stated number of iterations (Eq. 5).

    Args:
        work: features and device.
        config: of the method.
        seed: of the run.
        epoch: whose labels these become.

    Raises:
        ValueError: fewer samples have features than a set has prototypes.
    """
    state = work.load_state()
    done, centroids = state if state is not None else (0, _random_samples(work, config, seed, epoch))
    centroids_HKD = torch.from_numpy(centroids).to(work.device)
    for iteration in range(done + 1, config.num_iters + 1):

        def body(segments: Iterable[int], centroids_HKD: Tensor = centroids_HKD) -> tuple[list[ClusterSums], Tensor]:
            num_sets, num_clusters, dim = centroids_HKD.shape
            sums = [ClusterSums.zeros(num_clusters, dim, work.device) for _ in range(num_sets)]
            similarity = torch.zeros(num_sets, dtype=torch.float64)
            for segment in segments:
                crops, _ = work.features(segment)
                for number in range(num_sets):
                    features = crops[number % len(crops)]
                    labels, similarities = nearest_centroids(features, centroids_HKD[number])
                    sums[number].add(features, labels)
                    similarity[number] += similarities.sum(dtype=torch.float64).cpu()
            return sums, similarity

        parts = work.over_segments(body)
        similarity = all_reduce_sum(torch.stack([part for _, part in parts]).sum(dim=0))
        sums = [_added([part[number] for part, _ in parts]) for number in range(config.num_sets)]
        for total in sums:
            total.all_reduce()
        centroids_HKD = torch.stack([total.centroids(centroids_HKD[n]) for n, total in enumerate(sums)])
        mean = similarity / torch.stack([total.counts.sum() for total in sums]).cpu()
        _logger.info("k-means iteration %d: mean cosine %s", iteration, [round(value, 5) for value in mean.tolist()])
        work.save_state(iteration, centroids_HKD.cpu().numpy())
    facts = [{"iterations": config.num_iters} for _ in range(config.num_sets)]
    return Solution(centroids_HKD, None, 0.0, facts)


def partition(work: Workshop, config: SelaV2Config) -> Solution:
    """SeLa-v2's labels: Sinkhorn-Knopp over the whole data set until all prototypes have their share (Eq. 6).

    A sample's own sum is 1 in every pass, but for rounding; what converges is the largest deviation of a prototype's
    sum from its share.

    Args:
        work: features and device.
        config: of the method.
    """
    prototypes_HKD = torch.from_numpy(work.bank.prototypes()).to(work.device)
    state = work.load_state()
    done, saved = state if state is not None else (0, np.zeros(prototypes_HKD.shape[:2]))
    log_scales_HK = torch.from_numpy(saved)
    errors, sample_errors = [0.0], [0.0]
    for iteration in range(done + 1, config.num_iters + 2):

        def body(segments: Iterable[int], log_scales_HK: Tensor = log_scales_HK) -> tuple[Tensor, int]:
            scales_HK = log_scales_HK.to(work.device)
            sums_HK = torch.zeros_like(scales_HK, dtype=torch.int64)
            num_samples = 0
            for segment in segments:
                crops, found = work.features(segment)
                num_samples += int(found.sum())
                for number in range(config.num_sets):
                    for block in crops[number % len(crops)].split(_BLOCK_ROWS):
                        scores = _scores(block, prototypes_HKD[number])
                        sums_HK[number] += prototype_sums(scores, scales_HK[number], epsilon=config.epsilon)
            return sums_HK.cpu(), num_samples

        parts = work.over_segments(body)
        sums_HK = all_reduce_sum(torch.stack([part for part, _ in parts]).sum(dim=0))
        num_samples = int(all_reduce_sum(torch.tensor(sum(count for _, count in parts))))
        _check_enough(num_samples, config.num_prototypes)
        sample_errors = (sums_HK.sum(dim=1).double() / (SUM_UNIT * num_samples) - 1).abs().tolist()
        updates = [next_log_scales(log_scales_HK[n], sums_HK[n], num_samples) for n in range(config.num_sets)]
        errors = [error for _, error in updates]
        _logger.info(
            "Sinkhorn pass %d: samples' sums within %.2g of 1 (mean), prototypes' within %.3g of their share",
            *(iteration, max(sample_errors), max(errors)),
        )
        if max(errors) <= config.tolerance or iteration > config.num_iters:
            break
        log_scales_HK = torch.stack([scales for scales, _ in updates])
        work.save_state(iteration, log_scales_HK.numpy())
    if max(errors) > config.tolerance:
        _logger.warning(
            "after %d iterations prototypes' sums are within %.3g of their share, not within method.tolerance=%g; the "
            "labels are used all the same (raise method.num_iters, or method.epsilon)",
            *(config.num_iters, max(errors), config.tolerance),
        )
    facts = [
        {"iterations": iteration - 1, "prototype_error": error, "sample_error": sample_error}
        for error, sample_error in zip(errors, sample_errors, strict=True)
    ]
    return Solution(prototypes_HKD, log_scales_HK.to(work.device), config.epsilon, facts)


def _random_samples(work: Workshop, config: DeepClusterV2Config, seed: int, epoch: int) -> NDArray[np.float32]:
    """Different samples' features for each set to start from, float32 [H, K, D]."""
    layout = work.bank.layout
    total, num_clusters = int(layout.rows.sum()), config.num_prototypes
    starts = []
    for number in range(config.num_sets):
        keys = np.array([rng.key(seed, "k-means start", epoch, number)], dtype=np.uint64)
        num_tried, found = 0, np.empty((0, layout.dim), dtype=np.float32)
        while len(found) < num_clusters and num_tried < total:
            tried = np.arange(num_tried, min(total, num_tried + 2 * num_clusters))
            positions = feistel.permute(tried, np.array([total]), keys)
            rows = torch.zeros((len(tried), layout.dim))
            for place, feature in work.bank.rows(positions, number % layout.num_crops):
                rows[place] = torch.from_numpy(feature).float()
            features = all_reduce_sum(rows).numpy()
            found = np.concatenate([found, features[features.any(axis=1)]])
            num_tried += len(tried)
        _check_enough(len(found), num_clusters)
        starts.append(found[:num_clusters])
    return np.stack(starts)


def _check_enough(num_samples: int, num_prototypes: int) -> None:
    if num_samples < num_prototypes:
        raise ValueError(
            f"{num_samples} samples with features are fewer than method.num_prototypes={num_prototypes}; set it to "
            f"{max(1, num_samples // 10)}, or give more images"
        )


def _scores(features_BD: Tensor, prototypes_KD: Tensor) -> Tensor:
    """Cosines, float32 [B, K]."""
    if features_BD.device.type == "cpu":  # as nearest_centroids does, and for its reason
        return torch.from_numpy(features_BD.float().numpy() @ prototypes_KD.numpy().T)
    return features_BD.float() @ prototypes_KD.mT


def _added(parts: list[ClusterSums]) -> ClusterSums:
    total, *others = parts
    for other in others:
        total.sums.add_(other.sums)
        total.counts.add_(other.counts)
    return total


def remove_states(folder: str, before: int) -> None:
    """Remove the states of a phase up to an iteration."""
    for iteration in _states(folder):
        if iteration < before:
            storage.remove(_state_url(folder, iteration))


def _states(folder: str) -> list[int]:
    names = storage.list_names(folder, "state-*.npy")
    return [int(match["iteration"]) for match in map(_STATE.fullmatch, names) if match]


def _state_url(folder: str, iteration: int) -> str:
    return storage.join(folder, f"state-{iteration:06d}.npy")
