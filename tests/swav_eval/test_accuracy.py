import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from swav_testing.ranks import run_ranks
from swav_testing.runs import write_scenes
from torch import nn

from swav import features
from swav.data.source import open_dataset
from swav_eval.accuracy import Block, evaluate_classifier, feature_blocks, image_blocks
from swav_eval.classifier import Classifier
from swav_eval.config import LinearProtocol
from swav_eval.recipes import configure

CPU = torch.device("cpu")
BROKEN = (3, 40, 41, 102)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


class MeanColour(nn.Module):
    """The mean of each of three colours, in float64."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean(dim=(2, 3))


def classifier(num_heads: int, num_classes: int, num_features: int = 3) -> Classifier:
    made = Classifier(
        MeanColour() if num_features == 3 else nn.Identity(),
        num_features,
        num_classes,
        num_heads=num_heads,
        seed=1,
        is_frozen=True,
    ).double()
    generator = torch.Generator().manual_seed(5)
    for head in made.heads:
        nn.init.normal_(head.get_parameter("weight"), generator=generator)
    return made


def judged(data: str, cache: str, num_classes: int) -> tuple[list[dict[str, float]], dict[str, int], list[float]]:
    os.environ["SWAV_CACHE"] = cache
    features._BATCH = 8  # several blocks, of which some ranks have fewer
    protocol = configure("linear_imagenet", LinearProtocol, [f"num_classes={num_classes}"])
    index = open_dataset(data)
    seen: list[float] = []

    def blocks() -> Any:
        for block in image_blocks(
            index, range(index.num_samples), protocol, resize_px=20, crop_px=16, device=CPU, num_threads=2
        ):
            seen.extend(block.inputs.double().sum(dim=(1, 2, 3)).tolist())
            yield block

    found = evaluate_classifier(classifier(2, num_classes), blocks(), num_classes=num_classes, precision="fp32")
    return *found, seen


@pytest.mark.parametrize("num_classes", [3, 7])
def test_any_number_of_ranks_counts_every_image_once(tmp_path: Path, cache: Path, num_classes: int) -> None:
    data = write_scenes(tmp_path / "data", broken=BROKEN)
    accuracies, counts, seen = judged(str(data), str(cache), num_classes)
    assert counts == {"images": 99, "broken": 4}
    assert list(accuracies[0]) == (["top1"] if num_classes == 3 else ["top1", "top5"])
    for world in (2, 4):
        results = run_ranks(world, judged, str(data), str(cache), num_classes)
        assert [result[:2] for result in results] == [(accuracies, counts)] * world
        assert sorted(sum((result[2] for result in results), [])) == sorted(seen)  # noqa: RUF017


def test_accuracies_are_those_of_loops() -> None:
    draws = np.random.default_rng(3)
    values, labels = draws.normal(size=(200, 4)).astype(np.float32), draws.integers(0, 9, 200)
    rows = np.flatnonzero(draws.random(200) < 0.7)
    heads = classifier(3, 9, num_features=4)
    accuracies, counts = evaluate_classifier(
        heads, feature_blocks(values, labels, rows, device=CPU), num_classes=9, precision="fp32"
    )
    assert counts == {"images": len(rows), "broken": 0}
    for head, accuracy in zip(heads.heads, accuracies, strict=True):
        weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
        first = five = 0
        for row in rows:
            scores = [float(weight[k] @ values[row].astype(np.float64) + bias[k]) for k in range(9)]
            best = sorted(range(9), key=lambda k: -scores[k])
            first += best[0] == labels[row]
            five += labels[row] in best[:5]
        assert accuracy == {"top1": first / len(rows), "top5": five / len(rows)}
        assert 0 < accuracy["top1"] < accuracy["top5"] < 1


def test_equal_scores_are_no_success() -> None:
    """A classifier that says the same of all classes is right as often as chance has it, not always."""
    heads = classifier(1, 10, num_features=4)
    nn.init.zeros_(heads.heads[0].get_parameter("weight"))
    values, labels = np.zeros((100, 4), np.float32), np.arange(100) % 10
    (accuracy,), _ = evaluate_classifier(
        heads, feature_blocks(values, labels, np.arange(100), device=CPU), num_classes=10, precision="fp32"
    )
    assert accuracy == {"top1": 0.1, "top5": 0.5}


def test_no_whole_image_is_refused() -> None:
    nothing = Block(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), num_broken=7)
    with pytest.raises(ValueError, match="none of the 7 images to evaluate on can be decoded"):
        evaluate_classifier(classifier(1, 3, num_features=4), [nothing], num_classes=3, precision="fp32")
