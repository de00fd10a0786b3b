from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from swav_testing.banks import contents, make_config
from swav_testing.ranks import run_ranks
from swav_testing.runs import tiny_config, write_scenes
from swav_testing.shards import write_tar

from swav import labelling as labelling_module
from swav.assign import assign
from swav.bank.files import bank_folder, labels_folder
from swav.bank.layout import bank_layout
from swav.bank.reader import BankReader, with_features
from swav.config import DeepClusterV2Config, MethodConfig, PretrainConfig, SelaV2Config, SupervisedConfig
from swav.data.augment import Augment
from swav.data.batch import NO_LABEL
from swav.data.index import open_index
from swav.labelling import HandOver, TrueLabels, Unlabelled
from swav.methods.offline import Offline
from swav.program import Stopped
from swav.train import build_state, open_loader

CPU = torch.device("cpu")
BROKEN = (3, 41, 102)
KMEANS = DeepClusterV2Config(num_prototypes=7, num_sets=3, num_iters=2)
SELA = SelaV2Config(num_prototypes=7, num_sets=3, epsilon=0.05)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def broken_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("broken"), broken=BROKEN)


class Trainer:
    """What the training loop has, up to the labels of an epoch."""

    def __init__(self, config: PretrainConfig, output: Path, loader: Any) -> None:
        self.index = open_index(config.data.url)
        torch.manual_seed(0)
        method = build_state(config, CPU).method
        assert isinstance(method, Offline)
        self.method, self.output, self.config, self.loader = method, output, config, loader
        self.steps_until_stop = 10**6
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.hand_over = HandOver(
            config,
            self.index,
            output,
            method,
            loader=loader,
            augment=Augment(config.augment, seed=config.seed),
            is_stopping=self.is_stopping,
            on_labels=lambda epoch, facts: self.told.append((epoch, facts)),
        )

    def is_stopping(self) -> bool:
        self.steps_until_stop -= 1
        return self.steps_until_stop < 0

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.method.named_buffers()}


@contextmanager
def trainer(data: Path, output: Path, method: MethodConfig, *overrides: str) -> Iterator[Trainer]:
    config = make_config(
        method,
        "runtime.labels_timeout_seconds=0.1",
        "optim.epochs=3",
        "data.max_quarantined_fraction=0.1",
        *overrides,
        data=data,
    )
    with open_loader(config, open_index(str(data)), output, CPU) as loader:
        yield Trainer(config, output, loader)


def first_pass(data: Path, output: Path, method: MethodConfig) -> None:
    with trainer(data, output, method) as run:
        before = run.buffers()
        with pytest.raises(RuntimeError, match="no labels of epoch 0"):
            run.hand_over.begin(0, 0)
        assert before
        assert [name for name, value in run.buffers().items() if not torch.equal(value, before[name])] == []


def test_a_method_without_labels_has_none() -> None:
    with Unlabelled() as nothing:
        assert nothing.begin(0, 0) is None
        assert not nothing.saves_epochs
        nothing.flush()
        nothing.end()


def true_labels(data: Path, num_classes: int) -> TrueLabels:
    config = replace(tiny_config(data), method=SupervisedConfig(num_classes=num_classes))
    return TrueLabels(open_index(str(data)), config)


def test_true_labels_are_those_beside_the_images(data: Path) -> None:
    with true_labels(data, 3) as source:
        labels = source.begin(0, 0)(np.array([5, 0, 102]))
        assert labels.dtype == np.int64
        assert labels.tolist() == [[2], [0], [0]]
        assert source.begin(1, 2)(np.array([5])).tolist() == [[2]]


def test_a_label_out_of_range_is_refused_with_the_samples_name(data: Path) -> None:
    with (
        true_labels(data, 2) as source,
        pytest.raises(ValueError, match=r"shard-000000\.tar:000002 has the label 2, .* one from 0 to 1; label it, or"),
    ):
        source.begin(0, 0)(np.array([0, 1, 2]))


