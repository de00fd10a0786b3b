import json
import re
import time
from pathlib import Path

import pytest
import torch
from swav_testing.ranks import run_ranks
from swav_testing.runs import (
    NUM_STEPS,
    QUEUE,
    ROOT,
    arguments,
    assert_same_run,
    command_line,
    events,
    finish,
    kill_tree,
    losses,
    recorded_run,
    run,
    status_and_output,
    tiny_config,
    write_scenes,
)
from swav_testing.s3 import moto_server

from swav.checkpoint import checkpoint_steps, load
from swav.config import from_json
from swav.pretrain import describe, main


def refused(words: list[str], cache: Path, tmp_path: Path) -> str:
    """The line that a user gets."""
    status, text = status_and_output(words, cache, tmp_path / "log")
    assert status == 64, text
    assert "Traceback" not in text
    *_, last = text.splitlines()
    assert text.count("error: ") == 1
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.base_rl=1", ["'optim.base_rl'", "the nearest is 'optim.base_lr'"]),
        ("epochs=3", ["unknown setting 'epochs'", "the nearest is 'optim.epochs'"]),
        ("optim.epochs=many", ["optim.epochs='many'", "integer"]),
        ("optim.epochs=-1", ["at least 0", "-1"]),
        ("runtime.precision=fp8", ["runtime.precision='fp8'", "'bf16'"]),
        ("runtime.device=tpu", ["runtime.device='tpu'"]),
        ("optim.warmup_epochs=20", ["optim.warmup_epochs=20", "optim.epochs=2", "shorten"]),
        ("method.sinkhorn.epsilon=0", ["epsilon > 0"]),
        ("evaluate.num_neighbors=[5,103]", ["has only 102 images to vote", "evaluate.num_neighbors=[10]"]),
        ("evaluate.num_neighbors=[0]", ["at least 1", "[0]"]),
        ("evaluate.num_neighbors=[]", ["at least 1", "[]"]),
        ("evaluate.crop_px=64", ["crop_px=64", "crop_px must be from 1 to resize_px"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    tmp_path: Path, cache: Path, data: Path, override: str, parts: list[str]
) -> None:
    line = refused(arguments(data, tmp_path / "run", override), cache, tmp_path)
    assert [part for part in parts if part not in line] == [], line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, cache: Path, data: Path) -> None:
    line = refused(arguments(data, tmp_path / "run", "runtime.device=cuda"), cache, tmp_path)
    assert "torch sees no GPU here; use runtime.device=cpu" in line


def test_an_unknown_recipe_is_refused_at_once(tmp_path: Path, cache: Path) -> None:
    process = command_line("swav.pretrain", "--recipe", "dmeo", "--output", str(tmp_path / "run"), cache=cache)
    status, out, err = finish(process)
    assert (status, out) == (64, "")
    (line,) = err.splitlines()
    assert line.startswith("error: unknown recipe 'dmeo'; the nearest of ")
    assert line.endswith(" is 'demo'")


def test_data_that_are_not_there_are_refused(tmp_path: Path, cache: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for url, part in [(tmp_path / "none", "there is no such file or folder"), (empty, "no image")]:
        line = refused(arguments(url, tmp_path / "run"), cache, tmp_path)
        assert str(url) in line
        assert part in line


def test_unlabelled_test_images_are_refused_before_training(tmp_path: Path, cache: Path, data: Path) -> None:
    unlabelled = write_scenes(tmp_path / "unlabelled", (20,), labelled=False)
    line = refused(arguments(data, tmp_path / "run", f"evaluate.test_url={unlabelled}"), cache, tmp_path)
    assert f"evaluate.test_url={unlabelled} has no labels" in line


def test_unlabelled_data_are_trained_on_without_an_accuracy(tmp_path: Path, cache: Path) -> None:
    unlabelled = write_scenes(tmp_path / "unlabelled", (48,), labelled=False)
    output = tmp_path / "run"
    status, text = status_and_output(arguments(unlabelled, output), cache, tmp_path / "log")
    assert status == 0, text
    assert f"{unlabelled} has no labels, so there will be no k-NN accuracy" in text
    assert json.loads((output / "result.json").read_text()) == {}
    assert (output / "backbone.pt").exists()


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, cache: Path, data: Path, reference: Path) -> None:
    before = (reference / "config.json").read_text()
    line = refused(arguments(data, reference, "optim.base_lr=0.1", "seed=1"), cache, tmp_path)
    assert f"{reference} holds a run whose optim.base_lr, seed differ" in line
    assert "--output" in line
    assert (reference / "config.json").read_text() == before


