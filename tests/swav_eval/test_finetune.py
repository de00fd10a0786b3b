import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.ranks import run_ranks
from swav_testing.runs import write_scenes
from torch import Tensor

from swav.config import ModelConfig
from swav.data.source import open_dataset
from swav.models import batchnorm
from swav.models.backbone_file import load_backbone, save_backbone
from swav.models.resnet import ResNet
from swav_eval import finetune
from swav_eval.classifier import Classifier
from swav_eval.config import SubsetConfig
from swav_eval.finetune import main
from swav_eval.subsets import choose_subset

BROKEN = (3, 40, 102)
# In so small a network one ReLU input that rounds to the other side of zero changes the gradients: low rates keep that
# from growing. That the computation is the same shows in float64, below.
TINY = (
    "num_classes=3",
    "global_batch=24",
    "subset.fraction=0.5",
    "epochs=3",
    'schedule={"kind":"steps","epochs":[1,2],"factor":0.2}',
    "trunk_lr=0.01",
    "head_lr=0.1",
    "runtime.device=cpu",
    "runtime.loader_threads=2",
    "runtime.checkpoint_every_steps=4",
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_scenes(folder / "train", broken=BROKEN)
    write_scenes(folder / "test", (50, 53), first_seed=1000, broken=(7,))
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    model = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    save_backbone(network, model, folder / "backbone.pt", resize_px=24, crop_px=20)
    return folder


def words(files: Path, output: Path | None, *more: str) -> list[str]:
    where = [f"--{name}={files / name}" for name in ("train", "test")] + ["--backbone", str(files / "backbone.pt")]
    where += ["--output", str(output)] if output is not None else []
    return ["--recipe", "semisup_10pct", *where, *TINY, *more]


def spy_on_training(made: list[Classifier], *, double: bool = False) -> Callable[..., Any]:
    train: Callable[..., Any] = vars(finetune)["train_classifier"]

    def spy(classifier: Classifier, batches: Any, *args: Any, **settings: Any) -> Any:
        made.append(classifier)
        if double:
            classifier.double()
            augment = batches.augment
            object.__setattr__(batches, "augment", lambda raw: _doubled(augment(raw)))
        return train(classifier, batches, *args, **settings)

    return spy


def _doubled(batch: Any) -> Any:
    batch.crops[0] = batch.crops[0].double()
    return batch


def evaluated(
    files: str, output: str, cache: str, double: bool, *more: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The result and the trained weights, in float64 where asked for."""
    os.environ["SWAV_CACHE"] = cache
    made: list[Classifier] = []
    before = {name: vars(finetune)[name] for name in ("train_classifier", "image_blocks")}
    blocks: Callable[..., Any] = before["image_blocks"]

    def double_blocks(*args: Any, **settings: Any) -> Any:
        for block in blocks(*args, **settings):
            object.__setattr__(block, "inputs", block.inputs.double())
            yield block

    vars(finetune)["train_classifier"] = spy_on_training(made, double=double)
    if double:
        vars(finetune)["image_blocks"] = double_blocks
    try:
        assert main(words(Path(files), Path(output), *more)) == 0
    finally:
        vars(finetune).update(before)
    return json.loads(Path(output).read_text()), made[0].state_dict()


def found(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "command"}


def test_the_result_names_its_images_and_the_network_has_learned(tmp_path: Path, cache: Path, files: Path) -> None:
    result, weights = evaluated(str(files), str(tmp_path / "one.json"), str(cache), False)
    subset = choose_subset(open_dataset(str(files / "train")), SubsetConfig(fraction=0.5), seed=31, num_classes=3)
    assert result["subset"] == subset.facts
    assert result["data"]["train"]["broken"] == len(set(subset.ids.tolist()) & set(BROKEN))
    assert result["data"]["test"]["broken"] == 1
    assert result["metrics"]["top1"] > 0.5
    assert list(result["metrics"]) == ["top1"]
    before = load_backbone(files / "backbone.pt").backbone.state_dict()
    assert [name for name, tensor in before.items() if torch.equal(weights[f"trunk.{name}"], tensor)] == []
    again, same = evaluated(str(files), str(tmp_path / "two.json"), str(cache), False)
    assert found(again) == found(result)
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_any_number_of_ranks_trains_the_same_network(tmp_path: Path, cache: Path, files: Path) -> None:
    """In float64, with synchronised batch norm, uneven shares, and a broken image."""
    assert "CpuSyncBatchNorm" in vars(batchnorm)
    one, weights = evaluated(str(files), str(tmp_path / "1.json"), str(cache), True)
    for world in (2, 4):
        results = run_ranks(world, evaluated, str(files), str(tmp_path / f"{world}.json"), str(cache), True)
        for result, state in results:
            assert found(result) == found(one)
            assert state.keys() == weights.keys()
            for name, tensor in weights.items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_fewer_images_than_a_batch_are_one_batch_per_epoch(tmp_path: Path, cache: Path, files: Path) -> None:
    subset = 'subset={"per_class":2}'
    result, weights = evaluated(str(files), str(tmp_path / "one.json"), str(cache), False, subset)
    assert result["subset"]["images"] == 6
    assert int(weights["trunk.bn1.num_batches_tracked"]) == 3  # an epoch, a step


def test_from_scratch_only_the_architecture_is_the_backbones(tmp_path: Path, cache: Path, files: Path) -> None:
    settings = ("from_scratch=true", "trunk_lr=0.0")  # so that the weights stay those of the start
    _, one = evaluated(str(files), str(tmp_path / "1.json"), str(cache), False, *settings)
    torch.manual_seed(5)  # what was drawn before is nothing to it
    _, two = evaluated(str(files), str(tmp_path / "2.json"), str(cache), False, *settings)
    _, other = evaluated(str(files), str(tmp_path / "3.json"), str(cache), False, *settings, "seed=7")
    given = load_backbone(files / "backbone.pt").backbone.state_dict()["conv1.weight"]
    assert torch.equal(one["trunk.conv1.weight"], two["trunk.conv1.weight"])
    assert not torch.equal(one["trunk.conv1.weight"], other["trunk.conv1.weight"])
    assert not torch.equal(one["trunk.conv1.weight"], given)
    _, kept = evaluated(str(files), str(tmp_path / "4.json"), str(cache), False, "trunk_lr=0.0")
    assert torch.equal(kept["trunk.conv1.weight"], given)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["num_classes=2"], "has the label 2, and with num_classes=2 labels are 0 to 1; set num_classes to that of"),
        (["head_lr=0"], "fine-tuning needs trunk_lr >= 0 and head_lr > 0"),
        (['subset={"per_class":60}'], "60 are asked for"),
        (['subset={"names":"nowhere.txt"}'], "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused(
    files: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words(files, None, *more)) == 64
    assert message in caplog.records[-1].message


def test_a_diverged_training_names_both_rates(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(words(files, None, "trunk_lr=1e30", "head_lr=1e30")) == 1
    assert "give lower rates than trunk_lr=1e+30, head_lr=1e+30" in caplog.records[-1].message
