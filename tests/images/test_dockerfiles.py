"""What can be said of the images without building them."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from swav_testing.containers import LOCKS, ROOT

DOCKERFILES = [ROOT / "Dockerfile", *sorted((ROOT / "images").glob("*/Dockerfile"))]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def pins(text: str) -> dict[str, str]:
    """Versions by package."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE))


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: make setup")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=names)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    done = subprocess.run([str(HADOLINT), "--no-color", str(dockerfile)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=names)
def test_a_dockerfile_needs_no_frontend_from_a_hub_and_ignores_no_rule(dockerfile: Path) -> None:
    assert not re.search(r"^#\s*(syntax=|hadolint)", dockerfile.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["torch", "train", "eval", "launch"])
def test_a_lock_has_the_versions_of_the_constraints(name: str) -> None:
    locked = pins((LOCKS / f"{name}.txt").read_text())
    assert {package: CONSTRAINTS.get(package) for package in locked} == locked


def test_tools_of_the_build_differ_nowhere_from_the_constraints() -> None:
    """Those that only the images' build needs are pinned by the lock file alone."""
    locked = pins((LOCKS / "build.txt").read_text())
    assert {package: CONSTRAINTS[package] for package in locked if package in CONSTRAINTS}.items() <= locked.items()
    assert {"setuptools", "cyclonedx-bom"} <= locked.keys()


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=names)
def test_every_package_of_a_lock_has_its_hashes(lock: Path) -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text().partition("\n")[2])
    packages = [block for block in blocks if "==" in block]
    assert packages
    assert [block.split()[0] for block in packages if "--hash=sha256:" not in block] == []


def test_torch_and_what_comes_with_it_are_in_a_lock_of_their_own() -> None:
    """The variant for CPUs has another torch, and none of the rest."""
    torch, train = (pins((LOCKS / f"{name}.txt").read_text()) for name in ("torch", "train"))
    gpu = {name for name in CONSTRAINTS if re.match(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$", name)}
    assert gpu <= torch.keys()
    assert not gpu & train.keys()
    assert torch.keys() - gpu <= train.keys()


def test_evaluations_add_to_the_trainers_packages_and_change_none() -> None:
    torch, train, evaluation = (pins((LOCKS / f"{name}.txt").read_text()) for name in ("torch", "train", "eval"))
    assert {"scikit-learn", "scipy"} <= evaluation.keys()
    assert not evaluation.keys() & (torch.keys() | train.keys())


@pytest.mark.parametrize(("extra", "locks"), [("train", ["torch", "train"]), ("eval", ["torch", "train", "eval"])])
def test_images_have_what_an_extra_asks_for(extra: str, locks: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {re.split(r"[<>=\[]", requirement)[0] for requirement in extras[extra]} - {"swav"}
    assert asked <= {package for lock in locks for package in pins((LOCKS / f"{lock}.txt").read_text())}


def test_the_export_formats_are_in_no_image() -> None:
    locked = {package for lock in LOCKS.glob("*.txt") for package in pins(lock.read_text())}
    assert not locked & {"timm", "onnx", "onnxscript", "onnxruntime"}


def test_the_build_sees_only_what_it_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for dockerfile in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile.read_text(), re.MULTILINE)
        for word in line.split()
    }
    assert copied | {"images/locks"} == allowed


def test_the_workflow_takes_no_action_and_no_tool_by_a_moving_name() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/images.yaml").read_text())
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [action for action in used if not re.search(r"@(v\d+(\.\d+)*|[0-9a-f]{40})$", action)] == []
