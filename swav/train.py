"""The training loop: read it top to bottom and you have followed a batch from shard to optimiser step."""

import contextlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav import checkpoint, storage, telemetry
from swav.checkpoint import CheckpointWriter
from swav.config import PretrainConfig, SupervisedConfig, differing_keys, from_json, to_json
from swav.data.augment import Augment
from swav.data.batch import CropBatch
from swav.data.epochs import epoch_order
from swav.data.index import DatasetIndex
from swav.data.loader import Loader, Quarantined
from swav.data.order import substitutes
from swav.data.reader import ShardReader
from swav.distributed import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    copy_from_first_rank,
    cores_of_rank,
    rank,
    world_size,
)
from swav.features import Evaluation, evaluate_backbone
from swav.labelling import HandOver, TrueLabels, Unlabelled
from swav.methods import build_method
from swav.methods.base import Method, MethodOutput, autocast
from swav.methods.offline import Offline
from swav.metrics import Report, quarantine_budget
from swav.models.batchnorm import synchronize
from swav.optim.lars import LARS, parameter_groups
from swav.optim.schedule import warmup_cosine
from swav.program import StopFlag, Stopped, stop_on_signals
from swav.storage import Location, join, write_atomic
from swav.watchdog import progress

# Do not copy rank 0's buffers before each forward pass: batch norm and queue are equal on every rank by construction.
_DDP_SETTINGS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {  # torch 2.14 has renamed it
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_SETTINGS else "broadcast_buffers": False
}


@dataclass(slots=True)
class TrainState:
    """What a step changes, and what a checkpoint holds."""

    method: Method
    model: nn.Module  # the method, wrapped for this world
    optimizer: LARS
    scaler: torch.amp.GradScaler
    step: int = 0  # of the whole run
    # Images of the running epoch [delivered, replaced because broken]; the sum over ranks is the epoch's.
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))


