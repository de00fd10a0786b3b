"""Backbones through the paper's protocols on one labelled data set, as one table.

``python bench/evaluations.py 'train-*.tar' 'test-*.tar' swav=runs/swav supervised=runs/supervised random=runs/random``

Each evaluation runs as a user would run it. Settings are the paper's but for the number of classes, what follows from
it (a class's share of a batch, and with it the gradient of its row, is 1000 / classes times that on ImageNet, so the
rate of the last layer is as much smaller: ``--to-the-letter`` leaves it) and, so that it takes minutes on a CPU, the
epochs of the linear classifier and of training from scratch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from swav_eval.config import FinetuneProtocol
from swav_eval.recipes import get_protocol

EVALUATIONS: dict[str, list[str]] = {
    "knn": ["swav_eval.knn"],
    "linear_imagenet": ["swav_eval.linear", "epochs={linear_epochs}", "learning_rates=[0.03,0.1,0.3,1.0,3.0]"],
    "semisup_1pct": ["swav_eval.finetune"],
    "semisup_10pct": ["swav_eval.finetune"],
    "lowshot_13": ["swav_eval.finetune"],
    "lowshot_128": ["swav_eval.finetune"],
    "lowshot_13_scratch": ["swav_eval.finetune", "epochs={scratch_epochs}"],
    "lowshot_128_scratch": ["swav_eval.finetune", "epochs={scratch_epochs}"],
}


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="labelled shards")
    parser.add_argument("test", help="labelled shards")
    parser.add_argument("backbones", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--linear-epochs", type=int, default=10)
    parser.add_argument("--scratch-epochs", type=int, default=100)
    parser.add_argument("--to-the-letter", action="store_true", help="rates of fine-tuning as for 1000 classes")
    parser.add_argument("--only", nargs="+", default=list(EVALUATIONS), choices=list(EVALUATIONS))
    parser.add_argument("--output", type=Path, help="folder for the results (default: one that is removed)")
    options = parser.parse_args()
    backbones = dict(text.split("=", 1) for text in options.backbones)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        table: dict[str, list[str]] = {}
        for protocol in options.only:
            for name, backbone in backbones.items():
                if protocol.endswith("_scratch") and name != next(iter(backbones)):
                    continue  # takes the architecture alone
                began = time.monotonic()
                result = evaluate(protocol, backbone, folder / name / f"{protocol}.json", options)
                numbers = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in result["metrics"].items())
                table.setdefault(protocol, []).append(numbers)
                sys.stdout.write(f"{protocol}, {name}: {numbers} ({time.monotonic() - began:.0f} s)\n")
                sys.stdout.flush()
    sys.stdout.write(f"\n| | {' | '.join(backbones)} |\n|---|{'---|' * len(backbones)}\n")
    for protocol, cells in table.items():
        shown = [*cells, *[""] * (len(backbones) - len(cells))]
        sys.stdout.write(f"| {protocol} | {' | '.join(shown)} |\n")


def evaluate(protocol: str, backbone: str, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one evaluation; returns its result."""
    module, *overrides = EVALUATIONS[protocol]
    settings = [text.format(**vars(options)) for text in overrides]
    if protocol != "knn":
        settings.append(f"num_classes={options.num_classes}")
    found = get_protocol(protocol)
    if isinstance(found, FinetuneProtocol) and not found.from_scratch and not options.to_the_letter:
        settings.append(f"head_lr={found.head_lr * options.num_classes / 1000:g}")
    words = [sys.executable, "-m", module, "--recipe", protocol, "--backbone", backbone, "--train", options.train]
    words += ["--test", options.test, "--output", str(output), *settings]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


if __name__ == "__main__":
    main()
