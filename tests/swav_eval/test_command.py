import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.ranks import run_ranks
from swav_testing.runs import write_scenes

from swav.config import ModelConfig
from swav.models.backbone_file import save_backbone
from swav.models.resnet import ResNet
from swav.run_folder import sole_writer
from swav.storage import join, write_atomic
from swav_eval import command
from swav_eval.command import Job, Request, evaluate
from swav_eval.config import FinetuneProtocol, KnnProtocol, LinearProtocol
from swav_eval.recipes import configure
from swav_eval.results import Outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_scenes(folder / "train", (30,))
    write_scenes(folder / "test", (12,), first_seed=100)
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    save_backbone(
        network,
        ModelConfig(arch="resnet18", width=0.125, stem="3x3"),
        folder / "backbone.pt",
        resize_px=24,
        crop_px=20,
    )
    return folder


def words(files: Path, *more: str) -> list[str]:
    where = [f"--{name}={files / name}" for name in ("train", "test")]
    return ["--backbone", str(files / "backbone.pt"), *where, *more, "runtime.device=cpu"]


def run(carry_out: Any, arguments: list[str]) -> int:
    return command.main(KnnProtocol, carry_out, arguments, prog="swav_eval.knn", description="A test.")


def counting(calls: list[Job[KnnProtocol]]) -> Any:
    def carry_out(job: Job[KnnProtocol]) -> Outcome:
        calls.append(job)
        if job.work is not None:
            write_atomic(join(job.work, "block"), b"1")
            write_atomic(join(job.work, "checkpoints", "step"), b"1")
        return Outcome(metrics={"knn_20": 0.5}, broken={"train": 2}, facts={"more": [1]})

    return carry_out


def test_the_result_has_what_is_needed_to_get_it_again(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Job[KnnProtocol]] = []
    output = tmp_path / "results/knn.json"
    arguments = words(files, "--recipe", "knn", "--output", str(output), "temperature=0.1")
    assert run(counting(calls), arguments) == 0
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert (result["protocol"], result["metrics"], result["more"]) == ("knn", {"knn_20": 0.5}, [1])
    assert result["settings"]["temperature"] == 0.1
    assert (result["resize_px"], result["crop_px"]) == (24, 20)  # of the backbone's run
    assert {name: (one["images"], one["broken"]) for name, one in result["data"].items()} == {
        "train": (30, 2),
        "test": (12, 0),
    }
    assert len(set(result["data_identities"].values())) == 2
    assert (result["backbone"]["arch"], result["backbone"]["width"]) == ("resnet18", 0.125)
    assert len(result["backbone_sha256"]) == 64
    packages = {"torchvision", "numpy", "pillow", "simplejpeg", "scikit-learn"}
    assert set(result["versions"]) == {"swav", "torch", "python"} | packages
    assert result["command"].startswith("python -m swav_eval.knn --backbone ")
    assert [path.name for path in output.parent.iterdir()] == ["knn.json"]  # the work folder is gone
    assert run(counting(calls), arguments) == 0  # done already
    assert len(calls) == 1
    assert json.loads(capsys.readouterr().out) == result


