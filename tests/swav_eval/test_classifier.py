import contextlib
import logging
import os
import signal
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from swav_testing.oracles import classifier_steps
from swav_testing.ranks import run_ranks
from swav_testing.runs import write_scenes
from torch import Tensor, nn

from swav.checkpoint import checkpoint_steps
from swav.data.batch import NO_LABEL
from swav.data.source import open_dataset
from swav.distributed import rank, world_size
from swav.models.resnet import ResNet
from swav.partition import share
from swav.program import Stopped
from swav_eval.classifier import Classifier, Trained, rate_factor, train_classifier
from swav_eval.config import FinetuneProtocol, LinearProtocol
from swav_eval.labelled_data import FeatureBatches, LabelledBatch, OrderOfIds
from swav_eval.recipes import configure, get_protocol
from swav_eval.training_report import RateGroup

CPU = torch.device("cpu")
NUM, DIM, CLASSES = 103, 6, 4
DRAWS = np.random.default_rng(8)
VALUES = DRAWS.normal(size=(NUM, DIM)).astype(np.float32)
LABELS = DRAWS.integers(0, CLASSES, NUM)
SETTINGS = (f"num_classes={CLASSES}", "global_batch=24", "epochs=4", "runtime.checkpoint_every_steps=3")
STEPS = 5 * 4


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


def protocol(*overrides: str) -> LinearProtocol:
    return configure("linear_imagenet", LinearProtocol, [*SETTINGS, *overrides])


def heads_of(num: int, *, double: bool = True) -> Classifier:
    made = Classifier(nn.Identity(), DIM, CLASSES, num_heads=num, seed=31, is_frozen=True)
    return made.double() if double else made


def groups_of(classifier: Classifier, rates: tuple[float, ...]) -> list[RateGroup]:
    return [
        RateGroup("learning_rates", rate, list(head.parameters()))
        for rate, head in zip(rates, classifier.heads, strict=True)
    ]


class StoppingBatches:
    """Passes batches on, and asks this process to stop before a step of the whole run."""

    def __init__(self, batches: Any, before: int) -> None:
        self._batches, self._before = batches, before
        self.num_samples, self.num_steps = batches.num_samples, batches.num_steps

    def epoch(self, epoch: int, start_step: int) -> Generator[LabelledBatch]:
        for number, batch in enumerate(self._batches.epoch(epoch, start_step)):
            if epoch * self.num_steps + start_step + number + 1 == self._before and rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def train_heads(
    data: str,
    cache: str,
    *overrides: str,
    folder: str | None = None,
    stop_before: int | None = None,
    double: bool = True,
    identity: str = "this",
) -> tuple[list[Tensor], list[bool]]:
    """Weights and biases of the heads after a training on the features above, or as far as it got."""
    os.environ["SWAV_CACHE"] = cache
    settings = protocol(*overrides)
    classifier = heads_of(len(settings.learning_rates), double=double)
    batches: Any = FeatureBatches(
        open_dataset(data), np.arange(NUM), VALUES, LABELS, chosen=np.arange(NUM), protocol=settings, device=CPU
    )
    if stop_before is not None:
        batches = StoppingBatches(batches, stop_before)
    trained = Trained(0, [])
    with contextlib.suppress(Stopped) if stop_before is not None else contextlib.nullcontext():
        trained = train_classifier(
            classifier,
            batches,
            groups_of(classifier, settings.learning_rates),
            settings,
            device=CPU,
            folder=folder,
            identity={"evaluation": identity},
        )
    return [parameter.detach().clone() for parameter in classifier.heads.parameters()], trained.has_diverged


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"))


