"""Overrides, round trips and refusals of a run's configuration."""

import dataclasses
import re
from typing import Any

import pytest

from swav.config import (
    AugmentConfig,
    CropConfig,
    DataConfig,
    EvaluateConfig,
    Mocov2Config,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    QueueConfig,
    SimclrConfig,
    SinkhornConfig,
    SwavConfig,
    apply_overrides,
    differing_keys,
    from_json,
    to_json,
)


@pytest.fixture
def run() -> PretrainConfig:
    return PretrainConfig(
        name="test",
        method=SwavConfig(queue=QueueConfig(num_samples=512, start_epoch=3)),
        model=ModelConfig(),
        data=DataConfig(url="photos"),
        crops=(
            CropConfig(num_crops=2, size_px=224, scale=(0.14, 1.0)),
            CropConfig(num_crops=6, size_px=96, scale=(0.05, 0.14)),
        ),
        optim=OptimConfig(epochs=100),
        evaluate=EvaluateConfig(train_url="labelled"),
    )


def _get(run: PretrainConfig, path: str) -> Any:
    value: Any = run
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.epochs=200", 200),
        ("optim.base_lr=0.3", 0.3),
        ("optim.base_lr=3", 3.0),
        ("optim.weight_decay=1e-5", 1e-5),
        ("optim.exclude_bias_and_norm=true", True),
        ("model.arch=resnet18", "resnet18"),
        ("model.width=2", 2.0),
        ("method.sinkhorn.epsilon=0.03", 0.03),
        ("method.queue=null", None),
        ("method.queue.num_samples=1024", 1024),
        ("crops.1.num_crops=4", 4),
        ("crops.0.scale=[0.08, 1]", (0.08, 1.0)),
        ("evaluate.num_neighbors=[5]", (5,)),
        ("evaluate.test_url=held-out", "held-out"),
        ("seed=7", 7),
    ],
)
def test_override_is_read_as_its_field_wants_it(run: PretrainConfig, override: str, expected: object) -> None:
    changed = _get(apply_overrides(run, [override]), override.partition("=")[0])
    assert changed == expected
    assert type(changed) is type(expected)


def test_overrides_change_nothing_else_and_leave_the_original(run: PretrainConfig) -> None:
    before = to_json(run)
    changed = apply_overrides(run, ["optim.epochs=200", "crops.1.num_crops=4"])
    assert to_json(run) == before
    restored = dataclasses.replace(changed, optim=run.optim, crops=run.crops)
    assert restored == run


@pytest.mark.parametrize("text", ["2024", "true", "null", "1e3", "[1]", "s3://bucket/a=b"])
def test_text_fields_take_text_that_looks_like_something_else(run: PretrainConfig, text: str) -> None:
    assert apply_overrides(run, [f"data.url={text}"]).data.url == text


def test_later_override_wins(run: PretrainConfig) -> None:
    assert apply_overrides(run, ["seed=1", "seed=2"]).seed == 2


