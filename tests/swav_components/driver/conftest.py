"""What the driver's tests share."""

import logging
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_signals_and_log() -> Iterator[None]:
    """TorchX's local scheduler takes signals over where it is made, and the driver quietens TorchX's log."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    level = logging.getLogger("torchx").level
    yield
    logging.getLogger("torchx").setLevel(level)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
