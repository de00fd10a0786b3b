import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.ranks import run_ranks
from swav_testing.runs import (
    NUM_STEPS,
    QUEUE,
    STEPS_PER_EPOCH,
    arguments,
    events,
    losses,
    recorded_run,
    run,
    status_and_output,
    tiny_config,
    weights,
    write_scenes,
)

from swav import checkpoint, methods, storage, train
from swav.checkpoint import checkpoint_steps
from swav.data.augment import Augment
from swav.data.batch import CropBatch, RawBatch
from swav.data.source import open_dataset
from swav.distributed import rank
from swav.features import Evaluation
from swav.methods.base import Method, MethodOutput
from swav.models import batchnorm
from swav.pretrain import pretrain
from swav.program import Stopped

CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Runs in this process use the cache too."""
    monkeypatch.setenv("SWAV_CACHE", str(cache))


# float64: the same computation for every world, far below what float32 could show


def double_precision() -> None:
    """Let the loop compute in float64 (in this process, which is a test's own)."""
    build_method, synchronize = methods.build_method, batchnorm.synchronize

    class DoubleAugment(Augment):
        def __call__(self, raw: RawBatch) -> CropBatch:
            batch = super().__call__(raw)
            return replace(batch, crops=[crop.double() for crop in batch.crops])

    def build_double(*args: Any) -> Method:
        return build_method(*args).double()

    def synchronize_double(*args: Any, **settings: Any) -> torch.nn.Module:
        return synchronize(*args, **settings).double()

    vars(train).update(Augment=DoubleAugment, build_method=build_double, synchronize=synchronize_double)


def run_in_double(data: str, output: str, cache: str, overrides: tuple[str, ...], stop_at: int | None) -> Any:
    double_precision()
    return recorded_run(data, output, cache, ("evaluate=null", *overrides), stop_at)


@pytest.mark.parametrize("settings", [(), (QUEUE, "method.codes=hard", "runtime.channels_last=false")])
def test_every_world_computes_the_same(tmp_path: Path, cache: Path, data: Path, settings: tuple[str, ...]) -> None:
    run_ranks(1, run_in_double, str(data), str(tmp_path / "one"), str(cache), settings, None)
    run_ranks(2, run_in_double, str(data), str(tmp_path / "other"), str(cache), settings, 3)
    run_ranks(1, run_in_double, str(data), str(tmp_path / "other"), str(cache), settings, 6)
    run_ranks(3, run_in_double, str(data), str(tmp_path / "other"), str(cache), settings, None)  # uneven shares
    one, other = losses(tmp_path / "one"), losses(tmp_path / "other")
    assert list(one) == list(range(1, NUM_STEPS + 1))
    assert other == pytest.approx(one, rel=1e-11)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "other")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


# precision and layout


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 5e-3), ("fp16", 2e-3)])
def test_lower_precision_stays_near(
    tmp_path: Path, cache: Path, data: Path, reference: Path, precision: str, tolerance: float
) -> None:
    run(arguments(data, tmp_path / "run", f"runtime.precision={precision}"), cache)
    found, expected = losses(tmp_path / "run"), losses(reference)
    # The first two steps have the same weights, as the warm-up starts at 0; after them, training amplifies rounding.
    for step in (1, 2):
        assert found[step] != expected[step]
        assert found[step] == pytest.approx(expected[step], rel=tolerance)
    assert found == pytest.approx(expected, rel=0.1)


def test_a_run_of_fp16_resumes_with_its_loss_scale(tmp_path: Path, cache: Path, data: Path) -> None:
    settings = ("runtime.precision=fp16",)
    run_ranks(1, recorded_run, str(data), str(tmp_path / "one"), str(cache), settings, None)
    run_ranks(1, recorded_run, str(data), str(tmp_path / "two"), str(cache), settings, 4)
    assert checkpoint.load(tmp_path / "two" / "checkpoints", 4)["scaler"]["scale"] > 1
    run_ranks(1, recorded_run, str(data), str(tmp_path / "two"), str(cache), settings, None)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert all(torch.equal(weights(tmp_path / "two")[name], value) for name, value in weights(tmp_path / "one").items())


def test_the_memory_layout_does_not_change_the_run(tmp_path: Path, cache: Path, data: Path) -> None:
    for layout in ("true", "false"):
        run(arguments(data, tmp_path / layout, *GENTLE, f"runtime.channels_last={layout}"), cache)
    assert losses(tmp_path / "true") != losses(tmp_path / "false")  # other kernels round otherwise
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)


