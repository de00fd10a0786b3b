import logging
import traceback
from pathlib import Path

import pytest
from swav_testing import web as web_server
from swav_testing.web import WebServer

from swav import storage
from swav.storage.attempts import Patience


def test_a_file_is_found_and_read(web: WebServer) -> None:
    found = storage.stat(web.url)
    assert found == storage.FileStat(1 << 20, 1795449557 * 10**9, "one")
    assert storage.read(web.url) == web.data
    assert storage.list_tars(web.url) == [web.url]


def test_a_server_without_head_does(web: WebServer) -> None:
    web.heads_allowed = False
    assert storage.stat(web.url) == storage.FileStat(1 << 20, 1795449557 * 10**9, "one")
    web.plans = [web_server.status(404)]
    assert storage.stat(web.url) is None


def test_an_empty_file_is_known_as_such(web: WebServer) -> None:
    web.data = memoryview(b"")
    found = storage.stat(web.url)
    assert found is not None
    assert found.num_bytes == 0
    assert storage.read(web.url) == b""


def test_a_server_without_etags_is_held_to_its_times_and_sizes(web: WebServer, hasty: Patience) -> None:
    web.etag = ""
    file = storage.open_file(web.url)
    assert file.read(5, 5) == web.data[5:10]
    web.data = web.data[:-1]
    with pytest.raises(OSError, match="had 1048576 bytes and has 1048575 by this answer"):
        file.read(5, 5)
    web.plans = [web_server.status(412)]
    with pytest.raises(storage.ChangedError, match="was replaced"):
        file.read(5, 5)


def test_a_weak_etag_is_compared_here(web: WebServer, hasty: Patience) -> None:
    web.etag = 'W/"one"'
    file = storage.open_file(web.url)
    assert (file.stat.etag, file.read(5, 5)) == ("W/one", bytes(web.data[5:10]))
    assert web.seen[-1][2] == ""
    web.etag = 'W/"two"'
    with pytest.raises(storage.ChangedError, match="was replaced"):
        file.read(5, 5)


def test_a_server_without_ranges_is_refused_where_one_is_needed(web: WebServer) -> None:
    web.ranges = False
    assert storage.read(web.url) == web.data
    assert storage.open_file(web.url).read(0, 10) == web.data[:10]
    with pytest.raises(OSError, match="does not serve ranges; copy the object"):
        storage.open_file(web.url).read(5, 10)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (404, FileNotFoundError, "no such file"),
        (403, PermissionError, "sends no credentials"),
        (418, OSError, "answered 418"),
    ],
)
def test_what_does_not_help_to_try_again_is_said_at_once(
    web: WebServer, code: int, kind: type[OSError], message: str
) -> None:
    web.plans = [web_server.status(code)]
    with pytest.raises(kind, match=message):
        storage.read(web.url)
    assert len(web.gets()) == 1


def test_a_redirection_is_followed_and_its_signature_stays_unsaid(
    web: WebServer, hasty: Patience, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    moved = web_server.status(302, ("Location", "/b.tar?signature=canary"))
    web.plans = [moved]
    assert storage.read(web.url) == web.data
    web.plans = [moved, web_server.cut(0)] * 5
    with pytest.raises(ConnectionError, match="gave up after 5") as caught:
        storage.read(web.url)
    web.plans = [moved] * 9
    with pytest.raises(OSError, match="redirected more than 5 times") as often:
        storage.read(web.url)
    for error in (caught.value, often.value):
        assert "canary" not in "".join(traceback.format_exception(error))
    assert "canary" not in caplog.text


def test_shards_are_named_by_a_range(web: WebServer) -> None:
    folder = web.url.removesuffix("/a.tar")
    assert storage.list_tars(f"{folder}/x-{{09..11}}.tar") == [f"{folder}/x-{n}.tar" for n in ("09", "10", "11")]
    assert storage.has_pattern(f"{folder}/x-{{09..11}}.tar")
    for call in (storage.list_tars, storage.list_names):
        with pytest.raises(ValueError, match=r"cannot be listed; give a range such as .*{000\.\.146}"):
            call(folder)


def test_nothing_is_written(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path))
    for call in (storage.open_atomic, storage.remove):
        with pytest.raises(ValueError, match="a web server is only read; write to a folder or to s3://bucket/key"):
            call(web.url)
    with pytest.raises(ValueError, match="only read"):
        storage.write_atomic(web.url, b"")
    assert web.seen == []


def test_a_proxy_of_the_environment_is_used(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url.removesuffix("/a.tar"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert storage.read("http://somewhere.invalid/a.tar") == web.data
