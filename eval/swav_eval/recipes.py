"""Every protocol by name, as the paper states it: ``get_protocol("linear_imagenet")``.

Imports without torch.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from swav.config import apply_overrides, to_json
from swav_eval.config import (
    CosineSchedule,
    FinetuneProtocol,
    KnnProtocol,
    LinearProtocol,
    Protocol,
    StepSchedule,
    SubsetConfig,
    SvmProtocol,
)

_PARTS = 4  # of a training with three drops of the rate at equal intervals (A.5)

# What a backbone is judged by where nothing else is asked for: knn is knn_20 and knn_200 at once, and the rows without
# pretraining take long and say nothing of a backbone.
STANDARD = (
    "knn",
    "svm_voc07",
    "linear_imagenet",
    "linear_places205",
    "linear_inat18",
    "semisup_1pct",
    "semisup_10pct",
    "lowshot_13",
    "lowshot_128",
)

T = TypeVar("T", bound=Protocol)


def knn_20() -> KnnProtocol:
    """Table 7: 20 nearest neighbours on ImageNet (B.6). Expect 59.2 for the best ResNet-50."""
    return KnnProtocol(name="knn_20", num_neighbors=(20,))


def knn_200() -> KnnProtocol:
    """Table 7: 200 nearest neighbours on ImageNet (B.6). Expect 55.8 for the best ResNet-50."""
    return KnnProtocol(name="knn_200", num_neighbors=(200,))


def knn() -> KnnProtocol:
    """Both columns of Table 7 from one pass over the images."""
    return KnnProtocol(name="knn")


def svm_voc07() -> SvmProtocol:
    """Table 3, VOC07: linear SVMs by LIBLINEAR, mean average precision (A.5). Expect 88.9 for the best ResNet-50.

    A.5 follows PIRL, which follows Goyal et al., 2019: features of unit norm, three-fold cross-validation of the cost
    of each class, its own images weighted twice.
    """
    return SvmProtocol(name="svm_voc07")


def linear_imagenet() -> LinearProtocol:
    """ImageNet (A.3), the number of Tables 2 and 8 to 10 and of Fig. 2. Expect 75.3 for the best ResNet-50.

    A.3 states no momentum; 0.9 is what A.5 has.
    """
    return LinearProtocol(
        name="linear_imagenet",
        num_classes=1000,
        epochs=100,
        learning_rates=(0.3,),
        schedule=CosineSchedule(),
        weight_decay=1e-6,
    )


def linear_places205() -> LinearProtocol:
    """Table 3, Places205 (A.5). Expect 56.7 for the best ResNet-50."""
    return _transfer("linear_places205", num_classes=205, epochs=28)


def linear_inat18() -> LinearProtocol:
    """Table 3, iNaturalist 2018 (A.5). Expect 48.6 for the best ResNet-50."""
    return _transfer("linear_inat18", num_classes=8142, epochs=84)


def semisup_1pct() -> FinetuneProtocol:
    """Fine-tuning on 1 % of ImageNet's labels (A.4). Expect top-1 53.9, top-5 78.5 (main paper)."""
    return _finetuned("semisup_1pct", SubsetConfig(fraction=0.01), trunk_lr=0.02, head_lr=5.0)


def semisup_10pct() -> FinetuneProtocol:
    """Fine-tuning on 10 % of ImageNet's labels (A.4). Expect top-1 70.2, top-5 89.9 (main paper)."""
    return _finetuned("semisup_10pct", SubsetConfig(fraction=0.1), trunk_lr=0.01, head_lr=0.2)


def lowshot_13() -> FinetuneProtocol:
    """Table 6: 13 images of each class, after pretraining on Instagram (B.5). Expect top-1 38.2, top-5 67.1.

    B.5 states no settings: 13 images are 1 % of ImageNet, so those of A.4 for 1 %.
    """
    return _finetuned("lowshot_13", SubsetConfig(per_class=13), trunk_lr=0.02, head_lr=5.0)


def lowshot_128() -> FinetuneProtocol:
    """Table 6: 128 images of each class, after pretraining on Instagram (B.5). Expect top-1 64.7, top-5 87.2.

    B.5 states no settings: 128 images are 10 % of ImageNet, so those of A.4 for 10 %.
    """
    return _finetuned("lowshot_128", SubsetConfig(per_class=128), trunk_lr=0.01, head_lr=0.2)


def lowshot_13_scratch() -> FinetuneProtocol:
    """Table 6: 13 images of each class and no pretraining (B.5). Expect top-1 25.4, top-5 48.4."""
    return _scratch("lowshot_13_scratch", per_class=13, epochs=1000)


def lowshot_128_scratch() -> FinetuneProtocol:
    """Table 6: 128 images of each class and no pretraining (B.5). Expect top-1 56.4, top-5 80.4."""
    return _scratch("lowshot_128_scratch", per_class=128, epochs=200)


