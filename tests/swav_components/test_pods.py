"""What Kubernetes gets: golden renderings, schemas, the restricted security standard, and what is refused."""

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from swav_testing.manifests import check_template, check_volcano, violations
from torchx import specs
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import ComponentValidationException

from swav_components import jobs, pods, schedulers

GOLDEN = Path(__file__).parent / "golden"
RUN = ["--data", "s3://bucket/photos", "--output", "s3://bucket/runs/a"]
GPUS = ["--cpu", "90", "--gpu", "8", "--memMB", "900000", "--disk_gb", "2000"]
LARGE = ["-j", "2:3x8", *GPUS]
OFFLINE = ["--assign_cpu", "30", "--assign_gpu", "4", "--assign_memMB", "200000", "--assign_disk_gb", "900"]
BACKBONE = ["--backbone", "s3://bucket/runs/a/backbone.pt"]
KNN = [*BACKBONE, "--train", "s3://bucket/train", "--output", "s3://bucket/knn.json"]
LABELLED = [*BACKBONE, "--train", "s3://bucket/train", "--test", "s3://bucket/test", "--output", "s3://bucket/a.json"]
KEPT = ["--work", "s3://bucket/features"]
TABLE = [*BACKBONE, "--data", "s3://bucket/data", "--output", "s3://bucket/runs/a/paper.json"]

RENDERINGS: dict[str, tuple[Callable[..., specs.AppDef], list[str]]] = {
    "pretrain-small": (jobs.pretrain, ["--recipe", "demo"]),
    "pretrain-large": (jobs.pretrain, ["--recipe", "swav_r50_2x224_6x96_800ep", *RUN, *LARGE, "runtime.compile=true"]),
    "deepclusterv2-small": (jobs.deepclusterv2, ["--recipe", "deepclusterv2_r50_2x224_400ep", *RUN]),
    "deepclusterv2-large": (
        jobs.deepclusterv2,
        ["--recipe", "deepclusterv2_r50_2x224_6x96_800ep", *RUN, *LARGE, *OFFLINE, "--workers", "4"],
    ),
    "selav2-small": (jobs.selav2, ["--recipe", "selav2_r50_2x224_400ep", *RUN]),
    "selav2-large": (jobs.selav2, ["--recipe", "selav2_r50_2x160_4x96_400ep", *RUN, *LARGE, *OFFLINE]),
    "assign-small": (jobs.assign, ["--output", "s3://bucket/runs/a"]),
    "assign-large": (jobs.assign, [*RUN, *GPUS, "--workers", "8", "--timeout_hours", "48"]),
    "linear-small": (jobs.linear, ["--recipe", "linear_imagenet", *LABELLED]),
    "linear-large": (jobs.linear, ["--recipe", "linear_inat18", *LABELLED, *LARGE, "learning_rates=[0.01,0.1]"]),
    "finetune-small": (jobs.finetune, ["--recipe", "semisup_1pct", *LABELLED]),
    "finetune-large": (
        jobs.finetune,
        ["--recipe", "semisup_10pct", *LABELLED, *LARGE, "subset.names=s3://bucket/10percent.txt"],
    ),
    "lowshot-small": (jobs.lowshot, ["--recipe", "lowshot_13", *LABELLED]),
    "lowshot-large": (jobs.lowshot, ["--recipe", "lowshot_128_scratch", *LABELLED, *LARGE]),
    "svm-small": (jobs.svm, LABELLED),
    "svm-large": (jobs.svm, [*LABELLED, *KEPT, *LARGE, "num_folds=5"]),
    "knn-small": (jobs.knn, KNN),
    "knn-large": (jobs.knn, [*LABELLED, *KEPT, *LARGE, "--k", "20,200"]),
    "evaluate-small": (jobs.evaluate, TABLE),
    "evaluate-large": (
        jobs.evaluate,
        [
            *TABLE,
            "-j",
            "3x8",
            *GPUS,
            "--protocols",
            "knn,linear_places205",
            "linear_places205:learning_rates=[0.01,0.1]",
        ],
    ),
    "shards-small": (jobs.shards, ["--source", "s3://bucket/list.csv", "--out", "s3://bucket/photos"]),
    "shards-large": (
        jobs.shards,
        ["--source", "s3://bucket/a.csv", "--out", "s3://bucket/b", "--shuffle", "1", "--disk_gb", "900"],
    ),
    "doctor-small": (jobs.doctor, ["--output", "s3://bucket/runs/a"]),
    "doctor-large": (jobs.doctor, [*RUN, "-j", "3x8", *GPUS, "--", "--min-free-disk-gb", "500"]),
}


def render(job: Callable[..., specs.AppDef], arguments: list[str], **settings: Any) -> dict[str, Any]:
    """The Volcano job, as it would be sent."""
    app = materialize_appdef(job, arguments)
    found: dict[str, Any] = schedulers.create_scheduler("test").submit_dryrun(app, settings).request.resource
    return found


def named(name: str) -> dict[str, Any]:
    job, arguments = RENDERINGS[name]
    return render(job, ["--name", name, *arguments])


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [task["template"] for task in job["spec"]["tasks"]]


