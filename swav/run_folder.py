"""One run at a time writes a run's folder."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from swav.distributed import rank
from swav.storage import Location, is_remote, local_path

_NAME = ".lock"
_FOR_ANOTHER_LAUNCH_SECONDS = 10.0
_RETRY_SECONDS = 0.25

_logger = logging.getLogger(__name__)


@contextmanager
def sole_writer(output: Location, *, wait_seconds: float) -> Iterator[None]:
    """Keep the run's folder to this run within the block; rank 0 does it for all.

    Ranks that a launcher is about to start anew may still be ending, on another host perhaps, so a launched run waits;
    a plain process does not. A killed process holds no lock. Of an object store nothing is locked.

    Args:
        output: the run's folder, made if missing.
        wait_seconds: at most, for ranks of the same launch; ranks of another get some seconds to save and end.

    Raises:
        RuntimeError: another run writes there; says which process. It may end soon, so this is no refusal for good.
    """
    if rank() != 0 or is_remote(output):
        yield
        return
    place = local_path(output) / _NAME
    place.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(place, output, wait_seconds):
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _open_locked(place: Path, output: Location, wait_seconds: float) -> BinaryIO:
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    since = time.monotonic()
    while True:
        file = place.open("a+b")
        if _is_locked(file, output):
            if not _is_removed(file, place):
                break
            file.close()
            continue
        with file:
            file.seek(0)
            holder = _holder(file.read())
        limit = wait_seconds if launch == holder.get("launch") else min(wait_seconds, _FOR_ANOTHER_LAUNCH_SECONDS)
        if launch is None or time.monotonic() - since > limit:
            raise RuntimeError(
                f"{output} is being written by another run, process {holder.get('process')} on {holder.get('host')}; "
                "wait until it has ended or stop it, or give another --output"
            )
        time.sleep(_RETRY_SECONDS)
    file.truncate(0)
    file.write(json.dumps({"launch": launch, "process": os.getpid(), "host": socket.gethostname()}).encode())
    file.flush()
    return file


def _holder(text: bytes) -> dict[str, Any]:
    """Who holds the lock; nothing where that is being written at this moment."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return {}
    return found


def _is_removed(file: BinaryIO, place: Path) -> bool:
    """Whether the one that held the lock has removed the file since it was opened."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return True


def _is_locked(file: BinaryIO, output: Location) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _logger.warning("%s cannot be locked (%s): make sure that no other run writes there", output, error)
    return True