def test_whole_group_can_be_switched_on(run: PretrainConfig) -> None:
    bare = dataclasses.replace(run, evaluate=None)
    changed = apply_overrides(bare, ['evaluate={"train_url": "labelled"}'])
    assert changed.evaluate == EvaluateConfig(train_url="labelled")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.epoch=2", "optim.epochs"),
        ("optm.epochs=2", "optim.epochs"),
        ("crops.2.num_crops=2", "crops.1.num_crops"),
        ("method.sinkhorn.eps=0.1", "method.sinkhorn.epsilon"),
        ("sed=1", "seed"),
        ("optim.epochs.extra=1", "optim.epochs"),
    ],
)
def test_unknown_setting_names_the_nearest(run: PretrainConfig, override: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting .* the nearest is '{nearest}'"):
        apply_overrides(run, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.epochs=many", "optim.epochs='many'"),
        ("optim.epochs=1.5", "optim.epochs=1.5"),
        ("model.arch=resnet19", "model.arch='resnet19'"),
        ("crops.1.num_crops=0", "num_crops >= 1"),
        ("crops.0.scale=[0.5, 0.1]", "not a range inside"),
        ("method.sinkhorn.epsilon=0", "epsilon > 0"),
        ("optim.warmup_epochs=101", "shorten the warm-up"),
        ("optim.epochs", "not of the form key=value"),
        ('method={"kind": "swav", "prototypes": 3}', "prototypes"),
    ],
)
def test_value_that_does_not_fit_is_refused_with_its_place(run: PretrainConfig, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        apply_overrides(run, [override])


def test_json_round_trip_is_exact(run: PretrainConfig) -> None:
    changed = apply_overrides(run, ["optim.base_lr=0.1", "method.queue=null"])
    assert from_json(to_json(changed)) == changed


@pytest.mark.parametrize("place", ["optim", "data", "method"])
def test_json_with_an_unknown_key_is_refused(run: PretrainConfig, place: str) -> None:
    text = to_json(run).replace(f'"{place}": {{', f'"{place}": {{"colour": 1, ', 1)
    with pytest.raises(ValueError, match="colour"):
        from_json(text)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: CropConfig(num_crops=0, size_px=96, scale=(0.1, 1.0)), "num_crops >= 1"),
        (lambda: CropConfig(num_crops=2, size_px=4, scale=(0.1, 1.0)), "size_px >= 8"),
        (lambda: CropConfig(num_crops=2, size_px=96, scale=(0.0, 1.0)), "not a range"),
        (lambda: CropConfig(num_crops=2, size_px=96, scale=(0.1, 1.1)), "not a range"),
        (lambda: SinkhornConfig(epsilon=-1), "epsilon > 0"),
        (lambda: SinkhornConfig(num_iters=0), "num_iters >= 1"),
        (lambda: OptimConfig(epochs=-1), "optim.epochs at least 0"),
        (lambda: OptimConfig(epochs=5), "warmup_epochs=10"),
        (lambda: OptimConfig(epochs=20, global_batch=0), "at least 1"),
    ],
)
def test_bad_value_is_refused_where_it_is_written(build: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


def test_first_crop_group_needs_two_crops(run: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        dataclasses.replace(run, crops=(CropConfig(num_crops=1, size_px=224, scale=(0.14, 1.0)),))


def test_runs_are_frozen(run: PretrainConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]
    assert AugmentConfig() == run.augment


@pytest.mark.parametrize(
    ("batch", "limit", "expected"), [(4096, 512, 512), (2560, 512, 512), (1536, 512, 512), (250, 64, 50), (7, 512, 7)]
)
def test_lanes_are_the_largest_divisor_of_the_batch(run: PretrainConfig, batch: int, limit: int, expected: int) -> None:
    changed = apply_overrides(run, [f"optim.global_batch={batch}", f"data.lanes={limit}"])
    assert changed.num_lanes == expected


def test_a_setting_inside_a_group_that_is_null_is_refused(run: PretrainConfig) -> None:
    with pytest.raises(ValueError, match=r"cannot be set while method\.queue is null"):
        apply_overrides(run, ["method.queue=null", "method.queue.num_samples=3"])


def test_what_may_change_while_a_run_goes_on(run: PretrainConfig) -> None:
    changed = apply_overrides(
        run, ["data.url=elsewhere", "data.max_quarantined_fraction=0.5", "runtime.log_every_steps=3", "name=other"]
    )
    assert differing_keys(run, changed) == []
    changed = apply_overrides(run, ["optim.base_lr=0.5", "runtime.precision=fp16", "data.lanes=3"])
    assert differing_keys(run, changed) == ["data.lanes", "optim.base_lr", "precision"]


def test_another_method_is_set_whole(run: PretrainConfig) -> None:
    other = apply_overrides(run, ['method={"kind": "simclr", "temperature": 0.2}'])
    assert other.method == SimclrConfig(temperature=0.2)
    assert from_json(to_json(other)) == other
    assert "method.kind" in differing_keys(run, other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.kind=simclr", 'set it whole: method={"kind": "simclr"}'),
        ('method={"kind": "simcl"}', "expected tags: 'swav', 'simclr', 'mocov2'"),
        ('method={"kind": "simclr", "temperature": 0}', "simclr needs temperature > 0, got 0.0"),
        ('method={"kind": "simclr", "queue": 1}', "method.queue=1: Unexpected keyword argument"),
    ],
)
def test_a_method_that_cannot_be_is_refused(run: PretrainConfig, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_overrides(run, [override])


def test_settings_of_a_group_that_was_set_whole_can_be_set_after_it(run: PretrainConfig) -> None:
    whole, two_crops = 'method={"kind":"mocov2"}', 'crops=[{"num_crops":2,"size_px":48,"scale":[0.2,1.0]}]'
    for first, second in ((whole, two_crops), (two_crops, whole)):
        found = apply_overrides(run, [first, second, "method.momentum=0.5", "crops.0.size_px=64"])
        assert found.method == Mocov2Config(momentum=0.5)
        assert found.crops[0].size_px == 64
    with pytest.raises(ValueError, match=r"unknown setting 'method\.num_prototypes'"):
        apply_overrides(run, [two_crops, whole, "method.num_prototypes=9"])
