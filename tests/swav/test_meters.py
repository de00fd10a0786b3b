"""What a process and the ranks of a launcher count and show."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import Metric
from swav_testing.runs import files_of_at_most

from swav.meters import COUNTERS, GAUGES, Meters

ROOT = Path(__file__).parents[2]


def values(metrics: list[Metric]) -> dict[str, float]:
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def test_counters_start_at_zero_and_gauges_when_they_are_shown() -> None:
    meters = Meters()
    assert values(list(meters.collect())) == {f"swav_{name}_total": 0 for name in COUNTERS}
    meters.count("images", 24)
    meters.show("loss", 4.5)
    meters.show("checkpoint_age_seconds", time.monotonic() - 60)
    found = values(list(meters.collect()))
    assert found["swav_images_total"] == 24
    assert found["swav_loss"] == 4.5
    assert 60 <= found["swav_checkpoint_age_seconds"] < 600
    assert values(list(meters.collect()))["swav_checkpoint_age_seconds"] >= found["swav_checkpoint_age_seconds"]


def test_every_metric_is_explained() -> None:
    assert [name for name, text in (COUNTERS | GAUGES).items() if len(text) < 20] == []
    documented = set(re.findall(r"`swav_([a-z_]+)", (ROOT / "docs/observability.md").read_text()))
    named = {f"{name}_total" for name in COUNTERS} | set(GAUGES)
    assert named <= documented


# Two ranks that are started again a thousand times; each life is a new set of meters over the same files.
LIVES = """
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
from swav.meters import Meters, collect_ranks, forget_gauges

def found():
    return {sample.name: sample.value for metric in collect_ranks(folder) for sample in metric.samples}

before = -1.0
for life in range(1000):
    for rank in ("0", "1"):
        meters = Meters(rank)
        meters.count("images", 3)
        if rank == "0":
            meters.show("step", life)
    if life % 100 == 0:
        assert found()["swav_images_total"] == 6 * (life + 1) > before, found()
        before = found()["swav_images_total"]
        assert found()["swav_step"] == life
    forget_gauges(folder)
    assert life % 100 or "swav_step" not in found()
    assert sorted(path.name for path in folder.iterdir()) == ["counter_0.db", "counter_1.db"]
print("done")
"""


def test_a_rank_without_room_for_its_files_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with files_of_at_most(1000), pytest.raises(OSError, match="too large"):
        Meters("0")


def test_a_thousand_lives_leave_the_files_of_one_and_counters_go_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 16
