import logging

import pytest
import torch
from torch import nn

from swav_eval.config import LinearProtocol
from swav_eval.labelled_data import LabelledBatch
from swav_eval.recipes import configure
from swav_eval.training_report import DivergenceWatch, RateGroup, Report

NAN, INF = float("nan"), float("inf")


def groups(*rates: float) -> list[RateGroup]:
    return [RateGroup("learning_rates", rate, [nn.Parameter(torch.ones(2))]) for rate in rates]


def test_a_loss_is_looked_at_one_step_late() -> None:
    diverged = [False]
    watch = DivergenceWatch(groups(0.3), diverged)
    watch.take(1, torch.tensor([0.5]))
    watch.take(2, torch.tensor([NAN]))
    assert diverged == [False]
    with pytest.raises(RuntimeError, match=r"a loss of \[nan\] at step 2; give lower rates than learning_rates=0\.3"):
        watch.take(3, torch.tensor([NAN]))


def test_of_several_heads_each_that_diverges_is_said_once_and_the_last_one_ends_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    diverged = [False, False, False]
    watch = DivergenceWatch(groups(0.1, 5.0, 9.0), diverged)
    with caplog.at_level(logging.WARNING):
        for step, losses in enumerate([[1, INF, 1], [1, NAN, NAN], [1, NAN, NAN]]):
            watch.take(step, torch.tensor(losses))
        watch.check()
    assert diverged == [False, True, True]
    assert [record.message for record in caplog.records] == [
        "with learning_rates=5 the training has diverged at step 0; other rates go on",
        "with learning_rates=9 the training has diverged at step 1; other rates go on",
    ]
    watch.take(3, torch.tensor([NAN, NAN, NAN]))
    with pytest.raises(RuntimeError, match=r"give lower rates than learning_rates=0\.1"):
        watch.finish()


def test_the_last_step_shows_in_the_weights() -> None:
    bad = groups(0.1, 5.0)
    bad[1].parameters[0].data[0] = INF
    diverged = [False, False]
    watch = DivergenceWatch(bad, diverged)
    watch.take(1, torch.tensor([1.0, 1.0]))
    watch.finish()
    assert diverged == [False, True]
    one_head = DivergenceWatch(bad, [False])  # of two groups
    one_head.take(1, torch.tensor([1.0]))
    with pytest.raises(
        RuntimeError, match=r"not finite at step 1; give lower rates than learning_rates=0\.1, learning"
    ):
        one_head.finish()


class Sizes:
    num_samples, num_steps = 100, 5

    def epoch(self, epoch: int, start_step: int) -> None:
        raise AssertionError


def test_a_bar_starts_where_the_training_is_taken_up(capsys: pytest.CaptureFixture[str]) -> None:
    protocol = configure(
        "linear_imagenet", LinearProtocol, ["epochs=2", "global_batch=20", "runtime.log_every_steps=1"]
    )
    batch = LabelledBatch(torch.empty(20, 1), torch.empty(20, dtype=torch.int64), 20, 0)
    with Report(7, Sizes(), protocol) as report:  # type: ignore[arg-type]
        for step in (8, 9, 10):
            report.step(step, 1, torch.tensor([NAN, 0.25]), batch)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "200/200" in last
    assert "loss=0.250" in last
