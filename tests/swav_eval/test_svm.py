import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from swav_testing import eval_oracles
from swav_testing.ranks import _CONTEXT, run_ranks
from swav_testing.runs import make_scene
from swav_testing.s3 import moto_server
from swav_testing.shards import write_tar

from swav.config import ModelConfig
from swav.data.source import open_dataset
from swav.models.backbone_file import load_backbone, save_backbone
from swav.models.resnet import ResNet
from swav_eval import linear_svm, svm
from swav_eval.command import Job, Request, evaluate
from swav_eval.config import SvmProtocol
from swav_eval.datasets.__main__ import main as convert
from swav_eval.feature_store import extract_features
from swav_eval.recipes import configure
from swav_eval.svm import carry_out, main

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd-voc.tar"
COLOURS = ("red", "green", "blue")
COSTS = (0.1, 1.0, 10.0)
QUICK = ("runtime.device=cpu", "runtime.loader_threads=1", f"costs={list(COSTS)}")
CPU = torch.device("cpu")
_CONTEXT.set_forkserver_preload(["swav.pretrain", "torchvision", "pytest", "swav_eval.svm"])


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


def says(number: int) -> dict[str, list[str]]:
    """The colour of a scene; "odd" for about every third, and difficult for every fifth."""
    present, difficult = [COLOURS[number % 3]], []
    if number % 5 == 0:
        difficult.append("odd")
    elif np.random.default_rng(number).random() < 0.3:
        present.append("odd")
    return {"present": present, "difficult": difficult}


def write_voc(
    folder: Path,
    num_images: int,
    *,
    first: int = 0,
    broken: tuple[int, ...] = (),
    say: Callable[[int], dict[str, list[str]]] = says,
) -> Path:
    members = []
    for number in range(num_images):
        image = b"no image" if number in broken else make_scene(number % 3, first + number)
        members.append((f"{number:06d}.jpg", image))
        members.append((f"{number:06d}.json", json.dumps(say(number)).encode()))
    write_tar(folder / "shard-0.tar", members)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("train"), 70, broken=(4,))


@pytest.fixture(scope="module")
def test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("test"), 41, first=1000, broken=(6, 7))


def save(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    save_backbone(network, ModelConfig(arch="resnet18", width=0.125, stem="3x3"), path, resize_px=24, crop_px=20)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("backbone") / "backbone.pt", 0)


def words(backbone: Path, train: Path | str, test: Path | str, *more: str) -> list[str]:
    return ["--backbone", str(backbone), "--train", str(train), "--test", str(test), *more, *QUICK]


def result_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def normalised(backbone: Path, folder: Path) -> tuple[eval_oracles.Array, list[int]]:
    found = extract_features(
        load_backbone(backbone).backbone,
        open_dataset(str(folder)),
        backbone_sha256="",
        name="any",
        resize_px=24,
        crop_px=20,
        device=CPU,
        precision="fp32",
        num_threads=1,
        folder=None,
    )
    rows = found.values.double().numpy()
    return rows / np.linalg.norm(rows, axis=1)[:, None], found.ids.tolist()


def by_hand(backbone: Path, train: Path, test: Path) -> dict[str, dict[str, Any]]:
    """The protocol of each class, by loops."""
    (rows, ids), (queries, query_ids) = normalised(backbone, train), normalised(backbone, test)
    found = {}
    for name in (*COLOURS, "odd"):
        keep = [place for place, number in enumerate(ids) if name not in says(number)["difficult"]]
        present = np.array([name in says(ids[place])["present"] for place in keep])
        kept = rows[keep]

        def scores(some: Any, others: Any, cost: float, kept: Any = kept, present: Any = present) -> eval_oracles.Array:
            weights = {1: 2.0, 0: 1.0}
            model = LinearSVC(C=cost, dual=False, class_weight=weights, max_iter=2000).fit(
                kept[some], present[some] * 1
            )
            return np.asarray(model.decision_function(others))

        means = []
        for cost in COSTS:
            folds = StratifiedKFold(3, shuffle=True, random_state=31).split(kept, present)
            means.append(
                np.mean(
                    [
                        eval_oracles.average_precision(scores(some, kept[rest], cost), present[rest], "all-point")
                        for some, rest in folds
                    ]
                )
            )
        cost = COSTS[int(np.argmax(means))]
        final = scores(slice(None), queries, cost)
        truth = [name in says(number)["present"] for number in query_ids]
        ignored = [name in says(number)["difficult"] for number in query_ids]
        found[name] = {
            "cost": cost,
            "ap_11_point": eval_oracles.average_precision(final, truth, "11-point", ignored),
            "ap_all_point": eval_oracles.average_precision(final, truth, "all-point", ignored),
            "train_images": int(present.sum()),
            "test_images": sum(truth),
        }
    return found


