"""The shape of the repository: every module is tested where a reader looks for it, and versions are pinned once."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "swav": ROOT / "swav",
    "swav_eval": ROOT / "eval/swav_eval",
    "swav_components": ROOT / "components/swav_components",
}
# Modules that another test file covers.
TESTED_ELSEWHERE = {
    "swav/data/batch.py": "swav/data/test_loader.py",
    "swav/methods/base.py": "swav/methods/test_swav.py",
    "swav/recipes/ablations.py": "swav/recipes/test_recipes.py",
    "swav/recipes/base.py": "swav/recipes/test_recipes.py",
    "swav/recipes/baselines.py": "swav/recipes/test_recipes.py",
    "swav/recipes/mocov2.py": "swav/recipes/test_recipes.py",
    "swav/recipes/offline.py": "swav/recipes/test_recipes.py",
    "swav/recipes/simclr.py": "swav/recipes/test_recipes.py",
    "swav/recipes/small.py": "swav/recipes/test_recipes.py",
    "swav/recipes/swav.py": "swav/recipes/test_recipes.py",
    "swav/storage/types.py": "swav/storage/test_local.py",
    "swav_components/roles.py": "swav_components/test_jobs.py",
}


def _modules() -> list[str]:
    return sorted(
        f"{package}/{path.relative_to(source).as_posix()}"
        for package, source in SOURCES.items()
        for path in source.rglob("*.py")
        if path.name != "__init__.py"
    )


@pytest.mark.parametrize("module", _modules())
def test_module_has_a_test_file_of_the_same_path(module: str) -> None:
    folder, _, name = module.rpartition("/")
    expected = TESTED_ELSEWHERE.get(module, f"{folder}/test_{name}")
    assert (ROOT / "tests" / expected).is_file(), f"{module} has no tests/{expected}"


def test_exceptions_name_modules_that_exist_and_have_no_file_of_their_own() -> None:
    assert set(TESTED_ELSEWHERE) <= set(_modules())
    own = [f"{module.rpartition('/')[0]}/test_{module.rpartition('/')[2]}" for module in TESTED_ELSEWHERE]
    assert [path for path in own if (ROOT / "tests" / path).exists()] == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent for source in SOURCES.values() for path in source.rglob("*.py")})
)
def test_every_folder_with_code_is_a_package(folder: Path) -> None:
    assert (folder / "__init__.py").is_file()


def test_every_direct_dependency_is_pinned_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements} - {"swav"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    explained = set(re.findall(r"^\| ([a-z0-9-]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE))
    assert names <= pinned
    assert names == explained - {"package"}


def test_versions_are_pinned_in_one_place() -> None:
    pin = re.compile(r"(torch|numpy|ruff|mypy|pytest)\s*==\s*\d")
    places = [
        ROOT / name for name in ("pyproject.toml", "Makefile", "Dockerfile", ".pre-commit-config.yaml", ".ci/run")
    ]
    assert [path.name for path in places if pin.search(path.read_text())] == []
