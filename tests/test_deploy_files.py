"""Files for Compose, systemd and Kubernetes are well-formed and name settings, ports, images and keys that exist."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic_settings import BaseSettings

from railbus.embedded.permissions import SERVICE_USERS
from railbus.routes import NODE_VARIABLE
from railbus_shared.settings import CommonSettings, check_urls

REPO = Path(__file__).parents[1]
DEPLOY = REPO / "deploy"
SYSTEMD = sorted(path for path in (DEPLOY / "systemd").rglob("*") if path.is_file())
KUBERNETES = DEPLOY / "kubernetes" / "railbus.yaml"
COMPOSE = sorted(REPO.glob("compose*.yaml"))
FILES = (*SYSTEMD, *sorted((DEPLOY / "kubernetes").iterdir()), *COMPOSE)
OF_COMPOSE_ITSELF = {"RAILBUS_TAG", "RAILBUS_DEPLOY", NODE_VARIABLE}
"""Variables of these files, not of a service."""


def _settings(service: str) -> type[BaseSettings]:
    found: type[BaseSettings] = importlib.import_module(f"railbus_{service}.settings").Settings
    return found


def _variables() -> set[str]:
    classes: tuple[type[BaseSettings], ...] = (CommonSettings, *map(_settings, SERVICE_USERS))
    return {f"{of.model_config.get('env_prefix')}{name}".upper() for of in classes for name in of.model_fields}


def _port(service: str) -> int:
    return int(_settings(service).model_fields["http_port"].default)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_variable_is_a_setting(path: Path) -> None:
    named = set(re.findall(r"RAILBUS_[A-Z0-9_]*[A-Z0-9]", path.read_text()))
    assert named - _variables() - OF_COMPOSE_ITSELF == set()


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def _resources() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def _pods() -> Iterator[dict[str, Any]]:
    for resource in _resources():
        if resource["kind"] in {"Deployment", "DaemonSet"}:
            yield resource["spec"]["template"]["spec"]


def test_kubernetes_would_take_the_resources() -> None:
    for resource in _resources():
        kubernetes_validate.validate(resource, "1.31", strict=True)


def test_every_service_runs_once_in_kubernetes_with_its_port_its_key_and_its_image() -> None:
    containers = {box["name"].replace("-", "_"): (pod, box) for pod in _pods() for box in pod["containers"]}
    assert containers.keys() == set(SERVICE_USERS)
    built = {service["image"].partition(":")[0] for service in _compose()["services"].values() if "build" in service}
    for name, (pod, box) in containers.items():
        env = {each["name"]: each.get("value") for each in box["env"]}
        assert box["image"].partition(":")[0] in built
        assert {port["containerPort"] for port in box["ports"]} == {_port(name)}
        for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            assert box[probe]["httpGet"] == {"path": path, "port": _port(name)}
        assert env[f"RAILBUS_{name.upper()}_HTTP_HOST"] == "0.0.0.0"  # noqa: S104 - of the pod
        keys = next(volume for volume in pod["volumes"] if volume["name"] == "keys")["secret"]["items"]
        assert Path(str(env["RAILBUS_NATS_KEY_FILE"])).name in {key["path"] for key in keys}


AS_ROOT = {"runner": ["SETUID", "SETGID"], "runner-key": None}
"""Containers that are root, until the runner has read its key, and what else they may."""


def test_nothing_in_kubernetes_has_power_over_its_host() -> None:
    for pod in _pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for box in (*pod["containers"], *pod["initContainers"]):
            closed = box["securityContext"]
            assert (closed["allowPrivilegeEscalation"], closed["readOnlyRootFilesystem"]) == (False, True)
            assert closed["capabilities"]["drop"] == ["ALL"]
            assert closed["capabilities"].get("add") == AS_ROOT.get(box["name"])
            assert (closed.get("runAsUser", 10001) == 0) == (box["name"] in AS_ROOT)


def test_training_code_in_kubernetes_is_a_user_whose_keys_are_none() -> None:
    pod = next(pod for pod in _pods() for box in pod["containers"] if box["name"] == "runner")
    boxes = {box["name"]: box for box in (*pod["containers"], *pod["initContainers"])}
    env = {each["name"]: each.get("value") for each in boxes["runner"]["env"]}
    assert (env["RAILBUS_RUNNER_USER"], env["HOME"]) == ("10001:10001", "/root")
    mounts = {name: {mount["name"]: mount["mountPath"] for mount in box["volumeMounts"]} for name, box in boxes.items()}
    assert env["RAILBUS_NATS_KEY_FILE"] == f"{mounts['runner']['runner-key']}/runner.nk"
    assert not {"keys", "own-keys"} & mounts["runner"].keys()  # those of others, and its own that the group can read
    assert "runner.nk" in boxes["runner-key"]["command"][-1]
    assert "runner.nk" not in boxes["keys"]["command"][-1]


def test_a_service_takes_longer_to_be_killed_than_to_drain() -> None:
    for pod in _pods():
        for box in pod["containers"]:
            grace_s = _settings(box["name"].replace("-", "_")).model_fields["grace_s"].default
            assert pod["terminationGracePeriodSeconds"] > grace_s + 10
    unit = (DEPLOY / "systemd" / "railbus@.service").read_text()
    stop_s = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert all(stop_s > _settings(name).model_fields["grace_s"].default + 10 for name in SERVICE_USERS)


def test_the_settings_in_kubernetes_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    (data,) = (resource["data"] for resource in _resources() if resource["kind"] == "ConfigMap")
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    found = CommonSettings()
    check_urls(found.nats_url, insecure=found.insecure)
    values = yaml.safe_load((DEPLOY / "kubernetes" / "nats-values.yaml").read_text())
    assert found.nats_url.count("nats://") == found.replicas == values["config"]["cluster"]["replicas"]
    assert values["config"]["jetstream"]["merge"]["sync_interval"] == "always"
    assert f"nats:{values['container']['image']['tag']}" in (REPO / "compose.cluster.yaml").read_text()


# --- systemd ----------------------------------------------------------------------------------------------------------


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """But for the programs, which are not installed here."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    for path in SYSTEMD:
        copy = tmp_path / path.relative_to(DEPLOY / "systemd")
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(re.sub(r"^ExecStart=(!?)/\S+", r"ExecStart=\1/bin/true", path.read_text(), flags=re.MULTILINE))
    template = (tmp_path / "railbus@.service").read_text()
    for name in SERVICE_USERS:
        (tmp_path / f"railbus@{name}.service").write_text(template)
    assert (tmp_path / "railbus@runner.service.d" / "runner.conf").exists()  # is read with the unit of that name
    units = sorted(str(path) for path in tmp_path.glob("*.service"))
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_unit_runs_each_service_as_nobody_with_its_own_key() -> None:
    unit = (DEPLOY / "systemd" / "railbus@.service").read_text()
    assert re.findall(r"^ExecStart=.* -m (\S+)$", unit, re.MULTILINE) == ["railbus_%i"]
    assert all(importlib.util.find_spec(f"railbus_{name}.__main__") for name in SERVICE_USERS)
    for path in SYSTEMD:
        if path.suffix == ".service":
            text = path.read_text()
            for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "User=railbus"):
                assert f"\n{line}\n" in text, path.name
    assert "LoadCredential=railbus.nk:/etc/railbus/keys/%i.nk" in unit