def oracle(data: Path, settings: LinearProtocol, rate: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The whole training of one head by loops in float64."""
    index, num_steps = open_dataset(str(data)), 5
    batches, rates = [], []
    for epoch in range(settings.epochs):
        order = OrderOfIds(index, np.arange(NUM), seed=settings.seed, epoch=epoch, global_batch=24)
        batches += [order.rank_batch(step, 0, 1)[0] for step in range(num_steps)]
    total = len(batches)
    for step in range(total):
        if settings.schedule.kind == "cosine":
            rates.append(rate * (1 + np.cos(np.pi * step / total)) / 2)
        else:
            passed = sum(step / num_steps >= epoch for epoch in settings.schedule.epochs)
            rates.append(rate * settings.schedule.factor**passed)
    start = heads_of(1).heads[0]
    return classifier_steps(
        start.weight.detach().numpy().copy(),
        start.bias.detach().numpy().copy(),
        [(VALUES[rows].astype(np.float64), LABELS[rows]) for rows in batches],
        rates=rates,
        momentum=settings.momentum,
        decay=settings.weight_decay,
    )


STEP_SCHEDULE = 'schedule={"kind":"steps","epochs":[1,2.4],"factor":0.2}'


@pytest.mark.parametrize("schedule", ["momentum=0.9", STEP_SCHEDULE])
def test_a_training_is_that_of_the_oracle(data: Path, cache: Path, schedule: str) -> None:
    """In float64, so that only the order of sums differs."""
    settings = ("learning_rates=[0.3]", "weight_decay=0.01", schedule)
    (weight, bias), _ = train_heads(str(data), str(cache), *settings)
    expected_weight, expected_bias = oracle(data, protocol(*settings), 0.3)
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=0, atol=1e-12)
    np.testing.assert_allclose(bias.numpy(), expected_bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("double", [True, False])
def test_each_of_several_rates_trains_as_it_would_alone(data: Path, cache: Path, double: bool) -> None:
    rates = (0.01, 3.0, 0.3)
    together, _ = train_heads(str(data), str(cache), f"learning_rates={list(rates)}", double=double)
    for number, rate in enumerate(rates):
        alone, _ = train_heads(str(data), str(cache), f"learning_rates=[{rate}]", double=double)
        assert torch.equal(together[2 * number], alone[0])
        assert torch.equal(together[2 * number + 1], alone[1])
    assert not torch.equal(together[0], together[2])


def test_any_number_of_ranks_trains_the_same(data: Path, cache: Path) -> None:
    settings = ("learning_rates=[0.3,1.0]", STEP_SCHEDULE)
    expected, _ = train_heads(str(data), str(cache), *settings)
    for world in (2, 4):
        for weights, _ in run_ranks(world, train_heads, str(data), str(cache), *settings):
            for one, other in zip(weights, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class UnevenBatches:
    """One batch, twice, whose images without label are all on one rank, and once none has one."""

    num_samples, num_steps = 10, 1

    def epoch(self, epoch: int, start_step: int) -> Generator[LabelledBatch]:
        labels = torch.from_numpy(LABELS[:10].copy())
        labels[: (4, 10, 4)[epoch]] = NO_LABEL
        first, last = share(10, rank(), world_size())
        for _ in range(start_step, 1):
            own = torch.from_numpy(VALUES[first:last])
            yield LabelledBatch(own, labels[first:last], 10, int((labels[first:last] == NO_LABEL).sum()))


def train_uneven() -> tuple[list[Tensor], int]:
    settings = protocol("learning_rates=[0.5]", "epochs=3", "weight_decay=0.1")
    classifier = heads_of(1)
    trained = train_classifier(
        classifier,
        UnevenBatches(),
        groups_of(classifier, (0.5,)),
        settings,
        device=CPU,
        folder=None,
        identity={},
    )
    return [parameter.detach() for parameter in classifier.parameters()], trained.num_broken


def test_images_without_label_leave_the_mean_of_all_ranks() -> None:
    start = heads_of(1).heads[0]
    batches = [(VALUES[k:10].astype(np.float64), LABELS[k:10]) for k in (4, 10, 4)]
    rates = [0.5 * (1 + np.cos(np.pi * step / 3)) / 2 for step in range(3)]
    expected = classifier_steps(
        start.weight.detach().numpy().copy(),
        start.bias.detach().numpy().copy(),
        batches,
        rates=rates,
        momentum=0.9,
        decay=0.1,
    )
    for weights, num_broken in [train_uneven(), *run_ranks(3, train_uneven)]:
        assert num_broken == 4  # of the last epoch
        np.testing.assert_allclose(weights[0].numpy(), expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(weights[1].numpy(), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "base", "drops"),
    [
        ("linear_places205", 0.01, {0: 1, 7: 1e-1, 14: 1e-2, 21: 1e-3}),
        ("linear_inat18", 0.01, {0: 1, 21: 1e-1, 42: 1e-2, 63: 1e-3}),
        ("semisup_1pct", 5.0, {0: 1, 12: 0.2, 16: 0.04}),
        ("semisup_10pct", 0.2, {0: 1, 12: 0.2, 16: 0.04}),
    ],
)
def test_rates_drop_when_the_paper_says(name: str, base: float, drops: dict[int, float]) -> None:
    steps_per_epoch = 37
    made = get_protocol(name)
    assert isinstance(made, LinearProtocol | FinetuneProtocol)
    found = [base * rate_factor(made, step, steps_per_epoch) for step in range(made.epochs * steps_per_epoch)]
    expected = np.empty(made.epochs * steps_per_epoch)
    for epoch, factor in drops.items():
        expected[epoch * steps_per_epoch :] = base * factor
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_imagenets_rate_is_a_cosine_to_zero() -> None:
    made = get_protocol("linear_imagenet")
    assert isinstance(made, LinearProtocol)
    total = made.epochs * 50
    found = [0.3 * rate_factor(made, step, 50) for step in range(total)]
    np.testing.assert_allclose(found, 0.15 * (1 + np.cos(np.pi * np.arange(total) / total)), rtol=0, atol=1e-15)
    assert found[0] == 0.3
    assert 0 < found[-1] < 1e-7


@pytest.mark.parametrize("stop_before", [2, 5, 11, STEPS])  # in an epoch, at ends of epochs, and at the end of all
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, data: Path, cache: Path, stop_before: int) -> None:
    settings = ("learning_rates=[0.3,1.0]",)
    expected, _ = train_heads(str(data), str(cache), *settings)
    folder = str(tmp_path / "checkpoints")
    train_heads(str(data), str(cache), *settings, folder=folder, stop_before=stop_before)
    assert checkpoint_steps(folder)[0] == stop_before
    found, _ = train_heads(str(data), str(cache), *settings, folder=folder)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def resumed(data: str, cache: str, folder: str, stop_before: int | None) -> list[Tensor]:
    return train_heads(data, cache, "learning_rates=[0.3]", folder=folder, stop_before=stop_before)[0]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_another_number_of_ranks_goes_on(tmp_path: Path, data: Path, cache: Path, before: int, after: int) -> None:
    (weight, bias), _ = train_heads(str(data), str(cache), "learning_rates=[0.3]")
    folder = str(tmp_path / "checkpoints")
    run_ranks(before, resumed, str(data), str(cache), folder, 7)
    assert checkpoint_steps(folder)[0] == 7
    for found in run_ranks(after, resumed, str(data), str(cache), folder, None):
        torch.testing.assert_close(found[0], weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], bias, rtol=0, atol=1e-12)


def test_a_checkpoint_of_another_evaluation_is_left_aside(
    tmp_path: Path, data: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, rate = str(tmp_path / "checkpoints"), "learning_rates=[0.3]"
    expected, _ = train_heads(str(data), str(cache), rate)
    train_heads(str(data), str(cache), rate, folder=folder, stop_before=7, identity="another")
    found, _ = train_heads(str(data), str(cache), rate, folder=folder)
    assert "checkpoint of step 7 in" in caplog.text
    assert "is of another evaluation (evaluation differ)" in caplog.text
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_without_a_folder_a_stop_says_that_nothing_is_kept(data: Path, cache: Path) -> None:
    settings = protocol()
    classifier = heads_of(1)
    batches = FeatureBatches(
        open_dataset(str(data)), np.arange(NUM), VALUES, LABELS, chosen=np.arange(NUM), protocol=settings, device=CPU
    )
    with pytest.raises(Stopped, match="after step 3 of 20; without --output or --work nothing is kept"):
        train_classifier(
            classifier,
            StoppingBatches(batches, 3),
            groups_of(classifier, settings.learning_rates),
            settings,
            device=CPU,
            folder=None,
            identity={},
        )


def test_a_training_that_diverges_names_its_rate(data: Path, cache: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"diverged, with .* at step .*; give lower rates than learning_rates=1e\+300"
    ):
        train_heads(str(data), str(cache), "learning_rates=[1e300]")


def test_one_rate_that_diverges_does_not_stop_the_others(
    data: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        weights, has_diverged = train_heads(str(data), str(cache), "learning_rates=[1e300,0.3]")
    assert has_diverged == [True, False]
    assert "with learning_rates=1e+300 the training has diverged at step" in caplog.text
    alone, _ = train_heads(str(data), str(cache), "learning_rates=[0.3]")
    assert torch.equal(weights[2], alone[0])


def small_network() -> ResNet:
    torch.manual_seed(3)
    return ResNet("resnet18", width=0.125, stem="3x3")


def step_on_images(classifier: Classifier, groups: list[RateGroup], settings: Any) -> None:
    class OneBatch:
        num_samples, num_steps = 8, 1

        def epoch(self, epoch: int, start_step: int) -> Generator[LabelledBatch]:
            images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            yield LabelledBatch(images, torch.arange(8) % CLASSES, 8, 0)

    train_classifier(classifier, OneBatch(), groups, settings, device=CPU, folder=None, identity={})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_network_stays_as_it_is_to_the_bit(precision: str) -> None:
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    classifier = Classifier(network, network.num_features, CLASSES, num_heads=1, seed=1, is_frozen=True)
    head = classifier.heads[0].weight.detach().clone()
    settings = protocol("learning_rates=[0.3]", "weight_decay=0.1", f"runtime.precision={precision}")
    step_on_images(classifier, groups_of(classifier, (0.3,)), settings)
    assert not torch.equal(classifier.heads[0].get_parameter("weight"), head)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_that_is_not_frozen_moves_by_its_own_rate() -> None:
    settings = configure("semisup_1pct", FinetuneProtocol, [f"num_classes={CLASSES}", "global_batch=8"])
    moved = {}
    for trunk_lr in (0.0, 0.02):
        network = small_network()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        classifier = Classifier(network, network.num_features, CLASSES, num_heads=1, seed=1, is_frozen=False)
        groups = [
            RateGroup("trunk_lr", trunk_lr, list(network.parameters())),
            RateGroup("head_lr", 0.1, list(classifier.heads.parameters())),
        ]
        step_on_images(classifier, groups, replace(settings, epochs=17))
        moved[trunk_lr] = {
            name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])
        }
    statistics = {name for name in before if "running" in name or "tracked" in name}
    assert moved[0.0] == statistics
    assert moved[0.02] == set(before)


def test_heads_are_equal_and_do_not_depend_on_what_was_drawn() -> None:
    torch.manual_seed(1)
    one = heads_of(2, double=False)
    torch.manual_seed(2)
    other = heads_of(1, double=False)
    assert torch.equal(one.heads[0].get_parameter("weight"), one.heads[1].get_parameter("weight"))
    assert torch.equal(one.heads[0].get_parameter("weight"), other.heads[0].get_parameter("weight"))
    assert not other.heads[0].bias.any()
    large = Classifier(nn.Identity(), 512, 100, num_heads=1, seed=3, is_frozen=True).heads[0].weight
    assert float(large.detach().std()) == pytest.approx(0.01, rel=0.02)
