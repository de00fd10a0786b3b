"""Checkpoints that survive a crash at any moment.

A checkpoint is ``step-<n>.pt``, which appears whole or not at all, then ``step-<n>.json`` with its size and SHA-256,
written last. Reading starts at the newest manifest whose file verifies and walks back, so a torn or rotten
file costs one interval, not the run. Nothing in a checkpoint depends on the number of ranks.
"""

import hashlib
import io
import json
import logging
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from swav import storage, telemetry
from swav.storage import Location, join, write_atomic

FORMAT = "swav.checkpoint/1"
_MAX_FAILURES = 3
_NAME = re.compile(r"\.?step-(?P<step>[0-9]{9,})\.(json|pt)(?P<partial>\.[0-9a-f]+\.partial)?")

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints on a thread of its own, one at a time, and keeps the newest few."""

    def __init__(self, folder: Location, *, keep: int, enabled: bool = True) -> None:
        """Prepare.

        Args:
            folder: where checkpoints lie; nobody else writes there.
            keep: how many of the newest to keep.
            enabled: whether to write at all: one rank does for all.
        """
        self._folder = folder
        self._enabled = enabled
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write_under_way: Future[None] | None = None
        self._failures = 0
        self._failure: OSError | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` to host memory now and write it in the background; waits for the previous write first.

        A failed write leaves the checkpoints that exist as they are and is logged; training goes on and the next
        interval tries again.

        Raises:
            RuntimeError: three writes in a row failed.
        """
        self.wait()
        telemetry.saving(step)
        if not self._enabled:
            return
        if self._failures >= _MAX_FAILURES:
            self._give_up()
        self._write_under_way = self._pool.submit(self._write, step, _to_host(state), time.monotonic())

    def wait(self) -> None:
        """Wait until the last write has ended, well or badly."""
        if self._write_under_way is not None:
            under_way, self._write_under_way = self._write_under_way, None
            under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Wait for the last write.

        Raises:
            RuntimeError: it failed.
        """
        try:
            self.wait()
        finally:
            self._pool.shutdown()
        if self._failure is not None:
            self._give_up()

    def _give_up(self) -> None:
        raise RuntimeError(
            f"checkpoints cannot be written to {self._folder} ({self._failure}); those already there are intact. "
            "Free space or mend the storage, then run the same command again to resume"
        ) from self._failure

    def _write(self, step: int, snapshot: dict[str, Any], taken_at: float) -> None:
        buffer = io.BytesIO()
        torch.save(snapshot, buffer)
        data = buffer.getbuffer()
        name = f"step-{step:09d}"
        manifest = {"format": FORMAT, "step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            write_atomic(join(self._folder, f"{name}.pt"), data)
            write_atomic(join(self._folder, f"{name}.json"), json.dumps(manifest, indent=2).encode())
            self._remove_all_but(step)
        except OSError as error:
            self._failures += 1
            self._failure = error
            _logger.error(
                "checkpoint of step %d (%.1f MB) could not be written to %s: %s; training goes on, earlier checkpoints "
                "are intact; free space or mend the storage (failure %d, the run stops after %d in a row)",
                *(step, len(data) / 1e6, self._folder, error, self._failures, _MAX_FAILURES),
            )
            return
        self._failures, self._failure = 0, None
        telemetry.show(checkpoint_age_seconds=taken_at)

    def _remove_all_but(self, newest: int) -> None:
        """Remove old checkpoints, broken ones that the run was resumed before, and what killed writers left."""
        kept = [step for step in checkpoint_steps(self._folder) if step <= newest][: self._keep]
        for name in storage.list_names(self._folder):  # in order: a manifest goes before its file
            found = _NAME.fullmatch(name)
            if found and (found["partial"] or int(found["step"]) not in kept):
                storage.remove(join(self._folder, name))


def checkpoint_steps(folder: Location) -> list[int]:
    """Steps that have a manifest, the newest first."""
    found = [_NAME.fullmatch(name) for name in storage.list_names(folder, "step-*.json")]
    return sorted((int(match["step"]) for match in found if match), reverse=True)


def latest_step(folder: Location) -> int | None:
    """The newest step whose file is whole, or None where there is no checkpoint.

    Raises:
        RuntimeError: there are checkpoints, but none is whole.
    """
    steps = checkpoint_steps(folder)
    for step in steps:
        problem = _problem(folder, step)
        if problem is None:
            return step
        _logger.warning("checkpoint of step %d in %s is passed over: %s", step, folder, problem)
    if steps:
        raise RuntimeError(
            f"none of the {len(steps)} checkpoints in {folder} is whole; restore it, or start over with another "
            "--output"
        )
    return None


def load(folder: Location, step: int) -> dict[str, Any]:
    """Read one checkpoint into host memory."""
    file = storage.readable(join(folder, f"step-{step:09d}.pt"))
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _problem(folder: Location, step: int) -> str | None:
    try:
        manifest = json.loads(storage.read(join(folder, f"step-{step:09d}.json")))
        form, num_bytes, sha256 = manifest["format"], manifest["bytes"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error!r})"
    if form != FORMAT:
        return f"its format is {form!r}, this version reads {FORMAT!r}"
    try:
        file = storage.open_file(join(folder, f"step-{step:09d}.pt"))
        if file.num_bytes() != num_bytes:
            return f"its file has {file.num_bytes()} bytes, the manifest says {num_bytes}"
        digest = hashlib.sha256()
        for piece in file.stream(0, num_bytes):
            digest.update(piece)
    except OSError as error:
        return f"its file cannot be read ({error!r})"
    found = digest.hexdigest()
    return None if found == sha256 else f"its file's SHA-256 is {found}, the manifest says {sha256}"


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return value
