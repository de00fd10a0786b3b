import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors
from swav_testing.ranks import _CONTEXT, run_ranks
from swav_testing.runs import write_scenes
from swav_testing.s3 import moto_server
from torch import nn

from swav import features
from swav.config import EvaluateConfig
from swav.data.source import open_dataset
from swav.models.resnet import ResNet
from swav_eval import feature_store
from swav_eval.feature_store import StoredFeatures, extract_features

CPU = torch.device("cpu")
BROKEN = (3, 40, 41, 102)
GOOD = [number for number in range(103) if number not in BROKEN]
NUM_BLOCKS = 7  # of 16 samples; the last has 7


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))
    monkeypatch.setattr(feature_store, "BLOCK_SAMPLES", 16)
    monkeypatch.setattr(features, "_BATCH", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"), broken=BROKEN)


def network() -> nn.Module:
    torch.manual_seed(3)
    return ResNet("resnet18", width=0.125, stem="3x3")


def extracted(
    data: Path | str, folder: Path | str | None, model: nn.Module | None = None, **changed: Any
) -> StoredFeatures:
    settings = {
        "backbone_sha256": "0" * 64,
        "name": "train",
        "resize_px": 20,
        "crop_px": 16,
        "device": CPU,
        "precision": "fp32",
        "num_threads": 2,
    }
    return extract_features(
        network() if model is None else model, open_dataset(str(data)), folder=folder, **{**settings, **changed}
    )


class Counting(nn.Module):
    """Counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.num_images = network(), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_images += len(images)
        return self.inner(images)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows of the features that k-NN in a pretraining run has, which have unit norm, and the same without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWAV_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = EvaluateConfig(train_url=str(data), num_neighbors=(1,), resize_px=20, crop_px=16)
        index = open_dataset(str(data))
        unit = features.extract_features(network(), index, config, device=CPU, num_threads=1).values
        return unit, extracted(data, None).values


def test_features_are_the_networks_own(data: Path, expected: Any) -> None:
    unit, raw = expected
    found = extracted(data, None)
    assert (found.offset, found.total, found.dim, found.num_broken, found.num_resumed) == (0, 99, 64, 4, 0)
    assert found.ids.tolist() == GOOD
    assert found.labels.tolist() == [number % 3 for number in GOOD]
    assert torch.equal(found.values, raw)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(99), atol=0.1)
    torch.testing.assert_close(nn.functional.normalize(raw, dim=1), unit, rtol=1e-4, atol=1e-6)
    assert found.values.dtype == torch.float32
    assert np.array_equal(found.mapped(), raw.numpy())


def test_a_folder_keeps_blocks_that_are_not_computed_again(tmp_path: Path, data: Path, expected: Any) -> None:
    first, second = Counting(), Counting()
    one = extracted(data, tmp_path, first)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == NUM_BLOCKS
    assert all(name.startswith("train-") and name.endswith(".safetensors") for name in names)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    two = extracted(data, tmp_path, second)
    assert (first.num_images, second.num_images) == (99, 0)
    assert (one.num_resumed, two.num_resumed) == (0, NUM_BLOCKS)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times
    for found in (one, two):
        assert torch.equal(found.values, expected[1])
        assert (found.ids.tolist(), found.total, found.dim, found.num_broken) == (GOOD, 99, 64, 4)
        assert found.labels.tolist() == [number % 3 for number in GOOD]


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "bit", "other block", "other file", "no block"],
)
def test_a_damaged_block_is_computed_again_and_named(
    tmp_path: Path, data: Path, expected: Any, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    extracted(data, tmp_path)
    paths = sorted(tmp_path.iterdir())
    good = paths[2].read_bytes()
    bad = {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "bit": good[:-3000] + bytes([good[-3000] ^ 1]) + good[-2999:],
        "other block": paths[1].read_bytes(),
        "other file": json.dumps({"accuracy": 1}).encode(),
        "no block": safetensors.save({"x": np.zeros(3)}),
    }[damage]
    paths[2].write_bytes(bad)
    again = Counting()
    found = extracted(data, tmp_path, again)
    assert again.num_images == 14  # of samples 32 to 47, without the broken ones
    assert found.num_resumed == NUM_BLOCKS - 1
    assert torch.equal(found.values, expected[1])
    assert f"{paths[2]} is damaged" in caplog.text
    assert "computed again" in caplog.text
    assert paths[2].read_bytes() == good


@pytest.mark.parametrize(
    "changed",
    [{"backbone_sha256": "1" * 64}, {"resize_px": 24}, {"crop_px": 12}, {"precision": "bf16"}, {"name": "test"}],
)
def test_other_features_have_other_names(tmp_path: Path, data: Path, changed: dict[str, Any]) -> None:
    extracted(data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = extracted(data, tmp_path, **changed)
    assert other.num_resumed == 0
    assert len(list(tmp_path.iterdir())) == 2 * NUM_BLOCKS
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_other_images_have_other_names(tmp_path: Path, data: Path) -> None:
    extracted(data, tmp_path / "work")
    other = write_scenes(tmp_path / "other", (40, 30, 32))
    assert extracted(other, tmp_path / "work").num_resumed == 0


def on_a_rank(data: str, folder: str | None, cache: str) -> tuple[dict[str, Any], torch.Tensor, Any, Any, Any]:
    os.environ["SWAV_CACHE"] = cache
    feature_store.BLOCK_SAMPLES, features._BATCH = 16, 8
    found = extracted(data, folder)
    facts = {name: getattr(found, name) for name in ("offset", "total", "dim", "num_broken", "num_resumed")}
    whole = found.mapped() if folder is not None else None
    left = list((Path(cache) / "features").glob("*")) if folder is not None else []
    assert whole is None or not whole.flags.writeable
    return facts, found.values, found.all_ids(), found.all_labels(), (np.array(whole), [path.name for path in left])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(
    tmp_path: Path, data: Path, cache: Path, expected: Any, world: int
) -> None:
    for folder in (None, str(tmp_path / "work")):
        parts = run_ranks(world, on_a_rank, str(data), folder, str(cache))
        assert torch.equal(torch.cat([values for _, values, *_ in parts]), expected[1])
        offsets = np.cumsum([0, *(len(values) for _, values, *_ in parts[:-1])]).tolist()
        assert [facts["offset"] for facts, *_ in parts] == offsets
        for facts, _, ids, labels, (whole, left) in parts:
            assert (facts["total"], facts["dim"], facts["num_broken"], facts["num_resumed"]) == (99, 64, 4, 0)
            assert ids.tolist() == GOOD
            assert labels.tolist() == [number % 3 for number in GOOD]
            if folder is not None:
                assert np.array_equal(whole, expected[1].numpy())
                assert [name for name in left if name.endswith(".f32")] == []
    resumed = extracted(data, tmp_path / "work")  # by another number of ranks
    assert resumed.num_resumed == NUM_BLOCKS
    assert torch.equal(resumed.values, expected[1])


def test_ranks_without_blocks_take_part(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", (20,), broken=tuple(range(16)))  # no row in the first block
    parts = run_ranks(3, on_a_rank, str(data), str(tmp_path / "work"), str(cache))
    assert [len(values) for _, values, *_ in parts] == [0, 0, 4]
    for facts, values, ids, _, (whole, _) in parts:
        assert (facts["total"], facts["num_broken"], values.shape[1]) == (4, 16, 64)
        assert ids.tolist() == [16, 17, 18, 19]
        assert whole.shape == (4, 64)


def mapped_without_a_folder(data: str, cache: str) -> str:
    os.environ["SWAV_CACHE"] = cache
    with pytest.raises(ValueError, match="2 ranks share all features through a folder; give --output or --work"):
        extracted(data, None).mapped()
    return "refused"


def test_all_rows_on_several_ranks_want_a_folder(data: Path, cache: Path) -> None:
    assert run_ranks(2, mapped_without_a_folder, str(data), str(cache)) == ["refused"] * 2


def test_all_rows_are_read_only_and_leave_nothing(tmp_path: Path, data: Path, cache: Path, expected: Any) -> None:
    left = cache / "features"
    left.mkdir(exist_ok=True)
    (left / "train-0-1.f32").write_bytes(b"of a killed process")
    (left / ".train-0-2.f32.1234.partial").write_bytes(b"of a killed process")
    (left / "else.txt").write_text("not ours")
    rows = extracted(data, tmp_path).mapped()
    assert np.array_equal(rows, expected[1].numpy())
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0
    assert sorted(path.name for path in left.iterdir()) == [".lock", "else.txt"]
    in_memory = extracted(data, None).mapped()
    with pytest.raises(ValueError, match="read-only"):
        in_memory[0] = 0


def on_a_host_of_its_own(data: str, folder: str, cache: str) -> str:
    from swav.distributed import rank

    os.environ["SWAV_CACHE"] = f"{cache}/{rank()}"
    feature_store.BLOCK_SAMPLES, features._BATCH = 16, 8
    found = extracted(data, f"{folder}/{rank()}")
    assert len(found.values) in (45, 54)  # k-NN needs no more than its own rows
    with pytest.raises(RuntimeError, match="all hosts must share the folder") as error:
        found.mapped()
    return str(error.value)


def test_hosts_that_do_not_share_the_folder_are_told_so(tmp_path: Path, data: Path) -> None:
    messages = run_ranks(2, on_a_host_of_its_own, str(data), str(tmp_path / "work"), str(tmp_path / "cache"))
    assert "000003.safetensors is not there" in messages[0]
    assert "000000.safetensors is not there" in messages[1]


class Slow(Counting):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().forward(images)


def killed(data: str, folder: str, cache: str) -> None:
    os.environ["SWAV_CACHE"] = cache
    torch.set_num_threads(1)
    feature_store.BLOCK_SAMPLES, features._BATCH = 16, 8
    extracted(data, folder, Slow())


def test_what_a_killed_process_has_done_is_taken_up(tmp_path: Path, data: Path, cache: Path, expected: Any) -> None:
    work = tmp_path / "work"
    process = _CONTEXT.Process(target=killed, args=(str(data), str(work), str(cache)))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(work.glob("*.safetensors"))) < 3:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(list(work.glob("*.safetensors")))
    assert 3 <= done < NUM_BLOCKS
    rest = Counting()
    found = extracted(data, work, rest)
    assert found.num_resumed == done
    assert rest.num_images == sum(sample >= done * 16 for sample in GOOD)
    assert torch.equal(found.values, expected[1])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_folder_in_a_store(store: Any, data: Path, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = f"{store.make_bucket('work')}/evaluation"
    extracted(data, folder)
    keys = store.keys("work")
    assert len(keys) == NUM_BLOCKS
    store.delete("work", keys[0])
    store.put("work", keys[5], store.get("work", keys[5])[:-1])
    again = Counting()
    found = extracted(data, folder, again)
    assert (found.num_resumed, again.num_images) == (NUM_BLOCKS - 2, 15 + 16)
    assert f"s3://work/{keys[5]} is damaged" in caplog.text
    assert torch.equal(found.values, expected[1])
    assert np.array_equal(found.mapped(), expected[1].numpy())
    store.put("work", keys[5], b"")
    with pytest.raises(RuntimeError, match=r"is damaged \(.*\); run again, and it is computed again"):
        _ = found.values


def test_the_network_is_evaluated_and_left_as_it_was(data: Path) -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = extracted(data, None, model).values
    assert model.training
    assert not values.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_precision_changes_the_forward_passes(data: Path, expected: Any) -> None:
    half = extracted(data, None, precision="bf16").values
    assert half.dtype == torch.float32
    assert not torch.equal(half, expected[1])
    torch.testing.assert_close(half, expected[1], rtol=0.1, atol=0.1)


class Infinite(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4] / 0


def test_what_cannot_be_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RuntimeError, match=r"shard-000000\.tar:000000 and its neighbours are not finite"):
        extracted(data, tmp_path / "work", Infinite())
    assert not (tmp_path / "work").exists()
    broken = write_scenes(tmp_path / "broken", (2,), broken=(0, 1))
    with pytest.raises(ValueError, match="none of the 2 images to evaluate on can be decoded"):
        extracted(broken, None)


def test_images_without_labels_have_none(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", (4,), labelled=False)
    assert extracted(data, None).labels.tolist() == [-1] * 4
