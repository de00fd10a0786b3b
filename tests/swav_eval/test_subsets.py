import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swav_testing.public_data import write_files
from swav_testing.ranks import run_ranks
from swav_testing.s3 import moto_server
from swav_testing.shards import write_dataset, write_tar

from swav import watchdog
from swav.data.index import DatasetIndex, build_index, open_index
from swav.data.reader import ShardReader
from swav.data.write_shards import write_shards
from swav_eval.config import EvaluationRuntime, SubsetConfig
from swav_eval.subsets import Subset, choose_subset, hold_out

SIZES = {"cat": 40, "dog": 25, "eel": 10}  # images of each class
LABELS = np.repeat([0, 1, 2], list(SIZES.values()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    return write_files(
        folder, [(f"{name}/{name}_{number:02d}.JPEG", b"x") for name, size in SIZES.items() for number in range(size)]
    )


@pytest.fixture(scope="module")
def index(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_shards(str(photos), str(tmp_path_factory.mktemp("shards") / "out"), samples_per_shard=20)


def _choose(index: DatasetIndex, *, seed: int = 31, num_classes: int = 3, **config: Any) -> Subset:
    return choose_subset(index, SubsetConfig(**config), seed=seed, num_classes=num_classes)


def _names(index: DatasetIndex, folder: Path, *names: str) -> Subset:
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    return _choose(index, names=str(folder / "names.txt"))


def test_so_many_of_each_class(index: DatasetIndex) -> None:
    subset = _choose(index, per_class=7)
    assert np.bincount(LABELS[subset.ids]).tolist() == [7, 7, 7]
    assert subset.ids.dtype == np.int64
    assert (np.diff(subset.ids) > 0).all()
    digest = hashlib.sha256(subset.ids.tobytes()).hexdigest()
    assert subset.facts == {
        "chosen": "by seed", "per_class": 7, "seed": 31, "images": 21, "classes": 3, "ids_sha256": digest,
    }  # fmt: skip


def test_a_fraction_of_each_class(index: DatasetIndex) -> None:
    subset = _choose(index, fraction=0.1)
    assert np.bincount(LABELS[subset.ids]).tolist() == [4, 3, 1]  # 2.5 is 3
    assert (subset.facts["fraction"], subset.facts["images"], "per_class" in subset.facts) == (0.1, 8, False)
    assert np.bincount(LABELS[_choose(index, fraction=0.001).ids]).tolist() == [1, 1, 1]
    assert _choose(index, fraction=1.0).ids.tolist() == list(range(75))


@pytest.mark.parametrize("seed", [0, 31])
def test_smaller_subsets_are_parts_of_larger_ones(index: DatasetIndex, seed: int) -> None:
    subsets = [set(_choose(index, per_class=number, seed=seed).ids.tolist()) for number in (1, 3, 10)]
    subsets += [set(_choose(index, fraction=fraction, seed=seed).ids.tolist()) for fraction in (0.4, 0.8)]
    assert subsets[0] < subsets[1] < subsets[2]
    assert subsets[3] < subsets[4]


def test_a_seed_has_its_own_subset_for_ever(index: DatasetIndex) -> None:
    assert _choose(index, per_class=2).ids.tolist() == _choose(index, per_class=2).ids.tolist()
    assert len({tuple(_choose(index, per_class=2, seed=seed).ids.tolist()) for seed in range(10)}) == 10
    # Whoever changes these changes the subsets behind published numbers.
    assert _choose(index, per_class=2).ids.tolist() == [12, 34, 40, 60, 71, 73]


def test_draws_are_even(index: DatasetIndex) -> None:
    counts = np.zeros(75)
    for seed in range(300):
        counts[_choose(index, per_class=5, seed=seed).ids] += 1
    expected = 300 * 5 / np.array(list(SIZES.values()))[LABELS]
    deviation = np.sqrt(expected * (1 - expected / 300))  # binomial
    assert (abs(counts - expected) < 4.5 * deviation).all()


def test_the_shards_of_one_source_may_be_of_any_size(photos: Path, index: DatasetIndex, tmp_path: Path) -> None:
    other = write_shards(str(photos), str(tmp_path / "other"), samples_per_shard=3)
    for config in ({"per_class": 5}, {"fraction": 0.3}):
        assert _choose(other, **config).facts == _choose(index, **config).facts


def test_labels_need_not_be_sorted(tmp_path: Path) -> None:
    write_dataset(tmp_path, [5, 1, 24], num_classes=3)  # 0 1 2 0 1 2 ...
    subset = _choose(build_index(str(tmp_path), str(tmp_path)), per_class=4)
    assert np.bincount(subset.ids % 3).tolist() == [4, 4, 4]


def _on_a_rank(folder: str) -> tuple[str, list[int]]:
    subset = _choose(open_index(folder), per_class=5)
    return subset.facts["ids_sha256"], hold_out(75, 0.1, seed=31)[1].tolist()


def test_every_rank_of_any_number_chooses_the_same(index: DatasetIndex) -> None:
    assert run_ranks(2, _on_a_rank, index.folder) == [_on_a_rank(index.folder)] * 2


def test_progress_is_said_while_labels_and_names_are_read(
    index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[float]()
    monkeypatch.setattr("swav_eval.subsets.progress", lambda: said.append(watchdog.last_progress()))
    _choose(index, per_class=1)
    assert len(said) == index.num_shards
    _names(index, tmp_path, "cat_00")
    assert len(said) > index.num_shards


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"per_class": 11}, r"class 2 \(eel\) of .* has 10 images and 11 are asked for; ask for subset.per_class=10$"),
        ({"per_class": 26}, r"class 1 \(dog\) .* 25 images and 26 are asked for, and 1 other classes have too few"),
        (
            {"fraction": 0.5, "num_classes": 4},
            r"class 3 of .* has 0 images and 1 are .* or set num_classes .*\(it is 4\)",
        ),
        ({"per_class": 1, "num_classes": 2}, r"eel_00 has the label 2, and with num_classes=2 labels are 0 to 1; set"),
    ],
)
def test_classes_that_do_not_fit_are_refused(index: DatasetIndex, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _choose(index, **config)


def test_a_class_without_a_name_is_refused_by_its_number(tmp_path: Path) -> None:
    write_dataset(tmp_path, [7], num_classes=3)
    with pytest.raises(ValueError, match=r"class 1 of .* has 2 images and 3 are asked for, and 1 other"):
        _choose(build_index(str(tmp_path), str(tmp_path)), per_class=3)


def test_negative_and_missing_labels_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "x.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"-1")])
    with pytest.raises(ValueError, match=r"x\.tar:b has the label -1, and with num_classes=3 labels are 0 to 2"):
        _choose(open_index(str(tmp_path / "a")), per_class=1)
    write_tar(tmp_path / "b" / "x.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x")])
    with pytest.raises(ValueError, match=r"x\.tar:b has no label"):
        _choose(open_index(str(tmp_path / "b")), fraction=0.5)
    with pytest.raises(ValueError, match=r"x\.tar:b has no label \(\.cls\), and .*names\.txt names it for training"):
        _names(open_index(str(tmp_path / "b")), tmp_path, "a", "b")
    with pytest.raises(ValueError, match=r"x\.tar:b has the label -1"):
        _names(open_index(str(tmp_path / "a")), tmp_path, "b")


