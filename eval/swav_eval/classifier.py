"""Training a classifier on labelled images, and judging it: the one supervised loop of all protocols.

Shape letters: ``H`` heads, ``B`` samples of this rank, ``C`` classes.
"""

import contextlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from swav import checkpoint, rng
from swav.checkpoint import CheckpointWriter
from swav.data.batch import NO_LABEL
from swav.distributed import all_reduce_max, all_reduce_sum, any_rank, barrier, rank, world_size
from swav.methods.base import autocast
from swav.optim.schedule import cosine_factor, steps_factor
from swav.program import Stopped, stop_on_signals
from swav.storage import Location
from swav.watchdog import progress
from swav_eval.config import FinetuneProtocol, LinearProtocol, StepSchedule
from swav_eval.labelled_data import Batches, LabelledBatch, check_num_broken
from swav_eval.training_report import DivergenceWatch, RateGroup, Report

_KEPT_CHECKPOINTS = 2
_HEAD_DEVIATION = 0.01

_logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """A network, and one or more linear classifiers on its features, which do not influence one another."""

    def __init__(
        self, trunk: nn.Module, num_features: int, num_classes: int, *, num_heads: int, seed: int, is_frozen: bool
    ) -> None:
        """Build; the heads are equal, normal weights with a deviation of 0.01 and no bias, whatever was drawn before.

        Args:
            trunk: images to features [B, num_features], or the identity for features.
            num_features: of the trunk.
            num_classes: of each head.
            num_heads: how many.
            seed: of the heads.
            is_frozen: the trunk stays as it is, the statistics of its batch norms included.
        """
        super().__init__()
        self.trunk, self.is_frozen = trunk, is_frozen
        draws = rng.generator(seed, "classifier").normal(0.0, _HEAD_DEVIATION, (num_classes, num_features))
        self.heads = nn.ModuleList(nn.Linear(num_features, num_classes) for _ in range(num_heads))
        with torch.no_grad():
            for head in self.heads:
                assert isinstance(head, nn.Linear)
                head.weight.copy_(torch.from_numpy(draws))
                head.bias.zero_()
        trunk.requires_grad_(not is_frozen)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but for a frozen trunk, which only evaluates."""
        super().train(mode)
        if self.is_frozen:
            self.trunk.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Images, or features, to scores [H, B, C]; the heads compute in their own precision."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            features = self.trunk(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.stack([head(features.to(head.weight.dtype)) for head in self.heads])

    def what_is_trained(self) -> nn.Module:
        """The part that a checkpoint holds."""
        return self.heads if self.is_frozen else self


@dataclass(slots=True)
class TrainState:
    """What a step changes, and what a checkpoint holds."""

    classifier: Classifier
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    step: int = 0
    # Images of the running epoch [delivered, replaced because broken]; the sum over ranks is the epoch's.
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    num_broken: int = 0  # of the last whole epoch
    has_diverged: list[bool] = field(default_factory=list)  # of each head


@dataclass(frozen=True, slots=True)
class Trained:
    """What the training says beside the classifier."""

    num_broken: int  # images to train on that cannot be decoded
    has_diverged: list[bool]  # of each head: its numbers are no longer finite


def train_classifier(
    classifier: Classifier,
    batches: Batches,
    groups: list[RateGroup],
    protocol: LinearProtocol | FinetuneProtocol,
    *,
    device: torch.device,
    folder: Location | None,
    identity: dict[str, Any],
) -> Trained:
    """Train to the end by SGD with momentum, taking up the newest checkpoint in ``folder`` that is of this training.

    The loss is the mean cross-entropy of the labelled images of the global batch, whatever the number of ranks.

    Args:
        classifier: on the device, the same on every rank; trained in place.
        batches: what to train on.
        groups: all that is trained, with its rates. One group per head where there are several heads.
        protocol: epochs, schedule, momentum, decay, precision.
        device: where this rank computes.
        folder: for checkpoints, the same on every rank; None: a stop loses all.
        identity: what the trained classifier depends on; a checkpoint of something else is left aside.

    Raises:
        Stopped: SIGTERM or SIGINT arrived.
        ValueError: an image has no label of a class.
        RuntimeError: the loss is no longer finite, too many images are broken, or checkpoints cannot be written.
    """
    steps_per_epoch = batches.num_steps
    num_steps = steps_per_epoch * protocol.epochs
    state = _build_state(classifier, groups, protocol, device)
    identity = json.loads(json.dumps(identity))
    if folder is not None:
        _restore(state, identity, folder)
    classifier.train()
    watch = DivergenceWatch(groups, state.has_diverged)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        report = stack.enter_context(Report(state.step, batches, protocol))
        writer = None
        if folder is not None:
            writer = stack.enter_context(CheckpointWriter(folder, keep=_KEPT_CHECKPOINTS, enabled=rank() == 0))
        # A checkpoint at an epoch's end is older than its books: the rest of that epoch is empty, and they are closed.
        for epoch in range(max(state.step - 1, 0) // steps_per_epoch, protocol.epochs):
            start_step = state.step - epoch * steps_per_epoch
            with contextlib.closing(batches.epoch(epoch, start_step)) as own_batches:
                for batch in own_batches:
                    factor = rate_factor(protocol, state.step, steps_per_epoch)
                    losses_H = train_step(state, batch, factor=factor, precision=protocol.runtime.precision)
                    watch.take(state.step, losses_H)
                    state.counts += torch.tensor([len(batch.labels) - batch.num_broken, batch.num_broken])
                    report.step(state.step, epoch, losses_H, batch)
                    stopping = any_rank(stop.is_set)
                    progress(state.step)
                    is_due = state.step % protocol.runtime.checkpoint_every_steps == 0 or state.step == num_steps
                    if writer is not None and (stopping or is_due):
                        watch.check()
                        writer.save(state.step, _snapshot(state, identity))
                    if stopping:
                        _stop(state.step, num_steps, writer)
            _close_books(state, batches.num_samples, protocol)
        watch.finish()
    return Trained(state.num_broken, state.has_diverged)


def rate_factor(protocol: LinearProtocol | FinetuneProtocol, step: int, steps_per_epoch: int) -> float:
    """What every learning rate of a step of the training is multiplied by (appendices A.3 to A.5).

    A rate drops at the first step of an epoch, and of a fraction of an epoch at the nearest step.
    """
    if isinstance(protocol.schedule, StepSchedule):
        drops = [round(epoch * steps_per_epoch) for epoch in protocol.schedule.epochs]
        return steps_factor(step, drops=drops, factor=protocol.schedule.factor)
    return cosine_factor(step, num_steps=steps_per_epoch * protocol.epochs)


def train_step(state: TrainState, batch: LabelledBatch, *, factor: float, precision: str) -> Tensor:
    """One step on this rank's share of a global batch; the losses of the heads over all ranks, float [H]."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    with autocast(batch.inputs.device, precision):
        scores_HBC = state.classifier(batch.inputs)
    losses_H = torch.stack(
        [F.cross_entropy(scores, batch.labels, ignore_index=NO_LABEL, reduction="sum") for scores in scores_HBC]
    )
    losses_H = losses_H / batch.global_size
    state.scaler.scale(losses_H.sum()).backward()
    num_labelled = (batch.labels != NO_LABEL).sum()
    totals = torch.cat([losses_H.detach(), num_labelled.to(losses_H.dtype)[None]])
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    _sum_over_ranks([totals, *gradients])
    labelled_share = totals[-1].clamp(min=1) / batch.global_size  # where no image has a label, all gradients are zero
    torch._foreach_div_(gradients, labelled_share)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    state.step += 1
    return totals[:-1] / labelled_share


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum over ranks in place, all in one collective."""
    if world_size() == 1:
        return
    flat = all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _build_state(
    classifier: Classifier, groups: list[RateGroup], protocol: LinearProtocol | FinetuneProtocol, device: torch.device
) -> TrainState:
    optimizer = torch.optim.SGD(
        [{"params": group.parameters, "base_lr": group.base_lr} for group in groups],
        lr=0.0,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    is_scaled = protocol.runtime.precision == "fp16" and not classifier.is_frozen
    scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
    return TrainState(classifier, optimizer, scaler, has_diverged=[False] * len(classifier.heads))


def _snapshot(state: TrainState, identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds; the same on every rank and for every number of ranks."""
    return {
        "identity": identity,
        "step": state.step,
        "classifier": state.classifier.what_is_trained().state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "counts": all_reduce_sum(state.counts.clone()),
        "num_broken": state.num_broken,
        "has_diverged": state.has_diverged,
    }


