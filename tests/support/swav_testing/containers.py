"""Images that are built and run: by the container engine that answers here, or by one started for the purpose.

Where no hub can be reached, a system made of Debian's packages stands in for the base image. Python's packages come
from wherever this machine's pip finds them: they are fetched once, as the lock files have them, and offered to the
build over HTTP. What is fetched and built stays in a folder of the user's cache (SWAV_TEST_ENGINE): it takes minutes.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[3]
LOCKS = ROOT / "images" / "locks"
TAG = "test"
FIRST_BASE = "python:3.11-slim-bookworm"
STAND_IN = "swav-test-python:bookworm"
# What a pod of ours may do.
LOCKED_DOWN = (
    *("--read-only", "--tmpfs", "/tmp:size=1g", "--user", "10001:10001", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--pids-limit", "512"),
)
_START_SECONDS = 60
_NEEDED_BYTES = 15 * 10**9
_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"


class Missing(Exception):
    """What this machine lacks for containers."""


@dataclass(frozen=True)
class Engine:
    """A container engine that can build."""

    client: str
    host: str | None  # its address, if it is not where the client looks

    @property
    def environment(self) -> dict[str, str]:
        """Of the client."""
        return {**os.environ, "DOCKER_BUILDKIT": "1", **({"DOCKER_HOST": self.host} if self.host else {})}

    def call(self, *words: str, check: bool = True, timeout_seconds: float = 300) -> "subprocess.CompletedProcess[str]":
        """Run the client.

        Raises:
            RuntimeError: it failed, and was not to; says what it said.
        """
        done = subprocess.run(
            [self.client, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"docker {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"[-20_000:]
            )
        return done

    def has_image(self, name: str) -> bool:
        """Whether it need not be fetched."""
        return self.call("image", "inspect", name, check=False).returncode == 0

    def size(self, image: str) -> int:
        """Bytes of all layers."""
        return int(self.call("image", "inspect", "--format", "{{.Size}}", image).stdout)

    def layers(self, image: str) -> list[tuple[int, str]]:
        """Bytes of each layer, the last one first, and what made it."""
        lines = self.call(
            "history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image
        ).stdout.splitlines()
        return [(int(size), words) for size, _, words in (line.partition(" ") for line in lines)]


@contextmanager
def engine() -> Iterator[Engine]:
    """The engine that answers, or one of our own for the length of the block.

    Raises:
        Missing: there is none, and none can be started.
    """
    clients = list(
        dict.fromkeys(filter(None, [shutil.which("docker"), shutil.which("docker", path=_PATH), "/usr/bin/docker"]))
    )
    able = [client for client in clients if Path(client).exists() and _can_build(client)]
    if not able:
        raise Missing("no docker client that builds images: install docker.io (Debian, Ubuntu) or Docker with buildx")
    for client in able:
        found = Engine(client, None)
        if _answers(found):
            yield found
            return
    daemon = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:{_PATH}")
    if daemon is None or os.geteuid() != 0:
        raise Missing("no container engine answers, and starting one needs root and dockerd")
    with _own(daemon, able[0]) as own:
        yield own


@contextmanager
def _own(daemon: str, client: str) -> Iterator[Engine]:
    """An engine without a bridge and without rules for packets: this host's network stays as it is."""
    folder = state_folder()
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be building
        with _started(daemon, client, folder) as found:
            yield found


@contextmanager
def _started(daemon: str, client: str, folder: Path) -> Iterator[Engine]:
    found = Engine(client, f"unix://{folder}/docker.sock")
    roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/docker.pid"]
    network = ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    log = folder / "dockerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen([daemon, *roots, *network, f"--host={found.host}"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(found):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Missing(f"no container engine can be started here: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait(_START_SECONDS)


