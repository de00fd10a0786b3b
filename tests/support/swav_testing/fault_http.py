"""The HTTP of the fault proxy: one thread per connection, bodies forwarded whole, answers sent as the fault says."""

import random
import select
import socket
import struct
import threading
import time
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from swav_testing.fault_kinds import Answered, Behaviour, Fault, Kind, Request

_ERRORS = {
    Kind.ERROR_500: (500, "Internal Server Error", "InternalError"),
    Kind.SLOW_DOWN: (503, "Slow Down", "SlowDown"),
}
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>by the fault proxy</Message></Error>'
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
_SUBRESOURCES = {"acl", "list-type", "location", "tagging", "uploadId", "uploads", "versioning", "versions"}
_TICK_SECONDS = 0.05
_UPSTREAM_SECONDS = 25


class _Cut(Exception):
    """This connection is of no more use."""


class Server(ThreadingHTTPServer):
    """Listens on a free port of this machine."""

    daemon_threads = False  # server_close joins them
    request_queue_size = 128

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.closing = threading.Event()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: "socket.socket | tuple[bytes, socket.socket]") -> None:
        assert isinstance(request, socket.socket)
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may leave at any time."""

    def end(self) -> None:
        """Stop, and end every connection whatever it waits for."""
        self.closing.set()
        self.shutdown()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended by itself
                continue
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    _upstream: HTTPConnection | None = None
    _status = 0
    _num_sent = 0

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        super().finish()

    def log_message(self, *args: object) -> None:
        """What happened is in the proxy's log."""

    def do_GET(self) -> None:
        request = self._request()
        fault = self.server.behaviour.draw(request)
        self._status = self._num_sent = 0
        harmed = False
        try:
            harmed = self._answer(request, fault)
        except _Cut:
            harmed, self.close_connection = fault is not None, True
        except (OSError, HTTPException):  # the store or the client has gone
            self.close_connection = True
        kind = fault.kind if fault is not None and harmed else None
        self.server.behaviour.note(Answered(request, kind, self._status, self._num_sent))

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _request(self) -> Request:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        parameters = parse_qs(parts.query, keep_blank_values=True).keys()
        is_object = self.command == "GET" and bool(key) and not parameters & _SUBRESOURCES
        return Request(self.command, bucket, key, self.headers.get("Range", ""), is_object)

    def _answer(self, request: Request, fault: Fault | None) -> bool:
        """Carry out one request; whether it was harmed."""
        if fault is not None and fault.kind is Kind.RESET:
            self._reset()
        uploaded = self._receive(fault)
        if fault is not None and fault.kind in _ERRORS:
            status, reason, code = _ERRORS[fault.kind]
            body = _XML.format(code).encode()
            self._send_plain(status, reason, [("Content-Type", "application/xml")], body)
            return True
        status, reason, headers, body = self._forward(uploaded)
        if fault is None or (fault.kind is Kind.CORRUPT and (status not in (200, 206) or not body)):
            self._send_plain(status, reason, headers, body)
            return False
        self._send_harmed(status, reason, headers, body, fault)
        return True

    def _receive(self, fault: Fault | None) -> bytes:
        num_bytes = int(self.headers.get("Content-Length", 0))
        if num_bytes and fault is not None and fault.kind is Kind.DROP:
            if fault.at_byte is not None:
                self.rfile.read(min(num_bytes, fault.at_byte))
                self._reset()
            if fault.draws.random() < 0.5:
                self.rfile.read(fault.draws.randrange(num_bytes))
                self._reset()
        return self.rfile.read(num_bytes)

    def _forward(self, uploaded: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        address = urlsplit(self.server.behaviour.upstream_url)
        assert address.hostname is not None
        known = self._upstream
        if known is None or (known.host, known.port) != (address.hostname, address.port):
            self._upstream = known = HTTPConnection(address.hostname, address.port, timeout=_UPSTREAM_SECONDS)
        fresh = known.sock is None
        try:
            return self._exchange(known, uploaded)
        except (OSError, HTTPException):
            known.close()
            if fresh:
                raise
        return self._exchange(known, uploaded)  # the store had closed the kept connection

    def _exchange(self, upstream: HTTPConnection, uploaded: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(uploaded or None)
        answer = upstream.getresponse()
        return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _head(self, status: int, reason: str, headers: list[tuple[str, str]], num_bytes: int) -> bytes:
        as_it_is = self.command == "HEAD" or status in (204, 304)
        dropped = _HOP_BY_HOP if as_it_is else _HOP_BY_HOP | {"content-length"}
        lines = [f"{name}: {value}\r\n" for name, value in headers if name.lower() not in dropped]
        if not as_it_is:
            lines.append(f"Content-Length: {num_bytes}\r\n")
        self._status = status
        return f"HTTP/1.1 {status} {reason}\r\n{''.join(lines)}\r\n".encode("latin-1")

    def _send_plain(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self._send(self._head(status, reason, headers, len(body)), body if self.command != "HEAD" else b"")

    def _send_harmed(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, fault: Fault) -> None:
        head = self._head(status, reason, headers, len(body))
        draws, at_byte = fault.draws, fault.at_byte
        if fault.kind is Kind.CORRUPT:
            self._send(head, _flip_bits(body, draws, at_byte))
        elif fault.kind is Kind.SLOW_START:
            self._wait(self.server.behaviour.slow_start_seconds)
            self._send(head, body)
        elif fault.kind is Kind.TRICKLE:
            self._trickle(head + body, len(head))
        elif fault.kind is Kind.LENGTH:
            claimed = at_byte if at_byte is not None else _other_length(len(body), draws)
            self._send(self._head(status, reason, headers, claimed), body)
            raise _Cut
        else:
            if body:
                cut = at_byte if at_byte is not None else draws.randrange(len(body))
                self._send(head if cut >= 0 else head[:cut], body[: max(cut, 0)])
            else:
                self._send(head[: at_byte if at_byte is not None else draws.randrange(len(head))], b"")
            if fault.kind is Kind.STALL:
                self._wait(self.server.behaviour.stall_seconds)
            raise _Cut

    def _send(self, head: bytes, body: bytes) -> None:
        self.connection.sendall(head + body)
        self._num_sent += len(body)

    def _trickle(self, data: bytes, head_bytes: int) -> None:
        piece = max(1, round(self.server.behaviour.trickle_bytes_per_second * _TICK_SECONDS))
        for start in range(0, len(data), piece):
            self.connection.sendall(data[start : start + piece])
            self._num_sent = max(0, min(start + piece, len(data)) - head_bytes)
            self._wait(_TICK_SECONDS)

    def _wait(self, seconds: float) -> None:
        """Be silent; returns early only by raising, when the client leaves or the proxy closes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection], [], [], min(left, _TICK_SECONDS))
            if self.server.closing.is_set() or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                raise _Cut
            if readable:  # the next request is here already
                time.sleep(min(left, _TICK_SECONDS))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        raise _Cut


def _flip_bits(body: bytes, draws: random.Random, at_byte: int | None) -> bytes:
    harmed = bytearray(body)
    places = [at_byte] if at_byte is not None else draws.sample(range(len(body)), min(len(body), draws.randint(1, 4)))
    for place in places:
        harmed[place] ^= 1 << draws.randrange(8)
    return bytes(harmed)


def _other_length(num_bytes: int, draws: random.Random) -> int:
    if num_bytes and draws.random() < 0.5:
        return draws.randrange(num_bytes)
    return num_bytes + draws.randint(1, 1000)
