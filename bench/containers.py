"""Sizes of the images, how long a container takes to its first step, and how two pods get over a kill and a cut.

    sudo python bench/containers.py [start-up | pods] [--collective-timeout-seconds 15] [--rendezvous ...]

Builds the images first where they are not built yet. Prints tables. Root is needed to empty the page cache, for the
pods' network, and where no container engine answers.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from swav_testing.containers import LOCKED_DOWN, Engine, build, engine
from swav_testing.pods import DATA, OUTPUT, Times, cluster, disturb, render, table
from swav_testing.runs import STEPS_PER_EPOCH, TINY, write_scenes

from swav.config import RuntimeConfig

_ALONE = (*LOCKED_DOWN, "--network", "none", "--env", "OMP_NUM_THREADS=1")
_SETTINGS = ("optim.epochs=60", "evaluate=null", "runtime.checkpoint_every_steps=5")


def _empty_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _leave_page_cache() -> None:
    pass


def _first_step_seconds(found: Engine, image: str, data: Path, output: Path) -> float:
    """From the start of a container until its run has noted its first step."""
    output.mkdir()
    output.chmod(0o777)
    volumes = ("--volume", f"{data}:/data:ro", "--volume", f"{output}:/output")
    words = ["python", "-m", "swav.pretrain", "--recipe", "demo", "--data", "/data", "--output", "/output/run", *TINY]
    since = time.monotonic()
    name = found.call("run", "--detach", *_ALONE, *volumes, image, *words).stdout.strip()
    try:
        metrics = output / "run" / "metrics.jsonl"
        while not (metrics.exists() and '"loss"' in metrics.read_text()):
            time.sleep(0.02)
        return time.monotonic() - since
    finally:
        found.call("rm", "--force", name)


def _import_seconds(found: Engine, image: str, module: str) -> float:
    """What the imports of a program take, by its interpreter's own account."""
    command = ("python", "-X", "importtime", "-c", f"import {module}")
    lines = found.call("run", "--rm", *_ALONE, image, *command).stderr.splitlines()
    totals = [
        int(match[1]) for line in lines if (match := re.match(rf"import time: +\d+ \| +(\d+) \| {module}$", line))
    ]
    return totals[-1] / 1e6


def _start_up(found: Engine, image: str, data: Path, folder: Path) -> str:
    """Medians of three."""
    rows = []
    for state, prepare in (("cold", _empty_page_cache), ("warm", _leave_page_cache)):
        seconds: list[list[float]] = [[], [], []]
        for number in range(3):
            prepare()
            seconds[0].append(_seconds(found, image, "python", "-c", "pass"))
            prepare()
            seconds[1].append(_import_seconds(found, image, "swav.pretrain"))
            prepare()
            seconds[2].append(_first_step_seconds(found, image, data, folder / f"{state}-{number}"))
        rows.append(f"| {state} | {' | '.join(f'{statistics.median(one):.1f}' for one in seconds)} |")
    head = "| page cache | container of Python alone, s | imports of `swav.pretrain`, s | container to first step, s |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def _seconds(found: Engine, image: str, *command: str) -> float:
    since = time.monotonic()
    found.call("run", "--rm", *_ALONE, image, *command)
    return time.monotonic() - since


def _pods(found: Engine, images: dict[str, str], data: Path, folder: Path, options: argparse.Namespace) -> Times:
    timeout = f"runtime.collective_timeout_seconds={options.collective_timeout_seconds}"
    words = ["swav.pretrain", "--recipe", "demo", "--data", DATA, "--output", OUTPUT, "-j", "1:2x1"]
    job = render(found, images["launcher"], *words, *TINY, *_SETTINGS, timeout)
    gate = folder / "gate"
    gate.mkdir()
    gate.chmod(0o777)
    variables = {"GATE": "/gate", "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH), "OMP_NUM_THREADS": "1"}
    if options.rendezvous:
        variables["PET_RDZV_CONF"] = options.rendezvous
    with cluster(found, images["pretrain"], job, data, gate, variables) as made:
        return disturb(made, deadline_seconds=options.collective_timeout_seconds + 600)


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("start-up", "pods"), help="this part alone")
    default = RuntimeConfig().collective_timeout_seconds
    parser.add_argument("--collective-timeout-seconds", type=float, default=default)
    parser.add_argument("--rendezvous", default="", help="--rdzv-conf of every agent, where not as rendered")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swav-bench-") as path, engine() as found:
        folder = Path(path)
        folder.chmod(0o755)
        images = build(found)
        for name, image in images.items():
            sys.stdout.write(f"{name}: {found.size(image) / 1e9:.2f} GB\n")
        data = write_scenes(folder / "data")
        if options.part != "pods":
            sys.stdout.write(_start_up(found, images["pretrain"], data, folder) + "\n\n")
        if options.part != "start-up":
            sys.stdout.write(table(_pods(found, images, data, folder, options)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
