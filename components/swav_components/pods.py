"""What Volcano and the pods of a job need, and TorchX does not say: all of it is here.

TorchX renders a Volcano job; :func:`complete` takes that and adds the rest. What a cluster must
have before a job (namespace, queue, priorities, service accounts, network policies) is in ``k8s/``. Names agree.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torchx.specs.finder import ComponentValidationException

from swav_components.roles import ProgramRole, replaced

NAMESPACE = QUEUE = "swav"
METRICS_PORT = 9400
USER = 10001  # of the images
MAX_PODS = 512
MAX_NAME = 63  # of a label's value, a host name and a volume

# An agent gives its ranks so long to save after SIGTERM; the kernel ends the pod after the grace period.
_SHUTDOWN_SECONDS = 150
_GRACE_SECONDS = 180
# Every pod that is replaced counts. What is elastic sees to it itself that it gets on. Evaluations take up what they
# have stored, and one job may have many of them; the rest begins anew each time.
_MAX_RETRIES = {"trainer": 1000, "assigner": 1000, "evaluator": 100, "shards": 20, "doctor": 1}
_KEPT_SECONDS = 7 * 24 * 3600  # a finished job, for those who look later
_LEAVE_SECONDS = 30  # a lost node is given up after so long; Kubernetes' own 300 hold up everybody else
_FOR_A_PERSON = (64, 70)  # the command is wrong, or goes on failing at one place: no other pod would do better

_PRIORITIES = {"evaluator": "swav-evaluation"}  # all others train, or are waited for by what trains
_SERVING = ("trainer", "assigner", "evaluator")  # say by HTTP whether they get on
_SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "swav/spot")
_DEVICE_TAINTS = ("nvidia.com/gpu",)


def complete(job: dict[str, Any], roles: Iterable[ProgramRole], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add to TorchX's Volcano job what it lacks.

    Args:
        job: as TorchX renders it, in plain dictionaries; changed.
        roles: of the app, in its order.
        settings: the scheduler's, which say where jobs of this cluster run.

    Returns:
        The job.

    Raises:
        ComponentValidationException: the cluster would refuse it, or it could not work there.
    """
    spec = job["spec"]
    rendered = iter(spec["tasks"])
    spec["tasks"] = []
    num_pods = num_needed = max_retries = 0
    roles = list(roles)
    for role in roles:
        _check(role)
        max_retries = max(max_retries, _MAX_RETRIES[role.kind])
        num_pods += role.num_replicas
        num_needed += role.min_replicas or role.num_replicas
        tasks = _tasks([next(rendered) for _ in range(role.num_replicas)], role, settings)
        if not spec["tasks"] or role.num_replicas > 1:
            tasks[0]["template"]["spec"]["nodeSelector"] |= labels_of(settings, "first_pod_nodes")
        spec["tasks"] += _meeting_at_their_own(tasks, role, roles[0])
    # Roles of one pod each that need no other need no room at one time, but all must get to their end.
    gang = 1 if all(role.independent and role.num_replicas == 1 for role in roles) else num_needed
    _check_size(job["metadata"]["name"], spec["tasks"], num_pods)
    job["metadata"]["namespace"] = settings["namespace"]
    job["metadata"]["labels"] = {"app.kubernetes.io/part-of": "swav", "app.kubernetes.io/managed-by": "torchx"}
    spec |= {
        "minAvailable": gang,  # less than these does not start
        "minSuccess": num_needed,  # done when these are; a pod that never found a node is not waited for
        "maxRetry": max_retries,
        "policies": [  # the first that fits counts
            *({"exitCode": status, "action": "TerminateJob"} for status in _FOR_A_PERSON),
            {"event": "PodFailed", "action": "RestartPod"},  # 75 (stopped, saved) and 1: another pod goes on
            {"event": "PodEvicted", "action": "RestartPod"},
        ],
        "priorityClassName": spec["tasks"][0]["template"]["spec"]["priorityClassName"],
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
    }
    if settings.get("network_tier"):
        spec["networkTopology"] = {"mode": "soft", "highestTierAllowed": settings["network_tier"]}
    return job