def test_the_images_of_a_list(index: DatasetIndex, tmp_path: Path) -> None:
    subset = _names(index, tmp_path, "dog_03.JPEG", "cat_00.JPEG", "eel/eel_09", "train/cat/cat_39.JPEG")
    assert subset.ids.tolist() == [0, 39, 43, 74]
    digest = hashlib.sha256(subset.ids.tobytes()).hexdigest()
    url = str(tmp_path / "names.txt")
    assert subset.facts == {"chosen": "by names", "names": url, "images": 4, "classes": 3, "ids_sha256": digest}


def test_a_list_holds_for_shards_of_any_kind(photos: Path, index: DatasetIndex, tmp_path: Path) -> None:
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.JPEG"))
    labels = {name: b"%d" % list(SIZES).index(name.partition("/")[0]) for name in files}
    for folder, key in (("deep", str), ("flat", lambda name: name.rpartition("/")[2])):
        members = [(key(name).removesuffix("JPEG") + end, data) for name in files for end, data in
                   (("cls", labels[name]), ("JPEG", b"x"))]  # fmt: skip
        write_tar(tmp_path / folder / "x.tar", members)
    written = write_shards(str(tmp_path / "flat"), str(tmp_path / "again"))
    listed = [name.rpartition("/")[2] for name in files[::3]]
    for one in (index, open_index(str(tmp_path / "deep")), open_index(str(tmp_path / "flat")), written):
        assert _names(one, tmp_path, *listed).ids.tolist() == list(range(0, 75, 3))


