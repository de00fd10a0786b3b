"""Tiny pretraining runs: in this process, in processes of their own that can be killed, and under torchrun."""

import io
import json
import multiprocessing.process
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from swav_testing.ranks import _CONTEXT
from swav_testing.shards import write_tar

from swav.config import PretrainConfig
from swav.data import loader as loader_module
from swav.data.batch import RawBatch
from swav.data.loader import LabelSource
from swav.pretrain import main, pretrain
from swav.program import Stopped
from swav.recipes import configure

ROOT = Path(__file__).parents[3]
DEADLINE_SECONDS = 120
_CONTEXT.set_forkserver_preload(["swav.pretrain", "torchvision", "pytest"])

# 103 images in batches of 24: five steps per epoch, the last two of them smaller. 8 lanes divide unevenly over 3 ranks.
ROWS_PER_SHARD = (40, 30, 33)
STEPS_PER_EPOCH, EPOCHS = 5, 2
NUM_STEPS = STEPS_PER_EPOCH * EPOCHS
TINY = (
    "model.width=0.125",
    "model.stem=3x3",
    "model.head_hidden=32",
    "model.embedding_dim=16",
    "method.num_prototypes=16",
    "method.sinkhorn.epsilon=0.05",
    "crops.0.size_px=16",
    "crops.1.num_crops=2",
    "crops.1.size_px=12",
    "optim.global_batch=24",
    f"optim.epochs={EPOCHS}",
    "optim.warmup_epochs=1",
    "optim.base_lr=0.05",
    "optim.final_lr=0.0005",
    "data.lanes=8",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "runtime.loader_threads=1",
    "runtime.checkpoint_every_steps=3",  # not a divisor of the epoch: resumes fall inside it
    "runtime.log_every_steps=1",
    "evaluate.num_neighbors=[5]",
    "evaluate.resize_px=24",
    "evaluate.crop_px=24",
    "evaluate.baselines=false",
)
QUEUE = 'method.queue={"num_samples": 48, "start_epoch": 0}'


def make_scene(label: int, seed: int, *, size: int = 24) -> bytes:
    """A JPEG of soft random patches in a class's colour: unlike noise, no two images look the same to a network."""
    draws = np.random.default_rng([label, seed])
    patches = draws.integers(0, 120, (4, 4, 3)) + np.eye(3, dtype=np.int64)[label % 3] * 120
    image = Image.fromarray(patches.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_scenes(
    folder: Path,
    rows_per_shard: tuple[int, ...] = ROWS_PER_SHARD,
    *,
    broken: tuple[int, ...] = (),
    labelled: bool = True,
    first_seed: int = 0,
) -> Path:
    """Shards of scenes of three classes; the broken ones hold text."""
    number = 0
    for shard, rows in enumerate(rows_per_shard):
        members: list[tuple[str, bytes]] = []
        for _ in range(rows):
            image = b"no image" if number in broken else make_scene(number % 3, first_seed + number)
            members.append((f"{number:06d}.jpg", image))
            if labelled:
                members.append((f"{number:06d}.cls", b"%d" % (number % 3)))
            number += 1
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return folder


def tiny_config(data: Path | str, *overrides: str) -> PretrainConfig:
    """The demo made tiny, on other data."""
    return configure("demo", data=str(data), overrides=[*TINY, *overrides])


def arguments(data: Path | str, output: Path, *overrides: str) -> list[str]:
    """The command line of a tiny run, after ``python -m swav.pretrain``."""
    return ["--recipe", "demo", "--data", str(data), "--output", str(output), *TINY, *overrides]


def environment(cache: Path) -> dict[str, str]:
    """Of a process of its own."""
    folders = [ROOT, ROOT / "eval", ROOT / "tests" / "support"]
    path = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "SWAV_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def command_line(module: str, *words: str, cache: Path, ranks: int | None = None) -> "subprocess.Popen[str]":
    """Start ``python -m module words...`` as a user would, under torchrun where ranks are given."""
    launcher = []
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *words],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait; exit status, standard output and standard error."""
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, out, err


def start(
    words: list[str], cache: Path, *, log: Path | None = None, max_file_bytes: int | None = None
) -> multiprocessing.process.BaseProcess:
    """Start the main job in a process of its own that has torch loaded already; ``log`` gets what it prints."""
    process = _CONTEXT.Process(target=_main, args=(words, str(cache), log, max_file_bytes))
    process.start()
    return process


def status_and_output(
    words: list[str], cache: Path, log: Path, *, max_file_bytes: int | None = None
) -> tuple[int, str]:
    """Run the main job as :func:`start` has it; its exit status and what it printed."""
    process = start(words, cache, log=log, max_file_bytes=max_file_bytes)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


def run(words: list[str], cache: Path) -> None:
    """Carry the main job to its end in a process of its own."""
    process = start(words, cache)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0, f"exit status {process.exitcode}"


def _main(words: list[str], cache: str, log: Path | None, max_file_bytes: int | None) -> None:
    os.environ["SWAV_CACHE"] = cache
    torch.set_num_threads(1)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    with files_of_at_most(max_file_bytes) if max_file_bytes is not None else nullcontext():
        sys.exit(main(words))


def wait_for_step(output: Path, step: int, alive: Callable[[], bool]) -> None:
    """Return as soon as the run has noted the step."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while last_step(output) < step:
        assert alive(), f"the run ended at step {last_step(output)}, before step {step}"
        assert time.monotonic() < deadline, f"no step {step} in {DEADLINE_SECONDS} s"
        time.sleep(0.002)


