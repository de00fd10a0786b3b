"""Every object under ``k8s/``: valid, safe, and naming only what is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.utils import parse_quantity
from swav_testing.kustomize import FOLDERS, K8S, OVERLAYS, PREREQUISITES, one, pods, render
from swav_testing.manifests import check, check_template, check_volcano, violations
from yaml.constructor import ConstructorError

ACCOUNTS = {f"swav-{role}" for role in ("trainer", "assigner", "evaluator", "shards", "doctor", "driver")}
FOREIGN = ("monitoring.coreos.com/", "argoproj.io/")  # their definitions are not at hand
CLUSTER_WIDE = ("Namespace", "PriorityClass", "Queue")
FILES = sorted(K8S.rglob("*.yaml"))
GOLDEN = sorted((Path(__file__).parents[1] / "swav_components" / "golden").glob("*.yaml"))
EXAMPLE = yaml.safe_load((K8S / "examples" / "job-disruption.yaml").read_text())


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's loaders take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConstructorError(None, None, f"{key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(K8S).as_posix())
def test_file_is_tidy(path: Path) -> None:
    text = path.read_text()
    assert list(yaml.load_all(text, _Strict))
    assert "\t" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert [line for line in text.splitlines() if len(line) > 130 or line != line.rstrip()] == []
    assert path.suffix == ".yaml"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "kustomization.yaml"], ids=str)
def test_file_is_used(path: Path) -> None:
    if path.parent.name == "examples":
        return
    found = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
    assert path.name in found["resources"] + [patch["path"] for patch in found.get("patches", [])]


@pytest.mark.parametrize("folder", FOLDERS)
def test_objects_pass_their_schemas(folder: str) -> None:
    for found in render(folder):
        if found["apiVersion"].startswith(("scheduling.volcano.sh/", "batch.volcano.sh/")):
            check_volcano(found)
        elif not found["apiVersion"].startswith(FOREIGN):
            check(found)


def test_example_passes_its_schema() -> None:
    check(EXAMPLE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_objects_are_named_once_and_live_in_the_namespace(folder: str) -> None:
    found = render(folder)
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names)
    for each in found:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])
        expected = None if each["kind"] in CLUSTER_WIDE else "swav"
        assert each["metadata"].get("namespace") == expected, each["metadata"]["name"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_labels_and_annotations_are_of_a_form_that_is_accepted(folder: str) -> None:
    name = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
    value = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
    metadata = [each["metadata"] for each in render(folder)] + [pod["metadata"] for pod in pods(folder)]
    for each in metadata:
        for key, text in each.get("labels", {}).items():
            assert name.fullmatch(key)
            assert value.fullmatch(text)
        for key, text in each.get("annotations", {}).items():
            assert name.fullmatch(key)
            assert isinstance(text, str)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_secret_is_made(folder: str) -> None:
    assert [each for each in render(folder) if each["kind"] == "Secret"] == []


@pytest.mark.parametrize("path", [path for path in K8S.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_nothing_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert "secretGenerator" not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY-|(?i:password|secret_?(access_?)?key): *[^\s}]", text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_restricted_and_sized(folder: str) -> None:
    for pod in pods(folder):
        check_template(pod)
        assert violations(pod["spec"]) == []
        assert pod["spec"].get("serviceAccountName") or pod["spec"]["automountServiceAccountToken"] is False
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert set(container["resources"]["limits"]) >= {"cpu", "memory", "ephemeral-storage"}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            check_image(container["image"])


def check_image(image: str) -> None:
    assert "@sha256:" in image or re.search(r"/[^/:]+:v?\d[\w.-]*$", image), f"{image} is no fixed version"


def test_files_name_no_moving_image() -> None:
    for path in [*FILES, *K8S.rglob("*.json")]:
        assert not re.search(r":latest\b", path.read_text()), path


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_every_account_is_there_and_only_the_drivers_gets_a_token(folder: str) -> None:
    found = {each["metadata"]["name"]: each for each in render(folder) if each["kind"] == "ServiceAccount"}
    assert set(found) == ACCOUNTS
    assert {name for name, each in found.items() if each["automountServiceAccountToken"]} == {"swav-driver"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_has_what_the_base_has(overlay: str) -> None:
    def names(folder: str) -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in render(folder)}

    assert names("base") <= names(f"overlays/{overlay}")
    assert names(f"overlays/{overlay}") - names("base") == (
        {(kind, "swav-s3") for kind in ("Deployment", "Service", "PersistentVolumeClaim")}
        | {("NetworkPolicy", "s3-server")}
        if overlay == "kind"
        else set()
    )


def test_namespace_refuses_what_is_not_restricted() -> None:
    labels = one("base", "Namespace", "swav")["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert re.fullmatch(r"v1\.\d+", labels[f"pod-security.kubernetes.io/{mode}-version"])


def test_priorities_are_ordered_and_within_what_users_may_have() -> None:
    found = {each["metadata"]["name"]: each for each in render("base") if each["kind"] == "PriorityClass"}
    driver, training, evaluation = (found[f"swav-{name}"] for name in ("driver", "training", "evaluation"))
    assert 1_000_000_000 >= driver["value"] > training["value"] > evaluation["value"] > 0
    assert training["preemptionPolicy"] == "PreemptLowerPriority"
    assert {driver["preemptionPolicy"], evaluation["preemptionPolicy"]} == {"Never"}
    assert not any(each.get("globalDefault") for each in found.values())


def test_driver_may_make_jobs_and_no_more() -> None:
    rights = {
        (group, resource): set(rule["verbs"])
        for rule in one("base", "Role", "swav-driver")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert rights == {
        ("batch.volcano.sh", "jobs"): {"create", "get", "list", "watch", "delete"},
        ("batch.volcano.sh", "jobs/status"): {"get"},
        ("bus.volcano.sh", "commands"): {"create"},
        ("", "pods"): {"get", "list"},
        ("", "pods/log"): {"get"},
    }


@pytest.mark.parametrize(("folder", "name"), [("base", "swav-driver"), ("argo", "swav-workflow")])
def test_rights_are_given_to_the_driver_alone(folder: str, name: str) -> None:
    binding = one(folder, "RoleBinding", name)
    assert one(folder, "Role", binding["roleRef"]["name"])
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "swav-driver", "namespace": "swav"}]
    assert {each["kind"] for each in render(folder)} & {"ClusterRole", "ClusterRoleBinding"} == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_a_pod_names_is_there(folder: str) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in (*render("base"), *render(folder))}
    for pod in pods(folder):
        assert references(pod["spec"]) - there <= {("Secret", "swav-storage")}  # which a person makes


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_a_job_names_is_there(path: Path) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in render("base")}
    job = yaml.safe_load(path.read_text())
    assert job["metadata"]["namespace"] == one("base", "Namespace", "swav")["metadata"]["name"]
    assert ("Queue", job["spec"]["queue"]) in there
    for task in job["spec"]["tasks"]:
        spec, labels = task["template"]["spec"], task["template"]["metadata"]["labels"]
        assert spec["serviceAccountName"] == f"swav-{labels['app.kubernetes.io/component']}"
        assert references(spec) - there <= {("Secret", "swav-storage")}


def references(spec: dict[str, Any]) -> set[tuple[str, str]]:
    found = {("ServiceAccount", spec["serviceAccountName"])} if "serviceAccountName" in spec else set()
    if "priorityClassName" in spec:
        found.add(("PriorityClass", spec["priorityClassName"]))
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for source in container.get("envFrom", []):
            found |= {("ConfigMap", source[key]["name"]) for key in source if key == "configMapRef"}
            found |= {("Secret", source[key]["name"]) for key in source if key == "secretRef"}
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                found.add(("Secret", variable["valueFrom"]["secretKeyRef"]["name"]))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_selectors_find_the_pods_that_they_are_for(folder: str) -> None:
    for found in render(folder):
        if found["kind"] == "Deployment":
            selected = found["spec"]["selector"]["matchLabels"].items()
            assert selected <= found["spec"]["template"]["metadata"]["labels"].items()
        if found["kind"] == "Service":
            (pod,) = pods(folder)
            assert found["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
            ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            assert [ports[port["targetPort"]] for port in found["spec"]["ports"]] == [
                port["port"] for port in found["spec"]["ports"]
            ]


def test_a_drain_may_take_one_driver_at_a_time() -> None:
    budget = one("base", "PodDisruptionBudget", "swav-driver")["spec"]
    (driver,) = pods("driver")
    assert budget["selector"]["matchLabels"].items() <= driver["metadata"]["labels"].items()
    assert budget["maxUnavailable"] == 1  # of a Deployment, whose scale is known


def test_a_jobs_own_budget_counts_pods_in_whole_numbers() -> None:
    assert isinstance(EXAMPLE["spec"]["minAvailable"], int)  # a Volcano job has no scale to take a share of
    assert "maxUnavailable" not in EXAMPLE["spec"]
    job = yaml.safe_load(next(path for path in GOLDEN if path.stem == "pretrain-large").read_text())
    labels = job["spec"]["tasks"][0]["template"]["metadata"]["labels"]
    selected = EXAMPLE["spec"]["selector"]["matchLabels"] | {"app.kubernetes.io/instance": job["metadata"]["name"]}
    assert selected.items() <= labels.items()


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_storage_settings_are_text_and_hold_no_secret(folder: str) -> None:
    data = one(folder, "ConfigMap", "swav-storage")["data"]
    assert data.keys() >= {"AWS_REGION", "SWAV_RUNS"}
    assert not [key for key in data if "SECRET" in key or "KEY" in key]
    assert all(isinstance(value, str) for value in data.values())
    assert data["SWAV_RUNS"].startswith("s3://")


def test_s3_server_is_where_the_settings_say() -> None:
    (server,) = pods("overlays/kind")
    service = one("overlays/kind", "Service", "swav-s3")
    settings = one("overlays/kind", "ConfigMap", "swav-storage")["data"]
    port = service["spec"]["ports"][0]["port"]
    assert settings["AWS_ENDPOINT_URL"] == f"http://{service['metadata']['name']}:{port}"
    environment = {each["name"]: each.get("value") for each in server["spec"]["containers"][0]["env"]}
    assert environment["VGW_PORT"] == f":{port}"
    assert environment["VGW_REGION"] == settings["AWS_REGION"]
    bucket = settings["SWAV_RUNS"].split("/")[2]
    assert server["spec"]["initContainers"][0]["command"][-1] == f"{environment['VGW_BACKEND_ARG']}/{bucket}"


def test_driver_starts_a_run_that_is_not_refused() -> None:
    import argparse

    from swav_components.driver.plan import make_plan

    (pod,) = pods("driver")
    container = pod["spec"]["containers"][0]
    parser = argparse.ArgumentParser()
    for name in ("run", "scheduler", "pretrain"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--evaluate", required=True, action="append")
    options = parser.parse_args(container["args"])
    run = options.run.replace("$(SWAV_RUNS)", "s3://bucket/runs")
    plan = make_plan(run, "pretrain", options.pretrain, assign=None, evaluations=options.evaluate)
    assert container["command"] == ["python", "-m", "swav_components.driver"]
    assert options.scheduler == "kubernetes"
    assert [step.key for step in plan.steps] == ["pretrain", "knn-1", "svm-1", "linear-1", "finetune-1"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_volumes_are_within_the_pods_disk(folder: str) -> None:
    for pod in pods(folder):
        sizes = [volume["emptyDir"]["sizeLimit"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume]
        disk = pod["spec"]["containers"][0]["resources"]["limits"]["ephemeral-storage"]
        assert sum(map(parse_quantity, sizes)) <= parse_quantity(disk)
