"""Every named run; ``get_recipe("demo")`` builds one. Imports without torch."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace

from swav.config import PretrainConfig, apply_overrides
from swav.recipes import ablations, baselines, mocov2, offline, simclr, small, swav

_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    build.__name__: build
    for runs in (small, swav, ablations, offline, simclr, mocov2, baselines)
    for build in runs.RECIPES
}


def recipe_names() -> list[str]:
    """All names that :func:`get_recipe` takes."""
    return list(_RECIPES)


def get_recipe(name: str) -> PretrainConfig:
    """Build a named run.

    Raises:
        ValueError: no such recipe; the message holds the nearest name.
    """
    if name not in _RECIPES:
        nearest = difflib.get_close_matches(name, _RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown recipe {name!r}; the nearest of {len(_RECIPES)} is {nearest!r}")
    return _RECIPES[name]()


def configure(name: str, *, data: str | None = None, overrides: Iterable[str] = ()) -> PretrainConfig:
    """Build the run that a command line asks for; the launcher and the program both refuse what this refuses.

    Args:
        name: of the recipe.
        data: images to train on, in place of the recipe's; an evaluation on the recipe's images follows.
        overrides: ``key=value`` settings, applied last.

    Raises:
        ValueError: an unknown recipe or setting, a value that does not fit, or no data.
    """
    run = get_recipe(name)
    if data:
        if run.evaluate and run.evaluate.train_url == run.data.url:
            run = replace(run, evaluate=replace(run.evaluate, train_url=data, test_url=None))
        run = replace(run, data=replace(run.data, url=data))
    run = apply_overrides(run, list(overrides))
    if not run.data.url or (run.evaluate and not run.evaluate.train_url):
        raise ValueError(
            f"recipe {name} has no images of its own; give a folder of images or shards, for example --data ~/photos"
        )
    return run
