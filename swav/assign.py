"""Makes the labels of DeepCluster-v2 and SeLa-v2, beside a run: ``python -m swav.assign --output RUN``.

It may run in a container of its own, with any number of workers (``python -m swav.elastic ... -m swav.assign ...``),
and shares nothing with the trainer but the run's folder. The same features give the same bytes.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from swav import storage, telemetry
from swav.bank.files import bank_folder, labels_folder, manifest_url, read_manifest, write_array, write_manifest
from swav.bank.labels import LABELS_FORMAT, LabelTables, LabelWriter, decoded, table_url
from swav.bank.layout import bank_layout, order_epoch_of
from swav.bank.reader import BankReader
from swav.bank.writer import BANK_FORMAT, remove_all, remove_bank
from swav.clustering import Solution, Workshop, cluster, partition, remove_states
from swav.config import DeepClusterV2Config, PretrainConfig, from_json
from swav.data.batch import NO_LABEL
from swav.data.index import DatasetIndex
from swav.data.source import open_dataset
from swav.distributed import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    cores_of_rank,
    pick_device,
    process_group,
    rank,
)
from swav.logs import set_context, start_logging
from swav.ops.agreement import add_pairs, entropy, normalized_mutual_information
from swav.program import run, stop_at_once
from swav.watchdog import ends_when_stalled, progress

_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 2.0
_SAY_EVERY_SECONDS = 60.0
_STAT_THREADS = 16
_KEPT_EPOCHS = 3  # of labels: the new ones, and those that a trainer may still use or go back to
_MAX_COMPARED = 4096  # prototypes whose pairs are counted: 400 MB for 3 sets

_logger = logging.getLogger(__name__)


def assign(
    config: PretrainConfig, index: DatasetIndex, output: storage.Location, epoch: int, device: torch.device
) -> None:
    """Make and publish the labels of one epoch; does nothing where they are published.

    Args:
        config: the run.
        index: its images.
        output: its folder.
        epoch: whose labels to make; its features have been published.
        device: where this worker computes.

    Raises:
        ValueError: there are too few features, or they are of other data.
        RuntimeError: features are damaged or missing.
        OSError: the storage fails.
    """
    folder = labels_folder(output, epoch)
    if agreed(lambda: read_manifest(folder, LABELS_FORMAT) is not None):
        if rank() == 0:
            remove_states(folder, before=sys.maxsize)  # of an assigner that was killed before it did so
        return
    method = config.offline
    assert method is not None
    began = time.monotonic()
    set_context(epoch=epoch)
    telemetry.show(assign_epoch=epoch, assign_iteration=0)
    layout = bank_layout(config, index, order_epoch_of(config, epoch))
    num_threads = cores_of_rank() if device.type == "cpu" else 2
    with BankReader(bank_folder(output, epoch), layout) as bank, threadpool_limits(1):
        work = Workshop(bank, folder, device, num_threads, first_step=epoch * (method.num_iters + 2))
        if isinstance(method, DeepClusterV2Config):
            solution = cluster(work, method, seed=config.seed, epoch=epoch)
        else:
            solution = partition(work, method)
        facts = write_labels(work, solution, index, previous=previous_labels(output, epoch, index))
        barrier()
        if rank() == 0:
            write_array(storage.join(folder, "centroids.npy"), solution.prototypes.cpu().numpy())
            whole = {"format": LABELS_FORMAT, "epoch": epoch, "method": method.kind, "data_identity": index.identity}
            whole |= {"num_samples": index.num_samples, "num_sets": method.num_sets}
            write_manifest(folder, whole | {"num_prototypes": method.num_prototypes, "sets": facts})
            remove_states(folder, before=sys.maxsize)
            telemetry.show(labels_age_seconds=time.monotonic())
            _logger.info("labels of epoch %d published after %.1f s: %s", epoch, time.monotonic() - began, facts)
        barrier()


def write_labels(
    work: Workshop, solution: Solution, index: DatasetIndex, *, previous: LabelTables | None
) -> list[dict[str, object]]:
    """Label every sample and write the labels, shard by shard.

    Args:
        work: features and device.
        solution: what labels follow from.
        index: of the data set.
        previous: the epoch's before, to compare with.

    Returns:
        Of each set: its solution's facts, the sizes of its clusters (least, largest, how many are empty), their
        entropy in bits, samples without a label, and the normalised mutual information with the labels before.
    """
    num_sets, num_prototypes, _ = solution.prototypes.shape
    sizes = np.zeros((num_sets, num_prototypes), dtype=np.int64)
    compared = previous if previous is not None and num_prototypes <= _MAX_COMPARED else None
    pairs = np.zeros((num_sets, num_prototypes, num_prototypes if compared else 0), dtype=np.int64)
    with LabelWriter(work.folder, index, num_prototypes=num_prototypes, num_sets=num_sets) as writer:

        def body(segments: Iterable[int]) -> None:
            for segment in segments:
                writer.add(work.bank.layout.ids(segment), _segment_labels(work, solution, segment))

        work.over_segments(body)
        for shard, table in writer.tables():
            progress()
            labels = decoded(table)
            before = decoded(compared.table(shard)) if compared else labels
            for number in range(num_sets):
                own = labels[:, number]
                sizes[number] += np.bincount(own[own != NO_LABEL], minlength=num_prototypes)
                if compared:
                    add_pairs(pairs[number], own, before[:, number])
    sizes, pairs = (all_reduce_sum(torch.from_numpy(array)).numpy() for array in (sizes, pairs))
    return [
        {
            **solution.facts[number],
            "smallest": int(sizes[number].min()),
            "largest": int(sizes[number].max()),
            "empty": int((sizes[number] == 0).sum()),
            "entropy_bits": entropy(sizes[number]),
            "unlabelled": index.num_samples - int(sizes[number].sum()),
            "nmi_with_last": normalized_mutual_information(pairs[number]) if pairs[number].any() else None,
        }
        for number in range(num_sets)
    ]


def _segment_labels(work: Workshop, solution: Solution, segment: int) -> NDArray[np.int64]:
    """The labels of a segment's rows, int64 [rows, sets]."""
    crops, found = work.features(segment)
    labels = np.full((len(found), len(solution.prototypes)), NO_LABEL, dtype=np.int64)
    for number in range(labels.shape[1]):
        labels[found, number] = solution.labels(crops, number)
    return labels


