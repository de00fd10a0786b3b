"""Evaluations that are killed or stopped, and taken up again by the same command."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.ranks import _CONTEXT
from swav_testing.runs import DEADLINE_SECONDS, command_line, finish, kill_tree, write_scenes

from swav.checkpoint import checkpoint_steps
from swav.config import ModelConfig
from swav.models.backbone_file import save_backbone
from swav.models.resnet import ResNet
from swav_eval import finetune, linear

PROGRAMS = {
    "linear": ("linear_imagenet", "learning_rates=[0.3,0.03]"),
    "finetune": ("semisup_10pct", "subset.fraction=0.6", "trunk_lr=0.01", "head_lr=0.1", 'schedule={"kind":"cosine"}'),
}
NUM_STEPS = {"linear": 16 * 4, "finetune": 16 * 3}  # of 93 images, and of 62, in batches of 24


@pytest.fixture
def draw() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    return random.Random(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_scenes(folder / "train", broken=(3, 40, 102))
    write_scenes(folder / "test", (30, 17), first_seed=1000)
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    model = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    save_backbone(network, model, folder / "backbone.pt", resize_px=16, crop_px=16)
    return folder


def arguments(program: str, files: Path, output: Path, *more: str) -> list[str]:
    recipe, *settings = PROGRAMS[program]
    where = [f"--{name}={files / name}" for name in ("train", "test")] + [f"--backbone={files / 'backbone.pt'}"]
    tiny = ["num_classes=3", "global_batch=24", "epochs=16", "runtime.device=cpu", "runtime.loader_threads=1"]
    words = ["--recipe", recipe, *where, "--output", str(output), *tiny, "runtime.checkpoint_every_steps=7"]
    return [*words, *settings, *more]


def start(program: str, files: Path, output: Path, cache: Path) -> BaseProcess:
    """Start it in a process of its own that has torch loaded already."""
    process = _CONTEXT.Process(target=_main, args=(program, arguments(program, files, output), str(cache)))
    process.start()
    return process


def _main(program: str, words: list[str], cache: str) -> None:
    os.environ["SWAV_CACHE"] = cache
    torch.set_num_threads(1)
    sys.exit({"linear": linear.main, "finetune": finetune.main}[program](words))


def result_in(output: Path) -> dict[str, Any]:
    """All that is in the result, but for how it was asked for."""
    result: dict[str, Any] = json.loads(output.read_text())
    result.pop("command")
    return result


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, files: Path, cache: Path) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("references")
    results = {}
    for program in PROGRAMS:
        output = folder / f"{program}.json"
        process = start(program, files, output, cache)
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == 0
        results[program] = result_in(output)
    return results


def saved_step(output: Path) -> int:
    return max(checkpoint_steps(f"{output}.work/checkpoints"), default=0)


def wait_for_step(output: Path, step: int, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while saved_step(output) < step:
        assert is_alive(), f"it ended at step {saved_step(output)}"
        assert time.monotonic() < deadline, f"no step {step} in {DEADLINE_SECONDS} s"
        time.sleep(0.002)


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_a_killed_evaluation_ends_as_one_that_was_not(
    tmp_path: Path,
    files: Path,
    cache: Path,
    draw: random.Random,
    references: dict[str, dict[str, Any]],
    program: str,
) -> None:
    output = tmp_path / "result.json"
    for number in (1, 2):
        process = start(program, files, output, cache)
        wait_for_step(output, draw.randint(1, NUM_STEPS[program] // 3) * number, process.is_alive)
        assert process.pid is not None
        kill_tree(process.pid)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not output.exists()
    process = start(program, files, output, cache)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    assert result_in(output) == references[program]
    assert not Path(f"{output}.work").exists()


def test_a_stopped_command_says_so_and_goes_on_under_torchrun(
    tmp_path: Path, files: Path, cache: Path, draw: random.Random, references: dict[str, dict[str, Any]]
) -> None:
    output = tmp_path / "result.json"
    words = arguments("linear", files, output)
    command = command_line("swav_eval.linear", *words, cache=cache)
    wait_for_step(output, draw.randint(1, 40), lambda: command.poll() is None)
    command.send_signal(signal.SIGTERM)
    status, out, err = finish(command)
    assert (status, out) == (75, ""), err
    step = saved_step(output)
    assert f"stopped on request after step {step} of {NUM_STEPS['linear']}; its state is saved; run the same" in err
    assert "Traceback" not in err
    status, out, err = finish(command_line("swav_eval.linear", *words, cache=cache, ranks=2))
    assert status == 0, err
    result, expected = result_in(output), references["linear"]
    assert json.loads(out)["metrics"] == result["metrics"]  # said once
    # The ranks' sums differ in the last bits: an image between two classes may fall on either side.
    for found, wanted in zip(result["rates"], expected["rates"], strict=True):
        for part in ("held_out", "test"):
            assert found[part]["top1"] == pytest.approx(wanted[part]["top1"], abs=0.05)
    assert result["data"] == expected["data"]
    assert result["settings"] == expected["settings"]
