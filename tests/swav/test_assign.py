import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from swav_testing.banks import NUM_SAMPLES, contents, make_config, make_features, write_bank
from swav_testing.ranks import run_ranks
from swav_testing.runs import tiny_config, write_scenes

from swav.assign import assign, main, remove_old, serve
from swav.bank.files import bank_folder, labels_folder
from swav.bank.labels import LabelTables
from swav.bank.layout import bank_layout, order_epoch_of
from swav.config import DeepClusterV2Config, MethodConfig, PretrainConfig, SelaV2Config, to_json
from swav.data.batch import NO_LABEL
from swav.data.index import DatasetIndex, open_index
from swav.program import EXIT_REFUSED

CPU = torch.device("cpu")
BROKEN = (3, 41, 102)
KMEANS = DeepClusterV2Config(num_prototypes=7, num_sets=3, num_iters=3)
SELA = SelaV2Config(num_prototypes=7, num_sets=3, epsilon=0.05)
METHODS: dict[str, MethodConfig] = {"kmeans": KMEANS, "sela": SELA}
EPOCHS = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))


def config_of(data: Path, method: str = "kmeans") -> PretrainConfig:
    return make_config(METHODS[method], f"optim.epochs={EPOCHS}", data=data)


def give_features(config: PretrainConfig, index: DatasetIndex, output: Path, epoch: int) -> None:
    """What a trainer leaves; features drift a little from epoch to epoch."""
    features = make_features() + 0.15 * epoch * make_features(seed=1)
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    layout = bank_layout(config, index, order_epoch_of(config, epoch))
    prototypes = make_features(7, num_crops=3, seed=9)
    folder = bank_folder(output, epoch)
    write_bank(folder, layout, features, broken=BROKEN, prototypes=prototypes, identity=index.identity)