@pytest.mark.parametrize("name", RENDERINGS)
def test_rendering_is_the_reviewed_one(name: str) -> None:
    """Write them anew by SWAV_WRITE_GOLDEN=1, and review the difference."""
    path = GOLDEN / f"{name}.yaml"
    job = named(name)
    for template in templates(job):  # TorchX's versions differ in these
        del template["metadata"]["labels"]["torchx.pytorch.org/version"]
        (container,) = template["spec"]["containers"]
        container["env"] = [variable for variable in container["env"] if variable["name"] != "TORCHX_IMAGE"]
    found = yaml.safe_dump(job)
    if os.environ.get("SWAV_WRITE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


def test_every_component_has_a_small_and_a_large_rendering() -> None:
    rendered = {(job.__name__, name.rpartition("-")[2]) for name, (job, _) in RENDERINGS.items()}
    components = [name for name, job in vars(jobs).items() if callable(job) and job.__module__ == jobs.__name__]
    assert rendered == {(name, size) for name in components for size in ("small", "large")}
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(RENDERINGS)


@pytest.mark.parametrize("name", RENDERINGS)
def test_schemas_know_every_field(name: str) -> None:
    job = named(name)
    for template in templates(job):
        check_template(template)
    check_volcano(job)


def test_schemas_refuse_what_they_do_not_know() -> None:
    job = named("pretrain-small")
    for place in ("spec", "template"):
        wrong = copy.deepcopy(job)
        spec = wrong["spec"] if place == "spec" else templates(wrong)[0]["spec"]
        spec["minSucess"] = 1
        with pytest.raises(Exception, match="minSucess"):
            check_volcano(wrong) if place == "spec" else check_template(templates(wrong)[0])


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_restricted_namespace_takes_every_pod(name: str) -> None:
    for template in templates(named(name)):
        assert violations(template["spec"]) == []


@pytest.mark.parametrize("name", RENDERINGS)
def test_pods_keep_to_the_rules_of_the_house(name: str) -> None:
    job = named(name)
    for template in templates(job):
        pod = template["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
        assert not container["image"].endswith(":latest")
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] == f"swav-{template['metadata']['labels']['app.kubernetes.io/component']}"
        values = [variable.get("value", "") for variable in container["env"]]
        assert not [value for value in values if re.search(r"(?i)secret|password|AKIA", value)]
        assert all(set(source) <= {"configMapRef", "secretRef"} for source in container["envFrom"])
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_scratch_fits_the_disk_that_is_asked_for() -> None:
    for gigabytes in (4, 50, 2000):
        job = render(jobs.pretrain, ["--recipe", "demo", "--disk_gb", str(gigabytes)])
        (template,) = templates(job)
        sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in template["spec"]["volumes"]}
        cache, tmp = int(sizes["cache"].removesuffix("G")), int(sizes["tmp"].removesuffix("G"))
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"]["ephemeral-storage"] == f"{gigabytes}G"
        assert 0 < cache + tmp < gigabytes
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert 0 < int(environment["SWAV_CACHE_BYTES"] or 0) < cache * 10**9


def _tasks(job: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(task["name"], task["replicas"], task["minAvailable"]) for task in job["spec"]["tasks"]]


def test_job_ends_with_those_that_it_needs() -> None:
    job = named("pretrain-large")
    assert _tasks(job) == [("pretrain-0", 1, 1), ("pretrain-1", 2, 1)]
    assert (job["spec"]["minAvailable"], job["spec"]["minSuccess"]) == (2, 2)
    job = named("deepclusterv2-large")
    assert _tasks(job) == [("trainer-0", 1, 1), ("trainer-1", 2, 1), ("assigner-0", 1, 1)]
    assert (job["spec"]["minAvailable"], job["spec"]["minSuccess"]) == (3, 3)
    job = render(jobs.pretrain, ["--recipe", "demo", "-j", "1:2x1"])
    assert _tasks(job) == [("pretrain-0", 1, 1), ("pretrain-1", 1, 0)]


def test_pods_meet_at_the_first() -> None:
    job = named("pretrain-large")
    first, other = (template["spec"]["containers"][0] for template in templates(job))
    assert "--rdzv-endpoint=${TORCHX_RANK0_HOST:-localhost}:29500 " in first["command"][2]
    assert {"name": "TORCHX_RANK0_HOST", "value": "localhost"} in first["env"]
    # Volcano gives every pod the host names of the task pretrain-0 in this variable.
    assert "--rdzv-endpoint=${VC_PRETRAIN_0_HOSTS:-localhost}:29500 " in other["command"][2]


def test_agents_have_their_time_to_stop() -> None:
    (pod, *_) = (template["spec"] for template in templates(named("pretrain-large")))
    environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) > 60


def test_a_refused_command_ends_the_job_before_another_pod_is_tried() -> None:
    job = named("deepclusterv2-small")
    assert job["spec"]["policies"] == [
        {"exitCode": 64, "action": "TerminateJob"},
        {"exitCode": 70, "action": "TerminateJob"},
        {"event": "PodFailed", "action": "RestartPod"},
        {"event": "PodEvicted", "action": "RestartPod"},
    ]
    assert not any("policies" in task for task in job["spec"]["tasks"])  # they would come before the job's


