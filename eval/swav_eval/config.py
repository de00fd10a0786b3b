"""An evaluation as a frozen value: every setting, its unit, and where the paper states it.

Imports without torch, so that a job's settings are checked where it is submitted. ``resize_px`` and ``crop_px`` are
those of appendix A.5 for the paper's backbones, 256 and 224: None takes them from the backbone's own run, which has the
same unless it was of smaller images.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from swav.config import CHECKED


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class EvaluationRuntime:
    """How an evaluation is carried out; nothing here changes what is computed, precision apart."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loader_threads: int = 0  # 0: the cores this rank may use
    fetch_bytes: int = 8_000_000  # of neighbouring samples, aimed at in one request to an object store
    cache_bytes: int = 0  # disk for what comes from an object store; 0: half of what is free
    collective_timeout_seconds: float = 600.0  # rank 0 alone prepares data and writes results while others wait
    stalled_after_seconds: float = 600.0  # without a step or a block of features; the rank then ends
    checkpoint_every_steps: int = 500
    log_every_steps: int = 50
    max_quarantined_fraction: float = 0.001  # above this share of broken images to train on, and above 10, it stops

    def __post_init__(self) -> None:
        if min(self.checkpoint_every_steps, self.log_every_steps) < 1:
            raise ValueError(
                "runtime.checkpoint_every_steps and runtime.log_every_steps must be at least 1, got "
                f"{self.checkpoint_every_steps} and {self.log_every_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SubsetConfig:
    """Which labelled images are trained on: so many of each class, drawn by the seed, or those of a list."""

    per_class: int | None = None
    fraction: float | None = None  # of each class, rounded, at least one image
    names: str | None = None  # file that names the images, one per line, in place of the draw (SimCLR's 1percent.txt)

    def __post_init__(self) -> None:
        if self.names is not None:
            return
        if (self.per_class is None) == (self.fraction is None):
            raise ValueError(
                "a subset needs per_class or fraction, and not both, or names, a file that lists its images"
            )
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"subset.per_class={self.per_class} must be at least 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"subset.fraction={self.fraction} is not in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class CosineSchedule:
    """Cosine decay to zero, step by step (appendix A.3)."""

    kind: Literal["cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class StepSchedule:
    """A factor at the start of some epochs (appendices A.4 and A.5)."""

    kind: Literal["steps"] = "steps"
    epochs: tuple[float, ...]  # at which the rate drops
    factor: float

    def __post_init__(self) -> None:
        if (
            list(self.epochs) != sorted(set(self.epochs))
            or any(epoch <= 0 for epoch in self.epochs)
            or self.factor <= 0
        ):
            raise ValueError(
                f"a schedule of steps needs rising epochs above 0 and a factor above 0, got {list(self.epochs)} and "
                f"{self.factor}"
            )


Schedule = Annotated[CosineSchedule | StepSchedule, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class KnnProtocol:
    """k nearest neighbours on frozen features (appendix B.6)."""

    name: str
    num_neighbors: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    resize_px: int | None = None
    crop_px: int | None = None
    runtime: EvaluationRuntime = EvaluationRuntime()

    def __post_init__(self) -> None:
        if not self.num_neighbors or min(self.num_neighbors) < 1 or self.temperature <= 0:
            raise ValueError(
                "k-NN needs numbers of neighbours of at least 1 and a temperature above 0, got "
                f"{list(self.num_neighbors)} and {self.temperature}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SvmProtocol:
    """One linear SVM per class on frozen features (appendix A.5, VOC07)."""

    name: str
    costs: tuple[float, ...] = tuple(2.0**power for power in range(-19, 2, 2))  # of which each class takes its best
    num_folds: int = 3  # of the cross-validation that chooses
    positive_weight: float = 2.0  # of the cost of a class's own images
    max_iterations: int = 2000
    resize_px: int | None = None
    crop_px: int | None = None
    seed: int = 31
    runtime: EvaluationRuntime = EvaluationRuntime()

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0 or self.positive_weight <= 0:
            raise ValueError(
                f"SVMs need costs and a positive_weight above 0, got {list(self.costs)} and {self.positive_weight}"
            )
        if self.num_folds < 2 or self.max_iterations < 1:
            raise ValueError(
                f"SVMs need num_folds >= 2 and max_iterations >= 1, got {self.num_folds} and {self.max_iterations}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class LinearProtocol:
    """A linear classifier on frozen features (appendices A.3 and A.5).

    Several learning rates are trained at once, each a classifier of its own on the same features; a share of the
    training images is then held out, and the rate that is best there is the result's.
    """

    name: str
    num_classes: int
    epochs: int
    learning_rates: tuple[float, ...]
    schedule: Schedule
    weight_decay: float
    momentum: float = 0.9
    global_batch: int = 256  # images per step over all ranks
    augment: bool = True  # random crops and flips; without, features are computed once and kept
    held_out_fraction: float = 0.1  # of the training images, to choose among several learning rates; one needs none
    resize_px: int | None = None
    crop_px: int | None = None
    seed: int = 31
    runtime: EvaluationRuntime = EvaluationRuntime()

    def __post_init__(self) -> None:
        _check_training(self)
        if (
            not self.learning_rates
            or min(self.learning_rates) <= 0
            or len(set(self.learning_rates)) < len(self.learning_rates)
        ):
            raise ValueError(
                f"learning_rates={list(self.learning_rates)} must be different rates above 0, at least one"
            )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction={self.held_out_fraction} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class FinetuneProtocol:
    """The whole network and a linear classifier, trained on few labelled images (appendices A.4 and B.5)."""

    name: str
    num_classes: int
    subset: SubsetConfig
    epochs: int
    trunk_lr: float
    head_lr: float
    schedule: Schedule
    weight_decay: float = 0.0
    momentum: float = 0.9
    global_batch: int = 256  # images per step over all ranks
    from_scratch: bool = False  # forget the backbone's weights: the row without pretraining
    resize_px: int | None = None
    crop_px: int | None = None
    seed: int = 31
    runtime: EvaluationRuntime = EvaluationRuntime()

    def __post_init__(self) -> None:
        _check_training(self)
        if self.trunk_lr < 0 or self.head_lr <= 0:
            raise ValueError(f"fine-tuning needs trunk_lr >= 0 and head_lr > 0, got {self.trunk_lr} and {self.head_lr}")


Protocol = KnnProtocol | SvmProtocol | LinearProtocol | FinetuneProtocol


def _check_training(one: LinearProtocol | FinetuneProtocol) -> None:
    if min(one.num_classes - 1, one.epochs, one.global_batch) < 1 or one.weight_decay < 0 or not 0 <= one.momentum < 1:
        raise ValueError(
            "training a classifier needs num_classes >= 2, epochs >= 1, global_batch >= 1, weight_decay >= 0 and "
            f"momentum from 0 to below 1, got {one.num_classes}, {one.epochs}, {one.global_batch}, {one.weight_decay} "
            f"and {one.momentum}"
        )
    if isinstance(one.schedule, StepSchedule) and one.schedule.epochs and one.schedule.epochs[-1] >= one.epochs:
        raise ValueError(
            f"schedule.epochs={list(one.schedule.epochs)} must lie below epochs={one.epochs}; set both, for example "
            f"schedule.epochs=[{one.epochs / 2:g}]"
        )
