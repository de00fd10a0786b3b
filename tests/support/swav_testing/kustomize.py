"""The folders of ``k8s/`` as kubectl renders them; without a kubectl, tests that need one are skipped."""

import functools
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[3] / "k8s"
OVERLAYS = ("imagenet", "ig1b", "kind")
PREREQUISITES = ("base", *(f"overlays/{name}" for name in OVERLAYS))
FOLDERS = (*PREREQUISITES, "monitoring", "driver", "argo")


@functools.cache
def render(folder: str) -> tuple[dict[str, Any], ...]:
    """The objects of a folder of ``k8s/``; skips without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    with tempfile.TemporaryDirectory() as temporary:
        root = K8S if _kubectl_minor() >= 27 else _for_old_kubectl(Path(temporary))
        command = ["kubectl", "kustomize", str(root / folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found is not None)


def one(folder: str, kind: str, name: str) -> dict[str, Any]:
    """The one object of that kind and name."""
    (found,) = (each for each in render(folder) if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods(folder: str) -> list[dict[str, Any]]:
    """The pod templates of a folder's objects."""
    return [each["spec"]["template"] for each in render(folder) if each["kind"] == "Deployment"]


@functools.cache
def _kubectl_minor() -> int:
    command = ["kubectl", "version", "--client", "-o", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (minor,) = re.findall(r"^\d+", json.loads(answer)["clientVersion"]["minor"])
    return int(minor)


def _for_old_kubectl(copy: Path) -> Path:
    """A copy that kustomize 2 can read (Debian's kubectl 1.20): it has other names for folders and patches."""
    root = shutil.copytree(K8S, copy / "k8s")
    for path in root.rglob("kustomization.yaml"):
        found = yaml.safe_load(path.read_text())
        folders = [name for name in found["resources"] if (path.parent / name).is_dir()]
        found["resources"] = [name for name in found["resources"] if name not in folders]
        found["bases"] = folders
        found["patchesStrategicMerge"] = [patch["path"] for patch in found.pop("patches", [])]
        path.write_text(yaml.safe_dump(found))
    return root
