"""The HTTP endpoint of a pod: ``GET /metrics`` for Prometheus, ``GET /healthz`` for whoever restarts what is stuck.

It answers from threads of its own, and never ends what it tells of: a port that is taken is a warning. Imported only
where metrics are asked for.
"""

import errno
import json
import logging
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

import swav
from swav.life import METRICS_PORT, Life

LIVENESS_SECONDS = "SWAV_LIVENESS_SECONDS"
_DEFAULT_LIVENESS_SECONDS = 900.0  # after runtime.stalled_after_seconds, whose watchdog shows what is stuck
_CLIENT_SECONDS = 10.0
_POLL_SECONDS = 0.1

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # it speaks once per pod, and from launchers, whose others are quiet


@contextmanager
def serving(port: str, life: Life, collect: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """Serve within the block, on all interfaces; where that cannot be, warn and go on without.

    Args:
        port: as the environment has it; 0 for any that is free.
        life: whose it is.
        collect: gives the metrics beside those of the life itself.
    """
    try:
        server = _open(_port(port), life, collect)
    except (OSError, ValueError) as error:
        _logger.warning(
            "no metrics and no /healthz: port %s cannot be served (%s); free it, or set %s to another", port, error,
            METRICS_PORT,
        )  # fmt: skip
        yield
        return
    with server:
        _logger.info("serving /metrics and /healthz on port %d", server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def health(life: Life, limit_seconds: float) -> tuple[bool, dict[str, Any]]:
    """Whether a life goes on, and why it is thought so: a launcher that waits for others is well."""
    age = time.monotonic() - life.progress_at()
    said = {"seconds_since_progress": round(age, 3), "limit_seconds": limit_seconds}
    if life.runs_since is None:
        return True, {"status": "waiting", "reason": f"no rank runs; waiting for {life.waits_for}", **said}
    if age <= limit_seconds:
        return True, {"status": "running", "reason": "progress is made", **said}
    reason = f"no progress for {age:.0f} s, more than {LIVENESS_SECONDS}={limit_seconds:g}"
    return False, {"status": "stalled", "reason": reason, **said}


class _LifeMetrics:
    """A collector, as prometheus_client wants it, of all that an endpoint serves."""

    def __init__(self, life: Life, collect: Callable[[], Iterable[Metric]]) -> None:
        self._life = life
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        life, now = self._life, time.monotonic()
        yield from self._collect()
        yield GaugeMetricFamily(
            "swav_world_size", "Ranks of the whole run, as this pod knows it; 0 while none runs", life.world_size
        )
        yield GaugeMetricFamily(
            "swav_progress_age_seconds",
            "Seconds since a rank of this pod started or last said that work goes on",
            max(0.0, now - life.progress_at()),
        )
        yield CounterMetricFamily(
            "swav_restarts_total", "How often this pod's launcher has started its ranks again", life.num_restarts
        )
        kept = life.kept_seconds()
        if kept is not None:
            yield GaugeMetricFamily(
                "swav_goodput_ratio",
                "Share of this pod's seconds since its launcher's start that went into steps that counted, 0 to 1",
                min(1.0, kept / max(now - life.began_at, 1e-9)),
            )
        build = {"version": swav.__version__, "torch": _torch_version(), "image": os.environ.get("SWAV_IMAGE", "")}
        yield InfoMetricFamily("swav_build", "What runs: versions, and the image as the job names it", build)


class _Server(ThreadingHTTPServer):
    """Listens on all interfaces, by IPv6 and IPv4 or by IPv4 alone."""

    daemon_threads = True

    def __init__(self, family: int, port: int, life: Life, collect: Callable[[], Iterable[Metric]]) -> None:
        self.address_family = family
        self.life = life
        self.registry = CollectorRegistry()
        self.registry.register(_LifeMetrics(life, collect))
        self.limit_seconds = _limit_seconds()
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        """Bind; the server of http.server would look for this host's name, which may take long."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a request; a client that hangs up is none of our business."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            _logger.warning("a request for metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = _CLIENT_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, kind, encode(self.server.registry))
        elif path == "/healthz":
            is_well, why = health(self.server.life, self.server.limit_seconds)
            self._answer(200 if is_well else 503, "application/json", json.dumps(why).encode() + b"\n")
        else:
            self._answer(404, "text/plain", b"there are /metrics and /healthz\n")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name in http.server)
        """Requests are not logged."""

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _open(port: int, life: Life, collect: Callable[[], Iterable[Metric]]) -> _Server:
    """A server that listens.

    Raises:
        OSError: the port is taken, or is not for this user.
    """
    try:
        return _Server(socket.AF_INET6, port, life, collect)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT):
            raise
    return _Server(socket.AF_INET, port, life, collect)  # a host without IPv6


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError("not a number from 0 to 65535")
    return int(text)


def _limit_seconds() -> float:
    text = os.environ.get(LIVENESS_SECONDS) or str(_DEFAULT_LIVENESS_SECONDS)
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    _logger.warning(
        "%s=%s is no number of seconds above 0; taking %g", LIVENESS_SECONDS, text, _DEFAULT_LIVENESS_SECONDS
    )
    return _DEFAULT_LIVENESS_SECONDS


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