GENTLE = ("optim.base_lr=0.02", "method.temperature=0.5", "method.sinkhorn.epsilon=0.2")  # as tests/e2e has it
COMPILE = ("runtime.compile=true", "optim.epochs=1", "optim.warmup_epochs=0", "evaluate=null", *GENTLE)


def traced_run(data: str, output: str, cache: str, overrides: tuple[str, ...]) -> None:
    """As a compiled run, but torch only traces and differentiates the network and generates no code."""
    compile_module = torch.nn.Module.compile

    def _with_backend(method: Method) -> Method:
        object.__setattr__(method.backbone, "compile", lambda: compile_module(method.backbone, backend="aot_eager"))
        return method

    vars(train)["build_method"] = lambda config: _with_backend(methods.build_method(config))
    recorded_run(data, output, cache, overrides, None)


def test_a_traced_run_computes_the_same(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", (24,))
    settings = (*COMPILE, "crops.1.size_px=16", "runtime.sync_batch_norm=false")  # tracing is slow: one shape
    run_ranks(2, traced_run, str(data), str(tmp_path / "traced"), str(cache), settings)
    run_ranks(2, recorded_run, str(data), str(tmp_path / "eager"), str(cache), settings[1:], None)
    assert losses(tmp_path / "traced") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    expected, found = weights(tmp_path / "eager"), weights(tmp_path / "traced")
    assert expected.keys() == found.keys()  # names do not show that it was compiled


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_computes_the_same(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_scenes(tmp_path / "data", (48,))
    run_ranks(1, compiled_run, str(data), str(tmp_path / "compiled"), str(cache), COMPILE, str(tmp_path / "inductor"))
    run_ranks(1, recorded_run, str(data), str(tmp_path / "eager"), str(cache), COMPILE[1:], None)
    assert len(losses(tmp_path / "eager")) == 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def compiled_run(data: str, output: str, cache: str, overrides: tuple[str, ...], inductor: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor
    recorded_run(data, output, cache, overrides, None)


# batch norm over groups of ranks


def grouped_run(data: str, output: str, cache: str, group: int) -> list[torch.Tensor]:
    """Running means of the first batch norm, on this rank, after each step and after the evaluation."""
    os.environ["SWAV_CACHE"] = cache
    means: list[torch.Tensor] = []
    train_step = train.train_step

    def spy(state: train.TrainState, *args: Any, **settings: Any) -> MethodOutput:
        result = train_step(state, *args, **settings)
        means.append(running_mean(state.method))
        return result

    vars(train)["train_step"] = spy
    small = tiny_config(data, "optim.epochs=1", f"runtime.sync_batch_norm_group={group}", "crops.1.num_crops=1")
    os.environ["SWAV_CACHE"] = cache
    index = open_dataset(data)
    method = train.train(small, index, Path(output), CPU)
    assert small.evaluate is not None
    train.evaluate(method.backbone, Evaluation(small.evaluate, index, None), small, CPU)
    return [*means, running_mean(method)]


def running_mean(method: Method) -> torch.Tensor:
    return method.state_dict()["model.backbone.bn1.running_mean"].clone()


@pytest.mark.parametrize("group", [1, 2, 0])
def test_groups_of_ranks_share_batch_norm_and_the_evaluation_sees_one_network(
    tmp_path: Path, cache: Path, group: int
) -> None:
    data = write_scenes(tmp_path / "data", (48,))
    by_rank = run_ranks(4, grouped_run, str(data), str(tmp_path / "run"), str(cache), group)
    assert [len(means) for means in by_rank] == [3] * 4
    for step in (0, 1):
        means = [by_rank[number][step] for number in range(4)]
        for a in range(4):
            for b in range(a):
                together = group == 0 or a // group == b // group
                assert torch.equal(means[a], means[b]) == together
    assert all(torch.equal(means[-1], by_rank[0][-1]) for means in by_rank)
    assert torch.equal(by_rank[0][-1], by_rank[0][-2])  # rank 0's, which the run saves


# prototypes and schedule


def spied_run(
    monkeypatch: pytest.MonkeyPatch, data: Path, output: Path, *overrides: str
) -> list[tuple[torch.Tensor, float]]:
    """Unit prototypes, and the learning rate that the optimiser had, after each step."""
    seen = []
    train_step = train.train_step

    def spy(state: train.TrainState, *args: Any, **settings: Any) -> MethodOutput:
        result = train_step(state, *args, **settings)
        (group,) = {values["lr"] for values in state.optimizer.param_groups}
        prototypes = torch.nn.functional.normalize(state.method.state_dict()["prototypes.heads.0"], dim=1)
        seen.append((prototypes, group))
        return result

    monkeypatch.setattr(train, "train_step", spy)
    pretrain(tiny_config(data, "evaluate=null", *overrides), output)
    return seen


@pytest.mark.usefixtures("here")
def test_prototypes_are_frozen_in_the_first_epoch_only(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [prototypes for prototypes, _ in spied_run(monkeypatch, data, tmp_path / "run", "optim.warmup_epochs=0")]
    for step in range(1, NUM_STEPS):
        moved = float((seen[step] - seen[step - 1]).abs().max())
        if step < STEPS_PER_EPOCH:
            assert moved < 1e-6  # normalised again in every step
        else:
            assert moved > 1e-6, step


@pytest.mark.usefixtures("here")
def test_fixed_prototypes_never_move(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("method.learn_prototypes=false", "method.freeze_prototypes_epochs=0")
    seen = [prototypes for prototypes, _ in spied_run(monkeypatch, data, tmp_path / "run", *settings)]
    assert float((seen[-1] - seen[0]).abs().max()) < 1e-6


@pytest.mark.usefixtures("here")
def test_prototypes_that_are_not_frozen_move_from_the_first_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("method.freeze_prototypes_epochs=0", "optim.warmup_epochs=0", "optim.epochs=1")
    seen = [prototypes for prototypes, _ in spied_run(monkeypatch, data, tmp_path / "run", *settings)]
    assert float((seen[1] - seen[0]).abs().max()) > 1e-6


@pytest.mark.usefixtures("here")
def test_the_schedule_reaches_the_optimizer_and_the_metrics(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [rate for _, rate in spied_run(monkeypatch, data, tmp_path / "run")]
    warmup = [0.05 * step / (STEPS_PER_EPOCH - 1) for step in range(STEPS_PER_EPOCH)]
    assert rates[:STEPS_PER_EPOCH] == pytest.approx(warmup, abs=1e-12)
    decay = rates[STEPS_PER_EPOCH:]
    assert decay == sorted(decay, reverse=True)
    assert 0.0005 <= decay[-1] < 0.2 * 0.05
    noted = [event["learning_rate"] for event in events(tmp_path / "run") if "loss" in event]
    assert noted == rates


# stopping


def stop_with_slow_writes(data: str, output: str, cache: str) -> list[int]:
    """Stop by a signal to rank 1; the checkpoints that are there when this rank goes."""
    os.environ["SWAV_CACHE"] = cache

    def slow(path: Path, contents: Any) -> None:
        time.sleep(1)  # as object storage has it
        storage.write_atomic(path, contents)

    vars(checkpoint)["write_atomic"] = slow
    train_step = train.train_step

    def spy(state: train.TrainState, *args: Any, **settings: Any) -> MethodOutput:
        if rank() == 1 and state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, *args, **settings)

    vars(train)["train_step"] = spy
    with pytest.raises(Stopped, match="after step 2 of 10; its state is saved"):
        pretrain(tiny_config(data), Path(output))
    return checkpoint_steps(Path(output) / "checkpoints")


def test_no_rank_leaves_before_the_state_is_on_the_disk(tmp_path: Path, cache: Path, data: Path) -> None:
    assert run_ranks(2, stop_with_slow_writes, str(data), str(tmp_path / "run"), str(cache)) == [[2], [2]]


@pytest.mark.usefixtures("here")
def test_a_stopped_run_in_this_process_is_taken_up(
    tmp_path: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of: list[Callable[..., MethodOutput]] = [train.train_step]

    def spy(state: train.TrainState, *args: Any, **settings: Any) -> MethodOutput:
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step_of[0](state, *args, **settings)

    monkeypatch.setattr(train, "train_step", spy)
    with pytest.raises(Stopped):
        pretrain(tiny_config(data), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[0] == 7
    monkeypatch.undo()


def test_gradient_accumulation_is_not_on_offer(tmp_path: Path, cache: Path, data: Path) -> None:
    status, text = status_and_output(arguments(data, tmp_path / "run", "optim.accumulate=2"), cache, tmp_path / "log")
    assert status == 64
    assert "unknown setting 'optim.accumulate'" in text
