"""Dashboard and alerts: read as Prometheus reads them, and naming only metrics and labels that exist."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from swav_testing.kustomize import K8S, one, render

from swav import meters

DOCS = Path(__file__).parents[2] / "docs"
METRICS = (
    {f"swav_{name}_total" for name in meters.COUNTERS}
    | {f"swav_{name}" for name in meters.GAUGES}
    | {"swav_restarts_total", "swav_world_size", "swav_progress_age_seconds", "swav_goodput_ratio", "swav_build_info"}
)
PROMETHEUS_OWN = {"up"}
LABELS = {"namespace", "pod", "swav_job", "component", "version", "torch", "image"}
ALERTS = {
    *("SwavNoProgress", "SwavCheckpointTooOld", "SwavRestartsTooFrequent", "SwavGoodputLow", "SwavQuarantineBudget"),
    *("SwavNoMetrics", "SwavStorageRetriesHigh", "SwavDataWaitHigh"),
}
RULES = [
    rule
    for group in yaml.safe_load((K8S / "monitoring" / "alerts.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
SHOWN = [target["expr"] for panel in PANELS for target in panel["targets"]]


def selectors(text: str) -> list[promql_parser.VectorSelector]:
    found = []

    def visit(expression: promql_parser.Expr) -> None:
        if isinstance(expression, promql_parser.MatrixSelector):
            expression = expression.vector_selector
        if isinstance(expression, promql_parser.VectorSelector):
            found.append(expression)

    promql_parser.walk(promql_parser.parse(text), visit)
    return found


def grouping(text: str) -> set[str]:
    return {label.strip() for part in re.findall(r"\bby \(([^)]*)\)", text) for label in part.split(",")}


@pytest.mark.parametrize("text", [*(rule["expr"] for rule in RULES), *SHOWN])
def test_expression_names_metrics_and_labels_that_exist(text: str) -> None:
    found = selectors(text)
    assert found
    for selector in found:
        assert selector.name in METRICS | PROMETHEUS_OWN
        assert {matcher.name for matcher in selector.matchers.matchers} <= LABELS
    assert grouping(text) <= LABELS


@pytest.mark.parametrize("text", [*(rule["expr"] for rule in RULES), *SHOWN])
def test_counters_are_looked_at_by_their_rate_or_their_sum(text: str) -> None:
    for name in re.findall(r"swav_\w+", text):
        if name in METRICS and not name.endswith("_total"):
            assert not re.search(rf"(rate|increase)\({name}", text)


def test_there_is_a_wrong_expression_that_the_parser_refuses() -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum by (a) (rate(swav_images_total[5m])")
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("rate(swav_images_total)")


def test_alerts_are_the_ones_that_are_promised() -> None:
    assert {rule["alert"] for rule in RULES} == ALERTS
    assert len(RULES) == len(ALERTS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_tells_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 300
    summary = rule["annotations"]["summary"]
    assert "$labels.swav_job" in summary
    assert set(re.findall(r"\$labels\.(\w+)", summary)) <= LABELS
    assert rule["annotations"]["runbook_url"] == f"docs/observability.md#{rule['alert'].lower()}"
    if rule["alert"] != "SwavNoMetrics":  # by pod
        assert {"namespace", "swav_job"} <= grouping(rule["expr"])


def test_runbook_has_a_section_for_every_alert() -> None:
    page = (DOCS / "observability.md").read_text()
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == ALERTS


def test_every_metric_is_described() -> None:
    page = (DOCS / "observability.md").read_text()
    described = {
        name for row in re.findall(r"^\| (`swav_.*?) \|", page, re.MULTILINE) for name in row.strip("`").split("`, `")
    }
    assert described == METRICS


def test_dashboard_shows_what_is_asked_of_it_once() -> None:
    shown = {selector.name for text in SHOWN for selector in selectors(text)}
    assert shown == METRICS
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)


def test_dashboard_is_for_one_job_or_all_of_a_namespace() -> None:
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "namespace", "job"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) == variables
    assert all('namespace="$namespace", swav_job=~"$job"' in text for text in SHOWN)


def test_dashboard_is_found_by_grafana() -> None:
    found = one("monitoring", "ConfigMap", "swav-dashboard")
    assert json.loads(found["data"]["swav.json"]) == DASHBOARD
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}


def test_pods_are_scraped_where_they_serve_and_get_the_labels_that_alerts_use() -> None:
    spec = one("monitoring", "PodMonitor", "swav")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"swav_job", "component"}
    golden = Path(__file__).parents[1] / "swav_components" / "golden" / "pretrain-large.yaml"
    template = yaml.safe_load(golden.read_text())["spec"]["tasks"][0]["template"]
    labels = template["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    (expression,) = spec["selector"]["matchExpressions"]
    assert labels[expression["key"]] in expression["values"]
    known = {f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}" for name in labels}
    assert {name for each in endpoint["relabelings"] for name in each["sourceLabels"]} <= known
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert ports[endpoint["port"]] == 9400


def test_everything_is_in_the_namespace_where_the_jobs_are() -> None:
    assert {each["metadata"]["namespace"] for each in render("monitoring")} == {"swav"}
