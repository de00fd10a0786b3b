import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from swav_testing import oracles
from swav_testing.banks import DIM, NUM_SAMPLES, NUM_STEPS, contents, make_features, make_layout, write_bank
from swav_testing.ranks import run_ranks

from swav import clustering
from swav.bank.reader import BankReader
from swav.clustering import Solution, Workshop, cluster, partition
from swav.config import DeepClusterV2Config, SelaV2Config
from swav.ops.kmeans import nearest_centroids

BROKEN = (3, 41, 102)
FOUND = [sample for sample in range(NUM_SAMPLES) if sample not in BROKEN]
KMEANS = DeepClusterV2Config(num_prototypes=7, num_sets=3, num_iters=4)
SELA = SelaV2Config(num_prototypes=7, num_sets=3, epsilon=0.05, tolerance=0.003, num_iters=500)
PROTOTYPES = make_features(7, num_crops=3, seed=9)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    write_bank(folder, make_layout(), make_features(), broken=BROKEN, prototypes=PROTOTYPES)
    return folder


def workshop(bank: Path, folder: Path, num_threads: int = 2) -> Workshop:
    return Workshop(BankReader(str(bank), make_layout()), str(folder), torch.device("cpu"), num_threads, 0)


def labels_of(work: Workshop, solution: Solution) -> NDArray[np.int64]:
    """Of this worker's samples, [samples, sets], -1 where there is no feature or the sample is another worker's."""
    labels = np.full((NUM_SAMPLES, len(solution.prototypes)), -1)
    for segment in work.bank.own_segments:
        crops, found = work.features(segment)
        ids = work.bank.layout.ids(segment)[found]
        for number in range(labels.shape[1]):
            labels[ids, number] = solution.labels(crops, number)
    return labels


def solve(bank: Path, folder: Path, method: str, num_threads: int = 2) -> tuple[Any, Any, Any, Any]:
    work = workshop(bank, folder, num_threads)
    solution = cluster(work, KMEANS, seed=3, epoch=2) if method == "kmeans" else partition(work, SELA)
    return solution.prototypes, solution.log_scales, solution.facts, labels_of(work, solution)


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert torch.equal(one[0], other[0])
    assert (one[1] is None and other[1] is None) or torch.equal(one[1], other[1])
    assert one[2] == other[2]


def test_clusters_are_those_of_brute_force_from_the_same_start_and_sets_take_turns_on_crops(
    bank: Path, tmp_path: Path
) -> None:
    work = workshop(bank, tmp_path)
    starts = clustering._random_samples(work, KMEANS, 3, 2)
    solution = cluster(work, KMEANS, seed=3, epoch=2)
    labels = labels_of(work, solution)
    features = make_features().astype(np.float64)
    assert (labels[list(BROKEN)] == -1).all()
    for number in range(3):
        rows = features[number % 2, FOUND]
        expected, _ = oracles.spherical_kmeans(rows, starts[number].astype(np.float64), 4)
        np.testing.assert_allclose(solution.prototypes[number].numpy(), expected, atol=1e-6)
        assert labels[FOUND, number].tolist() == (rows @ expected.T).argmax(axis=1).tolist()
        other, _ = oracles.spherical_kmeans(features[(number + 1) % 2, FOUND], starts[number].astype(np.float64), 4)
        assert np.abs(solution.prototypes[number].numpy() - other).max() > 1e-3


def test_clusters_start_from_different_samples_of_the_sets_crops(bank: Path, tmp_path: Path) -> None:
    work = workshop(bank, tmp_path)
    features = make_features()
    chosen: list[list[int]] = []
    for seed, epoch in ((3, 2), (3, 3), (4, 2)):
        starts = clustering._random_samples(work, KMEANS, seed, epoch)
        for number in range(3):
            matches = [
                [int(sample) for sample in np.flatnonzero((features[number % 2] == start).all(axis=1))]
                for start in starts[number]
            ]
            samples = [sample for (sample,) in matches]
            assert len(set(samples)) == 7
            assert not set(samples) & set(BROKEN)
            chosen.append(sorted(samples))
    assert len({tuple(samples) for samples in chosen}) == 9


