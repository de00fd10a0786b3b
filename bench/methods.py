"""All methods on one data set with one small backbone: k-NN accuracy beside an untrained one, and how labels evolve.

``python bench/methods.py '../shared/data/cifar10/train-00000[01].tar' '../shared/data/cifar10/test-*.tar' --epochs 10``

Each method runs as a user would run it, one after the other, DeepCluster-v2 and SeLa-v2 with an assigner beside it.
Settings are for minutes on a CPU; the numbers compare nothing but this setting.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from swav.bank.labels import LabelTables
from swav.data.reader import ShardReader
from swav.data.source import open_dataset
from swav.ops.agreement import add_pairs, normalized_mutual_information

_BASE = [
    "runtime.precision=fp32",
    "model.stem=7x7",
    "model.width=0.25",
    "model.head_hidden=512",
    "optim.warmup_epochs=0.5",
    "optim.global_batch=128",
    "evaluate.resize_px=48",
    "evaluate.crop_px=48",
]
_TWO_CROPS = 'crops=[{"num_crops":2,"size_px":48,"scale":[0.2,1.0]}]'
_FOUR_CROPS = 'crops=[{"num_crops":2,"size_px":48,"scale":[0.2,1.0]},{"num_crops":2,"size_px":32,"scale":[0.1,0.4]}]'
_SGD = ["optim.optimizer=sgd", "optim.base_lr=0.06", "optim.final_lr=0.0", "optim.weight_decay=0.0005"]
METHODS = {
    "swav": ['method={"kind":"swav","num_prototypes":100,"sinkhorn":{"epsilon":0.02}}', _FOUR_CROPS],
    "simclr": ['method={"kind":"simclr"}', _FOUR_CROPS],
    "mocov2": [*_SGD, _TWO_CROPS, 'method={"kind":"mocov2","queue_samples":4096,"momentum":0.99}'],
    "deepclusterv2": ['method={"kind":"deepclusterv2","num_prototypes":100}', _FOUR_CROPS],
    "selav2": ['method={"kind":"selav2","num_prototypes":100}', _FOUR_CROPS],
}


def main() -> None:
    """Run the methods and print what they reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="labelled shards; training does not read the labels")
    parser.add_argument("test", help="labelled shards to classify")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, help="folder for the runs (default: one that is removed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(options.methods):
            output = (options.output or Path(temporary)) / name
            seconds = run(name, output, options, baselines=number == 0)
            result = json.loads((output / "result.json").read_text())
            for what, accuracies in result.items():
                values = ", ".join(f"{key} {100 * value:.1f} %" for key, value in accuracies.items())
                sys.stdout.write(f"{name if what == 'trained backbone' else what}: {values}\n")
            sys.stdout.write(f"  {name} took {seconds:.0f} s\n")
            if (output / "assign").exists():
                for line in label_lines(output, options.train):
                    sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()


def run(name: str, output: Path, options: argparse.Namespace, *, baselines: bool) -> float:
    """Carry a method to its end; returns the seconds that it took."""
    began = time.monotonic()
    words = [sys.executable, "-m", "swav.pretrain", "--recipe", "swav_r18_cifar10_200ep", "--data", options.train]
    words += ["--output", str(output), *METHODS[name], *_BASE, f"optim.epochs={options.epochs}"]
    words += [f"evaluate.test_url={options.test}", f"evaluate.baselines={str(baselines).lower()}"]
    assigner = None
    if name in ("deepclusterv2", "selav2"):
        assigner = subprocess.Popen([sys.executable, "-m", "swav.assign", "--output", str(output), "--keep"])
    subprocess.run(words, check=True)
    if assigner is not None and assigner.wait() != 0:
        sys.exit(f"the assigner ended with {assigner.returncode}")
    return time.monotonic() - began


def label_lines(output: Path, train: str) -> list[str]:
    """Of each epoch's labels, their first set: cluster sizes, and mutual information with the classes."""
    index = open_dataset(train)
    with ShardReader(index) as reader:
        classes = reader.labels()
    lines = []
    for epoch in range(len(list((output / "assign").iterdir()))):
        tables = LabelTables(output, epoch, index)
        facts: dict[str, Any] = tables.manifest["sets"][0]
        labels = tables(np.arange(index.num_samples))[:, 0]
        pairs = np.zeros((tables.manifest["num_prototypes"], int(classes.max()) + 1), dtype=np.int64)
        add_pairs(pairs, labels, classes)
        last = facts["nmi_with_last"]
        lines.append(
            f"epoch {epoch}: sizes {facts['smallest']} to {facts['largest']}, {facts['empty']} empty, entropy "
            f"{facts['entropy_bits']:.2f} bits; NMI with the classes {normalized_mutual_information(pairs):.3f}, with "
            f"the last epoch's labels {'-' if last is None else f'{last:.3f}'}"
        )
    return lines


if __name__ == "__main__":
    main()