def _restore(state: TrainState, identity: dict[str, Any], folder: Location) -> None:
    """Take up the newest whole checkpoint, the same one on every rank; without one of this training, do nothing.

    Raises:
        RuntimeError: there are checkpoints, but none is whole.
    """
    newest = checkpoint.latest_step(folder) if rank() == 0 else None
    step = int(all_reduce_max(torch.tensor(-1 if newest is None else newest)))
    if step < 0:
        return
    saved = checkpoint.load(folder, step)
    found = saved.get("identity", {})
    if found != identity:
        differing = [key for key in identity if found.get(key) != identity[key]]
        _logger.warning(
            "the checkpoint of step %d in %s is of another evaluation (%s differ); this begins anew and replaces it",
            *(step, folder, ", ".join(differing)),
        )
        return
    state.classifier.what_is_trained().load_state_dict(saved["classifier"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.num_broken, state.has_diverged = saved["step"], saved["num_broken"], saved["has_diverged"]
    if rank() == 0:
        state.counts.copy_(saved["counts"])
    _logger.info("taken up at step %d", step)


def _stop(step: int, num_steps: int, writer: CheckpointWriter | None) -> None:
    """End on request."""
    if writer is None:
        raise Stopped(
            f"stopped on request after step {step} of {num_steps}; without --output or --work nothing is kept"
        )
    writer.wait()
    barrier()  # a launcher that sees one rank end may kill the one that writes
    raise Stopped(f"stopped on request after step {step} of {num_steps}; its state is saved")


def _close_books(state: TrainState, num_samples: int, protocol: LinearProtocol | FinetuneProtocol) -> None:
    """Check that the epoch had every image once, and not too many broken ones.

    Raises:
        RuntimeError: it had not.
    """
    delivered, state.num_broken = (int(count) for count in all_reduce_sum(state.counts))
    state.counts.zero_()
    if delivered + state.num_broken != num_samples:
        raise RuntimeError(
            f"an epoch delivered {delivered} images and replaced {state.num_broken}, but it has {num_samples}; this is "
            "a defect of swav, please report it"
        )
    check_num_broken(state.num_broken, num_samples, protocol)
