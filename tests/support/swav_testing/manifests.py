"""Kubernetes objects as an API server would judge them: schemas, strictly, and the restricted Pod Security Standard."""

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CRDS = Path(__file__).parents[4] / "shared" / "k8s" / "volcano-crds.yaml"
VERSIONS = ("1.29", "1.33", "1.37")  # of Kubernetes
_RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def check(found: dict[str, Any]) -> None:
    """Validate an object of Kubernetes' own against the schemas of several versions; unknown fields are errors."""
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)


def check_template(template: dict[str, Any]) -> None:
    """Validate a pod's template, which Volcano's schema leaves out in part."""
    metadata = {"name": "pod", **template.get("metadata", {})}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


@functools.cache
def _volcano_schemas() -> dict[str, dict[str, Any]]:
    if not CRDS.exists():
        pytest.skip(f"needs Volcano's definitions, {CRDS}")
    found = {}
    for definition in yaml.safe_load_all(CRDS.read_text()):
        if definition is not None:
            version = definition["spec"]["versions"][0]
            kind = definition["spec"]["names"]["kind"]
            found[f"{definition['spec']['group']}/{version['name']} {kind}"] = _strict(
                version["schema"]["openAPIV3Schema"]
            )
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema under which unknown fields are errors, and whole numbers may stand for quantities."""
    found = copy.copy(schema)
    if found.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in found:
        found["properties"] = {name: _strict(part) for name, part in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in found:
            found["additionalProperties"] = False
    if isinstance(found.get("items"), dict):
        found["items"] = _strict(found["items"])
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = _strict(found["additionalProperties"])
    return found


def check_volcano(found: dict[str, Any]) -> None:
    """Validate an object against the schema in Volcano's definition of its kind; skips without the definitions."""
    schema = copy.deepcopy(_volcano_schemas()[f"{found['apiVersion']} {found['kind']}"])
    schema["properties"] |= {"metadata": {"type": "object"}, "apiVersion": {}, "kind": {}}
    jsonschema.Draft7Validator(schema).validate(found)


def violations(pod: dict[str, Any]) -> list[str]:
    """What the restricted Pod Security Standard refuses in a pod's spec."""
    found = [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [
        f"volume {volume['name']} is of another kind than allowed"
        for volume in pod.get("volumes", [])
        if not set(volume) - {"name"} <= _RESTRICTED_VOLUMES
    ]
    whole = pod.get("securityContext", {})
    if whole.get("sysctls"):
        found.append("sysctls are set")
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        asked = {
            "may gain privileges": own.get("allowPrivilegeEscalation") is not False,
            "is privileged": bool(own.get("privileged")),
            "keeps capabilities": "ALL" not in own.get("capabilities", {}).get("drop", []),
            "adds capabilities": bool(set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}),
            "may be root": not own.get("runAsNonRoot", whole.get("runAsNonRoot")),
            "is root": 0 in (own.get("runAsUser"), whole.get("runAsUser")),
            "has no seccomp profile": own.get("seccompProfile", whole.get("seccompProfile", {})).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "takes ports of the node": any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{container['name']} {what}" for what, is_so in asked.items() if is_so]
    return found
