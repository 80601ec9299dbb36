"""Alerts and dashboard use metrics and labels that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from loray.telemetry import METRICS, PREFIX, Metric
from tests.conftest import REPOSITORY
from tests.infra.manifests import pods, render, the

FOLDER = REPOSITORY / "infra" / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yaml").read_text())
BY_NAME = {m.name: m for m in METRICS.values()}
_SELECTOR = re.compile(rf"\b({PREFIX}\w+)(?:\{{([^}}]*)\}})?")


EXPRESSIONS = {rule["expr"] for group in RULES["spec"]["groups"] for rule in group["rules"]}
EXPRESSIONS |= {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}


def metric(name: str) -> Metric | None:
    """The metric by the name that Prometheus stores; the parts of a histogram have suffixes."""
    histogram = BY_NAME.get(re.sub(r"_(bucket|sum|count)$", "", name))
    return BY_NAME.get(name) or (histogram if histogram is not None and histogram.kind == "histogram" else None)


@pytest.mark.parametrize("expression", sorted(EXPRESSIONS))
def test_metrics_and_labels_exist(expression: str) -> None:
    used = _SELECTOR.findall(expression)
    assert used
    labels = {"replica", "gateway"}
    for name, selector in used:
        found = metric(name)
        assert found is not None, f"{name} is no metric of loray.telemetry"
        assert (found.kind == "histogram") == (name != found.name), f"{name} is a {found.kind}"
        if found.kind in ("counter", "histogram"):
            assert re.search(rf"(rate|increase)\({name}\b", expression), f"{name} only ever grows"
        selected = set(re.findall(r"(\w+)\s*[=!]", selector))
        assert selected <= {*found.labels, "replica", "gateway"}
        labels |= {*found.labels, *(["le"] if found.kind == "histogram" else [])}
    grouped = {
        label for by in re.findall(r"\b(?:by|ignoring)\s*\(([^)]*)\)", expression) for label in re.split(r",\s*", by)
    }
    assert grouped <= labels


def test_alerts_say_what_to_do() -> None:
    rules = [rule for group in RULES["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_dashboard_is_whole() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {v["name"] for v in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"} == variables
    (asked,) = re.findall(r"label_values\((\w+), (\w+)\)", text)
    assert asked[0] in BY_NAME


def test_prometheus_asks_where_loray_answers() -> None:
    scrape, monitor = yaml.safe_load_all((FOLDER / "scrape.yaml").read_text())
    service = the("RayService", "overlays/gpu")["metadata"]
    (target,) = scrape["spec"]["staticConfigs"][0]["targets"]
    assert target == f"{service['name']}-serve-svc.{service['namespace']}.svc:8000"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert all(wanted <= pod.labels.items() for folder in ("base", "train") for pod in pods(folder))


def test_it_renders() -> None:
    kinds = [d["kind"] for d in render("../observability")]
    assert sorted(kinds) == ["ConfigMap", "PodMonitor", "PrometheusRule", "ScrapeConfig"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(RULES["spec"]))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
