"""The alerts and the dashboard, by Prometheus's own tool and against the metrics that the server has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from deployment_tools import ALERTS, CHART, alert_rules, dashboard_expressions, metrics_in, one, rendered, succeeded

from mii_serve.metrics import FrontMetrics, ReplicaMetrics

CASES = Path(__file__).parent / "alerts.test.yaml"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"), "gauge": ("",)}


def names_of_metrics() -> set[str]:
    families = [*FrontMetrics().registry.collect(), *ReplicaMetrics().registry.collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def test_prometheus_reads_the_alerts():
    assert f"{len(alert_rules())} rules found" in succeeded("promtool", "check", "rules", ALERTS)


def test_alerts_fire_when_they_should_and_only_then():
    succeeded("promtool", "test", "rules", CASES)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alert_rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == set(rule["annotations"])


def test_every_metric_that_an_alert_names_exists():
    for rule in alert_rules():
        assert metrics_in(rule["expr"]) and metrics_in(rule["expr"]) <= names_of_metrics(), rule["alert"]


def test_every_metric_that_the_dashboard_names_exists():
    assert len(dashboard_expressions()) > 25
    for expression in dashboard_expressions():
        assert metrics_in(expression) and metrics_in(expression) <= names_of_metrics(), expression


def test_the_dashboard_shows_every_metric():
    """A new metric gets its panel; a family counts if any of its series is shown."""
    shown = set().union(*map(metrics_in, dashboard_expressions()))
    families = [*FrontMetrics().registry.collect(), *ReplicaMetrics().registry.collect()]
    assert [family.name for family in families if not any(name.startswith(family.name) for name in shown)] == []


def test_every_metric_of_the_autoscalers_exists():
    keda = one(rendered("-f", CHART / "ci" / "full-values.yaml"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
    adapter = (CHART / "files" / "prometheus-adapter.yaml").read_text()
    for text in (keda, adapter.partition("rules:")[2]):
        assert metrics_in(text) == {"mii_serve_queued_work_seconds"} <= names_of_metrics()


@pytest.mark.parametrize("source", ["dashboard", "keda"])
def test_prometheus_reads_every_expression(source, tmp_path):
    expressions = dashboard_expressions()
    if source == "keda":
        objects = rendered("-f", CHART / "ci" / "full-values.yaml")
        expressions = [one(objects, "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]]
    plain = [re.sub(r"\$__rate_interval", "5m", expression) for expression in expressions]
    rules = [{"record": f"trial:{number}", "expr": expression} for number, expression in enumerate(plain)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "trial", "rules": rules}]}))
    assert f"{len(rules)} rules found" in succeeded("promtool", "check", "rules", tmp_path / "rules.yaml")
