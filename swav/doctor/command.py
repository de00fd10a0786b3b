"""The preflight's command line: ``python -m swav.doctor --output URL [--data URL] [--recipe NAME key=value ...]``.

Every rank runs it. Exit status: 0 all passed; 1 a check failed: mend it, and run the same command again; 64 the command
is wrong.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from swav import storage
from swav.config import PretrainConfig
from swav.doctor.clock import Clock
from swav.doctor.peers import Peers, join
from swav.doctor.preflight import REPORT_SECONDS, Preflight
from swav.logs import start_logging
from swav.program import Stopped, run, stop_at_once
from swav.recipes import configure
from swav.watchdog import ends_when_stalled

_COLLECTIVE_TIMEOUT_SECONDS = 120.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m swav.doctor",
        description="Find out before a run what would end it. Run it where the run will be.",
    )
    parser.add_argument("--output", required=True, help="where the run will write: a folder, or s3://bucket/prefix")
    parser.add_argument("--data", help="the run's images, as pretrain takes them")
    parser.add_argument("--recipe", help="the run: its images, and whether they feed so many ranks")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    parser.add_argument("--min-free-disk-gb", type=float, default=10.0, help="where SWAV_CACHE is (default: 10)")
    parser.add_argument("--min-shm-mb", type=float, help="size of /dev/shm (default: 1024 with several GPUs per node)")
    parser.add_argument("--min-read-mb-per-second", type=float, help="of all ranks together (default: none)")
    parser.add_argument("--min-write-mb-per-second", type=float, help="of all ranks together (default: none)")
    parser.add_argument("--max-clock-skew-seconds", type=float, default=2.0, help="default: 2")
    parser.add_argument("--min-allreduce-gb-per-second", type=float, help="bus bandwidth (default: none)")
    parser.add_argument("--object-mb", type=_sizes, default=(8.0, 64.0), help="sizes to write and read (default: 8,64)")
    parser.add_argument("--streams", type=int, default=2, help="objects of each size at a time, per rank (default: 2)")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="for all ranks to come to a check")
    parser.add_argument(
        "--collective-timeout-seconds", type=float, help="default: the recipe's runtime.collective_timeout_seconds, 120"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--report", help="file or url of the JSON report (default: OUTPUT/doctor.json)")
    return parser.parse_intermixed_args(arguments)


def _sizes(text: str) -> tuple[float, ...]:
    return tuple(float(size) for size in text.split(","))


def check_command(options: argparse.Namespace) -> PretrainConfig | None:
    """Refuse a command that cannot be meant; returns the run that it names, if it does.

    Raises:
        ValueError: says what is wrong.
    """
    for name in ("output", "report"):
        url = getattr(options, name)
        if url is not None and storage.absolute(url).startswith(("http://", "https://")):
            raise ValueError(f"--{name} {url}: a web server is only read; give a folder or s3://bucket/prefix")
    limits = {name: value for name, value in vars(options).items() if name.startswith(("min_", "max_"))}
    timeouts = {name: value for name, value in vars(options).items() if name.endswith("timeout_seconds")}
    for name, value in limits.items():
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be at least 0")
    for name, value in timeouts.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    if options.streams < 1 or min(options.object_mb) <= 0:
        raise ValueError(f"--streams {options.streams} must be at least 1, --object-mb {options.object_mb} above 0")
    if options.recipe is None:
        if options.overrides:
            raise ValueError(f"{options.overrides[0]!r} changes a recipe's setting; give --recipe NAME too")
        return None
    return configure(options.recipe, data=options.data, overrides=options.overrides)


@contextmanager
def _left_together(peers: Peers) -> Iterator[None]:
    try:
        yield
    except Stopped:
        raise
    except Exception:
        peers.leave()
        raise
    else:
        peers.leave()


def main(arguments: list[str] | None = None, own_clock: Clock | None = None) -> int:
    """Run from the command line; returns the exit status.

    Args:
        arguments: of the command line.
        own_clock: of this node, where it is not the system's.
    """
    start_logging()

    def body() -> None:
        options = parse(arguments)
        config = check_command(options)
        if options.collective_timeout_seconds is None:
            from_recipe = config.runtime.collective_timeout_seconds if config is not None else None
            options.collective_timeout_seconds = from_recipe or _COLLECTIVE_TIMEOUT_SECONDS
        peers = join(options.timeout_seconds)
        with (
            ends_when_stalled(2 * options.timeout_seconds + 2 * REPORT_SECONDS),
            stop_at_once("stopped on request before the preflight was done; what it wrote is removed"),
            _left_together(peers),
        ):
            all_passed = Preflight(options, config, peers, own_clock or Clock()).examine()
        if not all_passed:
            raise RuntimeError("the preflight failed; mend what the table on rank 0's output says, then run it again")

    return run(body)
