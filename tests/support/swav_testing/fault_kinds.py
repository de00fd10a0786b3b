"""What the fault proxy does to requests, and what it says of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a request is harmed."""

    RESET = "reset"  # the connection is reset before the store hears of the request
    ERROR_500 = "500"
    SLOW_DOWN = "503"
    DROP = "drop"  # the answer, or what is uploaded, ends before its true Content-Length
    STALL = "stall"  # part of the answer, then nothing
    SLOW_START = "slow_start"  # the answer's first byte is late
    TRICKLE = "trickle"  # the answer comes a few bytes at a time
    LENGTH = "length"  # Content-Length says more or less than there is
    CORRUPT = "corrupt"  # some bits of an object are flipped, the length is right


@dataclass(frozen=True)
class Request:
    """What was asked of the store."""

    method: str
    bucket: str
    key: str  # empty for a request on the bucket: a listing
    range: str  # as the header has it, "bytes=0-99"; empty without one
    is_object: bool  # the answer to a GET is an object's bytes


@dataclass(frozen=True)
class Fault:
    """What happens to one request."""

    kind: Kind
    at_byte: int | None  # of the body; drawn where None
    draws: random.Random


@dataclass(frozen=True)
class Answered:
    """One request, how it was harmed (None: not), the status (0: none) and how many bytes of its body were sent."""

    request: Request
    kind: Kind | None
    status: int
    num_bytes: int


@dataclass
class Behaviour:
    """What the connections need to know; all of it may change while they are open."""

    upstream_url: str
    slow_start_seconds: float
    stall_seconds: float
    trickle_bytes_per_second: int
    draw: Callable[[Request], Fault | None]
    note: Callable[[Answered], None]