def test_other_data_in_the_same_folder_are_refused(tmp_path: Path, cache: Path, reference: Path) -> None:
    other = write_scenes(tmp_path / "other", (50, 53))
    before = (reference / "config.json").read_text()
    line = refused(arguments(other, reference), cache, tmp_path)
    assert (reference / "config.json").read_text() == before
    assert "was trained on other data" in line
    assert "give the same data, or another --output" in line


def test_how_a_run_is_carried_out_may_change(tmp_path: Path, cache: Path, data: Path, reference: Path) -> None:
    output = tmp_path / "run"
    run_ranks(1, recorded_run, str(data), str(output), str(cache), ("runtime.checkpoint_every_steps=2",), 4)
    run(arguments(data, output, "runtime.loader_threads=2", "runtime.keep_checkpoints=1"), cache)
    assert_same_run(output, reference)
    assert from_json((output / "config.json").read_text()).runtime.keep_checkpoints == 1
    assert checkpoint_steps(output / "checkpoints") == [NUM_STEPS]


def test_more_ranks_than_lanes_are_refused_and_the_folder_stays_free(tmp_path: Path, cache: Path, data: Path) -> None:
    words = arguments(data, tmp_path / "run", "data.lanes=1")
    status, _, err = finish(command_line("swav.pretrain", *words, cache=cache, ranks=2))
    assert status != 0
    assert "exitcode  : 64" in err
    assert "error: 2 ranks are more than 1 lanes; raise data.lanes" in err
    assert f'File "{ROOT / "swav"}' not in err  # the traceback that is there is torchrun's own
    assert not (tmp_path / "run").exists()


def test_a_batch_norm_group_that_does_not_fit_is_refused(tmp_path: Path, cache: Path, data: Path) -> None:
    settings = ("runtime.sync_batch_norm_group=3",)
    with pytest.raises(RuntimeError, match=r"sync_batch_norm_group=3 does not divide the world of 2 ranks; use a div"):
        run_ranks(2, recorded_run, str(data), str(tmp_path / "run"), str(cache), settings, None)


def test_what_a_run_leaves(cache: Path, data: Path, reference: Path) -> None:
    assert sorted(path.name for path in reference.iterdir()) == [
        *("backbone.pt", "checkpoints", "config.json", "metrics.jsonl", "result.json")
    ]
    assert from_json((reference / "config.json").read_text()) == tiny_config(data)
    result = json.loads((reference / "result.json").read_text())
    assert list(result) == ["trained backbone"]
    assert 0.34 < result["trained backbone"]["knn_5"] <= 1  # three classes that differ in colour
    assert checkpoint_steps(reference / "checkpoints") == [NUM_STEPS, 9]
    saved = load(reference / "checkpoints", NUM_STEPS)  # with weights_only=True
    assert saved["step"] == NUM_STEPS
    assert saved["counts"].tolist() == [103, 0]