def test_the_cluster_says_where_jobs_run() -> None:
    settings = {
        "namespace": "team-a",
        "queue": "research",
        "service_account": "own",
        "priority_class": "high",
        "node_selector": ["example.com/pool:gpu", "zone:"],
        "first_pod_nodes": ["example.com/spot:false"],
        "network_tier": 2,
    }
    job = render(jobs.pretrain, ["--recipe", "demo", "-j", "2x1"], **settings)
    assert (job["metadata"]["namespace"], job["spec"]["queue"]) == ("team-a", "research")
    assert job["spec"]["networkTopology"] == {"mode": "soft", "highestTierAllowed": 2}
    assert job["spec"]["priorityClassName"] == "high"
    first, second = (template["spec"] for template in templates(job))
    assert first["nodeSelector"] == {"example.com/pool": "gpu", "zone": "", "example.com/spot": "false"}
    assert second["nodeSelector"] == {"example.com/pool": "gpu", "zone": ""}
    assert {first["serviceAccountName"], second["serviceAccountName"]} == {"own"}
    check_volcano(job)


def test_a_chosen_name_is_everywhere() -> None:
    text = json.dumps(named("pretrain-large"))
    assert "--rdzv-id=pretrain-large" in text
    assert '"app.kubernetes.io/instance": "pretrain-large"' in text
    assert not re.search(r"swav-pretrain-[a-z0-9]{10,}", text)


def test_without_a_name_every_submission_is_another_job() -> None:
    found = {render(jobs.pretrain, ["--recipe", "demo"])["metadata"]["name"] for _ in range(3)}
    assert len(found) == 3


def test_a_job_of_many_pods_is_a_small_object() -> None:
    job = render(jobs.pretrain, ["--recipe", "swav_r50_2x224_6x96_800ep", *RUN, "-j", "256:512x8", "--name", "a" * 40])
    assert _tasks(job) == [("pretrain-0", 1, 1), ("pretrain-1", 511, 255)]
    assert len(json.dumps(job)) < 20_000
    check_volcano(job)


@pytest.mark.parametrize(
    ("job", "arguments", "settings", "said"),
    [
        (jobs.pretrain, ["--recipe", "demo", "-j", "513x8"], {}, "513 pods in one job.* at most 512"),
        (jobs.pretrain, ["--recipe", "demo", "--name", "a" * 60], {}, "give a --name of at most 50"),
        (jobs.pretrain, ["--recipe", "demo", "--output", "runs/a"], {}, "--output runs/a .* SWAV_RUNS"),
        (jobs.pretrain, ["--recipe", "demo", "--data", "photos"], {}, "--data photos is a path of this machine"),
        (jobs.pretrain, ["--recipe", "demo", "--image", "ours"], {}, "image ours means another one tomorrow"),
        (jobs.pretrain, ["--recipe", "demo", "--image", "h:5/ours:latest"], {}, r"h:5/ours@sha256:\.\.\."),
        (jobs.pretrain, ["--recipe", "demo", "--memMB", "512"], {}, "512 MB of memory"),
        (jobs.pretrain, ["--recipe", "demo", "--disk_gb", "3"], {}, "3 GB of disk"),
        (jobs.pretrain, ["--recipe", "demo"], {"node_selector": ["pool=gpu"]}, "written as label:value"),
        (jobs.selav2, ["--recipe", "selav2_r50_2x224_400ep", "--data", "s3://b/a"], {}, "runs/selav2_.* SWAV_RUNS"),
        (jobs.knn, ["--backbone", "b.pt", "--train", "demo/train"], {}, "--backbone b.pt"),
        (jobs.svm, [*LABELLED, "--work", "features"], {}, "--work features is a path of this machine"),
        (jobs.evaluate, [*TABLE[:4], "--output", "paper.json"], {}, "--output paper.json is a path of this machine"),
    ],
)
def test_what_the_cluster_could_not_run_is_refused(
    job: Callable[..., specs.AppDef], arguments: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ComponentValidationException, match=said):
        render(job, arguments, **settings)


def test_a_volume_of_a_node_is_refused() -> None:
    app = jobs.pretrain(recipe="demo")
    app.roles[0].mounts.append(specs.BindMount("/data", "/data"))
    with pytest.raises(ComponentValidationException, match="pods read and write object stores"):
        schedulers.create_scheduler("test").submit_dryrun(app, {})


@pytest.mark.parametrize("image", ["ours:1.2", "host:5000/ours:1.2", "ours@sha256:0a", "ours:latest@sha256:0a"])
def test_images_with_a_version_are_taken(image: str) -> None:
    job = render(jobs.pretrain, ["--recipe", "demo", "--image", image])
    assert templates(job)[0]["spec"]["containers"][0]["image"] == image


def test_agreed_numbers() -> None:
    assert pods.METRICS_PORT == 9400
    assert (pods.NAMESPACE, pods.QUEUE, pods.USER) == ("swav", "swav", 10001)
