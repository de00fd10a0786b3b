"""Every line that a program says, as JSON."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from swav_testing.agents import agents
from swav_testing.runs import NUM_STEPS, ROOT, arguments, command_line, finish
from swav_testing.shards import write_dataset

from swav.program import EXIT_REFUSED


def parsed(text: str) -> list[dict[str, Any]]:
    """Every line as the object that it must be."""
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        assert {"time", "level", "logger", "message"} <= record.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    return records


def said_by(body: str, **environment: str) -> tuple[str, str]:
    """What a process prints to standard output and error that starts its log and does something."""
    head = "import logging, warnings\nfrom swav import logs\nfrom swav.program import run\nlogs.start_logging()\n"
    done = subprocess.run(
        [sys.executable, "-c", head + body],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.fixture
def json_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes that the test starts."""
    monkeypatch.setenv("SWAV_LOG_FORMAT", "json")
    monkeypatch.setenv("POD_NAME", "swav-trainer-3")


@pytest.mark.usefixtures("json_logs")
def test_every_line_of_a_run_parses(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    status, out, err = finish(command_line("swav.pretrain", *arguments(data, output), cache=cache))
    assert status == 0, err
    (answer,) = parsed(out)
    assert answer["result"] == json.loads((output / "result.json").read_text())
    assert (answer["run"], answer["pod"], answer["step"]) == (str(output), "swav-trainer-3", NUM_STEPS)
    parsed(err)


@pytest.mark.usefixtures("json_logs")
def test_refusals_parse(tmp_path: Path, cache: Path) -> None:
    started = [
        command_line(module, *words, cache=cache)
        for module, *words in (
            ["swav.pretrain", "--recipe", "dmeo", "--output", str(tmp_path / "run")],
            ["swav.pretrain"],
            ["swav.data.write_shards", str(tmp_path / "none"), str(tmp_path / "out")],
            ["swav.data.index", str(tmp_path / "none")],
            ["swav.elastic", "--no-such-option", "script.py"],
        )
    ]
    expected = ["'dmeo'", "--recipe", "none", "none", "no-such-option"]
    for process, part in zip(started, expected, strict=True):
        status, out, err = finish(process)
        assert status in (EXIT_REFUSED, 2), err
        assert out == ""
        (record,) = parsed(err)
        assert record["level"] == "ERROR"
        assert record["message"].startswith("error: ")
        assert part in record["message"]


@pytest.mark.usefixtures("json_logs")
def test_shards_and_an_index_are_answered_in_json(tmp_path: Path, cache: Path) -> None:
    folder = write_dataset(tmp_path / "data", [3, 2])
    started = [
        command_line("swav.data.index", str(folder), cache=cache),
        command_line("swav.data.write_shards", str(folder), str(tmp_path / "out"), cache=cache),
    ]
    for process in started:
        status, out, err = finish(process)
        assert status == 0, err
        (answer,) = parsed(out)
        assert "5 samples in " in answer["message"]
        parsed(err)


@pytest.mark.usefixtures("json_logs")
def test_a_launcher_and_its_ranks_speak_json(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\nfrom swav.logs import start_logging\nfrom swav.program import run\nstart_logging()\n"
        "def body():\n    raise ValueError('the command is\\nwrong')\nsys.exit(run(body))\n"
    )
    with agents(tmp_path / "agents", cache, [str(script)], ranks_per_node=2) as started:
        started.start()
        assert started.statuses() == [EXIT_REFUSED]
        records = parsed(started.printed())
    of_ranks = [record for record in records if "rank" in record]
    assert {record["world_size"] for record in of_ranks} == {2}
    assert of_ranks[0]["message"] == "error: the command is\nwrong"
    assert any(record["logger"].startswith("torch.") for record in records)  # which has handlers of its own
    assert "no other try is made" in records[-1]["message"]


def test_a_traceback_is_one_field() -> None:
    body = """
def fail():
    import torch
    torch.zeros(2, 3) @ torch.zeros(2, 3)
warnings.warn("mind that")
run(fail)
assert False, "ours"
"""
    out, err = said_by(body, SWAV_LOG_FORMAT="json", RANK="1", WORLD_SIZE="4")
    assert out == ""
    warned, failed, ended = parsed(err)
    assert (warned["logger"], warned["rank"], warned["world_size"]) == ("py.warnings", 1, 4)
    assert "UserWarning: mind that" in warned["message"]
    assert failed["exception"].startswith("Traceback (most recent call last)")
    assert "in fail" in failed["exception"]
    assert (ended["level"], ended["message"]) == ("CRITICAL", "AssertionError: ours")
    assert "AssertionError: ours" in ended["exception"]


def test_text_stays_the_default_and_another_format_is_named() -> None:
    body = "logging.info('one')\nlogs.answer('two', result=3)"
    assert said_by(body, SWAV_LOG_FORMAT="") == ("two\n", "one\n")
    out, err = said_by(body, SWAV_LOG_FORMAT="yaml")
    assert (out, err) == ("two\n", "SWAV_LOG_FORMAT=yaml is neither text nor json; the log is text\none\n")
    assert said_by(body, RANK="3", SWAV_LOG_FORMAT="text") == ("two\n", "")