def previous_labels(output: storage.Location, epoch: int, index: DatasetIndex) -> LabelTables | None:
    """The labels of the epoch before, if they are still there."""
    folder = labels_folder(output, epoch - 1)
    if epoch == 0 or not agreed(lambda: read_manifest(folder, LABELS_FORMAT) is not None):
        return None
    return LabelTables(output, epoch - 1, index, kept_bytes=0)  # each is read once


def newest_labels(output: storage.Location, num_epochs: int) -> int:
    """The last epoch of a run whose labels are published; 0 where there is none. The same on every worker."""
    found = [0]
    if rank() == 0:
        urls = [manifest_url(labels_folder(output, number)) for number in range(num_epochs)]
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            found += [number for number, stat in enumerate(pool.map(storage.stat, urls)) if stat is not None]
    return int(all_reduce_max(torch.tensor(max(found))))


def remove_old(config: PretrainConfig, index: DatasetIndex, output: storage.Location, epoch: int) -> None:
    """Remove what nobody needs once an epoch has labels: its features, and labels of some epochs ago."""
    remove_bank(bank_folder(output, epoch), bank_layout(config, index, order_epoch_of(config, epoch)))
    old = epoch - _KEPT_EPOCHS
    folder = labels_folder(output, old)
    if old >= 0:  # also where a killed assigner has begun to
        remove_all([manifest_url(folder)])
        barrier()
        others = [storage.join(folder, name) for name in ("centroids.npy", "written.npy")]
        remove_all([*others, *(table_url(folder, shard) for shard in range(index.num_shards))])
    barrier()