def train(
    config: PretrainConfig,
    index: DatasetIndex,
    output: Location,
    device: torch.device,
    evaluation: Evaluation | None = None,
) -> Method:
    """Pretrain to the end, taking up the newest checkpoint in ``output`` where there is one.

    Args:
        config: the run.
        index: the images.
        output: the run's folder, or ``s3://bucket/prefix``, the same on every rank; see :func:`check_run_folder`.
        device: where this rank computes.
        evaluation: what to do every ``evaluate.every_epochs`` epochs.

    Returns:
        The trained method.

    Raises:
        ValueError: the checkpoint in ``output`` is of other data, or the world does not fit.
        Stopped: SIGTERM or SIGINT arrived; the state is saved.
        RuntimeError: the loss is no longer finite, too many images are broken, or checkpoints cannot be written.
    """
    first_epoch = epoch_order(config, index, 0)
    steps_per_epoch = first_epoch.num_steps
    num_steps = steps_per_epoch * config.optim.epochs
    state = build_state(config, device)
    restore(state, index, join(output, "checkpoints"))
    if rank() == 0:
        write_atomic(join(output, "config.json"), to_json(config).encode())
    augment = Augment(config.augment, seed=config.seed, device=device, channels_last=config.runtime.channels_last)
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(open_loader(config, index, output, device))
        stop = stack.enter_context(stop_on_signals())
        report = stack.enter_context(
            Report(
                config, output, num_samples=first_epoch.num_samples, step=state.step, steps_per_epoch=steps_per_epoch
            )
        )
        writer = stack.enter_context(
            CheckpointWriter(join(output, "checkpoints"), keep=config.runtime.keep_checkpoints, enabled=rank() == 0)
        )
        labelling = stack.enter_context(
            open_labelling(config, index, output, state, loader, augment, stop=stop, report=report)
        )
        # A checkpoint at an epoch's end is older than its books: the rest of that epoch is empty, and they are closed.
        for epoch in range(max(state.step - 1, 0) // steps_per_epoch, config.optim.epochs):
            start_step = state.step - epoch * steps_per_epoch
            labels = labelling.begin(epoch, start_step)
            with report.timed(loader.epoch(epoch, start_step, labels)) as batches:
                for raw in batches:
                    lr = learning_rate(config, state.step, steps_per_epoch)
                    with report.explained_divergence(state.step):
                        result = train_step(state, augment(raw), lr=lr, precision=config.runtime.precision)
                    labelling.take(raw, result.embeddings)
                    state.counts += torch.tensor([(~raw.substituted).sum(), raw.substituted.sum()])
                    report.step(
                        state.step,
                        epoch=epoch,
                        num_images=raw.global_size,
                        own_images=len(raw.ids),
                        lr=lr,
                        metrics=result.metrics,
                    )
                    stopping = any_rank(stop.is_set)
                    progress(state.step)
                    if (
                        stopping
                        or state.step % config.runtime.checkpoint_every_steps == 0
                        or state.step == num_steps
                        or (labelling.saves_epochs and raw.step == steps_per_epoch - 1)
                    ):
                        report.check_finite()
                        report.publish()
                        labelling.flush()
                        writer.save(state.step, snapshot(state, config, index))
                    if stopping:
                        writer.wait()
                        barrier()  # a launcher that sees one rank end may kill the one that writes
                        raise Stopped(f"stopped on request after step {state.step} of {num_steps}; its state is saved")
            labelling.end()
            report.epoch(
                state.step,
                epoch,
                all_reduce_sum(state.counts.clone()),
                num_images=epoch_order(config, index, epoch).num_samples,
            )
            report.storage_use(state.step, epoch)
            state.counts.zero_()
            if evaluation and evaluation.config.every_epochs and (epoch + 1) % evaluation.config.every_epochs == 0:
                report.knn(state.step, evaluate(state.method.backbone, evaluation, config, device))
        if any_rank(stop.is_set):  # while the last epoch was evaluated
            writer.wait()
            barrier()
            raise Stopped(f"stopped on request after the last step, {num_steps}; its state is saved")
    return state.method


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of a step of the run (appendix A.1)."""
    return warmup_cosine(
        step,
        num_steps=steps_per_epoch * config.optim.epochs,
        warmup_steps=round(steps_per_epoch * config.optim.warmup_epochs),
        start_lr=config.optim.start_lr,
        base_lr=config.optim.base_lr,
        final_lr=config.optim.final_lr,
    )


def evaluate(
    network: nn.Module, evaluation: Evaluation, config: PretrainConfig, device: torch.device
) -> dict[str, float]:
    """k-NN accuracies of a network, as equal on every rank as the network is."""
    copy_from_first_rank(network.buffers())  # batch norm may have had statistics of some ranks only
    num_threads = config.runtime.loader_threads or cores_of_rank()
    return evaluate_backbone(network, evaluation, device=device, num_threads=num_threads, runtime=config.runtime)


def train_step(state: TrainState, batch: CropBatch, *, lr: float, precision: str) -> MethodOutput:
    """One optimiser step on this rank's share of a global batch."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.method.before_step()
    with autocast(batch.crops[0].device, precision):
        output: MethodOutput = state.model(batch)
    state.scaler.scale(output.loss).backward()
    for parameter in state.method.frozen_parameters(batch.epoch):
        parameter.grad = None
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.step += 1
    return output


def build_state(config: PretrainConfig, device: torch.device) -> TrainState:
    """The untrained state, ready for this world and device."""
    method = build_method(config)
    if config.runtime.sync_batch_norm:
        synchronize(method, device, group_size=config.runtime.sync_batch_norm_group)
    method.to(device)
    if config.runtime.channels_last:
        method.to(memory_format=torch.channels_last)
    if config.runtime.compile:
        method.backbone.compile()
    model: nn.Module = method
    if world_size() > 1:
        model = DistributedDataParallel(
            method,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
    optimizer = LARS(
        parameter_groups(
            method,
            exclude_bias_and_norm=config.optim.exclude_bias_and_norm,
            adapt=config.optim.optimizer == "lars",
        ),
        lr=config.optim.start_lr,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        trust_coefficient=config.optim.trust_coefficient,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.runtime.precision == "fp16")
    return TrainState(method=method, model=model, optimizer=optimizer, scaler=scaler)


def open_labelling(
    config: PretrainConfig,
    index: DatasetIndex,
    output: Location,
    state: TrainState,
    loader: Loader,
    augment: Augment,
    *,
    stop: StopFlag,
    report: Report,
) -> Unlabelled:
    """Where the method's labels come from."""
    if isinstance(state.method, Offline):
        return HandOver(
            config,
            index,
            output,
            state.method,
            loader=loader,
            augment=augment,
            is_stopping=lambda: stop.is_set,
            on_labels=lambda epoch, facts: report.labels(state.step, epoch, facts),
        )
    if isinstance(config.method, SupervisedConfig):
        return TrueLabels(index, config)
    return Unlabelled()


@contextlib.contextmanager
def open_loader(
    config: PretrainConfig, index: DatasetIndex, output: Location, device: torch.device
) -> Iterator[Loader]:
    """The loader of this rank's shares; each broken image gets a file below ``output``."""

    def record(broken: Quarantined) -> None:
        telemetry.count("quarantined")
        name = f"epoch-{broken.epoch:04d}/{broken.sample_id:012d}.json"
        write_atomic(join(output, "quarantine", name), (json.dumps(asdict(broken), indent=2) + "\n").encode())

    runtime = config.runtime
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        yield Loader(
            reader,
            lambda epoch: epoch_order(config, index, epoch),
            config.crops,
            substitutes=lambda sample_id: substitutes(index.row_offsets, sample_id),
            seed=config.seed,
            num_threads=config.runtime.loader_threads or cores_of_rank(),
            rank=rank(),
            world_size=world_size(),
            pin_memory=device.type == "cuda",
            max_quarantined=quarantine_budget(
                epoch_order(config, index, 0).num_samples, config.data.max_quarantined_fraction
            ),
            on_quarantine=record,
        )


def check_run_folder(config: PretrainConfig, index: DatasetIndex, output: Location) -> None:
    """Make sure that the folder is free, or holds this very run, before anything is computed.

    Raises:
        ValueError: it holds another run, or this one has too few lanes or images for so many ranks.
    """
    epoch_order(config, index, 0).check_world(world_size())
    path = join(output, "config.json")
    if storage.stat(path) is None:
        return
    differing = differing_keys(from_json(storage.read(path).decode()), config)
    if differing:
        raise ValueError(
            f"{output} holds a run whose {', '.join(differing)} differ; continue it with its own settings, or give "
            "another --output"
        )


def snapshot(state: TrainState, config: PretrainConfig, index: DatasetIndex) -> dict[str, object]:
    """What a checkpoint holds; the same on every rank and for every world size."""
    return {
        "step": state.step,
        "method": state.method.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "counts": all_reduce_sum(state.counts.clone()),
        "config": to_json(config),
        "data_identity": index.identity,
        "torch_version": str(torch.__version__),
    }


def restore(state: TrainState, index: DatasetIndex, folder: Location) -> None:
    """Take up the newest whole checkpoint, the same one on every rank; without any, do nothing.

    Raises:
        ValueError: the checkpoint is of other data.
        RuntimeError: there are checkpoints, but none is whole.
    """
    newest = checkpoint.latest_step(folder) if rank() == 0 else None
    step = int(all_reduce_max(torch.tensor(-1 if newest is None else newest)))
    if step < 0:
        return
    progress()
    saved = checkpoint.load(folder, step)
    progress()
    if saved["data_identity"] != index.identity:
        raise ValueError(
            f"the checkpoint of step {step} in {folder} was trained on other data (identity {saved['data_identity']}, "
            f"now {index.identity}); give the same data, or another --output"
        )
    state.method.load_state_dict(saved["method"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step = saved["step"]
    if rank() == 0:
        state.counts.copy_(saved["counts"])
