"""What the dashboard for Grafana and the alerts ask Prometheus for, and what there is to be asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from railbus.metrics_page import OF_EVERY_PROCESS, declared

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/railbus.json"
ALERTS = Path(__file__).parents[1] / "deploy/prometheus/alerts.yml"
OF_PROMETHEUS = {"instance", "job", "le"}
_METRIC = re.compile(r"\b(?:railbus|process)_\w+")
_SELECTOR = re.compile(r"((?:railbus|process)_\w+)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_BY = re.compile(r"\bby \(([^)]*)\)")


def expressions() -> list[str]:
    """Every query of every panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alerts() -> list[dict[str, str]]:
    """Every rule."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def metrics(asked: list[str] | None = None) -> set[str]:
    """Names of the metrics that are asked for, as Prometheus has them; by the dashboard unless others are given."""
    return {name for expression in asked or expressions() for name in _METRIC.findall(expression)}


def labels(asked: list[str]) -> dict[str, set[str]]:
    """The labels by which each metric is selected or summed."""
    found: dict[str, set[str]] = {}
    for expression in asked:
        for name, selector in _SELECTOR.findall(expression):
            found.setdefault(name, set()).update(_LABEL.findall(selector))
        for name in metrics([expression]):
            summed = {label.strip() for labels in _BY.findall(expression) for label in labels.split(",")}
            found.setdefault(name, set()).update(summed)
    return found


def family(name: str) -> str:
    """The name under which a metric is declared, from that of one of its series."""
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


def known() -> dict[str, set[str]]:
    """Labels of every metric that there is, by its family."""
    found: dict[str, set[str]] = {family(name): set() for name in OF_EVERY_PROCESS}
    for one in declared():
        found.setdefault(family(one.name), set()).update(one.labels)
    return found
