"""The endpoint, over real HTTP."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from swav_testing.scrape import get, health, metrics

import swav
from swav.endpoint import LIVENESS_SECONDS, serving
from swav.endpoint import health as judge
from swav.goodput import StepBook
from swav.life import METRICS_PORT, Life
from swav.meters import Meters


@pytest.fixture
def life() -> Life:
    life = Life()
    life.ranks_start(1)
    return life


@pytest.fixture
def port(life: Life, caplog: pytest.LogCaptureFixture) -> Iterator[int]:
    with serving("0", life, Meters().collect):
        yield int(caplog.records[-1].getMessage().rpartition(" ")[2])


def test_a_scrape_parses_in_both_formats_and_has_units_and_words(port: int, life: Life) -> None:
    life.num_restarts = 3
    for accept, parser in (("", parse), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)):
        status, text = get(port, "/metrics", accept=accept)
        assert status == 200
        families = {family.name: family for family in parser(text)}
        assert [name for name, family in families.items() if not family.documentation] == []
        assert families["swav_restarts"].samples[0].value == 3
    found = metrics(port)
    assert found["swav_world_size"] == 1
    assert found["swav_progress_age_seconds"] >= 0
    assert "swav_goodput_ratio" not in found  # nothing trains
    assert f'version="{swav.__version__}"' in text


def test_goodput_is_the_share_of_seconds_that_counted(port: int, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWAV_LAUNCHER_FOLDER", raising=False)
    life.book = StepBook(0)
    assert metrics(port)["swav_goodput_ratio"] == 0
    life.began_at = time.monotonic() - 100
    life.book.add(1, 50.0)
    assert 0.1 < metrics(port)["swav_goodput_ratio"] <= 0.5


def test_other_paths_are_not_there(port: int) -> None:
    assert get(port, "/")[0] == 404
    assert get(port, "/metrics?name=x")[0] == 200


def test_ipv6_is_served_where_there_is_one(port: int) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert get(port, "/healthz", host="[::1]")[0] == 200


def test_a_main_thread_that_never_rests_does_not_keep_it_from_answering(port: int) -> None:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(health(port)))
    thread.start()
    deadline = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < deadline:  # holds the interpreter's lock whenever it may
        sum(range(1000))
    thread.join()
    assert answers[0][0] == 200


def test_a_client_that_says_nothing_holds_up_nobody(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)):
        assert health(port)[0] == 200


@pytest.mark.parametrize(("number", "why"), [("taken", "in use"), ("x", "0 to 65535"), ("70000", "0 to 65535")])
def test_a_port_that_cannot_be_served_is_a_warning_that_names_it(
    life: Life, caplog: pytest.LogCaptureFixture, number: str, why: str
) -> None:
    with socket.create_server(("", 0)) as listener:
        port = str(listener.getsockname()[1]) if number == "taken" else number
        done = False
        with serving(port, life, Meters().collect):
            done = True
    assert done
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (f"port {port}", why, METRICS_PORT):
        assert part in record.getMessage()


def test_what_waits_is_well_and_what_runs_must_go_on(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.began_at -= 5000
    is_well, why = judge(life, 900)
    assert is_well
    assert why["reason"] == "no rank runs; waiting for the first meeting of the nodes"
    life.ranks_start(8)
    assert judge(life, 900)[0]
    assert life.runs_since is not None
    life.runs_since -= 1000
    is_well, why = judge(life, 900)
    assert not is_well
    assert (why["status"], why["limit_seconds"]) == ("stalled", 900)
    assert "no progress for 1000 s, more than SWAV_LIVENESS_SECONDS=900" in why["reason"]
    life.ranks_end("the other nodes")
    assert judge(life, 900)[0]


@pytest.mark.parametrize("text", ["0", "-3", "soon"])
def test_a_limit_that_is_none_is_named(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    monkeypatch.setenv(LIVENESS_SECONDS, text)
    with serving("0", life, Meters().collect):
        pass
    assert f"SWAV_LIVENESS_SECONDS={text} is no number of seconds above 0; taking 900" in caplog.text