def test_names_of_no_image_are_refused(index: DatasetIndex, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"7 of the 8 names in .* of no image in .*: a0, a1, a2, a3, a4, \.\.\.\. .*there is 000000000-cat_cat_00",
    ):
        _names(index, tmp_path, *(f"a{number}" for number in range(7)), "cat_00")


def test_names_of_several_images_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", [(f"{name}/{n}.jpg", b"x") for name in ("a", "b") for n in range(7)])
    index = write_shards(str(folder), str(tmp_path / "out"))
    with pytest.raises(
        ValueError,
        match=r"1 of the names .* several images .*: 3 \(shard-0+\.tar:000000003-a_3, .*000000010-b_3\); write them",
    ):
        _names(index, tmp_path, "3", "a/4.jpg")
    assert _names(index, tmp_path, "a/3", "b/3.jpg", "b/4").ids.tolist() == [3, 10, 11]


def test_shards_of_a_store(photos: Path, index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        write_shards(str(photos), "s3://bucket/photos", samples_per_shard=30)
        server.put("bucket", "list.txt", b"cat_07.JPEG\ndog_11.JPEG\n")
        remote = open_index("s3://bucket/photos")
        assert _choose(remote, fraction=0.2).facts == _choose(index, fraction=0.2).facts
        named = _choose(remote, names="s3://bucket/list.txt")
        assert (named.ids.tolist(), named.facts["names"]) == ([7, 51], "s3://bucket/list.txt")
        with pytest.raises(ValueError, match=r"class 2 \(eel\) of s3://bucket/photos has 10 images"):
            _choose(remote, per_class=11)


@pytest.mark.parametrize("config", [{"per_class": 1}, {"names": "cat_00"}])
def test_shards_are_read_as_the_runtime_says(
    index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    given = list[dict[str, int]]()

    def reader(index: DatasetIndex, **settings: int) -> ShardReader:
        given.append(settings)
        return ShardReader(index, **settings)

    monkeypatch.setattr("swav_eval.subsets.ShardReader", reader)
    if "names" in config:
        (tmp_path / "names.txt").write_text(config["names"])
        config = {"names": str(tmp_path / "names.txt")}
    runtime = EvaluationRuntime(fetch_bytes=7, cache_bytes=8)
    choose_subset(index, SubsetConfig(**config), seed=0, num_classes=3, runtime=runtime)
    assert given == [{"fetch_bytes": 7, "cache_bytes": 8}]


@given(st.integers(2, 3000), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 9))
def test_held_out_images(num_samples: int, fraction: float, seed: int) -> None:
    train, held_out = hold_out(num_samples, fraction, seed=seed)
    assert np.union1d(train, held_out).tolist() == list(range(num_samples))
    assert len(train) + len(held_out) == num_samples
    assert min(len(train), len(held_out)) >= 1
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    exact = num_samples * Fraction(repr(fraction))
    assert abs(len(held_out) - exact) <= Fraction(1, 2) or len(held_out) in (1, num_samples - 1)
    again = hold_out(num_samples, fraction, seed=seed)
    assert [ids.tolist() for ids in again] == [train.tolist(), held_out.tolist()]


def test_held_out_images_are_a_function_of_the_seed() -> None:
    assert len({tuple(hold_out(1000, 0.01, seed=seed)[1].tolist()) for seed in range(10)}) == 10
    assert len(hold_out(1000, 0.145, seed=0)[1]) == 145
    assert len(hold_out(100, 0.145, seed=0)[1]) == 15  # as it is written, and not 0.145 in binary, which is less


@pytest.mark.parametrize(("num_samples", "fraction"), [(1, 0.5), (0, 0.5), (10, 0.0), (10, 1.0), (10, float("nan"))])
def test_what_cannot_be_split_is_refused(num_samples: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"{num_samples} images cannot be split with a fraction of {fraction} held"):
        hold_out(num_samples, fraction, seed=0)
