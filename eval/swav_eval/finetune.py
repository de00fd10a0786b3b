"""A network fine-tuned on few labelled images (appendices A.4 and B.5; Table 6).

``python -m swav_eval.finetune --recipe semisup_1pct --backbone FILE --train URL --test URL [--output FILE]``
"""

import sys

import torch

from swav import rng
from swav.models.batchnorm import synchronize
from swav.models.resnet import ResNet
from swav.storage import join
from swav_eval import command
from swav_eval.accuracy import evaluate_classifier, image_blocks
from swav_eval.classifier import Classifier, train_classifier
from swav_eval.command import Job
from swav_eval.config import FinetuneProtocol
from swav_eval.labelled_data import labelled_pipeline
from swav_eval.labels import check_labels
from swav_eval.results import Outcome, identity
from swav_eval.subsets import choose_subset
from swav_eval.training_report import RateGroup


def carry_out(job: Job[FinetuneProtocol]) -> Outcome:
    """Train the network and a classifier on some images of each class, with a rate for each of the two.

    Batch norm's statistics are those of the batch of all ranks. Decay of the weights, where there is any, applies to
    all parameters.

    Raises:
        ValueError: an image has no label of a class, or there are too few images.
        swav.program.Stopped: on SIGTERM or SIGINT.
        RuntimeError: the training has diverged, too many images are broken, or a file cannot be read or written.
    """
    protocol, test = job.protocol, job.indices["test"]
    check_labels(test, protocol)
    subset = choose_subset(
        job.train, protocol.subset, seed=protocol.seed, num_classes=protocol.num_classes, runtime=protocol.runtime
    )
    trunk = _trunk(job)
    classifier = Classifier(
        trunk, trunk.num_features, protocol.num_classes, num_heads=1, seed=protocol.seed, is_frozen=False
    )
    synchronize(classifier, job.device)
    classifier.to(job.device)
    if job.device.type == "cuda":
        classifier.to(memory_format=torch.channels_last)
    with labelled_pipeline(
        job.train, subset.ids, protocol, crop_px=job.crop_px, device=job.device, num_threads=job.num_threads
    ) as batches:
        trained = train_classifier(
            classifier,
            batches,
            [
                RateGroup("trunk_lr", protocol.trunk_lr, list(classifier.trunk.parameters())),
                RateGroup("head_lr", protocol.head_lr, list(classifier.heads.parameters())),
            ],
            protocol,
            device=job.device,
            folder=join(job.work, "checkpoints") if job.work is not None else None,
            identity=identity(protocol, backbone_sha256=job.backbone.sha256, data={"train": job.train.identity})
            | {"subset": subset.facts},
        )
    blocks = image_blocks(
        test,
        range(test.num_samples),
        protocol,
        resize_px=job.resize_px,
        crop_px=job.crop_px,
        device=job.device,
        num_threads=job.num_threads,
    )
    (accuracy,), seen = evaluate_classifier(
        classifier, blocks, num_classes=protocol.num_classes, precision=protocol.runtime.precision
    )
    return Outcome(
        metrics=accuracy,
        broken={"train": trained.num_broken, "test": seen["broken"]},
        facts={"subset": subset.facts},
    )


def _trunk(job: Job[FinetuneProtocol]) -> ResNet:
    """The backbone, or, from scratch, an untrained network of its architecture, which the seed alone decides."""
    if not job.protocol.from_scratch:
        return job.backbone.backbone
    model = job.backbone.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(job.protocol.seed, "backbone"))
        return ResNet(model.arch, width=model.width, stem=model.stem)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    return command.main(
        FinetuneProtocol,
        carry_out,
        arguments,
        prog="swav_eval.finetune",
        description="Accuracy of a network that is fine-tuned on few labelled images.",
    )


if __name__ == "__main__":
    sys.exit(main())