def agreed(question: Callable[[], bool]) -> bool:
    """What rank 0 answers, on every rank."""
    return any_rank(rank() == 0 and question())


def wait_until(ready: Callable[[], bool], what: str, *, seconds: float, every: float) -> None:
    """Return when something is there, all workers together.

    Raises:
        RuntimeError: it is not after some time.
    """
    began = said = time.monotonic()
    while not agreed(ready):
        now = time.monotonic()
        if agreed(lambda now=now: now - began > seconds):  # type: ignore[misc]
            raise RuntimeError(
                f"no {what} after {seconds:g} s; see that the trainer works on this run, then run the same command "
                "again"
            )
        if now - said > _SAY_EVERY_SECONDS or said == began:
            said = now
            _logger.info("waiting for %s", what)
        progress()
        time.sleep(every)


def serve(
    output: storage.Location,
    device: torch.device,
    *,
    data: str | None,
    epoch: int | None,
    seconds: float,
    keep: bool,
) -> None:
    """Make the labels of one epoch, or of every epoch of a run as its features come.

    Args:
        output: the run's folder.
        device: where this worker computes.
        data: the run's images, where they are found elsewhere than by the trainer.
        epoch: the only one; None for all.
        seconds: to wait for the trainer, each time.
        keep: whether old features and labels stay.

    Raises:
        ValueError: the run has no use for labels, or no such epoch.
    """
    every = _REMOTE_POLL_SECONDS if storage.is_remote(output) else _POLL_SECONDS
    place = storage.join(output, "config.json")
    wait_until(lambda: storage.stat(place) is not None, f"run in {output}", seconds=seconds, every=every)
    config = from_json(storage.read(place).decode())
    if config.offline is None:
        raise ValueError(f"{output} holds a run of {config.method.kind}, which needs no assigner")
    if epoch is not None and not 0 <= epoch < config.optim.epochs:
        raise ValueError(f"--epoch {epoch}: the run has the epochs 0 to {config.optim.epochs - 1}")
    index = open_dataset(data if data is not None else config.data.url)
    first = newest_labels(output, config.optim.epochs)  # of the epochs before, features and labels may be gone
    for number in range(first, config.optim.epochs) if epoch is None else (epoch,):
        made = manifest_url(labels_folder(output, number))
        features = bank_folder(output, number)

        def is_ready(made: str = made, features: str = features) -> bool:
            return storage.stat(made) is not None or read_manifest(features, BANK_FORMAT) is not None

        wait_until(is_ready, f"features for the labels of epoch {number}", seconds=seconds, every=every)
        assign(config, index, output, number, device)
        if not keep:
            remove_old(config, index, output, number)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swav.assign", description="Make a run's labels (appendix D).")
    parser.add_argument("--output", required=True, help="the run's folder, as the trainer has it")
    parser.add_argument("--data", help="the run's images, where they are found elsewhere than by the trainer")
    parser.add_argument("--epoch", type=int, help="only this epoch's labels (default: each epoch's, as features come)")
    parser.add_argument("--timeout-seconds", type=float, default=24 * 3600.0, help="to wait for the trainer each time")
    parser.add_argument("--keep", action="store_true", help="keep all features and labels, also those not needed")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    # Longer than the trainer's: workers meet only after each pass over their features.
    parser.add_argument("--collective-timeout-seconds", type=float, default=1800.0)
    parser.add_argument("--stalled-after-seconds", type=float, default=600.0)
    start_logging()
    options = parser.parse_args(arguments)
    set_context(run=options.output)
    torch.set_num_threads(1)  # a block is one thread's, whatever the number of threads: so its last bits are the same

    def body() -> None:
        device = pick_device(options.device)
        with (
            telemetry.reporting(),
            ends_when_stalled(options.stalled_after_seconds),
            stop_at_once("stopped on request; what iterations have found is saved"),
            process_group(device, options.collective_timeout_seconds),
        ):
            serve(
                options.output,
                device,
                data=options.data,
                epoch=options.epoch,
                seconds=options.timeout_seconds,
                keep=options.keep,
            )

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