def give_run(config: PretrainConfig, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(to_json(config))


def make_labels(output: Path, data: Path, method: str, epochs: tuple[int, ...]) -> None:
    config, index = config_of(data, method), open_index(str(data))
    for epoch in epochs:
        assign(config, index, output, epoch, CPU)


def manifest(output: Path, epoch: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(labels_folder(output, epoch), "manifest.json").read_text())
    return found


def epochs_with(output: Path, kind: str) -> list[int]:
    return sorted(int(path.parent.name) for path in (output / kind).glob("*/manifest.json"))


@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_labels_are_published_once_and_come_out_the_same_again(data: Path, tmp_path: Path, method: str) -> None:
    config, index = config_of(data, method), open_index(str(data))
    give_features(config, index, tmp_path, 0)
    assign(config, index, tmp_path, 0, CPU)
    folder = Path(labels_folder(tmp_path, 0))
    first = contents(folder)
    assert {"manifest.json", "centroids.npy"} < set(first)
    assert not [name for name in first if "state" in name]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assign(config, index, tmp_path, 0, CPU)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    (folder / "manifest.json").unlink()
    assign(config, index, tmp_path, 0, CPU)
    assert contents(folder) == first


@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_any_number_of_workers_publishes_the_same_bytes(data: Path, tmp_path: Path, method: str) -> None:
    config, index = config_of(data, method), open_index(str(data))
    for name in ("one", "many"):
        for epoch in (0, 1):
            give_features(config, index, tmp_path / name, epoch)
    make_labels(tmp_path / "one", data, method, (0, 1))
    run_ranks(3, make_labels, tmp_path / "many", data, method, (0, 1))
    assert contents(tmp_path / "many" / "assign") == contents(tmp_path / "one" / "assign")


def recount(labels: NDArray[np.int64], before: NDArray[np.int64] | None) -> dict[str, Any]:
    """The facts of a set, by loops."""
    sizes = [int((labels == k).sum()) for k in range(7)]
    shares = [size / sum(sizes) for size in sizes if size]
    facts: dict[str, Any] = {
        "smallest": min(sizes),
        "largest": max(sizes),
        "empty": sizes.count(0),
        "entropy_bits": pytest.approx(-sum(share * math.log2(share) for share in shares)),
        "unlabelled": NUM_SAMPLES - sum(sizes),
        "nmi_with_last": None,
    }
    if before is not None:
        pairs = [(a, b) for a, b in zip(labels.tolist(), before.tolist(), strict=True) if min(a, b) >= 0]

        def entropy(values: list[Any]) -> float:
            counts = [values.count(value) / len(values) for value in set(values)]
            return -sum(count * math.log(count) for count in counts)

        one, other = entropy([a for a, _ in pairs]), entropy([b for _, b in pairs])
        facts["nmi_with_last"] = pytest.approx(2 * (one + other - entropy(pairs)) / (one + other))
    return facts


@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_facts_are_those_of_a_recount(data: Path, tmp_path: Path, method: str) -> None:
    config, index = config_of(data, method), open_index(str(data))
    before = None
    for epoch in (0, 1, 2):
        give_features(config, index, tmp_path, epoch)
        assign(config, index, tmp_path, epoch, CPU)
        labels = LabelTables(tmp_path, epoch, index)(np.arange(NUM_SAMPLES))
        assert (labels[list(BROKEN)] == NO_LABEL).all()
        assert ((labels == NO_LABEL).sum(axis=1) > 0).sum() == len(BROKEN)
        facts = manifest(tmp_path, epoch)
        assert (facts["epoch"], facts["data_identity"], facts["num_prototypes"]) == (epoch, index.identity, 7)
        for number, found in enumerate(facts["sets"]):
            expected = recount(labels[:, number], None if before is None else before[:, number])
            assert {name: found[name] for name in expected} == expected
        before = labels


def test_features_of_other_images_are_refused(data: Path, tmp_path: Path) -> None:
    config, index = config_of(data), open_index(str(data))
    give_features(config, index, tmp_path, 0)
    other = open_index(str(write_scenes(tmp_path / "other", first_seed=900, rows_per_shard=(40, 33, 30))))
    with pytest.raises(ValueError, match="give the data that the trainer has"):
        assign(config, other, tmp_path, 0, CPU)
    assert epochs_with(tmp_path, "assign") == []


def test_only_what_nobody_needs_is_removed(data: Path, tmp_path: Path) -> None:
    config, index = config_of(data), open_index(str(data))
    for epoch in range(5):
        give_features(config, index, tmp_path, epoch)
        assign(config, index, tmp_path, epoch, CPU)
    before = contents(tmp_path)
    remove_old(config, index, tmp_path, 4)
    gone = set(before) - set(contents(tmp_path))
    assert {name for name in gone if name.startswith("bank/")} == {n for n in before if n.startswith("bank/000004/")}
    labels = {name for name in gone if name.startswith("assign/")}
    assert {"assign/000001/manifest.json", "assign/000001/labels/000000.npy"} <= labels
    assert all(name.startswith("assign/000001/") for name in labels)
    assert {name: data for name, data in before.items() if name not in gone} == contents(tmp_path)
    remove_old(config, index, tmp_path, 4)  # again, where nothing is left
    remove_old(config, index, tmp_path, 0)
    assert epochs_with(tmp_path, "assign") == [0, 2, 3, 4]


def served(output: Path, *, epoch: int | None = None, seconds: float = 0.1, keep: bool = False) -> None:
    serve(output, CPU, data=None, epoch=epoch, seconds=seconds, keep=keep)


@pytest.mark.parametrize("keep", [True, False])
def test_an_assigner_serves_epoch_by_epoch_and_keeps_what_is_asked(data: Path, tmp_path: Path, keep: bool) -> None:
    config, index = config_of(data), open_index(str(data))
    give_run(config, tmp_path)
    for epoch in range(EPOCHS):
        give_features(config, index, tmp_path, epoch)
    served(tmp_path, keep=keep)
    assert epochs_with(tmp_path, "assign") == (list(range(EPOCHS)) if keep else [3, 4, 5])
    assert epochs_with(tmp_path, "bank") == (list(range(EPOCHS)) if keep else [])


def test_an_assigner_that_starts_late_does_not_wait_for_what_it_has_removed(data: Path, tmp_path: Path) -> None:
    config, index = config_of(data), open_index(str(data))
    give_run(config, tmp_path)
    for epoch in range(4):
        give_features(config, index, tmp_path, epoch)
    with pytest.raises(RuntimeError, match="no features for the labels of epoch 4"):
        served(tmp_path)
    assert epochs_with(tmp_path, "assign") == [1, 2, 3]
    give_features(config, index, tmp_path, 4)
    with pytest.raises(RuntimeError, match="no features for the labels of epoch 5"):
        served(tmp_path)
    give_features(config, index, tmp_path, 5)
    served(tmp_path)
    assert epochs_with(tmp_path, "assign") == [3, 4, 5]
    served(tmp_path)  # all is done


def test_an_assigner_that_was_killed_before_it_removed_anything_does_so_later(data: Path, tmp_path: Path) -> None:
    config, index = config_of(data), open_index(str(data))
    give_run(config, tmp_path)
    give_features(config, index, tmp_path, 0)
    assign(config, index, tmp_path, 0, CPU)
    assert epochs_with(tmp_path, "bank") == [0]
    with pytest.raises(RuntimeError, match="no features for the labels of epoch 1"):
        served(tmp_path)
    assert epochs_with(tmp_path, "bank") == []


@pytest.mark.parametrize("epoch", [-1, EPOCHS, 99])
def test_an_epoch_that_the_run_has_not_is_refused(data: Path, tmp_path: Path, epoch: int) -> None:
    give_run(config_of(data), tmp_path)
    with pytest.raises(ValueError, match=f"--epoch {epoch}: the run has the epochs 0 to 5"):
        served(tmp_path, epoch=epoch)


def test_one_epoch_alone_is_labelled(data: Path, tmp_path: Path) -> None:
    config, index = config_of(data), open_index(str(data))
    give_run(config, tmp_path)
    give_features(config, index, tmp_path, 2)
    served(tmp_path, epoch=2)
    assert epochs_with(tmp_path, "assign") == [2]


def test_a_run_that_does_not_begin_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no run in .* after 0\.1 s; see that the trainer works on this run"):
        served(tmp_path)


def test_a_run_of_a_method_without_assigner_is_refused(data: Path, tmp_path: Path) -> None:
    give_run(tiny_config(data), tmp_path)
    with pytest.raises(ValueError, match="holds a run of swav, which needs no assigner"):
        served(tmp_path)


def test_the_command_line_says_what_is_wrong(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    give_run(config_of(data), tmp_path)
    assert main(["--output", str(tmp_path), "--epoch", "99", "--device", "cpu"]) == EXIT_REFUSED
    assert "--epoch 99: the run has the epochs 0 to 5" in caplog.text
