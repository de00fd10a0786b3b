"""The main job: ``python -m swav.pretrain --recipe NAME [--data URL] [--output FOLDER] [key=value ...]``."""

import argparse
import json
import logging
import os
import sys

from torch import nn

from swav.bars import above_bars
from swav.config import PretrainConfig
from swav.data.index import DatasetIndex
from swav.data.source import has_labels, open_dataset
from swav.distributed import barrier, pick_device, process_group, rank
from swav.features import Evaluation
from swav.logs import answer, set_context, start_logging
from swav.methods import build_backbone
from swav.models.backbone_file import image_sizes, save_backbone
from swav.program import run, stop_at_once
from swav.recipes import configure
from swav.run_folder import sole_writer
from swav.storage import Location, is_remote, join, local_path, stat, write_atomic
from swav.telemetry import reporting
from swav.train import check_run_folder, evaluate, train
from swav.watchdog import ends_when_stalled

_logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, output: Location) -> dict[str, dict[str, float]]:
    """Run, or take up again, one pretraining; leave ``backbone.pt`` and ``result.json`` in ``output``.

    Returns:
        k-NN accuracies, for example ``{"trained backbone": {"knn_20": 0.59}}``, with "raw pixels" and "random backbone"
        before it where the run asks for baselines; empty where it has no evaluation, or no labels to evaluate on.

    Raises:
        ValueError: the run cannot be carried out as asked.
        swav.program.Stopped: see :func:`swav.train.train`.
        RuntimeError: see :func:`swav.train.train`.
    """
    device = pick_device(config.runtime.device)
    check_output(output)
    index = open_dataset(config.data.url)
    evaluation = open_evaluation(config, index)
    if index.num_samples < config.optim.global_batch:
        _logger.warning(
            "%s has %d images, fewer than optim.global_batch=%d: a step takes them all, at a learning rate for more",
            *(config.data.url, index.num_samples, config.optim.global_batch),
        )
    timeout_seconds = config.runtime.collective_timeout_seconds
    with (
        ends_when_stalled(config.runtime.stalled_after_seconds),
        stop_at_once("stopped on request before or after training; what was trained is saved"),
        process_group(device, timeout_seconds),
    ):
        check_run_folder(config, index, output)
        with sole_writer(output, wait_seconds=timeout_seconds / 2):
            result: dict[str, dict[str, float]] = {}
            if evaluation is not None and evaluation.config.baselines:
                result["raw pixels"] = evaluate(nn.Flatten(), evaluation, config, device)
                result["random backbone"] = evaluate(build_backbone(config).to(device), evaluation, config, device)
            method = train(config, index, output, device, evaluation)
            if rank() == 0:
                sizes = image_sizes(config.evaluate)
                save_backbone(method.backbone, config.model, join(output, "backbone.pt"), **sizes)
            if evaluation is not None:
                result["trained backbone"] = evaluate(method.backbone, evaluation, config, device)
            if rank() == 0:
                write_atomic(join(output, "result.json"), (json.dumps(result, indent=2) + "\n").encode())
            barrier()  # a launcher takes the first rank that ends well for the run being done
    return result


def check_output(output: Location) -> None:
    """Find out before anything is computed whether the run's folder can be written.

    Of an object store only reading can be tried without a trace; :func:`swav.train.train` writes at its start.

    Raises:
        ValueError: it cannot.
        OSError: the object store refuses.
    """
    if is_remote(output):
        stat(join(output, "config.json"))
        return
    folder = local_path(output).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--output {output}: {there} is a file; give a folder, new or of this run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output} cannot be written below {there}; give a folder that can")


def open_evaluation(config: PretrainConfig, index: DatasetIndex) -> Evaluation | None:
    """Find out before training whether the evaluation after it can be done; None where there is none, or no labels.

    Args:
        config: the run.
        index: its training images, which need not be opened again if the evaluation has them too.

    Raises:
        ValueError: the evaluation asks for more neighbours than there are images, or for unlabelled test images.
    """
    wanted = config.evaluate
    if wanted is None:
        return None
    train_images = index if wanted.train_url == config.data.url else open_dataset(wanted.train_url)
    if not has_labels(train_images):
        _logger.info(
            "%s has no labels, so there will be no k-NN accuracy; give some with evaluate.train_url=FOLDER",
            wanted.train_url,
        )
        return None
    test_images = open_dataset(wanted.test_url) if wanted.test_url is not None else None
    if test_images is not None and not has_labels(test_images):
        raise ValueError(
            f"evaluate.test_url={wanted.test_url} has no labels; give labelled images, or evaluate.test_url=null to "
            "classify each of evaluate.train_url by the others"
        )
    evaluation = Evaluation(wanted, train_images, test_images)
    if max(wanted.num_neighbors) > evaluation.num_voters:
        fewer = max(1, evaluation.num_voters // 10)
        raise ValueError(
            f"evaluate.num_neighbors={list(wanted.num_neighbors)}, but {wanted.train_url} has only "
            f"{evaluation.num_voters} images to vote; set evaluate.num_neighbors=[{fewer}]"
        )
    return evaluation


def describe(result: dict[str, dict[str, float]], output: Location) -> str:
    """The result for a person."""
    lines = [f"backbone: {join(output, 'backbone.pt')}"]
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
    parser.add_argument("--output", help="a folder, or s3://bucket/prefix (default: RECIPE in SWAV_RUNS, or in runs)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. optim.epochs=100")
    start_logging()
    options = parser.parse_args(arguments)
    output = options.output or join(os.environ.get("SWAV_RUNS") or "runs", options.recipe)
    set_context(run=str(output))

    def body() -> None:
        with above_bars(), reporting():
            result = pretrain(configure(options.recipe, data=options.data, overrides=options.overrides), output)
        if os.environ.get("RANK", "0") == "0":
            answer(describe(result, output), title="the run is done", result=result)

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
