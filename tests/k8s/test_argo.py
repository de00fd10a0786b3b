"""The Argo template: the jobs that it makes are those of `torchx run`, and it runs under the namespace's policy."""

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from swav_testing.kustomize import one, render
from swav_testing.manifests import check_template, violations
from torchx.schedulers.kubernetes_scheduler import JOB_STATE
from torchx.specs import AppState

from swav_components import jobs

PREFIX = re.compile(r"\{\{(inputs|workflow)\.parameters\.([a-z]+)\}\}")


def spec() -> dict[str, Any]:
    found: dict[str, Any] = one("argo", "WorkflowTemplate", "swav-run")["spec"]
    return found


def template(name: str) -> dict[str, Any]:
    (found,) = (each for each in spec()["templates"] if each["name"] == name)
    return found


def calls(found: dict[str, Any]) -> list[dict[str, Any]]:
    steps = [step for group in found.get("steps", []) for step in group]
    return [*found.get("dag", {}).get("tasks", []), *steps]


def test_steps_call_templates_with_the_parameters_that_they_take() -> None:
    assert template(spec()["entrypoint"])
    for each in spec()["templates"]:
        own = {parameter["name"] for parameter in each.get("inputs", {}).get("parameters", [])}
        for call in calls(each):
            called = template(call["template"])
            given = {parameter["name"] for parameter in call["arguments"]["parameters"]}
            assert given == {parameter["name"] for parameter in called["inputs"]["parameters"]}
        of_workflow = {parameter["name"] for parameter in spec()["arguments"]["parameters"]}
        for scope, name in PREFIX.findall(json.dumps(each)):
            assert name in (own if scope == "inputs" else of_workflow)


def test_evaluations_follow_pretraining() -> None:
    tasks = {task["name"]: task for task in template("run")["dag"]["tasks"]}
    assert tasks["evaluate"]["depends"] == "pretrain.Succeeded"
    assert "depends" not in tasks["pretrain"]


def test_a_job_that_ends_ends_the_wait() -> None:
    resource = template("wait")["resource"]
    assert resource["action"] == "get"  # a wait that starts again must not make a job
    manifest = yaml.safe_load(resource["manifest"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    assert manifest["metadata"]["namespace"] == "swav"
    failed = re.fullmatch(r"status\.state\.phase in \((.*)\)", resource["failureCondition"])
    succeeded = re.fullmatch(r"status\.state\.phase == (\w+)", resource["successCondition"])
    assert failed is not None
    assert succeeded is not None
    ended = {phase for phase, state in JOB_STATE.items() if state in (AppState.FAILED, AppState.CANCELLED)}
    assert set(failed[1].split(", ")) == {phase for phase in ended if not phase.endswith("ing")}
    assert JOB_STATE[succeeded[1]] == AppState.SUCCEEDED


def submitted(folder: Path, **parameters: str) -> list[str]:
    """The words that torchx gets, by the container's own command, in a shell of this machine."""
    container = template("submit")["container"]
    fake = folder / "torchx"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    filled = {f"{{{{inputs.parameters.{name}}}}}": text for name, text in parameters.items()}
    environment = {each["name"]: filled.get(each["value"], each["value"]) for each in container["env"]}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    command = [*container["command"], *container["args"]]
    output = subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=True, timeout=60).stdout
    return output.decode().split("\0")[:-1]


def test_the_shell_reads_nothing_but_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = "--recipe demo  --data * $(touch a) `touch b` ; touch c > d"
    found = submitted(tmp_path, name="a-run", component="pretrain", arguments=words)
    assert found == ["run", "--scheduler", "kubernetes", "swav.pretrain", "--name", "a-run", *words.split()]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "torchx"}


@pytest.mark.parametrize(
    ("component", "arguments"),
    [
        ("pretrain", "--recipe demo --output s3://bucket/run -j 1:2x1"),
        ("knn", "--backbone s3://bucket/run/backbone.pt --train s3://bucket/a --output s3://bucket/run/knn.json"),
        (
            "linear",
            "--recipe linear_imagenet --backbone s3://bucket/run/backbone.pt --train s3://bucket/a --test s3://bucket/b"
            " --output s3://bucket/run/linear.json -j 1x8 learning_rates=[0.1,0.3]",
        ),
        (
            "evaluate",
            "--backbone s3://bucket/run/backbone.pt --data s3://bucket/data --output s3://bucket/run/paper.json",
        ),
    ],
)
def test_torchx_makes_the_job_that_is_waited_for(tmp_path: Path, component: str, arguments: str) -> None:
    from torchx.runner.api import get_runner

    name = f"a-run-{component}"
    words = submitted(tmp_path, name=name, component=component, arguments=arguments)
    assert hasattr(jobs, component)
    assert words[:4] == ["run", "--scheduler", "kubernetes", f"swav.{component}"]
    with get_runner() as runner:
        job = runner.dryrun_component(words[3], words[4:], scheduler="kubernetes").request.resource
    waited = yaml.safe_load(template("wait")["resource"]["manifest"].replace("{{inputs.parameters.name}}", name))
    assert job["kind"] == waited["kind"]
    assert job["apiVersion"] == waited["apiVersion"]
    assert job["metadata"]["name"] == waited["metadata"]["name"]
    assert job["metadata"]["namespace"] == waited["metadata"]["namespace"]


def test_pods_pass_the_policy_with_argos_own_containers() -> None:
    submit = template("submit")
    patch = yaml.safe_load(submit["podSpecPatch"])
    argos = [patch["initContainers"][0], patch["containers"][0]]
    assert [each["name"] for each in argos] == ["init", "wait"]
    pod = {
        "securityContext": spec()["securityContext"],
        "containers": [{"name": "main", **submit["container"]}, argos[1]],
        "initContainers": [argos[0]],
        "volumes": submit["volumes"],
    }
    assert violations(pod) == []
    check_template({"spec": {"containers": [pod["containers"][0]], "volumes": pod["volumes"]}})
    container = submit["container"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_workflow_runs_as_the_driver_and_as_the_policies_know_it() -> None:
    assert spec()["serviceAccountName"] == "swav-driver"
    assert spec()["podPriorityClassName"] == "swav-driver"
    labels = spec()["podMetadata"]["labels"]
    assert labels == {"app.kubernetes.io/part-of": "swav", "app.kubernetes.io/component": "driver"}
    rules = [rule for each in render("argo") if each["kind"] == "Role" for rule in each["rules"]]
    assert rules == [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
