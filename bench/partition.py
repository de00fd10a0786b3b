"""How long it takes until a host that is cut off is noticed, left behind and taken back: three hosts in namespaces.

    sudo python bench/partition.py [--timeout-seconds 120] [--rendezvous last_call_timeout=15,...]

Prints a table. It needs root and iproute2; the network that it makes is its own, and is removed in the end.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from swav_testing.partition import measure, table, why_not
from swav_testing.runs import write_scenes

from swav.config import RuntimeConfig
from swav.elastic import RENDEZVOUS_SETTINGS


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout-seconds", type=float, default=RuntimeConfig().collective_timeout_seconds)
    parser.add_argument("--rendezvous", default=RENDEZVOUS_SETTINGS, help="--rdzv-conf of every agent")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.stderr.write(reason + "\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        times = measure(
            Path(folder) / "run",
            Path(folder) / "cache",
            write_scenes(Path(folder) / "data"),
            timeout_seconds=options.timeout_seconds,
            rendezvous=options.rendezvous,
            deadline_seconds=options.timeout_seconds + 600,
        )
    sys.stdout.write(table(times) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
