"""Asks a pod's endpoint as Prometheus and a kubelet do."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from swav_testing.runs import DEADLINE_SECONDS


def wait_for_port(log: Path) -> int:
    """The port that a process says in its log that it serves."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"serving /metrics and /healthz on port (\d+)", log.read_text() if log.exists() else "")
        if found:
            return int(found[1])
        time.sleep(0.02)
    raise AssertionError(f"no port in {DEADLINE_SECONDS} s: {log.read_text()}")


def get(port: int, path: str, host: str = "127.0.0.1", accept: str = "") -> tuple[int, str]:
    """Status and body of an answer."""
    request = urllib.request.Request(f"http://{host}:{port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics(port: int) -> dict[str, float]:
    """Every sample by its name; no name has two."""
    status, text = get(port, "/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {sample.name: sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def health(port: int) -> tuple[int, dict[str, Any]]:
    """Status of /healthz, and what it says."""
    status, text = get(port, "/healthz")
    return status, json.loads(text)


def wait_for_metrics(port: int, condition: Callable[[dict[str, float]], bool]) -> list[dict[str, float]]:
    """Scrape until a condition holds; all scrapes, of which the last one meets it."""
    scrapes: list[dict[str, float]] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not scrapes or not condition(scrapes[-1]):
        assert time.monotonic() < deadline, scrapes[-1]
        time.sleep(0.05)
        scrapes.append(metrics(port))
    return scrapes


def wait_for_health(port: int, status: int) -> dict[str, Any]:
    """Ask /healthz until it has a status; what it says then."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found, why = health(port)
        if found == status:
            return why
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