def test_a_run_in_an_object_store_is_the_same(
    tmp_path: Path, cache: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        output = f"{server.make_bucket('runs')}/first"
        words = [*arguments(data, Path("unused")), "--output", output]
        process = command_line("swav.pretrain", *words, cache=cache)
        while "first/checkpoints/step-000000006.json" not in server.keys("runs"):
            assert process.poll() is None
            time.sleep(0.02)
        kill_tree(process.pid)
        finish(process)
        process = command_line("swav.pretrain", *words, cache=cache)
        status, out, err = finish(process)
        assert status == 0, err
        assert f"backbone: {output}/backbone.pt" in out
        folder = tmp_path / "copy"
        for key in server.keys("runs"):
            path = folder / key.removeprefix("first/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(server.get("runs", key))
        other = [*arguments(data, Path("unused"), "seed=3"), "--output", output]
        status, _, err = finish(command_line("swav.pretrain", *other, cache=cache))
    assert status == 64
    assert f"{output} holds a run whose seed differ" in err
    assert_same_run(folder, reference)
    starts = [event["step"] for event in events(folder) if event.get("event") == "start"]
    assert starts in ([0, 6], [0, 9])
    assert sum(event["requests"] for event in events(folder) if event.get("event") == "storage") > 0
    assert checkpoint_steps(folder / "checkpoints") == [NUM_STEPS, 9]


def test_an_object_store_that_refuses_is_noticed_before_anything_is_computed(
    cache: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        words = [*arguments(data, Path("unused")), "--output", "s3://no-such-bucket/run"]
        status, _, err = finish(command_line("swav.pretrain", *words, cache=cache))
    assert status == 64, err
    assert "no-such-bucket" in err
    assert "Traceback" not in err


def test_baselines_stand_before_the_result(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    words = arguments(data, output, "evaluate.baselines=true", "evaluate.num_neighbors=[1,5]", "optim.epochs=1")
    status, text = status_and_output(words, cache, tmp_path / "log")
    assert status == 0, text
    result = json.loads((output / "result.json").read_text())
    assert list(result) == ["raw pixels", "random backbone", "trained backbone"]
    assert text.endswith(describe(result, output) + "\n")
    first, *rest = text.splitlines()[-4:]
    assert first == f"backbone: {output / 'backbone.pt'}"
    for line, accuracies in zip(rest, result.values(), strict=True):
        assert f"{100 * accuracies['knn_1']:5.1f} % (1-NN), {100 * accuracies['knn_5']:5.1f} % (5-NN)" in line
    assert "103/103" in text.replace(".00", "")  # the progress bar reached its end


def test_broken_images_are_left_out_and_named(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", broken=(5, 6, 77))
    output = tmp_path / "run"
    status, text = status_and_output(arguments(data, output, QUEUE), cache, tmp_path / "log")
    assert status == 0, text
    assert [(event["images"], event["quarantined"]) for event in events(output) if event.get("event") == "epoch"] == [
        (100, 3),
        (100, 3),
    ]
    for epoch in (0, 1):
        files = sorted((output / "quarantine" / f"epoch-{epoch:04d}").iterdir())
        records = [json.loads(path.read_text()) for path in files]
        assert [path.name for path in files] == [f"{number:012d}.json" for number in (5, 6, 77)]
        assert [record["sample_id"] for record in records] == [5, 6, 77]
        assert {record["epoch"] for record in records} == {epoch}
        assert [record["name"].rpartition("/")[2] for record in records] == [
            *("shard-000000.tar:000005", "shard-000000.tar:000006", "shard-000002.tar:000077")
        ]
        assert all(record["reason"] for record in records)
    assert "sample 77 (" in text
    assert len(losses(output)) == NUM_STEPS


def test_a_resume_inside_an_epoch_keeps_the_count_of_broken_images(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", broken=(5, 6, 77))
    output = tmp_path / "run"
    run_ranks(2, recorded_run, str(data), str(output), str(cache), (), 3)
    run(arguments(data, output), cache)
    books = [(event["images"], event["quarantined"]) for event in events(output) if event.get("event") == "epoch"]
    assert books == [(100, 3), (100, 3)]


def test_too_many_broken_images_stop_the_run_with_examples(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", broken=tuple(range(0, 36, 3)))
    status, text = status_and_output(arguments(data, tmp_path / "run"), cache, tmp_path / "log")
    assert status not in (0, 64, 75)
    last = text.splitlines()[-1]
    assert re.search("1[12] broken images in one epoch are more than the 10 that are admitted", last)
    assert last.count("shard-000000.tar:0000") == 3
    assert "mend the data, or raise data.max_quarantined_fraction" in last
    raised = arguments(data, tmp_path / "raised", "data.max_quarantined_fraction=0.2", "optim.epochs=1")
    run(raised, cache)


def test_broken_images_of_all_ranks_count(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", broken=tuple(range(0, 36, 3)))  # 12, at most 10 of them on one rank
    with pytest.raises(RuntimeError, match="12 of 103 images are broken, more than the 10"):
        run_ranks(2, recorded_run, str(data), str(tmp_path / "run"), str(cache), (), None)


def test_a_disk_that_is_full_for_checkpoints_loses_nothing(
    tmp_path: Path, cache: Path, data: Path, reference: Path
) -> None:
    output = tmp_path / "run"
    run_ranks(1, recorded_run, str(data), str(output), str(cache), (), 3)
    # Checkpoints have 1.5 MB. Those of steps 6, 9 and 10 fail; the last one is not passed over in silence.
    status, text = status_and_output(arguments(data, output), cache, tmp_path / "log", max_file_bytes=1_000_000)
    assert status not in (0, 64, 75)
    for step, failure in ((6, 1), (9, 2), (10, 3)):
        assert f"checkpoint of step {step} (1.5 MB) could not be written" in text
        assert f"(failure {failure}, the run stops after 3 in a row)" in text
    assert "checkpoints cannot be written" in text.splitlines()[-1]
    assert "run the same command again to resume" in text.splitlines()[-1]
    assert checkpoint_steps(output / "checkpoints") == [3]
    assert list(losses(output)) == list(range(1, NUM_STEPS + 1))
    run(arguments(data, output), cache)
    assert_same_run(output, reference)


def test_a_disk_that_stays_full_stops_the_run(tmp_path: Path, cache: Path, data: Path) -> None:
    words = arguments(data, tmp_path / "run", "runtime.checkpoint_every_steps=1")
    status, text = status_and_output(words, cache, tmp_path / "log", max_file_bytes=1_000_000)
    assert status not in (0, 64, 75)
    assert "checkpoints cannot be written" in text.splitlines()[-1]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_checkpoint_that_is_damaged_costs_an_interval(
    tmp_path: Path, cache: Path, data: Path, reference: Path
) -> None:
    output = tmp_path / "run"
    run_ranks(1, recorded_run, str(data), str(output), str(cache), (), 7)
    assert checkpoint_steps(output / "checkpoints") == [7, 6]
    (output / "checkpoints" / "step-000000007.pt").write_bytes(b"torn")
    status, text = status_and_output(arguments(data, output), cache, tmp_path / "log")
    assert status == 0, text
    assert "checkpoint of step 7" in text
    assert "is passed over" in text
    assert_same_run(output, reference)


def test_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    run_ranks(1, recorded_run, str(data), str(output), str(cache), (), 3)
    (output / "checkpoints" / "step-000000003.pt").unlink()
    status, text = status_and_output(arguments(data, output), cache, tmp_path / "log")
    assert status not in (0, 64, 75)
    assert "none of the 1 checkpoints in" in text.splitlines()[-1]


def test_a_loss_that_diverges_stops_with_what_to_try(tmp_path: Path, cache: Path, data: Path) -> None:
    words = arguments(data, tmp_path / "run", "optim.base_lr=1e30", "optim.warmup_epochs=0")
    status, text = status_and_output(words, cache, tmp_path / "log")
    assert status not in (0, 64, 75)
    assert "Try a lower optim.base_lr (now 1e+30)" in text.splitlines()[-1]
    assert "nan" not in (tmp_path / "run" / "metrics.jsonl").read_text().lower()


def test_help_names_the_arguments(tmp_path: Path, cache: Path) -> None:
    status, text = status_and_output(["--help"], cache, tmp_path / "log")
    assert status == 0
    assert {"--recipe", "--data", "--output", "key=value"} <= {word.strip("[], .") for word in text.split()}


@pytest.mark.parametrize(
    ("runs", "words", "expected"),
    [
        (None, [], "runs/demo"),
        ("", [], "runs/demo"),
        ("/mnt/runs", [], "/mnt/runs/demo"),
        ("s3://bucket/runs", [], "s3://bucket/runs/demo"),
        ("/mnt/runs", ["--output", "here"], "here"),
    ],
)
def test_where_a_run_goes(monkeypatch: pytest.MonkeyPatch, runs: str | None, words: list[str], expected: str) -> None:
    outputs: list[str] = []

    def note(_config: object, output: str) -> dict[str, dict[str, float]]:
        outputs.append(str(output))
        return {}

    monkeypatch.setattr("swav.pretrain.pretrain", note)
    monkeypatch.delenv("SWAV_RUNS", raising=False)
    if runs is not None:
        monkeypatch.setenv("SWAV_RUNS", runs)
    assert main(["--recipe", "demo", *words]) == 0
    assert outputs == [expected]
