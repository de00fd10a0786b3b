import pytest

from swav_eval.config import (
    CosineSchedule,
    FinetuneProtocol,
    KnnProtocol,
    LinearProtocol,
    StepSchedule,
    SubsetConfig,
    SvmProtocol,
)
from swav_eval.recipes import configure, get_protocol, protocol_names, summary


def test_linear_imagenet_is_appendix_a3() -> None:
    assert get_protocol("linear_imagenet") == LinearProtocol(
        name="linear_imagenet",
        num_classes=1000,
        epochs=100,
        learning_rates=(0.3,),
        schedule=CosineSchedule(),
        weight_decay=1e-6,
        momentum=0.9,
        global_batch=256,
        augment=True,
    )


@pytest.mark.parametrize(
    ("name", "classes", "epochs", "drops"),
    [("linear_places205", 205, 28, (7, 14, 21)), ("linear_inat18", 8142, 84, (21, 42, 63))],
)
def test_transfers_are_appendix_a5(name: str, classes: int, epochs: int, drops: tuple[int, ...]) -> None:
    assert get_protocol(name) == LinearProtocol(
        name=name,
        num_classes=classes,
        epochs=epochs,
        learning_rates=(0.01,),
        schedule=StepSchedule(epochs=drops, factor=0.1),
        weight_decay=1e-4,
        momentum=0.9,
        global_batch=256,
    )


@pytest.mark.parametrize(
    ("name", "subset", "trunk_lr", "head_lr"),
    [
        ("semisup_1pct", SubsetConfig(fraction=0.01), 0.02, 5),
        ("semisup_10pct", SubsetConfig(fraction=0.1), 0.01, 0.2),
        ("lowshot_13", SubsetConfig(per_class=13), 0.02, 5),
        ("lowshot_128", SubsetConfig(per_class=128), 0.01, 0.2),
    ],
)
def test_fine_tuning_is_appendix_a4(name: str, subset: SubsetConfig, trunk_lr: float, head_lr: float) -> None:
    assert get_protocol(name) == FinetuneProtocol(
        name=name,
        num_classes=1000,
        subset=subset,
        epochs=20,
        trunk_lr=trunk_lr,
        head_lr=head_lr,
        schedule=StepSchedule(epochs=(12, 16), factor=0.2),
        weight_decay=0.0,
        global_batch=256,
    )


def test_low_shot_learning_without_pretraining_has_the_same_images() -> None:
    for number in (13, 128):
        run, scratch = get_protocol(f"lowshot_{number}"), get_protocol(f"lowshot_{number}_scratch")
        assert isinstance(run, FinetuneProtocol)
        assert isinstance(scratch, FinetuneProtocol)
        assert (run.subset, run.seed, run.from_scratch) == (scratch.subset, scratch.seed, False)
        assert scratch.from_scratch


def test_neighbours_are_table_7s() -> None:
    found = [get_protocol(name) for name in ("knn_20", "knn_200", "knn")]
    assert [one.num_neighbors for one in found if isinstance(one, KnnProtocol)] == [(20,), (200,), (20, 200)]


def test_every_protocol_says_what_it_is() -> None:
    assert all(summary(name).endswith(".") for name in protocol_names())
    assert protocol_names(SvmProtocol) == ["svm_voc07"]
    assert len(protocol_names()) == 13


def test_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown protocol 'linear_imagnet'; the nearest of 13 is 'linear_imagenet'"):
        get_protocol("linear_imagnet")
    with pytest.raises(ValueError, match="not one of this program's; choose from svm_voc07"):
        configure("knn", SvmProtocol)
