"""Servers for the tests of storage, and patience that is lost soon."""

from collections.abc import Iterator

import pytest
from swav_testing.s3 import S3Server, moto_server
from swav_testing.web import WebServer

from swav.storage import remote
from swav.storage.attempts import Patience


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer(bytes(range(256)) * 4096)  # 1 MiB
    yield server
    server.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Patience:
    """Patience for tests."""
    patience = Patience(
        first_byte_seconds=1.0,
        answer_seconds=3.0,
        idle_seconds=0.5,
        slow_seconds=0.5,
        attempts=5,
        backoff_seconds=0.01,
        backoff_cap_seconds=0.02,
    )
    monkeypatch.setattr(remote, "PATIENCE", patience)
    return patience


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An S3 server for all tests of this folder; each makes a bucket of its own."""
    with moto_server() as server:
        yield server


@pytest.fixture
def s3(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, as the environment's endpoint."""
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    return moto
