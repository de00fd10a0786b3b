import logging

import pytest
import torch
from torch import Tensor, nn

from swav.export.check import check_outputs, check_weights, needed
from swav.models.backbone_file import BackboneFile


def test_equal_outputs_pass_in_two_batches_and_sizes(tiny: BackboneFile) -> None:
    seen: list[tuple[int, ...]] = []

    def compute(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        features: Tensor = tiny.backbone(images)
        return features

    assert check_outputs("it", compute, tiny, tolerance=0.0) == 0
    assert seen == [(1, 3, 32, 32), (3, 3, 64, 64)]


def test_a_difference_above_the_tolerance_is_an_error(tiny: BackboneFile) -> None:
    def off_by(factor: float) -> float:
        return check_outputs("it", lambda images: tiny.backbone(images) * factor, tiny, tolerance=0.01)

    assert off_by(1.005) == pytest.approx(0.005, rel=0.01)
    with pytest.raises(
        RuntimeError, match=r"it does not compute what the backbone does: at 32 px features differ by 0.02 "
    ):
        off_by(1.02)
    with pytest.raises(RuntimeError, match="differ by nan of the largest"):
        off_by(float("nan"))


def test_other_shapes_are_an_error(tiny: BackboneFile) -> None:
    with pytest.raises(RuntimeError, match=r"it gives \[1, 32\] for \[1, 64\]; nothing was kept"):
        check_outputs("it", lambda images: tiny.backbone(images)[:, :32], tiny, tolerance=1.0)


def test_a_dead_backbone_is_said(tiny: BackboneFile, caplog: pytest.LogCaptureFixture) -> None:
    nn.init.zeros_(tiny.backbone.conv1.weight)
    for module in tiny.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    with caplog.at_level(logging.WARNING):
        check_outputs("it", tiny.backbone, tiny, tolerance=0.0)
    assert "all features of the backbone are 0, so trying it says little" in caplog.text


def test_every_weight_is_compared(tiny: BackboneFile) -> None:
    weights = dict(tiny.backbone.state_dict())
    check_weights("it", weights, tiny)
    with pytest.raises(RuntimeError, match=r"it does not hold the backbone's bn1\.weight; nothing was kept"):
        check_weights("it", {**weights, "bn1.weight": weights["bn1.weight"] + 1e-6}, tiny)
    with pytest.raises(RuntimeError, match="does not hold the backbone's extra"):
        check_weights("it", {**weights, "extra": torch.zeros(1)}, tiny)
    del weights["bn1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"does not hold the backbone's bn1\.num_batches_tracked"):
        check_weights("it", weights, tiny)
    check_weights(
        "it",
        {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")},
        tiny,
        without="num_batches_tracked",
    )


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"--to timm needs the package no_timm, .*: pip install 'swav\[export\]'"):
        needed("no_timm", "timm")
