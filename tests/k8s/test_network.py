"""What the network policies let through, judged packet by packet as a cluster's network would."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml
from swav_testing.kustomize import OVERLAYS, PREREQUISITES, one, render

GOLDEN = Path(__file__).parents[1] / "swav_components" / "golden"
METADATA, PRIVATE, STORE, API = "169.254.169.254", "10.1.2.3", "52.216.1.1", "10.96.0.1"
Pod = dict[str, Any]  # namespace, labels; or the address of what is no pod


def pod(component: str, *, name: str = "job", namespace: str = "swav") -> Pod:
    labels = {"app.kubernetes.io/part-of": "swav", "app.kubernetes.io/component": component}
    return {"namespace": namespace, "labels": labels | {"app.kubernetes.io/name": name}}


S3 = {"namespace": "swav", "labels": {"app.kubernetes.io/name": "swav-s3"}}
DNS = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
PROMETHEUS = {"namespace": "monitoring", "labels": {}}
STRANGER = {"namespace": "elsewhere", "labels": {"app.kubernetes.io/part-of": "swav"}}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def fits(peer: dict[str, Any], other: Pod | str) -> bool:
    if "ipBlock" in peer:
        assert set(peer) == {"ipBlock"}
        if not isinstance(other, str):
            return False  # pods have no address that a policy may count on
        address = ipaddress.ip_address(other)
        block = peer["ipBlock"]
        return inside(address, block["cidr"]) and not any(inside(address, cidr) for cidr in block.get("except", []))
    if isinstance(other, str):
        return False
    namespace = {"kubernetes.io/metadata.name": other["namespace"]}
    ours = {"matchLabels": {"kubernetes.io/metadata.name": "swav"}}
    return selects(peer.get("namespaceSelector", ours), namespace) and selects(
        peer.get("podSelector", {}), other["labels"]
    )


def inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address, cidr: str) -> bool:
    network = ipaddress.ip_network(cidr)
    return network.version == address.version and address in network


def passes(folder: str, way: str, here: Pod, other: Pod | str, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod of the namespace may send to another (``egress``), or get from it (``ingress``)."""
    policies = [each["spec"] for each in render(folder) if each["kind"] == "NetworkPolicy"]
    policies = [each for each in policies if way.capitalize() in each["policyTypes"]]
    policies = [each for each in policies if selects(each["podSelector"], here["labels"])]
    assert policies, "no policy is for this pod, so that it may do anything"
    wanted = {"protocol": protocol, "port": port}
    return any(
        any(fits(peer, other) for peer in rule["from" if way == "ingress" else "to"])
        and wanted in rule.get("ports", [wanted])
        for policy in policies
        for rule in policy.get(way, [])
    )


