"""The dashboard for Grafana asks for nothing that no source declares; `tests/e2e/test_devices.py` asks the services."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import yaml

import dashboard
from railbus_dataloader.settings import Settings as DataloaderSettings
from railbus_device_manager.settings import Settings as DeviceManagerSettings
from railbus_runner.settings import Settings as RunnerSettings
from railbus_telemetry.settings import Settings as TelemetrySettings

REPO = Path(__file__).parents[1]
OF_PROMETHEUS = {"instance", "job", "le"}
SETTINGS = (DeviceManagerSettings, DataloaderSettings, RunnerSettings, TelemetrySettings)


def declared() -> dict[str, set[str]]:
    """Labels of every metric that a source declares, by its name."""
    found = {}
    for path in [*REPO.glob("shared/*/*.py"), *REPO.glob("services/*/*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".counter", ".gauge", ".histogram")):
                name, _, *labels = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                found[f"railbus_{name!s}"] = {str(label) for label in labels}
    assert len(found) > 20
    return found


def test_every_metric_of_the_dashboard_is_declared_with_the_labels_it_is_selected_by() -> None:
    known = declared()
    for name, labels in dashboard.labels().items():
        assert labels - OF_PROMETHEUS <= known[dashboard.family(name)], name
    assert {dashboard.family(name) for name in dashboard.metrics()} == set(known), "a metric is shown nowhere"


def test_what_is_summed_by_a_label_has_that_label() -> None:
    known = declared()
    for expression in dashboard.expressions():
        labels = {label for found in re.findall(r"\bby \(([^)]*)\)", expression) for label in found.split(", ")}
        shown = set(re.findall(r"railbus_\w+", expression))
        assert all(labels - OF_PROMETHEUS <= known[dashboard.family(name)] for name in shown), expression


def test_panels_have_titles_numbers_and_places_of_their_own() -> None:
    panels = json.loads(dashboard.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_prometheus_scrapes_the_ports_that_services_have() -> None:
    config = yaml.safe_load((REPO / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    ports = [settings.model_fields["http_port"].default for settings in SETTINGS]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
