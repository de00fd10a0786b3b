import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BAR = """
import time
from swav import bars, logs
bars._BAR_EVERY_SECONDS = 0.01
logs.start_logging()
logs.set_context(step=7, epoch=2)
with bars.above_bars(), bars.progress_bar(total=4, desc="indexing", unit=" tars") as bar:
    for _ in range(4):
        time.sleep(0.02)
        bar.set_postfix(loss="1.5", refresh=False)
        bar.update()
"""


def said(script: str = BAR, **environment: str) -> str:
    """What a process with a bar prints."""
    settings = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr


def test_a_bar_says_how_far_it_is_by_records() -> None:
    records = [json.loads(line) for line in said(SWAV_LOG_FORMAT="json").splitlines()]
    assert records
    assert (records[0]["step"], records[0]["epoch"]) == (7, 2)
    assert records[0]["message"].startswith("indexing: ")
    assert "loss=1.5" in records[0]["message"]
    assert (records[0]["progress"]["of"], records[0]["progress"]["total"]) == ("indexing", 4)


def test_a_bar_is_a_bar_for_a_person() -> None:
    assert "4/4" in said(SWAV_LOG_FORMAT="").rpartition("\r")[2]


def test_a_bar_that_nobody_watches_is_drawn_rarely() -> None:
    drawn = said(BAR.replace("bars._BAR_EVERY_SECONDS = 0.01\n", "")).split("\r")
    assert [line for line in drawn if " 25%" in line or " 50%" in line or " 75%" in line] == []
    assert "100%" in drawn[-1]
