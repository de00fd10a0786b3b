"""Queue, quota and limits: of a form that is accepted, and wide enough for the jobs that each overlay is for."""

import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.utils import parse_quantity
from swav_testing.kustomize import PREREQUISITES, one, pods, render
from torchx.specs.builders import materialize_appdef

from swav_components import jobs, schedulers

GOLDEN = sorted((Path(__file__).parents[1] / "swav_components" / "golden").glob("*.yaml"))
GPU = "nvidia.com/gpu"
QUANTITY = re.compile(r"([0-9]+(\.[0-9]*)?)([KMGTPE]i|[numkMGTPE])?")  # of Volcano's own schema, without signs
COUNTED = {"pods", "services", "services.loadbalancers", "services.nodeports", "persistentvolumeclaims"}
DATA = ["--data", "s3://bucket/photos", "--output", "s3://bucket/runs/a"]
RUN = ["--recipe", "swav_r50_2x224_6x96_800ep", *DATA]


def quantities(found: dict[str, Any]) -> dict[str, Decimal]:
    for text in found.values():
        assert isinstance(text, str)  # a number is accepted, and written back as text: a difference for ever
        assert QUANTITY.fullmatch(text)
    return {name: parse_quantity(text) for name, text in found.items()}


def quota(folder: str) -> dict[str, Decimal]:
    return quantities(one(folder, "ResourceQuota", "swav")["spec"]["hard"])


def capability(folder: str) -> dict[str, Decimal]:
    return quantities(one(folder, "Queue", "swav")["spec"]["capability"])


def limits(folder: str) -> dict[str, Any]:
    (found,) = one(folder, "LimitRange", "swav")["spec"]["limits"]
    return {name: quantities(part) for name, part in found.items() if name != "type"}


def asked(templates: list[dict[str, Any]]) -> Counter[str]:
    """What pods ask for together, in the quota's words."""
    total: Counter[str] = Counter(pods=len(templates))
    for template in templates:
        for container in template["spec"]["containers"]:
            for name, text in container["resources"]["requests"].items():
                total[f"requests.{name}"] += parse_quantity(text)
    return total


def admitted(container: dict[str, Any], rules: dict[str, Any]) -> bool:
    """Whether the limit range lets a container in."""
    requests, most = (quantities_of(container["resources"][name]) for name in ("requests", "limits"))
    for name in rules["max"]:
        if most[name] > rules["max"][name] or requests[name] > most[name]:
            return False
        if most[name] > requests[name] * rules["maxLimitRequestRatio"][name]:
            return False
    return True


def quantities_of(found: dict[str, Any]) -> dict[str, Decimal]:
    return {name: parse_quantity(text) for name, text in found.items()}


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_queue_is_one_that_volcanos_webhook_takes(folder: str) -> None:
    spec = one(folder, "Queue", "swav")["spec"]
    most = capability(folder)
    assert set(most) == {"cpu", "memory", GPU}
    assert most[GPU] == int(most[GPU])
    deserved = quantities(spec.get("deserved", {}))
    assert all(deserved[name] <= most.get(name, deserved[name]) for name in deserved)
    guarantee = quantities(spec.get("guarantee", {}).get("resource", {}))
    assert all(guarantee[name] <= deserved[name] for name in guarantee)
    assert "parent" not in spec


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_quota_counts_what_can_be_counted(folder: str) -> None:
    for name, number in quota(folder).items():
        whole = name in COUNTED or re.fullmatch(r"count/[a-z]+(\.[a-z.]+)?", name) or name == f"requests.{GPU}"
        assert whole or name in {"requests.cpu", "requests.memory", "requests.ephemeral-storage"}, name
        assert number >= 0
        assert not whole or number == int(number)


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_jobs_may_wait_beyond_what_the_queue_runs(folder: str) -> None:
    for name, number in capability(folder).items():
        assert quota(folder)[f"requests.{name}"] >= 2 * number


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_limit_range_is_one_that_is_accepted(folder: str) -> None:
    rules = limits(folder)
    assert set(rules) == {"default", "defaultRequest", "max", "maxLimitRequestRatio"}
    assert rules["default"] == rules["defaultRequest"]
    assert set(rules["maxLimitRequestRatio"].values()) == {1}
    assert rules["default"].keys() == rules["max"].keys() == rules["maxLimitRequestRatio"].keys()
    assert all(rules["default"][name] <= rules["max"][name] for name in rules["max"])
    assert GPU not in rules["max"]  # else every container would have to ask for some


@pytest.mark.parametrize("folder", PREREQUISITES)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_limit_range_lets_jobs_in(folder: str, path: Path) -> None:
    for task in yaml.safe_load(path.read_text())["spec"]["tasks"]:
        for container in task["template"]["spec"]["containers"]:
            assert admitted(container, limits(folder))


def test_limit_range_keeps_out_what_asks_for_less_than_it_may_use() -> None:
    job = yaml.safe_load(GOLDEN[0].read_text())
    container = job["spec"]["tasks"][0]["template"]["spec"]["containers"][0]
    container["resources"]["requests"]["cpu"] = "10m"
    assert not admitted(container, limits("base"))


@pytest.mark.parametrize(
    ("overlay", "arguments"),
    [
        ("kind", [*RUN, "-j", "1:2x1", "--cpu", "2", "--memMB", "4000"]),
        ("imagenet", [*RUN, "-j", "4:8x8", "--cpu", "90", "--gpu", "8", "--memMB", "700000", "--disk_gb", "500"]),
        ("ig1b", [*RUN, "-j", "32:64x8", "--cpu", "90", "--gpu", "8", "--memMB", "1000000", "--disk_gb", "2000"]),
        ("ig1b", [*RUN, "-j", "512x1", "--cpu", "11", "--gpu", "1", "--memMB", "120000", "--disk_gb", "250"]),
    ],
)
def test_overlay_has_room_for_the_job_that_it_is_for(overlay: str, arguments: list[str]) -> None:
    app = materialize_appdef(jobs.pretrain, ["--name", "a-run", *arguments])
    job = schedulers.create_scheduler("test").submit_dryrun(app, {}).request.resource
    templates = [task["template"] for task in job["spec"]["tasks"] for _ in range(task["replicas"])]
    folder = f"overlays/{overlay}"
    assert len(templates) == int(re.sub(r"(\d+:)?(\d+)x\d+", r"\2", arguments[arguments.index("-j") + 1]))
    for name, number in asked(templates).items():
        assert number <= quota(folder)[name], name
        assert number <= capability(folder).get(name.removeprefix("requests."), number), name
    for template in templates:
        assert admitted(template["spec"]["containers"][0], limits(folder))


def test_quota_leaves_room_for_the_laptops_store() -> None:
    hard = quota("overlays/kind")
    kinds = Counter(each["kind"] for each in render("overlays/kind"))
    assert kinds["PersistentVolumeClaim"] == hard["persistentvolumeclaims"]
    assert hard["services"] == hard["count/jobs.batch.volcano.sh"] + kinds["Service"]
    assert all(number < hard[name] / 8 for name, number in asked(pods("overlays/kind")).items())