def test_the_unit_of_the_runner_leaves_training_code_no_key() -> None:
    lines = (DEPLOY / "systemd" / "railbus@runner.service.d" / "runner.conf").read_text().splitlines()
    start = lines.index("ExecStart=")  # or there would be two
    assert re.fullmatch(r"ExecStart=!\S+/python -P -s -m railbus_runner", lines[start + 1])
    assert "Environment=RAILBUS_RUNNER_USER=railbus" in lines  # the User= of the unit, to whom its folders belong
    assert "CapabilityBoundingSet=CAP_SETUID CAP_SETGID" in lines
    assert {"LoadCredential=", "Environment=RAILBUS_NATS_KEY_FILE=/etc/railbus/keys/runner.nk"} <= set(lines)
    assert "InaccessiblePaths=-/run/credentials" in lines


# --- Compose ----------------------------------------------------------------------------------------------------------


def _compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPO / name).read_text())
    return found


def test_the_cluster_changes_services_that_exist_and_waits_for_every_node() -> None:
    single, cluster = _compose(), _compose("compose.cluster.yaml")
    nodes = [
        name for name, service in cluster["services"].items() if "RAILBUS_NATS_NODE" in service.get("environment", {})
    ]
    assert nodes == ["nats", "nats-2", "nats-3"]
    assert [cluster["services"][node]["environment"]["RAILBUS_NATS_NODE"] for node in nodes] == nodes
    services = set(cluster["services"]) - {"init-cluster", *nodes}
    assert {name for name in services if not name.endswith("-gpu")} == set(SERVICE_USERS) <= set(single["services"])
    for name in services:
        service = cluster["services"][name]
        assert list(service["depends_on"]) == nodes
        url = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["environment"]["RAILBUS_NATS_URL"])
        assert url == ",".join(f"nats://{node}:4222" for node in nodes)
    assert f"python -m railbus.routes /deploy {' '.join(nodes)}" in cluster["services"]["init-cluster"]["command"][-1]
    stores = [volume for node in nodes for volume in cluster["services"][node]["volumes"] if volume.endswith(":/data")]
    assert len(set(stores)) == 3
    assert "nats:/data" not in stores