@pytest.mark.parametrize(("label", "found"), [(None, r"no label \(\.cls\)"), (b"-1", "the label -1")])
def test_a_sample_without_usable_label_is_refused_with_its_name(
    tmp_path: Path, label: bytes | None, found: str
) -> None:
    members = [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2"), *([("b.cls", label)] if label else [])]
    write_tar(tmp_path / "x.tar", members)
    with true_labels(tmp_path, 2) as source:
        assert source.begin(0, 0)(np.array([0])).tolist() == [[0]]
        with pytest.raises(ValueError, match=rf"x\.tar:b has {found}, and supervised training needs one from 0 to 1"):
            source.begin(0, 0)(np.array([0, 1]))


def test_images_in_the_place_of_broken_ones_have_no_label(broken_data: Path, tmp_path: Path) -> None:
    def labels(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([ids, 1000 + ids], axis=1)

    config = tiny_config(broken_data, "data.max_quarantined_fraction=0.1")
    with open_loader(config, open_index(str(broken_data)), tmp_path, CPU) as loader:
        batches = list(loader.epoch(0, 0, labels))
    seen: list[int] = []
    for batch in batches:
        assert batch.labels is not None
        for sample, found in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            assert found == ([NO_LABEL, NO_LABEL] if sample in BROKEN else [sample, 1000 + sample])
            seen.append(sample)
    assert sorted(seen) == list(range(103))


@pytest.mark.parametrize("method", [KMEANS, SELA], ids=["kmeans", "sela"])
def test_the_first_pass_gives_features_of_all_images_and_leaves_the_model_as_it_was(
    broken_data: Path, tmp_path: Path, method: MethodConfig
) -> None:
    first_pass(broken_data, tmp_path, method)
    index = open_index(str(broken_data))
    layout = bank_layout(make_config(method, data=broken_data), index, 0)
    with BankReader(bank_folder(tmp_path, 0), layout) as bank:
        for segment in bank.own_segments:
            features, ids = bank.segment(segment), layout.ids(segment)
            assert with_features(features[0]).tolist() == (~np.isin(ids, BROKEN)).tolist()
            norms = np.linalg.norm(features.astype(np.float64), axis=2)
            assert np.abs(norms[:, ~np.isin(ids, BROKEN)] - 1).max(initial=0) < 1e-3
        if method is SELA:
            assert bank.prototypes().shape == (3, 7, 16)
            np.testing.assert_allclose(np.linalg.norm(bank.prototypes(), axis=2), 1, atol=1e-6)
        else:
            assert "prototypes_crc32c" not in bank.manifest


@pytest.mark.parametrize("stop_after", [0, 2, 4])
def test_an_interrupted_first_pass_can_be_repeated_and_gives_the_same_bytes(
    data: Path, tmp_path: Path, stop_after: int
) -> None:
    first_pass(data, tmp_path / "whole", KMEANS)
    with trainer(data, tmp_path / "cut", KMEANS) as run:
        run.steps_until_stop = stop_after
        before = run.buffers()
        with pytest.raises(Stopped, match="stopped on request in the pass for features before epoch 0"):
            run.hand_over.begin(0, 0)
        assert not Path(bank_folder(tmp_path / "cut", 0), "manifest.json").exists()
        assert [name for name, value in run.buffers().items() if not torch.equal(value, before[name])] == []
    first_pass(data, tmp_path / "cut", KMEANS)
    assert contents(tmp_path / "cut" / "bank") == contents(tmp_path / "whole" / "bank")


def test_two_ranks_give_the_features_of_one(data: Path, tmp_path: Path) -> None:
    first_pass(data, tmp_path / "one", KMEANS)
    run_ranks(2, first_pass, data, tmp_path / "two", KMEANS)
    config, index = make_config(KMEANS, data=data), open_index(str(data))
    layout = bank_layout(config, index, 0)
    with (
        BankReader(bank_folder(tmp_path / "one", 0), layout) as one,
        BankReader(bank_folder(tmp_path / "two", 0), layout) as two,
    ):
        for segment in one.own_segments:
            np.testing.assert_allclose(two.segment(segment), one.segment(segment), atol=2e-3)


def test_published_features_are_not_computed_again(data: Path, tmp_path: Path) -> None:
    first_pass(data, tmp_path, KMEANS)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first_pass(data, tmp_path, KMEANS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


@pytest.mark.parametrize("method", [KMEANS, SELA], ids=["kmeans", "sela"])
def test_labels_that_are_there_are_handed_out_and_their_centroids_taken(
    data: Path, tmp_path: Path, method: MethodConfig
) -> None:
    first_pass(data, tmp_path, method)
    with trainer(data, tmp_path, method) as run:
        assign(run.config, run.index, tmp_path, 0, CPU)
        before = torch.stack([head.detach().clone() for head in run.method.prototypes.heads])
        labels = run.hand_over.begin(0, 0)
        after = torch.stack([head.detach() for head in run.method.prototypes.heads])
        assert labels is not None
        found = labels(np.arange(103))
        assert found.shape == (103, 3)
        assert 0 <= found.min() <= found.max() < 7
        assert torch.equal(before, after) == (method is SELA)
        assert [(epoch, facts["labels_of_epoch"]) for epoch, facts in run.told] == [(0, 0)]
        # the epoch leaves the features of the next one's labels
        for raw in run.loader.epoch(0, 0, labels):
            run.hand_over.take(raw, torch.nn.functional.normalize(torch.randn(2, len(raw.ids), 16), dim=2))
        run.hand_over.end()
        assert Path(bank_folder(tmp_path, 1), "manifest.json").exists()
        run.hand_over.__exit__(None, None, None)


def test_the_last_epoch_leaves_no_features(data: Path, tmp_path: Path) -> None:
    first_pass(data, tmp_path, KMEANS)
    with trainer(data, tmp_path, KMEANS, "optim.epochs=1") as run, run.hand_over:
        assign(run.config, run.index, tmp_path, 0, CPU)
        run.hand_over.begin(0, 0)
        for raw in run.loader.epoch(0):
            run.hand_over.take(raw, torch.ones(2, len(raw.ids), 16))
        run.hand_over.flush()
        run.hand_over.end()
    assert not Path(bank_folder(tmp_path, 1)).exists()


def test_one_epoch_stale_trains_on_the_labels_before(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path, replace(KMEANS, stale_epochs=1)) as run, run.hand_over:
        with pytest.raises(RuntimeError, match="no labels of epoch 0"):
            run.hand_over.begin(0, 0)
        assign(run.config, run.index, tmp_path, 0, CPU)
        assert run.hand_over.begin(1, 0) is not None
        assert [(epoch, facts["labels_of_epoch"]) for epoch, facts in run.told] == [(1, 0)]


def test_waiting_ends_on_request_and_after_a_stated_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_pass(data, tmp_path, KMEANS)
    monkeypatch.setattr(labelling_module, "_POLL_SECONDS", 0.01)
    with trainer(data, tmp_path, KMEANS) as run:
        run.steps_until_stop = 2
        with pytest.raises(Stopped, match="stopped on request while waiting for the labels of epoch 0; all is saved"):
            run.hand_over.begin(0, 0)
        run.steps_until_stop = 10**6
        with pytest.raises(
            RuntimeError, match=r"after 0\.1 s \(runtime\.labels_timeout_seconds\).*swav\.assign --output"
        ):
            run.hand_over.begin(0, 0)


def test_labels_of_other_images_are_refused(data: Path, tmp_path: Path) -> None:
    other = write_scenes(tmp_path / "other", (33, 30, 40))
    first_pass(data, tmp_path / "one", KMEANS)
    with trainer(data, tmp_path / "one", KMEANS) as run:
        assign(run.config, run.index, tmp_path / "one", 0, CPU)
    Path(tmp_path / "two" / "assign").mkdir(parents=True)
    Path(labels_folder(tmp_path / "one", 0)).rename(labels_folder(tmp_path / "two", 0))
    with (
        trainer(other, tmp_path / "two", KMEANS) as run,
        pytest.raises(ValueError, match="are of other data"),
    ):
        run.hand_over.begin(0, 0)
