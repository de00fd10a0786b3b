"""What the driver keeps in the run's folder: one record per job name, and nothing that a crash could lose.

A record is made before its job is submitted, by a write that fails where there is one, and changed only by writes that
fail where it has changed since it was read. So of two drivers one goes on and the other looks again.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Protocol

from swav import storage
from swav.storage import Tagged

INTENTS = "driver/intents"


class End(StrEnum):
    """How a job's name was given up, or its work ended."""

    SUCCEEDED = "succeeded"  # of a job that leaves no file of its own to tell it by
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"  # failed or cancelled, and somebody asked to try again


@dataclass(frozen=True)
class Calls:
    """How often one driver has asked the scheduler for a job of this name, and how often it knows the answer."""

    holder: str
    fencing: int
    made: int = 0
    returned: int = 0


@dataclass(frozen=True)
class Record:
    """The intent to run a job of one name.

    Attributes:
        name: of the job.
        step: that the job is for.
        number: of the attempt, from 1.
        command: component and arguments, as they were asked for.
        calls: by driver.
        confirmed_by: the driver that last was told that the job is there; None before that.
        vanished: jobs of this step that were there and went without a result, this name's and those before.
        ended: how it ended, where that is known for good.
        why: it ended so.
        at: when this record was last written, by its writer's clock: for people.
        writer: of this record: makes its bytes the writer's own.
    """

    name: str
    step: str
    number: int
    command: str
    calls: tuple[Calls, ...] = ()
    confirmed_by: str | None = None
    vanished: int = 0
    ended: End | None = None
    why: str = ""
    at: str = ""
    writer: str = ""

    @property
    def in_doubt(self) -> bool:
        """Whether a call may still come through: its driver has not written down that it returned."""
        return any(calls.made > calls.returned for calls in self.calls)

    def with_call(self, holder: str, fencing: int, *, made: int = 0, returned: int = 0) -> "Record":
        """This record with that much added to a driver's calls."""
        old = next((calls for calls in self.calls if calls.holder == holder), Calls(holder, fencing))
        new = replace(old, fencing=fencing, made=old.made + made, returned=old.returned + returned)
        return replace(self, calls=(*(calls for calls in self.calls if calls.holder != holder), new))

    def to_json(self) -> bytes:
        """As it is written."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def from_json(data: bytes) -> Record:
    """A record as it was written.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(data)
        found["calls"] = tuple(Calls(**calls) for calls in found["calls"])
        found["ended"] = None if found["ended"] is None else End(found["ended"])
        return Record(**found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a record of a job: {error!r}") from error


def record_of(name: str) -> str:
    """Where the record of a job's name is, in the run's folder."""
    return f"{INTENTS}/{name}.json"


class RunStorage(Protocol):
    """A run's folder, as far as the driver needs it. Names are relative to it."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    def names(self, folder: str) -> Iterable[str]:
        """Of the files ``*.json`` in a folder."""

    def read(self, name: str) -> Tagged | None:
        """A file; None where there is none."""

    def write(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write if unchanged since ``tag`` (None: if there is none); the new tag, or None where it has changed."""


class RunFolder:
    """The run's folder, local or in a store.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return storage.stat(storage.join(self.url, name)) is not None

    def names(self, folder: str) -> list[str]:
        """Of the files ``*.json`` in a folder."""
        return storage.list_names(storage.join(self.url, folder), "*.json")

    def read(self, name: str) -> Tagged | None:
        """A file; None where there is none."""
        return storage.read_tagged(storage.join(self.url, name))

    def write(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write if unchanged since ``tag``; see :func:`swav.storage.write_conditional`."""
        return storage.write_conditional(storage.join(self.url, name), data, tag=tag)
