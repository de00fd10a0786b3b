import torch
from torch import nn

from swav.models.multicrop import MultiCropModel


class CountingBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


def test_backbone_runs_once_per_size_and_the_head_once() -> None:
    backbone, calls = CountingBackbone(), []
    head = nn.Identity()
    head.register_forward_hook(lambda _module, inputs, _output: calls.append(inputs[0].shape))
    crops = [torch.full((4, 3, 8, 8), 1.0), torch.full((12, 3, 4, 4), 2.0)]
    embeddings = MultiCropModel(backbone, head)(crops)
    assert backbone.shapes == [(4, 3, 8, 8), (12, 3, 4, 4)]
    assert calls == [(16, 3)]
    assert embeddings[:4].eq(1).all()
    assert embeddings[4:].eq(2).all()
