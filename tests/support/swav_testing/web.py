"""A web server that does exactly what a test tells it to."""

import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[["Handler"], bool]  # whether the connection is still good


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may leave at any time."""


class WebServer:
    """Serves one file; the next requests may be spoiled by plans."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.etag = '"one"'
        self.modified = "Mon, 23 Nov 2026 15:59:17 GMT"
        self.heads_allowed = self.ranges = self.conditions = True
        self.plans: list[Behaviour | None] = []
        self.seen: list[tuple[str, str, str]] = []  # method, Range, If-Match
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self._server.web = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/a.tar"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def gets(self) -> list[str]:
        """The ranges that were asked for so far."""
        return [asked for method, asked, _ in self.seen if method == "GET"]

    def next_plan(self, request: tuple[str, str, str]) -> Behaviour | None:
        """What happens to a request."""
        with self._lock:
            self.seen.append(request)
            return self.plans.pop(0) if self.plans and request[0] == "GET" else None

    def close(self) -> None:
        """End it, and whatever it waits for."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        """Answer as planned, or rightly."""
        self.web: WebServer = self.server.web  # type: ignore[attr-defined]
        asked = self.headers.get("Range", "") if self.web.ranges else ""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        self.total = len(self.web.data)
        self.start = int(match[1]) if match else 0
        self.end = min(int(match[2]) + 1, self.total) if match and match[2] else self.total
        plan = self.web.next_plan((self.command, self.headers.get("Range", ""), self.headers.get("If-Match", "")))
        try:
            self.close_connection = not (plan or _serve)(self)
        except OSError:  # the client has left
            self.close_connection = True

    do_HEAD = do_GET

    def start_answer(self, *, num_bytes: int | None = None, content_range: str | None = None) -> None:
        """Send the headers, the right ones where nothing else is said."""
        ranged = "Range" in self.headers and self.web.ranges
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", content_range or f"bytes {self.start}-{self.end - 1}/{self.total}")
        self.send_header("Content-Length", str(self.end - self.start if num_bytes is None else num_bytes))
        if self.web.etag:
            self.send_header("ETag", self.web.etag)
        if self.web.modified:
            self.send_header("Last-Modified", self.web.modified)
        self.end_headers()

    def part(self, num_bytes: int) -> memoryview:
        """The first bytes of the body."""
        return self.web.data[self.start : min(self.start + num_bytes, self.end)]


def status(code: int, *headers: tuple[str, str]) -> Behaviour:
    """An answer without a body."""

    def answer(handler: Handler) -> bool:
        handler.send_response(code)
        for name, value in (("Content-Length", "0"), *headers):
            handler.send_header(name, value)
        handler.end_headers()
        return True

    return answer


def _serve(handler: Handler) -> bool:
    web = handler.web
    if handler.command == "HEAD" and not web.heads_allowed:
        return status(405)(handler)
    if web.conditions and handler.headers.get("If-Match", web.etag) != web.etag:
        return status(412)(handler)
    if handler.start >= handler.total > 0 or (handler.total == 0 and "Range" in handler.headers):
        return status(416)(handler)
    handler.start_answer()
    if handler.command == "GET":
        handler.wfile.write(handler.part(handler.total))
    return True


def cut(num_bytes: int, then: Callable[[], None] = lambda: None) -> Behaviour:
    """Part of the answer, and the end of the connection."""

    def answer(handler: Handler) -> bool:
        handler.start_answer()
        handler.wfile.write(handler.part(num_bytes))
        then()
        return False

    return answer


def stall(num_bytes: int) -> Behaviour:
    """Part of the answer, then nothing."""

    def answer(handler: Handler) -> bool:
        handler.start_answer()
        handler.wfile.write(handler.part(num_bytes))
        handler.web.closing.wait(30)
        return False

    return answer


def trickle(handler: Handler) -> bool:
    """A byte now and then."""
    handler.start_answer()
    for byte in handler.part(handler.total):
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)
    return True


def claim(*, num_bytes: int | None = None, content_range: str | None = None) -> Behaviour:
    """All of the answer, with headers that say something else."""

    def answer(handler: Handler) -> bool:
        handler.start_answer(num_bytes=num_bytes, content_range=content_range)
        handler.wfile.write(handler.part(handler.total))
        return False

    return answer


def late(until: threading.Event) -> Behaviour:
    """The right answer, when the test says so."""

    def answer(handler: Handler) -> bool:
        until.wait(30)
        return _serve(handler)

    return answer