def state_folder() -> Path:
    """What a second run need not fetch and build again; about 10 GB."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SWAV_TEST_ENGINE") or cache / "swav-test-engine")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _can_build(client: str) -> bool:
    """Whether BuildKit is in the client (until 22), or beside it."""
    version = subprocess.run([client, "--version"], capture_output=True, text=True, check=False).stdout
    major = re.search(r"version (\d+)\.", version)
    if major is None:
        return False
    if int(major[1]) < 23:
        return True
    return subprocess.run([client, "buildx", "version"], capture_output=True, check=False).returncode == 0


def _answers(found: Engine) -> bool:
    return found.call("version", "--format", "{{.Server.Version}}", check=False, timeout_seconds=60).returncode == 0


def base_image(found: Engine) -> str:
    """The images' first base as the hub has it, or what stands in for it.

    Raises:
        Missing: neither can be had.
    """
    if found.has_image(FIRST_BASE) or found.call("pull", "--quiet", FIRST_BASE, check=False).returncode == 0:
        return FIRST_BASE
    if not found.has_image(STAND_IN):
        _import_stand_in(found)
    return STAND_IN


def _import_stand_in(found: Engine) -> None:
    debootstrap = shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:{_PATH}")
    if debootstrap is None or os.geteuid() != 0:
        raise Missing(f"{FIRST_BASE} cannot be fetched, and making what stands in for it needs root and debootstrap")
    system = state_folder() / "system"
    shutil.rmtree(system, ignore_errors=True)
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    try:
        done = subprocess.run(
            [debootstrap, "--variant=minbase", f"--include={packages}", "bookworm", str(system)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Missing(f"{FIRST_BASE} cannot be fetched, and debootstrap failed: {done.stdout[-2000:]}{done.stderr}")
        (system / "usr/bin/python").symlink_to("python3")
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(system / folder)
        with subprocess.Popen(["tar", "--directory", str(system), "--create", "."], stdout=subprocess.PIPE) as tar:
            words = [found.client, "import", "--change", f"ENV PATH={_PATH}", "-", STAND_IN]
            subprocess.run(words, env=found.environment, stdin=tar.stdout, check=True, capture_output=True)
    finally:
        shutil.rmtree(system, ignore_errors=True)


def fetch_wheels() -> Path:
    """A folder of all that the lock files name, from where this machine's pip finds it; pip checks every hash."""
    locks = sorted(LOCKS.glob("*.txt"))
    folder = state_folder() / "wheels"
    done = folder / hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()
    if done.exists():
        return folder
    for lock in locks:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        words = [*pip, "--only-binary", ":all:", "--require-hashes", "--requirement", str(lock), "--dest", str(folder)]
        subprocess.run(words, check=True, capture_output=True)
    done.touch()
    return folder


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The url of a folder's files, on this host alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def build(found: Engine) -> dict[str, str]:
    """Build every image by ``make images``, tagged ``test``; their names by job.

    Raises:
        Missing: the base image cannot be had, or there is no room.
        RuntimeError: a build failed; says what it said last.
    """
    free = shutil.disk_usage(state_folder()).free
    if free < _NEEDED_BYTES and not found.has_image(f"swav-pretrain:{TAG}"):
        raise Missing(f"{state_folder()} has {free / 1e9:.0f} GB free; building needs {_NEEDED_BYTES / 1e9:.0f} GB")
    base = base_image(found)
    with _served(fetch_wheels()) as url:
        settings = state_folder() / "pip.conf"
        settings.write_text(f"[global]\nno-index = true\nfind-links = {url}\n")
        arguments = [
            "--network",
            "host",
            "--build-arg",
            f"PYTHON_IMAGE={base}",
            "--secret",
            f"id=pip_conf,src={settings}",
        ]
        done = subprocess.run(
            [
                "make",
                "images",
                f"DOCKER={found.client}",
                f"TAG={TAG}",
                f"IMAGE_ARGS=--progress plain {' '.join(arguments)}",
            ],
            cwd=ROOT,
            env=found.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"make images failed: {done.stdout[-10_000:]}")
    return {job: f"swav-{job}:{TAG}" for job in ("pretrain", "assign", "eval", "launcher")}


if __name__ == "__main__":  # beforehand, beside other tests
    try:
        with engine() as own:
            build(own)
    except Missing as missing:
        sys.exit(f"no images: {missing}")
