"""What many tests share: tiny data, a cache of their own, and one finished run."""

from pathlib import Path

import pytest
import torch
from swav_testing.runs import arguments, run, write_scenes


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small gain nothing from a second thread, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path, data: Path) -> Path:
    """The folder of an undisturbed run on ``data``."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run(arguments(data, output), cache)
    return output