def connects(folder: str, source: Pod | str, target: Pod | str, port: int, protocol: str = "TCP") -> bool:
    sent = isinstance(source, str) or source["namespace"] != "swav"
    got = isinstance(target, str) or target["namespace"] != "swav"
    return (sent or passes(folder, "egress", source, target, port, protocol)) and (  # type: ignore[arg-type]
        got or passes(folder, "ingress", target, source, port, protocol)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_nothing_passes_without_a_policy_that_says_so(folder: str) -> None:
    spec = one(folder, "NetworkPolicy", "default-deny")["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("folder", PREREQUISITES)
@pytest.mark.parametrize("port", [29500, 9400, 41234])
def test_pods_that_compute_together_reach_one_another_on_any_port(folder: str, port: int) -> None:
    for source, target in [("trainer", "trainer"), ("trainer", "assigner"), ("doctor", "doctor")]:
        assert connects(folder, pod(source), pod(target), port)


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_nobody_else_gets_in(folder: str) -> None:
    for stranger in (STRANGER, PROMETHEUS, PRIVATE, STORE, pod("trainer", namespace="elsewhere")):
        assert not connects(folder, stranger, pod("trainer"), 29500)
    for component in ("driver", "shards"):
        assert not connects(folder, pod("trainer"), pod(component), 8080)
        assert not connects(folder, pod(component), pod("trainer"), 29500)
    assert not connects(folder, {"namespace": "swav", "labels": {}}, pod("trainer"), 29500)


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_prometheus_reads_metrics_and_nothing_else(folder: str) -> None:
    assert connects(folder, PROMETHEUS, pod("trainer"), 9400)
    assert not connects(folder, PROMETHEUS, pod("trainer"), 22)
    assert not connects(folder, STRANGER, pod("trainer"), 9400)


@pytest.mark.parametrize("folder", PREREQUISITES)
@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_every_pod_finds_names(folder: str, protocol: str) -> None:
    for source in (pod("trainer"), pod("driver"), S3):
        assert connects(folder, source, DNS, 53, protocol)
        assert connects(folder, source, "169.254.20.10", 53, protocol)  # NodeLocal DNSCache
    assert not connects(folder, pod("trainer"), STORE, 53, protocol)


@pytest.mark.parametrize("folder", ["base", "overlays/imagenet", "overlays/ig1b"])
@pytest.mark.parametrize("component", ["trainer", "assigner", "evaluator", "shards", "doctor", "driver"])
def test_every_pod_reaches_stores_on_the_internet(folder: str, component: str) -> None:
    assert connects(folder, pod(component), STORE, 443)
    assert connects(folder, pod(component), "2600:1fa0::1", 443)
    assert not connects(folder, pod(component), STORE, 80)


@pytest.mark.parametrize("folder", PREREQUISITES)
@pytest.mark.parametrize("component", ["trainer", "assigner", "evaluator", "shards", "doctor", "driver"])
@pytest.mark.parametrize("address", [METADATA, "169.254.170.2", "fd00:ec2::254"])
def test_no_pod_reaches_the_nodes_metadata(folder: str, component: str, address: str) -> None:
    for port in (80, 443):
        assert not connects(folder, pod(component), address, port)


@pytest.mark.parametrize("folder", PREREQUISITES)
def test_only_the_driver_reaches_the_api_server(folder: str) -> None:
    for port in (443, 6443):
        assert connects(folder, pod("driver"), API, port)
        for component in ("trainer", "assigner", "evaluator", "shards", "doctor"):
            assert not connects(folder, pod(component), API, port)
            assert not connects(folder, pod(component), PRIVATE, port)
            assert not connects(folder, pod(component), "fd12::1", port)


def test_the_laptops_store_is_a_pod_and_nothing_needs_the_internet() -> None:
    for component in ("trainer", "assigner", "evaluator", "shards", "doctor", "driver"):
        assert connects("overlays/kind", pod(component), S3, 7070)
        assert connects("overlays/kind", pod(component), STORE, 443) == (component == "driver")
    assert not connects("overlays/kind", STRANGER, S3, 7070)
    assert not connects("overlays/kind", S3, STORE, 443)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_jobs_have_the_labels_that_the_policies_ask_for(path: Path) -> None:
    for task in yaml.safe_load(path.read_text())["spec"]["tasks"]:
        here = {"namespace": "swav", "labels": task["template"]["metadata"]["labels"]}
        assert connects("base", here, STORE, 443)
        assert connects("base", PROMETHEUS, here, 9400)
        if here["labels"]["app.kubernetes.io/component"] in ("trainer", "doctor"):
            assert connects("base", here, here, 29500)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policies_are_of_a_form_that_is_accepted(overlay: str) -> None:
    for each in render(f"overlays/{overlay}"):
        if each["kind"] != "NetworkPolicy":
            continue
        rules = each["spec"].get("ingress", []) + each["spec"].get("egress", [])
        for rule in rules:
            for port in rule.get("ports", []):
                assert port["protocol"] in ("TCP", "UDP")
                assert 1 <= port["port"] <= 65535
            for peer in rule.get("from", []) + rule.get("to", []):
                block = peer.get("ipBlock", {"cidr": "0.0.0.0/0"})
                whole: Any = ipaddress.ip_network(block["cidr"])  # refuses bits of a host
                for cidr in block.get("except", []):
                    part: Any = ipaddress.ip_network(cidr)
                    assert part.version == whole.version
                    assert part.subnet_of(whole)
                    assert part != whole