def test_another_evaluation_does_not_take_its_place(
    tmp_path: Path, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "knn.json"
    assert run(counting([]), words(files, "--recipe", "knn", "--output", str(output))) == 0
    before = output.read_text()
    assert run(counting([]), words(files, "--recipe", "knn", "--output", str(output), "temperature=0.2")) == 64
    assert "holds the result of another evaluation (settings differ)" in caplog.text
    assert output.read_text() == before


@pytest.mark.parametrize("own_work", [False, True])
def test_a_result_that_appears_while_another_evaluation_waits_or_computes_is_kept(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_work: bool
) -> None:
    output, calls = tmp_path / "knn.json", list[Job[KnnProtocol]]()
    arguments = words(files, "--recipe=knn", f"--output={output}")
    work = [f"--work={tmp_path / 'work'}"] if own_work else []
    other = words(files, "--recipe=knn", f"--output={output}", *work, "temperature=0.2")

    @contextlib.contextmanager
    def another_is_sooner(*_: Any, **__: Any) -> Iterator[None]:
        monkeypatch.setattr(command, "sole_writer", sole_writer)
        assert run(counting([]), arguments) == 0
        yield

    def computes(job: Job[KnnProtocol]) -> Outcome:
        if own_work:
            assert run(counting([]), arguments) == 0
        result: Outcome = counting(calls)(job)
        return result

    if not own_work:
        monkeypatch.setattr(command, "sole_writer", another_is_sooner)
    assert run(computes, other) == 64
    assert "another evaluation (settings differ)" in caplog.text
    assert json.loads(output.read_text())["settings"]["temperature"] == 0.07
    assert len(calls) == own_work


def test_another_list_of_images_is_another_evaluation(
    tmp_path: Path, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, names = tmp_path / "finetune.json", tmp_path / "names.txt"
    arguments = words(files, "--recipe=semisup_1pct", f"--output={output}", "num_classes=3", f"subset.names={names}")

    def status() -> int:
        counted = counting([])
        return command.main(FinetuneProtocol, counted, arguments, prog="swav_eval.finetune", description="A test.")

    names.write_text("000001.jpg\n")
    assert status() == 0
    before = output.read_text()
    names.write_text("000002.jpg\n")
    assert status() == 64
    assert "another evaluation (data_identities differ)" in caplog.text
    assert output.read_text() == before


def test_a_work_folder_that_was_asked_for_is_kept(tmp_path: Path, files: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "knn.json"
    assert run(counting([]), words(files, "--recipe", "knn", "--output", str(output), "--work", str(work))) == 0
    assert sorted(path.name for path in work.iterdir()) == ["block", "checkpoints"]


def test_a_stop_keeps_the_work(tmp_path: Path, files: Path) -> None:
    def stopped(job: Job[KnnProtocol]) -> Outcome:
        assert job.work is not None
        write_atomic(join(job.work, "block"), b"1")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    output = tmp_path / "knn.json"
    assert run(stopped, words(files, "--recipe", "knn", "--output", str(output))) == 75
    assert not output.exists()
    assert (tmp_path / "knn.json.work/block").read_bytes() == b"1"


def test_without_an_output_nothing_is_kept(files: Path) -> None:
    calls: list[Job[KnnProtocol]] = []
    assert run(counting(calls), words(files, "--recipe", "knn")) == 0
    assert calls[0].work is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--recipe", "svm_voc07"],
            "protocol svm_voc07 is not one of this program's; choose from knn, knn_20, knn_200",
        ),
        (["--recipe", "nn"], "unknown protocol 'nn'; the nearest of 13 is 'knn'"),
        (["--recipe", "knn", "crop_px=30"], "crop_px=30 out of images resized to resize_px=24"),
        (["--recipe", "knn", "crops=1"], "unknown setting 'crops'; the nearest is 'crop_px'"),
        (["--recipe", "knn", "--train", "nowhere"], "nowhere: there is no such file or folder"),
        (["--recipe", "knn", "--backbone", "nowhere.pt"], "nowhere.pt: there is no such file"),
    ],
)
def test_what_cannot_be_is_refused(
    files: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(counting([]), words(files, *more)) == 64
    assert message in caplog.records[-1].message


def test_a_wrong_command_line_is_refused_for_good(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(counting([]), [*words(files), "--recipe", "knn", "--learning-rate", "1"]) == 64
    assert "unrecognized arguments: --learning-rate" in capsys.readouterr().err


def both_ranks(files: str, output: str, cache: str) -> dict[str, Any]:
    os.environ["SWAV_CACHE"] = cache
    protocol = configure("linear_imagenet", LinearProtocol, ["num_classes=3"])
    request = Request(f"{files}/backbone.pt", f"{files}/train", f"{files}/test", output, None, "test")

    def carry_out(job: Job[LinearProtocol]) -> Outcome:
        return Outcome(metrics={"top1": 0.25}, broken={})

    first = evaluate(request, protocol, carry_out, CPU)
    assert evaluate(request, protocol, carry_out, CPU) == first
    return first


def test_every_rank_has_the_result_that_one_has_written(tmp_path: Path, files: Path, cache: Path) -> None:
    output = tmp_path / "linear.json"
    results = run_ranks(2, both_ranks, str(files), str(output), str(cache))
    assert results == [json.loads(output.read_text())] * 2
