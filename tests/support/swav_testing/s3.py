"""Real S3 servers, each a process of its own on a free port of this machine.

Where they differ (seen with moto 5.2 and s3rver 3.7): moto keeps objects in memory, knows ``If-Match`` and
``If-None-Match``, takes any credentials and closes every connection after one request. s3rver keeps objects in a
folder and so survives its own death, keeps connections, refuses unknown access keys but verifies only old (version 2)
signatures, ignores ``If-Match`` and, when writing, ``If-None-Match``, misreads suffix ranges (``bytes=-3``), and
answers any range of an empty object with ``bytes 0-0/0``. Both list by pages and know other ranges and multipart.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

ROOT = Path(__file__).parents[3]
S3RVER = ROOT / ".venv" / "s3rver"  # where the Makefile installs it
ACCESS_KEY = "CANARYACCESSKEY"
SECRET_KEY = "canary-secret-8f1b6c2e5d"  # a run must never write it down
_START_SECONDS = 60

_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """A running S3 server.

    It ends when its standard input does, so it never outlives the process that started it.
    """

    def __init__(
        self, command: list[str], arguments: list[str], environment: dict[str, str], *, knows_conditions: bool
    ) -> None:
        """Start it; ``command port *arguments`` must print the port that it got."""
        self.knows_conditions = knows_conditions  # If-Match of a read, If-None-Match of a write
        self._command, self._arguments, self._environment = command, arguments, environment
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self.start()
        self.endpoint_url = f"http://127.0.0.1:{self._port}"
        self._client = self._make_client(self.endpoint_url)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables by which a program finds and may use this server."""
        return environment(self.endpoint_url)

    def start(self) -> None:
        """Start the process, again on the port that it had; returns when it answers."""
        assert self._process is None
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*self._command, str(self._port), *self._arguments],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            timer = threading.Timer(_START_SECONDS, process.kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            self._process = process
            if not line:
                self.kill()
                errors.seek(0)
                raise RuntimeError(f"{self._command[0]} did not start: {errors.read()}")
        self._port = int(line)

    def kill(self) -> None:
        """End the process at once, in the middle of whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def close(self) -> None:
        """End the process and let go of its connections."""
        self._client.close()
        self.kill()

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns its ``s3://`` url."""
        self._client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, bucket: str, key: str) -> bytes:
        """Read an object."""
        data: bytes = self._client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object."""
        self._client.delete_object(Bucket=bucket, Key=key)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys below a prefix, sorted."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def upload_folder(self, bucket: str, prefix: str, folder: Path) -> str:
        """Write all files of a folder and of those in it below a prefix; returns the ``s3://`` url of the prefix."""
        prefix = prefix.strip("/")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"), path.read_bytes())
        return f"s3://{bucket}/{prefix}".rstrip("/")

    @staticmethod
    def _make_client(endpoint_url: str) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(request_checksum_calculation="when_required", retries={"total_max_attempts": 3}),
        )


def environment(endpoint_url: str) -> dict[str, str]:
    """The ``AWS_*`` variables of a program that shall speak to an endpoint (a server, or a proxy before it)."""
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # No user's own settings or credentials.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """A moto server for the length of the block; its objects are gone when its process is."""
    server = S3Server([sys.executable, "-c", _MOTO], [], dict(os.environ), knows_conditions=True)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3rver_server() -> Iterator[S3Server]:
    """An s3rver for the length of the block; skips the test where Node or s3rver is not installed."""
    node = shutil.which("node")
    if node is None or not (S3RVER / "node_modules" / "s3rver").is_dir():
        pytest.skip("s3rver is not installed: install Node.js and npm, then run make test again")
    with tempfile.TemporaryDirectory(prefix="s3rver-") as folder:
        variables = {**os.environ, "NODE_PATH": str(S3RVER / "node_modules"), "NODE_NO_WARNINGS": "1"}
        # Its continuation tokens are made with DES.
        command = [node, "--openssl-legacy-provider", str(ROOT / "tests" / "support" / "s3rver" / "serve.js")]
        server = S3Server(command, [folder, ACCESS_KEY, SECRET_KEY], variables, knows_conditions=False)
        try:
            yield server
        finally:
            server.close()
