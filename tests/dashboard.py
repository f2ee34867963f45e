"""What the dashboard for Grafana asks Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/railbus.json"
_METRIC = re.compile(r"\brailbus_\w+")
_SELECTOR = re.compile(r"(railbus_\w+)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def expressions() -> list[str]:
    """Every query of every panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def metrics() -> set[str]:
    """Names of the metrics that are asked for, as Prometheus has them."""
    return {name for expression in expressions() for name in _METRIC.findall(expression)}


def labels() -> dict[str, set[str]]:
    """The labels by which each metric is selected."""
    found: dict[str, set[str]] = {}
    for expression in expressions():
        for name, selector in _SELECTOR.findall(expression):
            found.setdefault(name, set()).update(_LABEL.findall(selector))
    return found


def family(name: str) -> str:
    """The name under which a metric is declared, from that of one of its series."""
    return re.sub(r"_(total|bucket|sum|count)$", "", name)
