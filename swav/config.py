"""A run as a frozen value: every setting, its unit, and where the paper states it.

Imports without torch, so that recipes and overrides are checked where a job is submitted.
"""

import difflib
import json
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

# Of ImageNet's colours, in 0..1; every image is normalised by them.
COLOUR_MEAN = (0.485, 0.456, 0.406)
COLOUR_STD = (0.229, 0.224, 0.225)

CHECKED = ConfigDict(extra="forbid")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class CropConfig:
    """One group of equal-size crops (appendix A.2)."""

    num_crops: int
    size_px: int
    scale: tuple[float, float]  # area fraction, as RandomResizedCrop takes it

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.num_crops < 1 or self.size_px < 8:
            raise ValueError(
                f"a crop group needs num_crops >= 1 and size_px >= 8, got {self.num_crops} and {self.size_px}"
            )
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop scale {self.scale} is not a range inside (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class AugmentConfig:
    """Flip, colour distortion and blur (appendix A.2, which follows SimCLR)."""

    flip_probability: float = 0.5
    jitter_strength: float = 1.0  # scales brightness, contrast, saturation 0.8 and hue 0.2
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class ModelConfig:
    """Backbone and projection head (appendix A.1, Table 2)."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    width: float = 1.0  # multiplies every layer's channels: 2, 4 and 5 in Table 2
    stem: Literal["7x7", "3x3"] = "7x7"  # 3x3: stride 1 and no max-pooling, for 32x32 images
    head_hidden: int = 2048
    head_batch_norm: bool = True
    embedding_dim: int = 128


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SinkhornConfig:
    """Sinkhorn-Knopp (appendix A.1, Table 10)."""

    epsilon: float = 0.05
    num_iters: int = 3

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.num_iters < 1:
            raise ValueError(f"sinkhorn needs epsilon > 0 and num_iters >= 1, got {self.epsilon} and {self.num_iters}")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class QueueConfig:
    """Embeddings of earlier batches that join the Sinkhorn of a small batch (appendix A.6)."""

    num_samples: int  # of the global queue
    start_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SwavConfig:
    """SwAV (appendix A.1)."""

    kind: Literal["swav"] = "swav"
    num_prototypes: int = 3000
    temperature: float = 0.1
    sinkhorn: SinkhornConfig = SinkhornConfig()
    codes: Literal["soft", "hard"] = "soft"  # Table 9, right
    learn_prototypes: bool = True  # Table 9, left
    freeze_prototypes_epochs: int = 1
    queue: QueueConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SimclrConfig:
    """SimCLR with multi-crop (appendix A.8)."""

    kind: Literal["simclr"] = "simclr"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"simclr needs temperature > 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class Mocov2Config:
    """MoCo-v2, with its authors' settings for 256 images per step."""

    kind: Literal["mocov2"] = "mocov2"
    temperature: float = 0.2
    momentum: float = 0.999  # of the key's encoder
    queue_samples: int = 65_536

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.momentum <= 1 or self.queue_samples < 1:
            raise ValueError(
                "mocov2 needs temperature > 0, momentum from 0 to 1 and queue_samples >= 1, got "
                f"{self.temperature}, {self.momentum} and {self.queue_samples}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class DeepClusterV2Config:
    """DeepCluster-v2 (appendix D): predict the clusters of the last epoch's features."""

    kind: Literal["deepclusterv2"] = "deepclusterv2"
    num_prototypes: int = 3000  # of each set: clusters of one k-means
    num_sets: int = 3
    temperature: float = 0.1
    num_iters: int = 10  # of k-means
    stale_epochs: Literal[0, 1] = 0  # 1, not the paper's: train on the labels before last while new ones are made

    def __post_init__(self) -> None:
        _check_offline(self.kind, self.num_prototypes, self.num_sets, self.num_iters, self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SelaV2Config:
    """SeLa-v2 (appendix D): predict an equal partition of the last epoch's features, and learn its prototypes."""

    kind: Literal["selav2"] = "selav2"
    num_prototypes: int = 3000  # of each set
    num_sets: int = 3
    temperature: float = 0.1
    epsilon: float = 0.004  # temperature / lambda, with SeLa's own lambda of 25; labels are the largest entries
    tolerance: float = 0.01  # of the partition: the largest deviation of a prototype's share, relative to it
    num_iters: int = 1000  # of Sinkhorn-Knopp, at most
    freeze_prototypes_epochs: int = 1
    stale_epochs: Literal[0, 1] = 0  # as DeepCluster-v2's

    def __post_init__(self) -> None:
        _check_offline(self.kind, self.num_prototypes, self.num_sets, self.num_iters, self.temperature)
        if self.epsilon < 0.001 or self.tolerance <= 0:
            raise ValueError(
                f"selav2 needs epsilon >= 0.001 and tolerance > 0, got {self.epsilon} and {self.tolerance}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class SupervisedConfig:
    """Cross-entropy with the true labels: the baseline that has them."""

    kind: Literal["supervised"] = "supervised"
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"supervised needs num_classes >= 2, got {self.num_classes}")


def _check_offline(kind: str, num_prototypes: int, num_sets: int, num_iters: int, temperature: float) -> None:
    if min(num_prototypes, num_sets, num_iters) < 1 or temperature <= 0:
        raise ValueError(
            f"{kind} needs num_prototypes, num_sets and num_iters >= 1 and temperature > 0, got {num_prototypes}, "
            f"{num_sets}, {num_iters} and {temperature}"
        )


MethodConfig = SwavConfig | SimclrConfig | Mocov2Config | DeepClusterV2Config | SelaV2Config | SupervisedConfig


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class DataConfig:
    """Where the images are and in which order they come."""

    url: str  # a folder of images, a folder of webdataset tars, or "demo"
    # Images that count as an epoch wherever a setting is in epochs, for data that are never seen to their end; rounded
    # down to whole batches. None: an epoch is a pass over all images.
    epoch_images: int | None = None
    lanes: int = 512  # upper limit; the largest divisor of the global batch below it is used
    window_chunks: int = 16
    max_quarantined_fraction: float = 0.001  # above this share of broken images, and above 10 of them, the run stops


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class OptimConfig:
    """The optimiser and its schedule (appendix A.1)."""

    optimizer: Literal["lars", "sgd"] = "lars"  # sgd: momentum and decay alone, as MoCo-v2 is trained
    global_batch: int = 4096  # images per step over all ranks
    epochs: int  # 0: the untrained backbone, "random" in the tables
    warmup_epochs: float = 10
    start_lr: float = 0.0
    base_lr: float = 4.8
    final_lr: float = 0.0048
    weight_decay: float = 1e-6
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    exclude_bias_and_norm: bool = False  # from adaptation and decay; the paper excludes nothing

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.epochs < 0:
            raise ValueError(
                "optim.global_batch must be at least 1 and optim.epochs at least 0, got "
                f"{self.global_batch} and {self.epochs}"
            )
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.warmup_epochs} is not between 0 and optim.epochs={self.epochs}; "
                "shorten the warm-up with the run"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class EvaluateConfig:
    """k-NN on labelled images while and after training (appendix B.6)."""

    train_url: str
    test_url: str | None = None  # None: leave one out of the train images
    every_epochs: int = 0  # 0: at the end only
    num_neighbors: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    resize_px: int = 256  # shorter side, before the centre crop
    crop_px: int = 224
    baselines: bool = False  # also raw pixels and the untrained backbone

    def __post_init__(self) -> None:
        if not self.num_neighbors or min(self.num_neighbors) < 1 or self.temperature <= 0:
            raise ValueError(
                "k-NN needs numbers of neighbours of at least 1 and a temperature above 0, got "
                f"{list(self.num_neighbors)} and {self.temperature}"
            )
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(
                f"an evaluation cuts crop_px={self.crop_px} out of images resized to resize_px={self.resize_px}; "
                "crop_px must be from 1 to resize_px"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class RuntimeConfig:
    """How the run is carried out; nothing here changes what is computed, precision apart."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    sync_batch_norm: bool = True
    sync_batch_norm_group: int = 0  # ranks that share statistics; 0: all
    channels_last: bool = True
    compile: bool = False
    loader_threads: int = 0  # 0: the cores this rank may use
    fetch_bytes: int = 8_000_000  # of neighbouring samples, aimed at in one request to an object store
    cache_bytes: int = 0  # disk for what comes from an object store, shared by a host's ranks; 0: half of what is free
    collective_timeout_seconds: float = 120.0  # after which a peer that is silent counts as lost
    labels_timeout_seconds: float = (
        3600.0  # for an assigner to make an epoch's labels; the run then ends, and can go on
    )
    stalled_after_seconds: float = 600.0  # without a step; the rank then ends and shows where every thread stood
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2
    log_every_steps: int = 10


@dataclass(frozen=True, kw_only=True, slots=True, config=CHECKED)
class PretrainConfig:
    """One pretraining run."""

    name: str
    method: Annotated[MethodConfig, Field(discriminator="kind")]
    model: ModelConfig
    data: DataConfig
    crops: tuple[CropConfig, ...]  # the first group holds the crops that get codes
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig
    evaluate: EvaluateConfig | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    seed: int = 31

    def __post_init__(self) -> None:
        predict_each_other = isinstance(self.method, SwavConfig | SimclrConfig | Mocov2Config)
        if not self.crops or (predict_each_other and self.crops[0].num_crops < 2):
            raise ValueError("crops: the first group holds the crops that predict each other, and needs at least 2")
        if isinstance(self.method, Mocov2Config) and (len(self.crops) > 1 or self.crops[0].num_crops != 2):
            raise ValueError(
                "crops: MoCo-v2 takes one group of two crops, a query and a key; set crops=[{...}] with num_crops 2"
            )

        wanted = self.data.epoch_images
        if wanted is not None and self.offline is not None and self.offline.stale_epochs:
            raise ValueError(
                "method.stale_epochs=1 needs epochs that are passes over all images: with data.epoch_images the labels "
                "before last are of other images; set one of them to its default"
            )
        if wanted is not None and wanted < self.optim.global_batch:
            raise ValueError(
                f"data.epoch_images={wanted} is less than one batch, optim.global_batch={self.optim.global_batch}"
            )

    @property
    def offline(self) -> DeepClusterV2Config | SelaV2Config | None:
        """The method, if its labels are made by an assigner between the epochs."""
        return self.method if isinstance(self.method, DeepClusterV2Config | SelaV2Config) else None

    @property
    def num_lanes(self) -> int:
        """The largest divisor of the global batch that is at most ``data.lanes``."""
        limit = min(self.data.lanes, self.optim.global_batch)
        return next(lanes for lanes in range(limit, 0, -1) if self.optim.global_batch % lanes == 0)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(config: object) -> str:
    """A run, or another dataclass of settings, as JSON; :func:`from_json` reads it back."""
    return _adapter(type(config)).dump_json(config, indent=2).decode() + "\n"


def from_json(text: str) -> PretrainConfig:
    """Read what :func:`to_json` wrote of a run.

    Raises:
        ValueError: a key is unknown, missing, or of the wrong type.
    """
    return _validate(PretrainConfig, json.loads(text))


def apply_overrides(config: T, overrides: list[str]) -> T:
    """Apply ``key=value`` settings, for example ``optim.epochs=2`` or ``crops.1.num_crops=4``.

    Values are read as JSON where they parse as JSON and as text otherwise (text settings always as text), then checked
    against the field's type.

    Args:
        config: a run, or another dataclass of settings.
        overrides: applied in their order.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value that does not fit.
    """
    kind = type(config)
    tree = _adapter(kind).dump_python(config, mode="json")
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            names = (name for name, _ in _settings(config))
            example = next(name for name in names if name.rpartition(".")[2] in ("epochs", "num_classes", "resize_px"))
            raise ValueError(f"override {override!r} is not of the form key=value, for example {example}=2")
        if path.endswith(".kind"):
            group = path.removesuffix(".kind")
            raise ValueError(
                f'{override}: a {group} comes with its settings; set it whole: {group}={{"kind": "{text}"}}'
            )
        *parents, last = path.split(".")
        node: Any = tree
        for part in parents:
            node = _step(node, part, path, config)
        _step(node, last, path, config)
        place = int(last) if isinstance(node, list) else last
        node[place] = text if isinstance(node[place], str) else _parse(text)
        if isinstance(node[place], dict | list):
            tree = _with_defaults(kind, tree)
    return _validate(kind, tree)


def _with_defaults(kind: type[T], tree: Any) -> Any:
    """The tree with all settings of a group that was set whole; as it is where a later override is needed first."""
    try:
        return _adapter(kind).dump_python(_adapter(kind).validate_python(tree), mode="json")
    except ValidationError:
        return tree


def differing_keys(one: PretrainConfig, other: PretrainConfig) -> list[str]:
    """Settings that change what is computed and differ between two runs.

    How a run is carried out (``runtime``, precision apart), where its images lie, how many of them may be broken, its
    name and its evaluation may change while it runs.
    """
    trees = [_adapter(PretrainConfig).dump_python(config, mode="json") for config in (one, other)]
    for tree in trees:
        tree["precision"] = tree.pop("runtime")["precision"]
        tree["data"] = {
            key: value for key, value in tree["data"].items() if key in ("epoch_images", "lanes", "window_chunks")
        }
        tree.pop("name")
        tree.pop("evaluate")
    flat_one, flat_other = (dict(_flatten(tree)) for tree in trees)
    return sorted(key for key in flat_one | flat_other if flat_one.get(key) != flat_other.get(key))


def _flatten(tree: Any, prefix: str = "") -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _step(node: Any, part: str, path: str, config: object) -> Any:
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, dict) and part in node:
        return node[part]
    if node is None:
        group = path.removesuffix(f".{part}")
        raise ValueError(f"{path} cannot be set while {group} is null; set {group} whole, as a JSON object")
    known = [name for name, _ in _settings(config)]
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    raise ValueError(f"unknown setting {path!r}; the nearest is {nearest[0]!r}")


def _settings(value: Any, prefix: str = "") -> Any:
    """Every settable key, with its value."""
    if is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        return
    for name, child in children:
        yield prefix + name, child
        yield from _settings(child, f"{prefix}{name}.")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _validate(kind: type[T], tree: Any) -> T:
    try:
        checked: T = _adapter(kind).validate_python(tree)
        return checked
    except ValidationError as error:
        raise ValueError("; ".join(_describe(problem["loc"], problem) for problem in error.errors())) from None


def _describe(place: tuple[int | str, ...], problem: Any) -> str:
    if place[:1] == ("method",) and len(place) > 2:  # after which pydantic names the kind of method
        place = (place[0], *place[2:])
    name = ".".join(map(str, place)) or "run"
    if isinstance(problem["input"], dict):
        return f"{name}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{name}={problem['input']!r}: {problem['msg']}"
