"""The main job: ``python -m swav.pretrain --recipe NAME [--data URL] [--output FOLDER] [key=value ...]``."""

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from swav.config import EvaluateConfig, PretrainConfig
from swav.data.index import DatasetIndex
from swav.data.source import has_labels, open_dataset
from swav.distributed import pick_device, process_group, rank
from swav.methods import build_backbone
from swav.models.backbone_file import save_backbone
from swav.recipes import configure
from swav.storage import write_atomic
from swav.train import Stopped, check_run_folder, evaluate, train

EXIT_REFUSED = 64  # the command is wrong: another try will not help
EXIT_STOPPED = 75  # stopped on request, state saved: run again (not 0, which would tell torchrun that all is done)

_logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, output: Path) -> dict[str, dict[str, float]]:
    """Run, or take up again, one pretraining; leave ``backbone.pt`` and ``result.json`` in ``output``.

    Returns:
        k-NN accuracies, for example ``{"trained backbone": {"knn_20": 0.59}}``, with "raw pixels" and "random backbone"
        before it where the run asks for baselines; empty where it has no evaluation, or no labels to evaluate on.

    Raises:
        ValueError: the run cannot be carried out as asked.
        Stopped: see :func:`swav.train.train`.
        RuntimeError: see :func:`swav.train.train`.
    """
    device = pick_device(config.runtime.device)
    index = open_dataset(config.data.url)
    with process_group(device):
        sizes = image_sizes(config.evaluate)
        config = check_evaluation(config)
        check_run_folder(config, index, output)
        result: dict[str, dict[str, float]] = {}
        if config.evaluate is not None and config.evaluate.baselines:
            result["raw pixels"] = evaluate(nn.Flatten(), config, device)
            result["random backbone"] = evaluate(build_backbone(config).to(device), config, device)
        method = train(config, index, output, device)
        if config.evaluate is not None:
            result["trained backbone"] = evaluate(method.backbone, config, device)
        if rank() == 0:
            save_backbone(method.backbone, config.model, output / "backbone.pt", **sizes)
            write_atomic(output / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def check_evaluation(config: PretrainConfig) -> PretrainConfig:
    """Find out before training whether the evaluation after it can be done; without labels, drop it and say so.

    Raises:
        ValueError: the evaluation asks for more neighbours than there are images, or for unlabelled test images.
    """
    if config.evaluate is None:
        return config
    voters = open_dataset(config.evaluate.train_url)
    if not has_labels(voters):
        if rank() == 0:
            _logger.info(
                "%s has no labels, so there will be no k-NN accuracy; give some with evaluate.train_url=FOLDER",
                config.evaluate.train_url,
            )
        return replace(config, evaluate=None)
    if config.evaluate.test_url is not None and not has_labels(open_dataset(config.evaluate.test_url)):
        raise ValueError(
            f"evaluate.test_url={config.evaluate.test_url} has no labels; give labelled images, or "
            "evaluate.test_url=null to classify each of evaluate.train_url by the others"
        )
    largest, available = max(config.evaluate.num_neighbors), num_voters(voters, config)
    if largest > available:
        raise ValueError(
            f"evaluate.num_neighbors={list(config.evaluate.num_neighbors)}, but {config.evaluate.train_url} has only "
            f"{available} images to vote; set evaluate.num_neighbors=[{max(1, available // 10)}]"
        )
    return config


def image_sizes(evaluation: EvaluateConfig | None) -> dict[str, int]:
    """How large an evaluation sees its images; the paper's 256 and 224 where the run has none."""
    if evaluation is None:
        return {"resize_px": 256, "crop_px": 224}
    return {"resize_px": evaluation.resize_px, "crop_px": evaluation.crop_px}


def num_voters(voters: DatasetIndex, config: PretrainConfig) -> int:
    """How many labelled images may vote on another."""
    leave_one_out = config.evaluate is not None and config.evaluate.test_url is None
    return voters.num_samples - leave_one_out


def describe(result: dict[str, dict[str, float]], output: Path) -> str:
    """The result for a person."""
    lines = [f"backbone: {output / 'backbone.pt'}"]
    for what, accuracies in result.items():
        values = ", ".join(
            f"{100 * value:5.1f} % ({name.removeprefix('knn_')}-NN)" for name, value in accuracies.items()
        )
        lines.append(f"k-NN accuracy, {what + ':':17} {values}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swav.pretrain", description="Pretrain a backbone with SwAV.")
    parser.add_argument("--recipe", required=True, help="name of the run, for example demo")
    parser.add_argument("--data", help="images to train on: a folder of images or of webdataset tars")
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. optim.epochs=100")
    options = parser.parse_args(arguments)
    output = options.output or Path("runs") / options.recipe
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    try:
        with logging_redirect_tqdm():
            result = pretrain(configure(options.recipe, data=options.data, overrides=options.overrides), output)
    except ValueError as error:
        _logger.error("error: %s", error)
        _logger.debug("where it was refused", exc_info=True)
        return EXIT_REFUSED
    except Stopped as stopped:
        _logger.info("%s; run the same command to go on", stopped)
        return EXIT_STOPPED
    if first:
        sys.stdout.write(describe(result, output) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