def _tasks(tasks: list[dict[str, Any]], role: ProgramRole, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first pod, where the others meet, and one task for all others, as they do not differ.

    TorchX has a task for each pod: at 512 of them more than a cluster stores in one object, and the ones without which
    the job cannot go on are fixed. Of one task any that are left will do.
    """
    found = [tasks[0] | {"replicas": 1, "minAvailable": 1}]
    if len(tasks) > 1:
        min_others = (role.min_replicas or role.num_replicas) - 1
        found.append(tasks[1] | {"replicas": len(tasks) - 1, "minAvailable": min_others})
    for task in found:
        task.pop("policies", None)  # TorchX's own, of which there are none: the job's count
        _complete_task(task, role, settings)
    return found


def _meeting_at_their_own(tasks: list[dict[str, Any]], role: ProgramRole, first: ProgramRole) -> list[dict[str, Any]]:
    """Tasks of a role whose pods meet at its own first pod; TorchX sends those of all roles to the job's first."""
    if role is first:
        return tasks
    jobs_own, own = (f"VC_{one.name.upper()}_0_HOSTS" for one in (first, role))
    return [replaced(tasks[0], f"${{{jobs_own}:-", "${TORCHX_RANK0_HOST:-"), *replaced(tasks[1:], jobs_own, own)]


def pod_name(job: str, role: str, replica: int) -> str:
    """Of a replica as TorchX counts them."""
    return f"{job}-{role}-0-0" if replica == 0 else f"{job}-{role}-1-{replica - 1}"


def _complete_task(task: dict[str, Any], role: ProgramRole, settings: Mapping[str, Any]) -> None:
    task["maxRetry"] = _MAX_RETRIES[role.kind]
    metadata, pod = task["template"]["metadata"], task["template"]["spec"]
    metadata["labels"] |= {"app.kubernetes.io/part-of": "swav", "app.kubernetes.io/component": role.kind}
    del metadata["labels"]["torchx.pytorch.org/replica-id"]
    metadata["annotations"] |= {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/path": "/metrics",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }
    pod |= {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": pod.get("nodeSelector", {}) | labels_of(settings, "node_selector"),
        "priorityClassName": settings.get("priority_class") or _PRIORITIES.get(role.kind, "swav-training"),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "serviceAccountName": settings.get("service_account") or f"swav-{role.kind}",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "tolerations": _tolerations(),
        "volumes": _volumes(role),
    }
    (container,) = pod["containers"]
    container["name"] = role.name
    _complete_container(container, role)


def _complete_container(container: dict[str, Any], role: ProgramRole) -> None:
    limits = container["resources"]["limits"] | {"ephemeral-storage": f"{role.disk_gb}G"}
    cache_gb, _ = _disks(role)
    environment = {
        "HOME": "/tmp",
        "SWAV_CACHE": "/cache",
        "SWAV_CACHE_BYTES": str(cache_gb * 8 * 10**8),  # what the disk says to be free is the node's
        "SWAV_IMAGE": role.image,
        "SWAV_LOG_FORMAT": "json",
        "SWAV_METRICS_PORT": str(METRICS_PORT),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    container |= {
        "env": [
            *container.get("env", []),
            *({"name": name, "value": value} for name, value in environment.items()),
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        # Where the store is, and, without workload identity, the keys to it: by reference alone.
        "envFrom": [
            {"configMapRef": {"name": "swav-storage", "optional": True}},
            {"secretRef": {"name": "swav-storage", "optional": True}},
        ],
        "ports": [*container.get("ports", []), {"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": {"limits": limits, "requests": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": "/cache"},
            {"name": "dshm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    if role.kind in _SERVING:
        container["livenessProbe"] = {
            "httpGet": {"path": "/healthz", "port": "metrics"},
            "initialDelaySeconds": 120,  # the image's first start on a cold disk
            "periodSeconds": 30,
            "timeoutSeconds": 10,
            "failureThreshold": 4,
        }


def _volumes(role: ProgramRole) -> list[dict[str, Any]]:
    cache_gb, tmp_gb = _disks(role)
    shm_mb = min(int(role.resource.memMB) // 4, 16384)  # counts as the pod's memory
    return [
        {"name": "cache", "emptyDir": {"sizeLimit": f"{cache_gb}G"}},
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_mb}M"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{tmp_gb}G"}},
    ]


def _disks(role: ProgramRole) -> tuple[int, int]:
    """GB of the cache and of ``/tmp``, which share the pod's disk with its logs."""
    tmp_gb = max(1, role.disk_gb // 10)
    return role.disk_gb - 2 * tmp_gb, tmp_gb


def _tolerations() -> list[dict[str, Any]]:
    lost = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    return [
        *({"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in (*_SPOT_TAINTS, *_DEVICE_TAINTS)),
        *(
            {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _LEAVE_SECONDS}
            for key in lost
        ),
    ]


def labels_of(settings: Mapping[str, Any], name: str) -> dict[str, str]:
    """A setting such as ``["example.com/pool:gpu"]`` as labels.

    Raises:
        ComponentValidationException: it is of another form.
    """
    found: dict[str, str] = {}
    for text in settings.get(name) or ():
        key, colon, value = text.partition(":")
        if not (key and colon):
            raise ComponentValidationException(
                f"-cfg {name}={text}: a node's label is written as label:value, e.g. {name}=example.com/pool:gpu"
            )
        found[key] = value
    return found


def _check(role: ProgramRole) -> None:
    _check_urls(role)
    _check_image(role)
    if role.mounts:
        raise ComponentValidationException(
            f"role {role.name} mounts {role.mounts}: pods read and write object stores; give s3://bucket/prefix"
        )
    if role.disk_gb < 4 or role.resource.memMB < 1024 or role.resource.cpu <= 0:
        raise ComponentValidationException(
            f"role {role.name} has {role.resource.cpu} cores, {role.resource.memMB} MB of memory and {role.disk_gb} GB "
            "of disk; a pod needs a core, 1024 MB and 4 GB at least"
        )


def _check_urls(role: ProgramRole) -> None:
    for option, url in role.urls.items():
        if "://" in url or url.startswith(("/", "demo/")):
            continue
        said = f"{option}={url}" if "." in option else f"--{option} {url}"
        raise ComponentValidationException(
            f"{said} is a path of this machine, and a pod has none of its files, nor keeps its own; give "
            f"s3://bucket/prefix" + (", or set SWAV_RUNS=s3://bucket/runs" if option == "output" else "")
        )


def _check_image(role: ProgramRole) -> None:
    name = role.image.rpartition("/")[2]
    if "@" not in name and (":" not in name or name.endswith(":latest")):
        raise ComponentValidationException(
            f"image {role.image} means another one tomorrow; give a version, or better a digest, e.g. "
            f"{role.image.removesuffix(':latest')}@sha256:..."
        )


def _check_size(name: str, tasks: list[dict[str, Any]], num_pods: int) -> None:
    if num_pods > MAX_PODS:
        raise ComponentValidationException(
            f"{num_pods} pods in one job: all start together, and each is told the names of all; use at most "
            f"{MAX_PODS}, with all GPUs of a node in each, e.g. -j 64x8"
        )
    longest = max((f"{name}-{task['name']}-{task['replicas'] - 1}" for task in tasks), key=len)
    if len(longest) > MAX_NAME:
        raise ComponentValidationException(
            f"pod {longest} has a name of {len(longest)} characters, and a host's may have {MAX_NAME}; give a --name "
            f"of at most {len(name) - len(longest) + MAX_NAME}"
        )
