"""Recipes against a second transcription of the paper's settings, and how they are found by name."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from swav import recipes
from swav.config import (
    COLOUR_STD,
    DeepClusterV2Config,
    Mocov2Config,
    PretrainConfig,
    QueueConfig,
    SelaV2Config,
    SimclrConfig,
    SupervisedConfig,
    SwavConfig,
    from_json,
    to_json,
)
from swav.recipes import ablations, configure, get_recipe, mocov2, offline, recipe_names, simclr, swav

NAME = re.compile(
    r"(swav|simclr|mocov2|deepclusterv2|selav2|supervised)_r(18|50|50w\d)_([12]x\d+(_\dx\d+)?|cifar10)_\d+ep(_bs\d+)?"
    r"|swav_abl_400ep(_[a-z0-9_]+)?|swav_r50_2x224_6x96_ig1b|random_r50|demo"
)

# name: (global crop, local crops, epochs, batch, peak rate, final rate, warm-up, queue, width, head, head norm)
PAPER = {
    "swav_r50_2x224_100ep": (224, 0, 100, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x160_4x96_100ep": (160, 4, 100, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x224_6x96_100ep": (224, 6, 100, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x224_6x96_200ep": (224, 6, 200, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x224_6x96_400ep": (224, 6, 400, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x224_6x96_800ep": (224, 6, 800, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x224_400ep": (224, 0, 400, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50_2x160_4x96_400ep": (160, 4, 400, 4096, 4.8, 0.0048, 10, None, 1, 2048, True),
    "swav_r50w2_2x224_4x96_400ep": (224, 4, 400, 4096, 4.8, 0.0048, 10, None, 2, 8192, True),
    "swav_r50w4_2x224_4x96_400ep_bs2560": (224, 4, 400, 2560, 4.8, 0.0048, 10, (2560, 0), 4, 8192, True),
    "swav_r50w5_2x224_4x96_400ep_bs1536": (224, 4, 400, 1536, 4.8, 0.0048, 10, (1536, 0), 5, 10240, False),
    "swav_r50_2x160_4x96_200ep_bs256": (160, 4, 200, 256, 0.6, 0.0006, 0, (3840, 15), 1, 2048, True),
    "swav_r50_2x224_6x96_200ep_bs256": (224, 6, 200, 256, 0.6, 0.0006, 0, (3840, 15), 1, 2048, True),
    "swav_r50_2x224_6x96_400ep_bs256": (224, 6, 400, 256, 0.6, 0.0006, 0, (3840, 15), 1, 2048, True),
}
# name: (prototypes, Sinkhorn iterations, codes, learned prototypes)
ABLATIONS = {
    "swav_abl_400ep": (3000, 3, "soft", True),
    "swav_abl_400ep_k300": (300, 3, "soft", True),
    "swav_abl_400ep_k1000": (1000, 3, "soft", True),
    "swav_abl_400ep_k10000": (10000, 3, "soft", True),
    "swav_abl_400ep_k30000": (30000, 3, "soft", True),
    "swav_abl_400ep_k100000": (100000, 3, "soft", True),
    "swav_abl_400ep_fixed_prototypes": (3000, 3, "soft", False),
    "swav_abl_400ep_hard": (3000, 3, "hard", True),
    "swav_abl_400ep_sinkhorn1": (3000, 1, "soft", True),
    "swav_abl_400ep_sinkhorn10": (3000, 10, "soft", True),
    "swav_abl_400ep_sinkhorn30": (3000, 30, "soft", True),
}


def _crops(run: PretrainConfig) -> list[tuple[int, int, tuple[float, float]]]:
    return [(group.num_crops, group.size_px, group.scale) for group in run.crops]


def test_every_recipe_of_the_paper_is_in_a_table_of_this_test() -> None:
    assert {build.__name__ for build in swav.RECIPES} == set(PAPER) | {"swav_r50_2x224_6x96_ig1b"}
    assert {build.__name__ for build in ablations.RECIPES} == set(ABLATIONS)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_named_as_its_function_and_survives_json(name: str) -> None:
    run = get_recipe(name)
    assert run.name == name
    assert NAME.fullmatch(name)
    assert from_json(to_json(run)) == run


@pytest.mark.parametrize("name", [*PAPER, *ABLATIONS])
def test_name_states_the_run(name: str) -> None:
    run = get_recipe(name)
    epochs = re.search(r"_(\d+)ep", name)
    batch = re.search(r"_bs(\d+)", name)
    assert epochs is not None
    assert run.optim.epochs == int(epochs[1])
    assert run.optim.global_batch == (int(batch[1]) if batch else 4096)
    if "_abl_" not in name:
        views = "_".join(f"{group.num_crops}x{group.size_px}" for group in run.crops)
        assert f"_{views}_" in name


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_main_runs(name: str) -> None:
    run = get_recipe(name)
    size, num_local, epochs, batch, peak, final, warmup, queue, width, head, head_norm = PAPER[name]
    local = [(num_local, 96, (0.05, 0.14))] if num_local else []
    assert _crops(run) == [(2, size, (0.14, 1.0)), *local]
    optim = run.optim
    assert (optim.epochs, optim.global_batch, optim.warmup_epochs) == (epochs, batch, warmup)
    assert (optim.start_lr, optim.base_lr, optim.final_lr) == (0.0, peak, final)
    assert (run.model.arch, run.model.width, run.model.stem) == ("resnet50", width, "7x7")
    assert (run.model.head_hidden, run.model.head_batch_norm) == (head, head_norm)
    assert isinstance(run.method, SwavConfig)
    assert run.method.num_prototypes == 3000
    assert run.method.queue == (QueueConfig(num_samples=queue[0], start_epoch=queue[1]) if queue else None)


@pytest.mark.parametrize("name", ABLATIONS)
def test_settings_of_the_ablations(name: str) -> None:
    run = get_recipe(name)
    assert _crops(run) == [(2, 160, (0.08, 1.0)), (4, 96, (0.05, 0.14))]
    assert (run.optim.epochs, run.optim.global_batch, run.optim.base_lr) == (400, 4096, 4.8)
    method = run.method
    assert isinstance(method, SwavConfig)
    found = (method.num_prototypes, method.sinkhorn.num_iters, method.codes, method.learn_prototypes)
    assert found == ABLATIONS[name]
    assert method.queue is None


@pytest.mark.parametrize("build", simclr.RECIPES)
def test_simclr_differs_from_swav_in_its_loss_alone(build: Callable[[], PretrainConfig]) -> None:
    run = build()
    views = run.name.removeprefix("simclr_r50_").rpartition("_")[0]
    twin = get_recipe(f"swav_r50_{views}_400ep")
    assert run.name.endswith(f"_{run.optim.epochs}ep")
    assert run.method == SimclrConfig(temperature=0.1)
    assert replace(run, name=twin.name, method=twin.method, optim=replace(run.optim, epochs=400)) == twin


@pytest.mark.parametrize("build", offline.RECIPES)
def test_offline_methods_have_swavs_settings_and_three_sets(build: Callable[[], PretrainConfig]) -> None:
    run = build()
    expected = DeepClusterV2Config() if run.name.startswith("deepclusterv2") else SelaV2Config()
    assert run.method == expected
    assert (expected.num_sets, expected.num_prototypes, expected.temperature) == (3, 3000, 0.1)
    views = "_".join(f"{group.num_crops}x{group.size_px}" for group in run.crops)
    assert f"_{views}_{run.optim.epochs}ep" in run.name
    if views != "1x224":
        twin = get_recipe(f"swav_r50_{views}_{run.optim.epochs}ep")
        assert replace(run, name=twin.name, method=twin.method) == twin


def test_the_billion_images_are_counted_in_images() -> None:
    run = get_recipe("swav_r50_2x224_6x96_ig1b")
    twin = get_recipe("swav_r50_2x224_6x96_800ep")
    assert replace(run, name=twin.name, data=twin.data) == twin
    assert run.data.epoch_images == 1_281_167


def test_settings_of_the_baselines() -> None:
    run = get_recipe("supervised_r50_1x224_100ep_bs256")
    assert run.method == SupervisedConfig(num_classes=1000)
    assert _crops(run) == [(1, 224, (0.08, 1.0))]
    assert (run.optim.optimizer, run.optim.base_lr, run.optim.weight_decay) == ("sgd", 0.1, 1e-4)
    augment = run.augment
    assert (augment.flip_probability, augment.jitter_probability) == (0.5, 0)
    assert (augment.grayscale_probability, augment.blur_probability) == (0, 0)
    assert get_recipe("random_r50").optim.epochs == 0


@pytest.mark.parametrize("epochs", [200, 800])
def test_settings_of_mocov2(epochs: int) -> None:
    run = get_recipe(f"mocov2_r50_2x224_{epochs}ep_bs256")
    assert run.method == Mocov2Config(temperature=0.2, momentum=0.999, queue_samples=65536)
    assert _crops(run) == [(2, 224, (0.2, 1.0))]
    optim = run.optim
    assert (optim.optimizer, optim.global_batch, optim.epochs, optim.warmup_epochs) == ("sgd", 256, epochs, 0)
    assert (optim.base_lr, optim.final_lr, optim.weight_decay, optim.momentum) == (0.03, 0.0, 1e-4, 0.9)
    assert (run.model.head_hidden, run.model.head_batch_norm, run.model.embedding_dim) == (2048, False, 128)
    assert run.augment.jitter_strength == 0.5  # brightness, contrast, saturation 0.4 and hue 0.1


@pytest.mark.parametrize("name", [*PAPER, *ABLATIONS])
def test_what_all_runs_of_the_paper_share(name: str) -> None:
    run = get_recipe(name)
    assert isinstance(run.method, SwavConfig)
    assert (run.method.temperature, run.method.sinkhorn.epsilon, run.method.freeze_prototypes_epochs) == (0.1, 0.05, 1)
    assert (run.optim.weight_decay, run.optim.momentum, run.optim.trust_coefficient) == (1e-6, 0.9, 0.001)
    assert run.model.embedding_dim == 128
    assert (run.augment.flip_probability, run.augment.jitter_strength, run.augment.jitter_probability) == (0.5, 1, 0.8)
    assert (run.augment.grayscale_probability, run.augment.blur_probability) == (0.2, 0.5)
    assert COLOUR_STD == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("build", [*swav.RECIPES, *ablations.RECIPES, *simclr.RECIPES, *mocov2.RECIPES])
def test_recipe_says_where_it_comes_from_and_what_to_expect(build: object) -> None:
    text = build.__doc__ or ""
    assert re.search(r"Table|Fig\.|A\.\d|method comparison", text)
    assert re.search(r"Expect|no accuracy", text)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'swav_r50_2x224_6x96_80ep'.*'swav_r50_2x224_6x96_800ep'"):
        get_recipe("swav_r50_2x224_6x96_80ep")


def test_own_images_replace_the_demo_for_training_and_evaluation() -> None:
    run = configure("demo", data="photos", overrides=["optim.epochs=2"])
    assert run.data.url == "photos"
    assert run.evaluate is not None
    assert run.evaluate.train_url == "photos"
    assert run.optim.epochs == 2


def test_overrides_win_over_the_data_argument() -> None:
    run = configure("demo", data="photos", overrides=["evaluate.train_url=labelled", "data.url=other"])
    assert run.data.url == "other"
    assert run.evaluate is not None
    assert run.evaluate.train_url == "labelled"


@pytest.mark.parametrize("name", [*PAPER, *ABLATIONS, "swav_r18_cifar10_200ep"])
def test_recipe_without_images_asks_for_them(name: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe {name} has no images of its own.*--data"):
        configure(name)
    assert configure(name, data="shards").data.url == "shards"


def test_recipes_import_without_torch() -> None:
    code = "import sys, swav.recipes; sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'torchx')))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "configure" in vars(recipes)