def last_step(output: Path) -> int:
    """The last step that the run has noted."""
    return max(losses(output), default=0)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse to make any file of this process larger: as a full disk, but anyone may ask for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill_tree(pid: int, signum: int = signal.SIGKILL) -> None:
    """Signal a process and all that it has started."""
    for child in children(pid):
        kill_tree(child, signum)
    os.kill(pid, signum)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def events(output: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(output: Path) -> dict[int, float]:
    """The loss of each step; no step stands there twice."""
    found = [(event["step"], event["loss"]) for event in events(output) if "loss" in event]
    assert len(dict(found)) == len(found)
    return dict(found)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The finished backbone."""
    saved = torch.load(output / "backbone.pt", weights_only=True)["state_dict"]
    assert saved
    return saved


def assert_same_run(output: Path, reference: Path) -> None:
    """Bitwise the same losses, accuracies and final weights."""
    assert losses(output) == losses(reference)
    assert sorted(losses(reference)) == list(range(1, NUM_STEPS + 1))
    epochs = [event for event in events(output) if event.get("event") == "epoch"]
    assert epochs == [event for event in events(reference) if event.get("event") == "epoch"]
    assert [event["epoch"] for event in epochs] == list(range(EPOCHS))
    assert (output / "result.json").read_text() == (reference / "result.json").read_text()
    expected, found = weights(reference), weights(output)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


class RecordingLoader(loader_module.Loader):
    """Keeps the ids of the batches that it delivers; asks its own process to stop before a step."""

    delivered: list[tuple[int, int, int, list[int]]]
    stop_before: int | None

    def epoch(self, epoch: int, start_step: int = 0, labels: LabelSource | None = None) -> Generator[RawBatch]:
        for batch in super().epoch(epoch, start_step, labels):
            self.delivered.append((epoch, batch.step, batch.global_offset, batch.ids.tolist()))
            if self.stop_before is not None and epoch * STEPS_PER_EPOCH + batch.step + 1 == self.stop_before:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def recorded_run(
    data: str, output: str, cache: str, overrides: tuple[str, ...], stop_at: int | None
) -> list[tuple[int, int, int, list[int]]]:
    """Run this rank's part, stopped by SIGTERM on rank 0 where asked; returns what its loader delivered."""
    import swav.train
    from swav.distributed import rank

    os.environ["SWAV_CACHE"] = cache
    RecordingLoader.delivered, RecordingLoader.stop_before = [], stop_at if rank() == 0 else None
    vars(swav.train)["Loader"] = RecordingLoader
    try:
        pretrain(tiny_config(data, *overrides), Path(output))
        assert stop_at is None
    except Stopped:
        assert stop_at is not None
    return RecordingLoader.delivered


def in_order(delivered_by_rank: list[list[tuple[int, int, int, list[int]]]]) -> dict[tuple[int, int], list[int]]:
    """Ids of each global batch, by (epoch, step), as the ranks together delivered them."""
    batches: dict[tuple[int, int], list[int]] = {}
    for epoch, step, offset, ids in sorted(record for records in delivered_by_rank for record in records):
        batch = batches.setdefault((epoch, step), [])
        assert offset == len(batch)
        batch += ids
    return batches
