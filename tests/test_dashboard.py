"""The dashboard and the alerts ask for nothing that no source declares; an end-to-end test asks the services."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import dashboard
from railbus_dataloader.settings import Settings as DataloaderSettings
from railbus_device_manager.settings import Settings as DeviceManagerSettings
from railbus_runner.settings import Settings as RunnerSettings
from railbus_telemetry.settings import Settings as TelemetrySettings

PROMETHEUS = Path(__file__).parents[1] / "deploy/prometheus"
SETTINGS = (DeviceManagerSettings, DataloaderSettings, RunnerSettings, TelemetrySettings)
SHOWN_ELSEWHERE = {"process_virtual_memory_bytes", "process_start_time_seconds", "process_open_fds", "process_max_fds"}
QUERIES = [*dashboard.expressions(), *(rule["expr"] for rule in dashboard.alerts())]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_that_there_are_by_labels_that_they_have(query: str) -> None:
    known = dashboard.known()
    for name, labels in dashboard.labels([query]).items():
        beside = set(dashboard.metrics([query])) - {name}
        others = {label for other in beside for label in known[dashboard.family(other)]}
        assert labels - dashboard.OF_PROMETHEUS <= known[dashboard.family(name)] | others, name


def test_every_metric_is_shown() -> None:
    shown = {dashboard.family(name) for name in dashboard.metrics()}
    assert set(dashboard.known()) - shown == {dashboard.family(name) for name in SHOWN_ELSEWHERE}


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


def test_a_panel_has_the_unit_of_what_it_shows() -> None:
    for panel in json.loads(dashboard.DASHBOARD.read_text())["panels"]:
        names = dashboard.metrics([target["expr"] for target in panel.get("targets", [])] or [""])
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        is_rate = any("rate(" in target["expr"] for target in panel.get("targets", []))
        if not is_rate and all(name.endswith("_bytes") for name in names) and len(names) == 1:
            assert unit == "bytes", panel["title"]
        if any(name.endswith("_seconds_bucket") for name in names):
            assert unit == "s", panel["title"]


def test_prometheus_scrapes_the_ports_that_services_have_and_reads_the_alerts() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    ports = [settings.model_fields["http_port"].default for settings in SETTINGS]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
    assert [PROMETHEUS / name for name in config["rule_files"]] == [dashboard.ALERTS]


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in dashboard.alerts():
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}  # type: ignore[index]  # YAML


def test_every_alert_is_played() -> None:
    played = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    raised = {one["alertname"] for test in played for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert raised == {rule["alert"] for rule in dashboard.alerts()}


def test_promtool_agrees_with_rules_and_their_play() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (it comes with Prometheus)")
    for asked in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *asked], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