def _transfer(name: str, *, num_classes: int, epochs: int) -> LinearProtocol:
    """A.5: learning rate 0.01, a tenth of it after each quarter of the epochs, decay 1e-4, momentum 0.9."""
    return LinearProtocol(
        name=name,
        num_classes=num_classes,
        epochs=epochs,
        learning_rates=(0.01,),
        schedule=StepSchedule(epochs=tuple(epochs * part / _PARTS for part in range(1, _PARTS)), factor=0.1),
        weight_decay=1e-4,
    )


def _finetuned(name: str, subset: SubsetConfig, *, trunk_lr: float, head_lr: float) -> FinetuneProtocol:
    """A.4: 20 epochs, both rates a fifth at epochs 12 and 16, no decay of the weights."""
    return FinetuneProtocol(
        name=name,
        num_classes=1000,
        subset=subset,
        epochs=20,
        trunk_lr=trunk_lr,
        head_lr=head_lr,
        schedule=StepSchedule(epochs=(12, 16), factor=0.2),
    )


def _scratch(name: str, *, per_class: int, epochs: int) -> FinetuneProtocol:
    """The row without pretraining, whose training the paper does not state.

    Few images want many epochs and a strong decay of the weights; one rate for all layers, and a cosine.
    """
    return FinetuneProtocol(
        name=name,
        num_classes=1000,
        subset=SubsetConfig(per_class=per_class),
        epochs=epochs,
        trunk_lr=0.1,
        head_lr=0.1,
        schedule=CosineSchedule(),
        weight_decay=1e-3,
        from_scratch=True,
    )


_PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    build.__name__: build
    for build in (
        linear_imagenet,
        linear_places205,
        linear_inat18,
        svm_voc07,
        knn,
        knn_20,
        knn_200,
        semisup_1pct,
        semisup_10pct,
        lowshot_13,
        lowshot_128,
        lowshot_13_scratch,
        lowshot_128_scratch,
    )
}


def protocol_names(kind: type[Any] | None = None) -> list[str]:
    """All names that :func:`get_protocol` takes, or those of one kind."""
    return [name for name, build in _PROTOCOLS.items() if kind is None or isinstance(build(), kind)]


def summary(name: str) -> str:
    """What a named protocol is, in a sentence."""
    return (_builder(name).__doc__ or "").partition("\n")[0]


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """What an evaluation's numbers depend on: all settings but the name and how it is carried out, as JSON has them."""
    settings: dict[str, Any] = json.loads(to_json(protocol))
    settings.pop("name")
    settings["precision"] = settings.pop("runtime")["precision"]
    return settings


def get_protocol(name: str) -> Protocol:
    """Build a named protocol.

    Raises:
        ValueError: there is none of this name; the message holds the nearest.
    """
    return _builder(name)()


def _builder(name: str) -> Callable[[], Protocol]:
    """What builds a named protocol.

    Raises:
        ValueError: there is none of this name; the message holds the nearest.
    """
    if name not in _PROTOCOLS:
        nearest = difflib.get_close_matches(name, _PROTOCOLS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown protocol {name!r}; the nearest of {len(_PROTOCOLS)} is {nearest!r}")
    return _PROTOCOLS[name]


def configure(name: str, kind: type[T], overrides: Iterable[str] = ()) -> T:
    """Build the protocol that a command line asks for; the launcher and the program both refuse what this refuses.

    Args:
        name: of the protocol.
        kind: of protocol that the program carries out.
        overrides: ``key=value`` settings.

    Raises:
        ValueError: an unknown protocol or setting, one of another kind, or a value that does not fit.
    """
    protocol = get_protocol(name)
    if not isinstance(protocol, kind):
        raise ValueError(f"protocol {name} is not one of this program's; choose from {', '.join(protocol_names(kind))}")
    return apply_overrides(protocol, list(overrides))


def configure_all(names: Iterable[str], overrides: Iterable[str] = ()) -> dict[str, Protocol]:
    """Build several protocols, by name.

    Args:
        names: of the protocols.
        overrides: ``key=value`` settings of all of them, ``PROTOCOL:key=value`` of one.

    Raises:
        ValueError: an unknown protocol or setting, one of a protocol that is not asked for, or a value that does not
            fit.
    """
    settings: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, colon, setting = override.partition(":")
        if not (colon and name in _PROTOCOLS):
            for own in settings.values():
                own.append(override)
        elif name in settings:
            settings[name].append(setting)
        else:
            raise ValueError(f"{override}: {name} is not asked for; leave it out, or add it to --protocols")
    return {name: apply_overrides(get_protocol(name), own) for name, own in settings.items()}