def sinkhorn(scores: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """As the oracle, for as many iterations as it takes, by the logarithms of the two scalings."""
    log_plan, columns = scores / epsilon, np.zeros(scores.shape[1])

    def log_sums(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        shift = values.max(axis=axis, keepdims=True)
        return (np.log(np.exp(values - shift).sum(axis=axis, keepdims=True)) + shift).squeeze(axis)

    for _ in range(50_000):
        rows = -log_sums(log_plan + columns, 1)
        sums = log_sums(log_plan + columns + rows[:, None], 0) - np.log(len(scores) / scores.shape[1])
        columns = columns - sums
        if np.abs(sums).max() < 1e-9:
            break
    codes = np.exp(log_plan + columns)
    return codes / codes.sum(axis=1, keepdims=True)


def test_the_fast_oracle_is_the_slow_one() -> None:
    scores = make_features()[0, :40].astype(np.float64) @ PROTOTYPES[0].T.astype(np.float64)
    np.testing.assert_allclose(sinkhorn(scores, 0.05), oracles.sinkhorn_log(scores, 0.05, 300), atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.05, 0.004])
def test_labels_are_those_of_sinkhorn_knopp_in_float64_run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    layout = make_layout(steps=NUM_STEPS)
    write_bank(tmp_path, layout, make_features(), broken=BROKEN, prototypes=PROTOTYPES[:2])
    monkeypatch.setattr(Workshop, "save_state", lambda work, number, state: None)
    config = replace(SELA, num_sets=2, epsilon=epsilon, num_iters=20_000, tolerance=1e-4)
    work = Workshop(BankReader(str(tmp_path), layout), str(tmp_path), torch.device("cpu"), 1, 0)
    solution = partition(work, config)
    labels = labels_of(work, solution)
    assert (labels[list(BROKEN)] == -1).all()
    for number in range(2):
        scores = make_features()[number % 2, FOUND].astype(np.float64) @ PROTOTYPES[number].T.astype(np.float64)
        codes = sinkhorn(scores, epsilon)
        assert solution.facts[number]["prototype_error"] <= config.tolerance
        assert solution.facts[number]["sample_error"] < 1e-6
        assert np.abs(codes.sum(axis=0) * 7 / len(FOUND) - 1).max() < 1e-6
        top = np.sort(codes, axis=1)
        clear = top[:, -1] > 1.01 * top[:, -2]
        assert clear.mean() > 0.9
        assert (labels[FOUND, number] == codes.argmax(axis=1))[clear].all()
        assert (labels[FOUND, number] != scores.argmax(axis=1)).any()  # the nearest alone are no equal partition


@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_any_number_of_threads_finds_the_same(bank: Path, tmp_path: Path, method: str) -> None:
    expected = solve(bank, tmp_path / "1", method, 1)
    for num_threads in (3, 40):
        found = solve(bank, tmp_path / str(num_threads), method, num_threads)
        assert_same(found, expected)
        assert (found[3] == expected[3]).all()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_any_number_of_workers_finds_the_same(bank: Path, tmp_path: Path, method: str, world: int) -> None:
    expected = solve(bank, tmp_path / "one", method)
    found = run_ranks(world, solve, bank, tmp_path / "many", method)
    for result in found:
        assert_same(result, expected)
    assert (np.max([labels for *_, labels in found], axis=0) == expected[3]).all()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


class KilledError(Exception):
    pass


def killed_at(iteration: int, *, before: bool) -> Callable[..., None]:
    save = Workshop.save_state

    def dying(work: Workshop, number: int, state: NDArray[Any]) -> None:
        if number == iteration and before:
            raise KilledError
        save(work, number, state)
        if number == iteration:
            raise KilledError

    return dying


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("method", "iteration"), [("kmeans", 1), ("kmeans", 3), ("kmeans", 4), ("sela", 1), ("sela", 9)]
)
def test_a_restart_after_any_iteration_finds_the_same(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, iteration: int, before: bool
) -> None:
    expected = solve(bank, tmp_path / "whole", method)
    with monkeypatch.context() as patch:
        patch.setattr(Workshop, "save_state", killed_at(iteration, before=before))
        with pytest.raises(KilledError):
            solve(bank, tmp_path / "killed", method)
    assert len(contents(tmp_path / "killed")) == (0 if before and iteration == 1 else 1)
    again: list[int] = []
    save = Workshop.save_state

    def record(work: Workshop, number: int, state: NDArray[Any]) -> None:
        again.append(number)
        save(work, number, state)

    monkeypatch.setattr(Workshop, "save_state", record)
    found = solve(bank, tmp_path / "killed", method)
    assert_same(found, expected)
    assert (found[3] == expected[3]).all()
    assert iteration in again if before else iteration not in again
    assert all(number >= iteration for number in again)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_restart_may_have_another_number_of_workers(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solve(bank, tmp_path / "whole", "kmeans")
    with monkeypatch.context() as patch:
        patch.setattr(Workshop, "save_state", killed_at(2, before=False))
        with pytest.raises(KilledError):
            solve(bank, tmp_path / "killed", "kmeans")
    for found in run_ranks(2, solve, bank, tmp_path / "killed", "kmeans"):
        assert_same(found, expected)


@pytest.mark.parametrize("num_prototypes", [101, 5000])
def test_fewer_features_than_prototypes_are_refused(bank: Path, tmp_path: Path, num_prototypes: int) -> None:
    message = rf"100 samples with features are fewer than method\.num_prototypes={num_prototypes}; set it to 10"
    with pytest.raises(ValueError, match=message):
        cluster(workshop(bank, tmp_path), replace(KMEANS, num_prototypes=num_prototypes), seed=3, epoch=0)


def test_as_many_prototypes_as_features_are_clusters_of_one(bank: Path, tmp_path: Path) -> None:
    config = replace(KMEANS, num_prototypes=100, num_sets=1)
    work = workshop(bank, tmp_path)
    labels = labels_of(work, cluster(work, config, seed=3, epoch=0))
    assert sorted(labels[FOUND, 0].tolist()) == list(range(100))


def test_fewer_features_than_prototypes_cannot_be_partitioned(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank", make_layout(), make_features(), prototypes=make_features(104, num_crops=3))
    with pytest.raises(ValueError, match="103 samples with features are fewer than"):
        partition(workshop(tmp_path / "bank", tmp_path), replace(SELA, num_prototypes=104))


@pytest.mark.parametrize("method", ["kmeans", "sela"])
def test_a_bank_without_any_feature_is_refused(tmp_path: Path, method: str) -> None:
    write_bank(tmp_path / "bank", make_layout(), make_features(), broken=tuple(range(103)), prototypes=PROTOTYPES)
    with pytest.raises(ValueError, match="0 samples with features are fewer"):
        solve(tmp_path / "bank", tmp_path, method)


def test_an_empty_cluster_keeps_its_centroid(tmp_path: Path) -> None:
    # All features of a crop are the same: every sample goes to the first of equal centroids, the others stay empty.
    features = np.zeros((2, NUM_SAMPLES, DIM), dtype=np.float32)
    features[:, :, 4] = 1
    write_bank(tmp_path / "bank", make_layout(), features)
    solution = cluster(workshop(tmp_path / "bank", tmp_path), KMEANS, seed=3, epoch=0)
    assert (solution.prototypes.numpy() == features[0, 0]).all()
    assert not torch.isnan(solution.prototypes).any()
    assert nearest_centroids(torch.from_numpy(features[0]).half(), solution.prototypes[0])[0].tolist() == [0] * 103


def test_iterations_that_do_not_suffice_are_reported_and_used(
    bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(SELA, epsilon=0.004, num_iters=2, tolerance=1e-9)
    work = workshop(bank, tmp_path)
    with caplog.at_level(logging.WARNING):
        solution = partition(work, config)
    assert "after 2 iterations prototypes' sums are within" in caplog.text
    assert "raise method.num_iters" in caplog.text
    assert [facts["iterations"] for facts in solution.facts] == [2] * 3
    assert all(facts["prototype_error"] > 1e-9 for facts in solution.facts)
    for number in range(3):
        scores = make_features()[number % 2, FOUND].astype(np.float64) @ PROTOTYPES[number].T.astype(np.float64)
        log_plan = scores / 0.004
        for _ in range(2):
            log_plan = log_plan - np.logaddexp.reduce(log_plan, axis=1, keepdims=True)
            log_plan = log_plan - np.logaddexp.reduce(log_plan, axis=0, keepdims=True)
        top = np.sort(log_plan, axis=1)
        clear = top[:, -1] - top[:, -2] > 0.01
        found = labels_of(work, solution)[FOUND, number]
        assert (found == log_plan.argmax(axis=1))[clear].all()


def test_a_failing_thread_ends_the_phase(bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = BankReader.segment

    def fail(reader: BankReader, number: int) -> NDArray[np.float16]:
        if number == 5:
            raise OSError("the disk is gone")
        return segment(reader, number)

    monkeypatch.setattr(BankReader, "segment", fail)
    work = workshop(bank, tmp_path, num_threads=3)
    with pytest.raises(OSError, match="the disk is gone"):
        partition(work, SELA)
