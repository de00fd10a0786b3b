"""The main job as ``python -m swav_testing.gated``, whose steps a test lets through and whose samples are recorded.

Environment: STEPS_PER_EPOCH; GATE, a folder: its file "allowed" holds the last step of the run that may begin (all,
where it is missing), its folder "ids" gets what each rank's loader delivered. PRECISION=double computes in float64,
where worlds do not differ. PACE_SECONDS pass before each step.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import swav.program
import swav.train
from swav.data.augment import Augment
from swav.data.batch import CropBatch, RawBatch
from swav.data.loader import LabelSource, Loader
from swav.distributed import world_size
from swav.methods import build_method
from swav.methods.base import Method
from swav.models.batchnorm import synchronize
from swav.program import StopFlag
from swav.storage import write_atomic

# The first rank of a round has a port of that round, which all of its ranks are told.
LIFE = os.environ.get("MASTER_PORT", "alone")


def allow(gate: Path, step: int) -> None:
    """Let the run's steps up to this one begin."""
    write_atomic(gate / "allowed", str(step).encode())


def take_last(gate: Path, step: int) -> None:
    """Let a rank that is asked to stop take its step; never takes back what the test allows at the same moment."""
    write_atomic(gate / "last", str(step).encode())


def allowed(gate: Path) -> float:
    """The last step that may begin."""
    if not (gate / "allowed").exists():
        return float("inf")
    return max(int(path.read_text()) for path in (gate / "allowed", gate / "last") if path.exists())


class NotedStopFlag(StopFlag):
    """Is known to the gate: a rank that is asked to stop takes its step, as do its peers."""

    current: "NotedStopFlag | None" = None

    def __init__(self) -> None:
        super().__init__()
        NotedStopFlag.current = self


class GatedLoader(Loader):
    """Waits before each step until it is allowed, and notes the ids that it delivers."""

    def epoch(self, epoch: int, start_step: int = 0, labels: LabelSource | None = None) -> Generator[RawBatch]:
        gate = Path(os.environ["GATE"])
        (gate / "ids").mkdir(exist_ok=True)
        with (gate / "ids" / f"{socket.gethostname()}-{os.getpid()}.jsonl").open("ab", buffering=0) as file:
            for batch in super().epoch(epoch, start_step, labels):
                step = epoch * int(os.environ["STEPS_PER_EPOCH"]) + batch.step + 1
                while step > allowed(gate):
                    if NotedStopFlag.current is not None and NotedStopFlag.current.is_set:
                        take_last(gate, step)
                    time.sleep(0.01)
                record = {"at": time.time_ns(), "life": LIFE, "epoch": epoch, "step": batch.step}
                record |= {"offset": batch.global_offset, "ids": batch.ids.tolist(), "world": world_size()}
                file.write((json.dumps(record) + "\n").encode())
                time.sleep(float(os.environ.get("PACE_SECONDS", "0")))
                yield batch


class DoubleAugment(Augment):
    """Pixels in float64."""

    def __call__(self, raw: RawBatch) -> CropBatch:
        batch = super().__call__(raw)
        return replace(batch, crops=[crop.double() for crop in batch.crops])


def build_double(*args: Any) -> Method:
    """The method in float64."""
    return build_method(*args).double()


def synchronize_double(*args: Any, **settings: Any) -> torch.nn.Module:
    """Synchronised batch norm in float64."""
    return synchronize(*args, **settings).double()


def records(gate: Path) -> list[dict[str, Any]]:
    """What the ranks have noted so far, in no order."""
    texts = [path.read_text() for path in (gate / "ids").glob("*.jsonl")]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed process may leave a torn one


def delivered(gate: Path) -> dict[tuple[int, int], list[int]]:
    """Ids of each global batch by (epoch, step), as the last life that took the step had them."""
    of_steps: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in records(gate):
        of_steps.setdefault((record["epoch"], record["step"]), []).append(record)
    batches = {}
    for key, found in sorted(of_steps.items()):
        last = max(found, key=lambda record: record["at"])["life"]
        batch: list[int] = []
        for record in sorted((record for record in found if record["life"] == last), key=lambda one: one["offset"]):
            assert record["offset"] == len(batch), (key, record)
            batch += record["ids"]
        batches[key] = batch
    return batches


def install() -> None:
    """Let the main job of this process wait at the gate, and compute as PRECISION says."""
    torch.set_num_threads(1)
    vars(swav.train).update(Loader=GatedLoader)
    vars(swav.program).update(StopFlag=NotedStopFlag)
    if os.environ.get("PRECISION") == "double":
        vars(swav.train).update(Augment=DoubleAugment, build_method=build_double, synchronize=synchronize_double)


if __name__ == "__main__":
    from swav.pretrain import main

    install()
    sys.exit(main())