def test_the_result_is_the_protocols(
    tmp_path: Path, backbone: Path, train: Path, test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "svm.json"
    result = result_of(words(backbone, train, test, "--output", str(output)), capsys)
    assert json.loads(output.read_text()) == result
    assert result["protocol"] == "svm_voc07"
    expected = by_hand(backbone, train, test)
    assert list(result["classes"]) == sorted(expected)
    for name, facts in expected.items():
        assert {key: result["classes"][name][key] for key in facts} == pytest.approx(facts, abs=1e-9)
    for kind in ("11_point", "all_point"):
        mean = np.mean([facts[f"ap_{kind}"] for facts in expected.values()])
        assert result["metrics"][f"map_{kind}"] == pytest.approx(mean, abs=1e-9)
    assert 0 < result["metrics"]["map_11_point"] < 1
    assert {name: facts["broken"] for name, facts in result["data"].items()} == {"train": 1, "test": 2}
    assert (result["unconverged_fits"], result["fits"]) == (0, 4 * (3 * 3 + 1))
    assert result["cost_chosen_by"] == "all-point average precision over 3 folds"
    assert result["classes_without_test_images"] == []
    assert not Path(f"{output}.work").exists()


def on_a_rank(backbone: str, train: str, test: str, work: str, cache: str) -> tuple[Any, Any, Any]:
    os.environ["SWAV_CACHE"] = cache
    protocol = configure("svm_voc07", SvmProtocol, QUICK)
    job = Job(protocol, load_backbone(backbone), open_dataset(train), open_dataset(test), CPU, work)
    outcome = carry_out(job)
    return outcome.metrics, outcome.broken, outcome.facts


def test_any_number_of_ranks_gives_the_same_result(
    tmp_path: Path, backbone: Path, train: Path, test: Path, cache: Path
) -> None:
    files = (str(backbone), str(train), str(test))
    here = on_a_rank(*files, str(tmp_path / "1"), str(cache))
    found = [
        one for world in (2, 4) for one in run_ranks(world, on_a_rank, *files, str(tmp_path / str(world)), str(cache))
    ]
    assert len(found) == 6
    assert all(one == here for one in found)
    assert [len(list((tmp_path / world).glob("svm-*.json"))) for world in "124"] == [4, 4, 4]


class Counting:
    """Counts the classes that are fitted; stops before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_fitted, self.stop_before = 0, -1
        self._choose = linear_svm.choose
        monkeypatch.setattr(svm, "choose", self)

    def __call__(self, *arguments: Any) -> Any:
        if self.num_fitted == self.stop_before:
            raise OSError("the machine is taken away")
        self.num_fitted += 1
        return self._choose(*arguments)


def test_classes_that_are_fitted_are_taken_up(
    tmp_path: Path,
    backbone: Path,
    train: Path,
    test: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = result_of(words(backbone, train, test), capsys)
    fitted = Counting(monkeypatch)
    more = words(backbone, train, test, "--work", str(tmp_path))
    fitted.stop_before = 2
    assert main(more) == 1
    assert len(list(tmp_path.glob("svm-*.json"))) == 2
    fitted.stop_before = -1
    found = result_of(more, capsys)
    assert fitted.num_fitted == 4  # each class once
    assert found["classes"] == whole["classes"]
    assert found["metrics"] == whole["metrics"]
    paths = sorted(tmp_path.glob("svm-*.json"))
    assert len(paths) == 4
    for number, bad in enumerate((b"", b"{}", b'{"cost": 1}', paths[3].read_bytes().replace(b"1", b"NaN", 1))):
        good = paths[number].read_bytes()
        paths[number].write_bytes(bad)
        assert result_of(more, capsys)["classes"] == whole["classes"]
        assert fitted.num_fitted == 5 + number
        assert paths[number].read_bytes() == good
        assert f"{paths[number]} is damaged" in caplog.text
    for changed in ("seed=32", "positive_weight=1", "num_folds=4", "costs=[0.1,1]", "max_iterations=1999"):
        before = fitted.num_fitted
        result_of([*more, changed], capsys)
        assert fitted.num_fitted == before + 4, changed
    other = words(save(tmp_path / "other.pt", 1), train, test)
    assert result_of([*other, "--work", str(tmp_path)], capsys)["metrics"] == result_of(other, capsys)["metrics"]
    assert result_of(more, capsys)["metrics"] == whole["metrics"]


def test_work_in_a_store(
    backbone: Path,
    train: Path,
    test: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        bucket = server.make_bucket("evaluations")
        fitted = Counting(monkeypatch)
        first = result_of(words(backbone, train, test, "--work", f"{bucket}/work"), capsys)
        kinds = [key.rpartition("/")[2].partition("-")[0] for key in server.keys("evaluations")]
        assert kinds == ["svm"] * 4 + ["test", "train"]
        again = result_of(words(backbone, train, test, "--work", f"{bucket}/work"), capsys)
        assert fitted.num_fitted == 4
        assert again["classes"] == first["classes"]
        result_of(words(backbone, train, test, "--output", f"{bucket}/svm.json"), capsys)
        assert [key for key in server.keys("evaluations") if not key.startswith("work/")] == ["svm.json"]


def test_a_class_that_no_test_image_has_is_in_no_mean(
    tmp_path: Path, backbone: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_voc(tmp_path, 30, first=1000, say=lambda number: {"present": [COLOURS[number % 3]], "difficult": []})
    result = result_of(words(backbone, train, plain), capsys)
    assert result["classes_without_test_images"] == ["odd"]
    assert result["classes"]["odd"]["ap_11_point"] is None
    of_colours = [result["classes"][name]["ap_11_point"] for name in COLOURS]
    assert result["metrics"]["map_11_point"] == pytest.approx(np.mean(of_colours))


def test_fits_that_do_not_converge_are_told(
    backbone: Path, train: Path, test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of([*words(backbone, train, test), "max_iterations=1", "costs=[10]"], capsys)
    assert result["unconverged_fits"] == result["fits"] == 16
    assert [facts["unconverged_fits"] for facts in result["classes"].values()] == [4] * 4


@pytest.mark.parametrize(
    ("say", "where", "message"),
    [
        (
            lambda number: {"present": [COLOURS[number % 3]] + ["odd"] * (number < 2)},
            "train",
            "2 have the class 'odd' and 28 have not",
        ),
        (lambda _: {"present": ["new"]}, "test", "of the training images, 0 have the class 'new'"),
        (lambda _: {"present": []}, "test", "no test image has any of the 4 classes"),
        (lambda _: {"present": "red"}, "train", "must have lists of names"),
    ],
)
def test_classes_that_cannot_be_are_refused(
    tmp_path: Path,
    backbone: Path,
    train: Path,
    test: Path,
    say: Any,
    where: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folders = {"train": train, "test": test, where: write_voc(tmp_path, 30, say=say)}
    assert main(words(backbone, folders["train"], folders["test"])) == 64
    assert message in caplog.records[-1].message


def test_images_with_a_label_have_one_class(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, first in (("train", 0), ("test", 500)):
        members = []
        for number in range(30):
            members += [
                (f"{number}.jpg", make_scene(number % 3, first + number)),
                (f"{number}.cls", b"%d" % (number % 3)),
            ]
        write_tar(tmp_path / name / "shard-0.tar", members)
    result = result_of(words(backbone, tmp_path / "train", tmp_path / "test"), capsys)
    assert list(result["classes"]) == ["0", "1", "2"]
    assert [facts["train_images"] for facts in result["classes"].values()] == [10] * 3
    write_tar(tmp_path / "bare" / "shard-0.tar", [(f"{number}.jpg", make_scene(0, number)) for number in range(4)])
    assert main(words(backbone, tmp_path / "bare", tmp_path / "test")) == 64
    assert "has no label (.cls)" in caplog.records[-1].message


def refusal(backbone: str, train: str, test: str, cache: str) -> str:
    os.environ["SWAV_CACHE"] = cache
    request = Request(backbone, train, test, None, None, "test")
    protocol = configure("svm_voc07", SvmProtocol, QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "features", None)  # which would be computed
        with pytest.raises(ValueError, match=r"give|needs") as refused:
            evaluate(request, protocol, carry_out, CPU)
    return str(refused.value)


def test_what_is_refused_is_refused_before_features_are_computed(
    tmp_path: Path, backbone: Path, train: Path, test: Path, cache: Path
) -> None:
    messages = run_ranks(2, refusal, str(backbone), str(train), str(test), str(cache))
    assert messages == ["2 ranks share the features through a folder; give --output or --work"] * 2
    write_tar(tmp_path / "bare" / "shard-0.tar", [("0.jpg", make_scene(0, 0))])
    assert "has no label (.cls)" in refusal(str(backbone), str(train), str(tmp_path / "bare"), str(cache))


@pytest.mark.skipif(not BCCD.exists(), reason=f"needs {BCCD}")
def test_real_blood_cells(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("trainval", "test"):
        assert convert(["voc07", str(BCCD), str(tmp_path / split), "--split", split]) == 0
    capsys.readouterr()
    more = words(backbone, tmp_path / "trainval", tmp_path / "test", "--work", str(tmp_path / "work"), "resize_px=32")
    assert main([*more, "crop_px=32"]) == 64
    assert "290 have the class 'WBC' and 2 have not" in caplog.records[-1].message
    result = result_of([*more, "crop_px=32", "num_folds=2"], capsys)
    counts = {name: (facts["train_images"], facts["test_images"]) for name, facts in result["classes"].items()}
    assert counts == {"Platelets": (162, 39), "RBC": (280, 69), "WBC": (290, 68)}
    assert result["data"]["test"] | {"url": ""} == {"url": "", "images": 72, "broken": 0}
    for name, facts in result["classes"].items():
        chance = counts[name][1] / 72  # what images in any order have, about
        assert chance - 0.15 < facts["ap_11_point"] <= 1
        assert chance - 0.15 < facts["ap_all_point"] <= 1
