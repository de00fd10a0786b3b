"""What the programs of all protocols share: options, device, process group, and the result's file."""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from swav import storage
from swav.bars import above_bars
from swav.data.index import DatasetIndex
from swav.data.source import open_dataset
from swav.distributed import barrier, cores_of_rank, pick_device, process_group, rank
from swav.logs import answer, set_context, start_logging
from swav.models.backbone_file import BackboneFile, load_backbone
from swav.program import run, stop_at_once
from swav.run_folder import sole_writer
from swav.storage import Location, join
from swav.telemetry import reporting
from swav.watchdog import ends_when_stalled, progress
from swav_eval.config import EvaluationRuntime, FinetuneProtocol, Protocol
from swav_eval.feature_store import StoredFeatures, extract_features
from swav_eval.recipes import configure, protocol_names
from swav_eval.results import Outcome, finished_result, identity, text_of, versions, write_result

P = TypeVar("P", bound=Protocol)


@dataclass(frozen=True, slots=True)
class Job(Generic[P]):
    """One evaluation, whose files have been opened."""

    protocol: P
    backbone: BackboneFile
    train: DatasetIndex
    test: DatasetIndex | None
    device: torch.device
    work: Location | None  # folder for what a restarted evaluation takes up again; None: it would begin anew

    @property
    def resize_px(self) -> int:
        """Shorter side of the images."""
        return self.backbone.resize_px if self.protocol.resize_px is None else self.protocol.resize_px

    @property
    def crop_px(self) -> int:
        """Centre crop, and random crops, of the images."""
        return self.backbone.crop_px if self.protocol.crop_px is None else self.protocol.crop_px

    @property
    def num_threads(self) -> int:
        """Threads of this rank that decode."""
        return self.protocol.runtime.loader_threads or cores_of_rank()

    @property
    def indices(self) -> dict[str, DatasetIndex]:
        """Of the images, by "train" and, where there are any, "test"."""
        return {"train": self.train} | ({"test": self.test} if self.test is not None else {})

    def features(self, name: str) -> StoredFeatures:
        """Features of the "train" or the "test" images from the frozen backbone. All ranks call it.

        Raises:
            ValueError: no image can be decoded.
            OSError: a shard cannot be read, or the work folder not written.
        """
        return extract_features(
            self.backbone.backbone,
            self.indices[name],
            backbone_sha256=self.backbone.sha256,
            name=name,
            resize_px=self.resize_px,
            crop_px=self.crop_px,
            device=self.device,
            precision=self.protocol.runtime.precision,
            num_threads=self.num_threads,
            runtime=self.protocol.runtime,
            folder=self.work,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What a command line names."""

    backbone: Location
    train: str
    test: str | None
    output: Location | None
    work: Location | None
    command: str


@contextmanager
def session(runtime: EvaluationRuntime) -> Iterator[torch.device]:
    """The device of this rank, within its process group; SIGTERM and SIGINT end the block by ``Stopped``.

    Args:
        runtime: of the evaluations in the block.

    Raises:
        ValueError: the device that is asked for is not there.
        swav.program.Stopped: on SIGTERM or SIGINT; what is done is kept in the work folder.
    """
    device = pick_device(runtime.device)
    with (
        ends_when_stalled(runtime.stalled_after_seconds),
        stop_at_once("stopped on request; with --output or --work, what was saved there is kept"),
        process_group(device, runtime.collective_timeout_seconds),
    ):
        yield device


def evaluate(
    request: Request, protocol: P, carry_out: Callable[[Job[P]], Outcome], device: torch.device
) -> dict[str, Any]:
    """Carry out a protocol, or find that it is done; every rank returns the result, and rank 0 has written it.

    Args:
        request: which files.
        protocol: the settings.
        carry_out: the protocol itself.
        device: of the :func:`session`.

    Raises:
        ValueError: the backbone, the images or the settings do not fit, or the output is another evaluation's.
        RuntimeError, OSError: a file cannot be read or written.
    """
    backbone = load_backbone(request.backbone)
    train = open_dataset(request.train)
    test = open_dataset(request.test) if request.test is not None else None
    indices = {"train": train} | ({"test": test} if test is not None else {})
    data = {name: index.identity for name, index in indices.items()} | _identity_of_list(protocol)
    wanted = identity(protocol, backbone_sha256=backbone.sha256, data=data)
    found = _finished(request, wanted)
    if found is not None:
        return found
    work = request.work or (f"{storage.absolute(request.output)}.work" if request.output is not None else None)
    job = Job(protocol, backbone, train, test, device, work)
    _check_sizes(job)
    wait_seconds = protocol.runtime.collective_timeout_seconds / 2
    with _work_folder(work, removed=request.work is None, wait_seconds=wait_seconds):
        barrier()  # until this evaluation has the folder to itself
        found = _finished(request, wanted)  # whoever had the folder has written it
        if found is not None:
            return found
        outcome = carry_out(job)
        urls = {"train": request.train, "test": request.test}
        result = {
            **wanted,
            "metrics": outcome.metrics,
            **outcome.facts,
            "resize_px": job.resize_px,
            "crop_px": job.crop_px,
            "backbone": {
                "file": str(request.backbone),
                "layout": backbone.layout,
                "arch": backbone.model.arch,
                "width": backbone.model.width,
                "left_out": list(backbone.left_out),
            },
            "data": {
                name: {"url": urls[name], "images": index.num_samples, "broken": outcome.broken.get(name, 0)}
                for name, index in indices.items()
            },
            "versions": versions(),
            "command": request.command,
        }
        if rank() == 0 and request.output is not None:
            finished_result(request.output, wanted)  # with another --work, another evaluation may have been sooner
            write_result(request.output, result)
        barrier()  # a launcher takes the first rank that ends well for all being done
    return result


def _finished(request: Request, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, on every rank."""
    found = finished_result(request.output, wanted) if request.output is not None else None
    barrier()  # before rank 0 writes it
    return found


def _identity_of_list(protocol: Protocol) -> dict[str, str]:
    """The SHA-256 of the list that names the images to train on, whose path alone says nothing of them."""
    if not isinstance(protocol, FinetuneProtocol) or protocol.subset.names is None:
        return {}
    url = storage.absolute(protocol.subset.names)
    if storage.stat(url) is None:
        raise ValueError(f"subset.names: there is no {url}")
    return {"subset.names": hashlib.sha256(storage.read(url)).hexdigest()}


def _check_sizes(job: Job[P]) -> None:
    if not 1 <= job.crop_px <= job.resize_px:
        raise ValueError(
            f"an evaluation cuts crop_px={job.crop_px} out of images resized to resize_px={job.resize_px}; "
            "crop_px must be from 1 to resize_px"
        )


@contextmanager
def _work_folder(work: Location | None, *, removed: bool, wait_seconds: float) -> Iterator[None]:
    """Keep the work folder to this evaluation; remove it once the block has ended well, unless it was asked for."""
    with sole_writer(work, wait_seconds=wait_seconds) if work is not None else nullcontext():
        yield
        if work is None or not removed or rank() != 0:
            return
        if not storage.is_remote(work):
            shutil.rmtree(storage.local_path(work), ignore_errors=True)
            return
        for folder in (join(work, "checkpoints"), work):
            for name in storage.list_names(folder):
                storage.remove(join(folder, name))
                progress()


def main(
    kind: type[P],
    carry_out: Callable[[Job[P]], Outcome],
    arguments: list[str] | None,
    *,
    prog: str,
    description: str,
    needs_test: bool = True,
    recipe: str | None = None,
    short: Sequence[tuple[str, str, Mapping[str, Any]]] = (),
) -> int:
    """Run a protocol's program from the command line; returns the exit status.

    Args:
        kind: of protocol.
        carry_out: the protocol itself.
        arguments: of the command line; None: those of the process.
        prog: how it is called.
        description: what it does.
        needs_test: whether test images must be given.
        recipe: the protocol without ``--recipe``; None where the name must be given, if there are several.
        short: options that stand for settings: their name, the setting's key, and how argparse takes them.
    """
    names = protocol_names(kind)
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    default = names[0] if len(names) == 1 else recipe
    parser.add_argument(
        "--recipe", default=default, required=default is None, help=f"name of the protocol: {', '.join(names)}"
    )
    parser.add_argument("--backbone", required=True, help="file of a backbone, of any layout, or folder of a run")
    parser.add_argument("--train", required=True, help="labelled images to learn from: a folder of images or of tars")
    parser.add_argument("--test", required=needs_test, help="labelled images to classify")
    parser.add_argument("--output", help="file for the result as JSON")
    parser.add_argument(
        "--work", help="folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)"
    )
    for option, key, taken in short:
        parser.add_argument(option, dest=key, help=f"the same as {key}=...", **taken)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. num_classes=10")
    words = sys.argv[1:] if arguments is None else arguments
    start_logging()

    def body() -> None:
        options = parser.parse_args(words)
        set_context(protocol=options.recipe)
        said = [(key, getattr(options, key)) for _, key, _ in short]
        overrides = [*options.overrides, *(f"{key}={value}" for key, value in said if value is not None)]
        protocol = configure(options.recipe, kind, overrides)
        files = (options.backbone, options.train, options.test, options.output, options.work)
        request = Request(*files, shlex.join(["python", "-m", prog, *words]))
        with above_bars(), reporting():
            with session(protocol.runtime) as device:
                result = evaluate(request, protocol, carry_out, device)
            if os.environ.get("RANK", "0") == "0":
                answer(text_of(result).rstrip("\n"), title=protocol.name, result=result)

    return run(body)
