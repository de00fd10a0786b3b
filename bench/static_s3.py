"""Serves a folder as S3 buckets, read only, as fast as one core can: bodies go by ``sendfile``.

    python bench/static_s3.py FOLDER [--port 0] [--core 1]

Each subfolder is a bucket. Prints the port. GET (also with Range and If-Match), HEAD and ListObjectsV2; no signature is
checked. Ends when its standard input does. For benchmarks, where a test server would be what is measured.
"""

import argparse
import hashlib
import os
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: Path

    def do_HEAD(self) -> None:
        self._object(body=False)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(unquote(parts.path).strip("/"), query.get("prefix", [""])[0])
        else:
            self._object(body=True)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _list(self, bucket: str, prefix: str) -> None:
        folder = self.root / bucket
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>{escape(_etag(path))}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in paths
            if (key := path.relative_to(folder).as_posix()).startswith(prefix)
        ]
        answer = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>false</IsTruncated><KeyCount>{len(entries)}</KeyCount>{''.join(entries)}</ListBucketResult>"
        ).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _object(self, *, body: bool) -> None:
        path = self.root / unquote(urlsplit(self.path).path).strip("/")
        if not path.is_file():
            self._refuse(HTTPStatus.NOT_FOUND, "NoSuchKey", body=body)
            return
        if self.headers.get("If-Match", _etag(path)) != _etag(path):
            self._refuse(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed", body=body)
            return
        size = path.stat().st_size
        start, end = 0, size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if match else HTTPStatus.OK)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", _etag(path))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if body:
            with path.open("rb") as file:
                while start < end:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def _refuse(self, status: HTTPStatus, code: str, *, body: bool) -> None:
        answer = f"<Error><Code>{code}</Code></Error>".encode() if body else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news."""


def _etag(path: Path) -> str:
    found = path.stat()
    return '"' + hashlib.md5(f"{path.name} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest() + '"'


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--core", type=int, help="the core to run on")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    _Handler.root = options.folder.absolute()
    server = _Server(("127.0.0.1", options.port), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
