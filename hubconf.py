"""Entry point for ``torch.hub.load(REPOSITORY, "swav_backbone", path=FILE, source="local")``; nothing is downloaded."""

from swav.models.backbone_file import load_backbone
from swav.models.resnet import ResNet

dependencies = ["torch", "torchvision", "numpy", "pydantic", "safetensors", "boto3", "urllib3", "google_crc32c"]


def swav_backbone(path: str) -> ResNet:
    """Load the backbone of a file of any layout in docs/models.md: images [B, 3, H, W], normalised -> features."""
    return load_backbone(path).backbone.eval()
