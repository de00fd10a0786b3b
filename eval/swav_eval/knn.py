"""k-nearest neighbours on frozen features (appendix B.6, Table 7).

``python -m swav_eval.knn --backbone FILE --train URL [--test URL] [--output FILE] [--k 20 200]``
"""

import argparse
import hashlib
import json
import sys
from typing import Any

import torch

import swav
from swav.config import EvaluateConfig, RuntimeConfig
from swav.data.source import open_dataset
from swav.distributed import cores_of_rank, pick_device, process_group, rank
from swav.features import extract_features, knn_accuracies
from swav.logs import answer, start_logging
from swav.models.backbone_file import load_backbone
from swav.program import run
from swav.storage import Location, read, write_atomic
from swav.telemetry import reporting


def knn(backbone: Location, config: EvaluateConfig, *, device: torch.device) -> dict[str, Any]:
    """Run the protocol.

    Args:
        backbone: a file that a run wrote.
        config: images and settings.
        device: where to compute.

    Returns:
        The result: accuracy by k, and what is needed to get the same again.

    Raises:
        ValueError: the backbone, the images or the settings do not fit.
    """
    network = load_backbone(backbone).backbone.to(device)
    urls = {"train": config.train_url} | ({"test": config.test_url} if config.test_url is not None else {})
    data = {name: open_dataset(url) for name, url in urls.items()}
    features = {
        name: extract_features(network, index, config, device=device, num_threads=cores_of_rank())
        for name, index in data.items()
    }
    accuracies = knn_accuracies(features["train"], features.get("test"), config)
    return {
        "protocol": "knn",
        "accuracy": {str(k): accuracy for k, accuracy in accuracies.items()},
        "temperature": config.temperature,
        "resize_px": config.resize_px,
        "crop_px": config.crop_px,
        "backbone_sha256": hashlib.sha256(read(backbone)).hexdigest(),
        "data": {
            name: {
                "url": urls[name],
                "identity": data[name].identity,
                "images": features[name].total,
                "broken": features[name].num_broken,
            }
            for name in data
        },
        "versions": {"swav": swav.__version__, "torch": torch.__version__},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swav_eval.knn", description="k-NN accuracy of a backbone.")
    parser.add_argument("--backbone", required=True, help="backbone.pt of a run")
    parser.add_argument("--train", required=True, help="labelled images that vote: a folder of images or of tars")
    parser.add_argument("--test", help="labelled images to classify (default: each of --train by the others)")
    parser.add_argument("--output", help="file for the result as JSON")
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--resize-px", type=int, help="shorter side (default: as the backbone's run)")
    parser.add_argument("--crop-px", type=int, help="centre crop (default: as the backbone's run)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    start_logging()
    options = parser.parse_args(arguments)

    def body() -> None:
        with reporting():
            _run(options)

    return run(body)


def _run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    device = pick_device(options.device)
    sizes = load_backbone(options.backbone)
    config = EvaluateConfig(
        train_url=options.train,
        test_url=options.test,
        num_neighbors=tuple(options.k),
        temperature=options.temperature,
        resize_px=sizes.resize_px if options.resize_px is None else options.resize_px,
        crop_px=sizes.crop_px if options.crop_px is None else options.crop_px,
    )
    with process_group(device, RuntimeConfig().collective_timeout_seconds):
        result = knn(options.backbone, config, device=device)
        if rank() == 0:
            text = json.dumps(result, indent=2)
            answer(text, title="k-NN accuracy", result=result)
            if options.output is not None:
                write_atomic(options.output, (text + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
