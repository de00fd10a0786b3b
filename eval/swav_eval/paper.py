"""One backbone, every protocol whose images are at hand, and the table beside the paper's.

``python -m swav_eval.paper --backbone FILE --data FOLDER [--output FILE.json] [[PROTOCOL:]key=value ...]``
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from swav import storage
from swav.bars import above_bars
from swav.distributed import barrier, rank
from swav.logs import answer, set_context, start_logging
from swav.program import run
from swav.recipes import get_recipe
from swav.storage import Location, join
from swav.telemetry import reporting
from swav_eval import finetune, knn, linear, svm
from swav_eval.command import Job, Request, evaluate, session
from swav_eval.comparison import BEST, table_of, text_of
from swav_eval.config import FinetuneProtocol, KnnProtocol, LinearProtocol, Protocol, SvmProtocol
from swav_eval.ledger import NOT_BUILT
from swav_eval.recipes import STANDARD, configure_all, protocol_names, settings_of
from swav_eval.results import Outcome

_SPLITS = {
    "linear_places205": ("places205/train", "places205/val"),
    "linear_inat18": ("inat18/train", "inat18/val"),
    "svm_voc07": ("voc07/trainval", "voc07/test"),
}
_IMAGENET = ("imagenet/train", "imagenet/val")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be run, and why the rest is not."""

    protocols: dict[str, Protocol]
    left_out: dict[str, str]


def plan(names: Iterable[str], data: str, overrides: Iterable[str]) -> _Plan:
    """Settle which of the protocols have their images.

    Args:
        names: of protocols.
        data: folder of the data sets.
        overrides: ``key=value`` for all protocols, ``PROTOCOL:key=value`` for one.

    Raises:
        ValueError: an unknown protocol or setting, a value that does not fit, or no images at all.
    """
    protocols = configure_all(names, overrides)
    missing = {name: [url for url in _urls(name, data) if not _is_there(url)] for name in protocols}
    if all(missing.values()):
        wanted = ", ".join(sorted({url for urls in missing.values() for url in urls}))
        raise ValueError(f"--data {data} has the images of no protocol; put them there as {wanted}")
    left_out = {name: f"there is no {' and no '.join(urls)}" for name, urls in missing.items() if urls}
    return _Plan({name: protocol for name, protocol in protocols.items() if name not in left_out}, left_out)


def _urls(name: str, data: str) -> tuple[str, str]:
    train, test = _SPLITS.get(name, _IMAGENET)
    return join(data, *train.split("/")), join(data, *test.split("/"))


def _is_there(url: str) -> bool:
    """Whether a data set is there: a local folder, or an index or tars in a store."""
    if not storage.is_remote(url):
        return storage.local_path(url).exists()
    return storage.stat(join(url, "index.json")) is not None or (
        url.startswith("s3://") and bool(storage.list_names(url, "*.tar"))
    )


def carry_out_of(protocol: Protocol) -> Callable[[Job[Any]], Outcome]:
    """The program of a protocol."""
    match protocol:
        case KnnProtocol():
            return knn.carry_out
        case SvmProtocol():
            return svm.carry_out
        case LinearProtocol():
            return linear.carry_out
        case FinetuneProtocol():
            return finetune.carry_out


def result_file(output: Location, name: str) -> str:
    """Where a protocol's own result lies: in a folder called as the table, without its ending."""
    return join(os.fspath(output).removesuffix(".json"), f"{name}.json")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swav_eval.paper", description="A backbone beside the paper's.")
    parser.add_argument("--backbone", required=True, help="file of a backbone, of any layout, or folder of a run")
    parser.add_argument(
        "--data", required=True, help="folder of imagenet/{train,val}, places205/…, inat18/…, voc07/{trainval,test}"
    )
    parser.add_argument("--output", help="file for the table as JSON; each result goes into a folder of its name")
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=list(STANDARD),
        choices=protocol_names(),
        metavar="NAME",
        help=f"of {', '.join(protocol_names())} (default: {' '.join(STANDARD)})",
    )
    parser.add_argument("--part", help="run one of --protocols; the last part that is done writes the table")
    parser.add_argument("--pretraining", default=BEST, help="recipe of the backbone: the row to compare with")
    parser.add_argument("overrides", nargs="*", metavar="[PROTOCOL:]key=value", help="settings to change")
    words = sys.argv[1:] if arguments is None else arguments
    start_logging()
    command = shlex.join(["python", "-m", "swav_eval.paper", *words])

    def body() -> None:
        options = parser.parse_args(words)
        with above_bars(), reporting():
            _run(options, command)

    return run(body)


def _run(options: argparse.Namespace, command: str) -> None:
    """Do what the command line says."""
    get_recipe(options.pretraining)
    if options.part is not None and (options.part not in options.protocols or options.output is None):
        raise ValueError(
            f"--part {options.part} must be one of --protocols {' '.join(options.protocols)}, and needs --output"
        )
    found = plan(options.protocols, options.data, options.overrides)
    ours = [options.part] if options.part is not None else list(found.protocols)
    results: dict[str, dict[str, Any]] = {}
    leading = found.protocols.get(ours[0], next(iter(found.protocols.values())))
    with session(leading.runtime) as device:
        for name in ours:
            if name not in found.protocols:
                continue
            set_context(protocol=name)
            train, test = _urls(name, options.data)
            output = result_file(options.output, name) if options.output is not None else None
            protocol = found.protocols[name]
            request = Request(options.backbone, train, test, output, None, command)
            results[name] = evaluate(request, protocol, carry_out_of(protocol), device)
        if rank() == 0:
            _tell(options, found, results)
        barrier()


def _tell(options: argparse.Namespace, found: _Plan, results: dict[str, dict[str, Any]]) -> None:
    """Print the table, and write it once all results are there."""
    left_out = found.left_out | {name: f"not built yet: {what}" for name, what in NOT_BUILT.items()}
    if options.part is not None:
        left_out |= _take_others(options, found, results)
    waiting = [name for name in found.protocols if name not in results]
    in_order = {name: results[name] for name in found.protocols if name in results}
    table = table_of(in_order, options.pretraining, left_out)
    if options.output is not None and not waiting:
        storage.write_atomic(options.output, (json.dumps(table, indent=2) + "\n").encode())
    answer(text_of(table), title="the paper's table", table=table)


def _take_others(options: argparse.Namespace, found: _Plan, results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Add the results of the other parts, those of the same backbone and settings; says why of some there is none."""
    lacking = {}
    for name, protocol in found.protocols.items():
        if name in results:
            continue
        file = result_file(options.output, name)
        if storage.stat(file) is None:
            lacking[name] = "its part is not done yet"
            continue
        other = json.loads(storage.read(file))
        backbones = {one["backbone_sha256"] for one in (*results.values(), other)}
        if len(backbones) > 1 or other["settings"] != settings_of(protocol):
            lacking[name] = f"{file} is another evaluation's: remove it, or give another --output"
        else:
            results[name] = other
    return lacking


if __name__ == "__main__":
    sys.exit(main())
