import argparse
from pathlib import Path

import pytest

from swav.doctor.command import check_command, main, parse


def options(*words: str) -> argparse.Namespace:
    return parse(["--output", "out", *words])


def test_defaults_are_stated() -> None:
    given = options()
    assert (given.min_free_disk_gb, given.max_clock_skew_seconds) == (10.0, 2.0)
    limits = (given.min_shm_mb, given.min_read_mb_per_second, given.min_write_mb_per_second)
    assert {*limits, given.min_allreduce_gb_per_second} == {None}
    assert check_command(given) is None


def test_a_recipe_brings_its_data() -> None:
    config = check_command(options("--recipe", "demo", "optim.epochs=3", "--min-shm-mb", "5", "data.url=/photos"))
    assert config is not None
    assert (config.optim.epochs, config.data.url) == (3, "/photos")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "dmeo"], "unknown recipe 'dmeo'; the nearest of .* is 'demo'"),
        (["--recipe", "demo", "optim.epoch=3"], "unknown setting 'optim.epoch'"),
        (["optim.epochs=3"], "'optim.epochs=3' changes a recipe's setting; give --recipe NAME too"),
        (["--output", "https://host/run"], "a web server is only read"),
        (["--report", "http://host/report"], "--report http://host/report: a web server is only read"),
        (["--output", "s3://key:word@bucket/run"], "must not hold a name or a password"),
        (["--min-free-disk-gb", "-1"], "--min-free-disk-gb -1 must be at least 0"),
        (["--timeout-seconds", "0"], "--timeout-seconds 0 must be above 0"),
        (["--streams", "0"], "--streams 0 must be at least 1"),
        (["--object-mb", "8,0"], "--object-mb"),
    ],
)
def test_a_wrong_command_is_refused(
    words: list[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        check_command(options(*words))
    assert main(["--output", str(tmp_path / "run"), *words]) == 64
    assert not (tmp_path / "run").exists()


def test_options_that_are_none_are_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    assert main(["--output", "out", "--object-mb", "big"]) == 64
    assert main(["--help"]) == 0
    assert "--min-free-disk-gb" in capsys.readouterr().out
