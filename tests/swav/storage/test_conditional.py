import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from swav_testing.s3 import S3Server, s3rver_server
from swav_testing.web import WebServer

from swav import storage
from swav.storage import conditional
from swav.storage import s3 as s3_store

_PROCESSES, _TURNS = 2, 15


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server: S3Server = request.getfixturevalue("s3")
    return server.make_bucket(f"conditional-{abs(hash(request.node.nodeid)):x}") + "/run"


def test_a_file_is_made_once_and_replaced_only_by_who_has_seen_it(folder: str) -> None:
    url = storage.join(folder, "lease.json")
    assert storage.read_tagged(url) is None
    assert storage.write_conditional(url, b"b", tag="0" * 32) is None  # nothing is there to replace
    first = storage.write_conditional(url, b"a", tag=None)
    assert first is not None
    assert storage.read_tagged(url) == storage.Tagged(b"a", first)
    assert storage.write_conditional(url, b"b", tag=None) is None
    second = storage.write_conditional(url, b"b", tag=first)
    assert second not in (None, first)
    assert storage.write_conditional(url, b"c", tag=first) is None
    assert storage.read_tagged(url) == storage.Tagged(b"b", second or "")


def test_the_same_bytes_again_count_as_written(folder: str) -> None:
    """A store that was asked again after its answer was lost refuses the second request: the first one was it."""
    url = storage.join(folder, "lease.json")
    tag = storage.write_conditional(url, b"mine", tag=None)
    assert storage.write_conditional(url, b"mine", tag=None) == tag
    assert storage.write_conditional(url, b"mine", tag="0" * 32) == tag


def test_conditions_are_tried(folder: str) -> None:
    url = storage.join(folder, "conditions")
    storage.check_conditions(url)
    storage.check_conditions(url)


def test_a_store_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3rver_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = server.make_bucket("run") + "/conditions"
        with pytest.raises(ValueError, match="ignores If-None-Match when writing"):
            storage.check_conditions(url)


def test_a_web_server_is_refused(web: WebServer) -> None:
    with pytest.raises(ValueError, match="only read"):
        storage.read_tagged(web.url)
    with pytest.raises(ValueError, match="only read"):
        storage.write_conditional(web.url, b"", tag=None)


def test_a_file_that_never_stands_still_is_given_up(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.make_bucket("restless") + "/file"
    s3.put("restless", "file", b"0")
    real: Callable[..., object] = s3_store.get
    turn = iter(range(1, 1000))

    def get(*arguments: object) -> object:
        answer = real(*arguments)
        s3.put("restless", "file", b"%d" % next(turn))
        return answer

    monkeypatch.setattr(s3_store, "get", get)
    with pytest.raises(RuntimeError, match="was replaced each time"):
        conditional.read_tagged(url)


def _count_up(url: str, variables: dict[str, str]) -> None:
    os.environ |= variables
    for _ in range(_TURNS):
        while True:
            found = storage.read_tagged(url)
            number = 0 if found is None else json.loads(found.data)["number"]
            text = json.dumps({"number": number + 1, "by": os.getpid()}).encode()
            if storage.write_conditional(url, text, tag=None if found is None else found.tag) is not None:
                break


def test_two_processes_lose_nothing(folder: str) -> None:
    url = storage.join(folder, "number.json")
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_up, args=(url, variables)) for _ in range(_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert json.loads(storage.read(url))["number"] == _PROCESSES * _TURNS
