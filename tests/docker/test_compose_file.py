"""What compose.yaml promises, read as data: also where there is no engine to try it with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from railbus_dataloader.settings import Settings as DataloaderSettings
from railbus_device_manager.settings import Settings as DeviceManagerSettings
from railbus_runner.settings import Settings as RunnerSettings
from railbus_telemetry.settings import Settings as TelemetrySettings

REPOSITORY = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SETTINGS = {
    "device_manager": DeviceManagerSettings,
    "dataloader": DataloaderSettings,
    "runner": RunnerSettings,
    "telemetry": TelemetrySettings,
}
ON_GPUS = {"device_manager": "device_manager-gpu", "runner": "runner-gpu"}
SERVING = (*SETTINGS, *ON_GPUS.values(), "nats")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_nothing_has_more_power_than_it_needs(name: str) -> None:
    service = COMPOSE["services"][name]
    assert (service["init"], service["read_only"], service["cap_drop"]) == (True, True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= service.keys()
    if name == "init":  # hands keys to their owners, and hears nobody
        assert service["network_mode"] == "none"
        assert service["cap_add"] == ["CHOWN", "DAC_OVERRIDE", "FOWNER"]
    elif _base(name) == "runner":  # root until it has read its key; its init passes signals on to another user
        assert (service["user"], service["cap_add"]) == ("0:0", ["SETUID", "SETGID", "KILL"])
        assert service["environment"]["RAILBUS_RUNNER_USER"] == "10001:10001"
        assert service["environment"]["HOME"] == "/root"
    else:
        assert service["user"] == "10001:10001"
        assert "cap_add" not in service


@pytest.mark.parametrize("name", SERVING)
def test_ports_are_published_on_loopback(name: str) -> None:
    assert COMPOSE["services"][name]["ports"]
    for port in COMPOSE["services"][name]["ports"]:
        assert port.startswith(("127.0.0.1:", "${NATS_LISTEN:-127.0.0.1}:")), port


@pytest.mark.parametrize("name", SERVING)
def test_a_service_sees_one_key_its_own(name: str) -> None:
    sources = [mount for mount in COMPOSE["services"][name]["volumes"] if "RAILBUS_DEPLOY" in mount]
    own = f"/keys/{_base(name)}.nk:/run/secrets/railbus.nk:ro"
    folder = "${RAILBUS_DEPLOY:-./deploy}"
    assert sources == [folder + (":/deploy:ro" if name == "nats" else own)]  # NATS's uid cannot open the keys


@pytest.mark.parametrize("name", [*SETTINGS, *ON_GPUS.values()])
def test_a_container_may_take_longer_to_stop_than_its_service_to_drain(name: str) -> None:
    settings = SETTINGS[_base(name)]()
    grace_s = int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= settings.grace_s + getattr(settings, "reap_s", 0) + 10


@pytest.mark.parametrize("name", [*SETTINGS, *ON_GPUS.values()])
def test_health_is_asked_where_the_service_answers(name: str) -> None:
    service, settings = COMPOSE["services"][name], SETTINGS[_base(name)]()
    assert service["environment"]["HEALTH_PORT"] == settings.http_port
    assert service["ports"][0].endswith(f":{settings.http_port}")
    assert "/readyz" in service["healthcheck"]["test"][-1]
    assert all(need["condition"] != "service_started" for need in service["depends_on"].values())


def test_one_profile_has_one_runner_and_one_device_manager() -> None:
    services = COMPOSE["services"]
    for cpu, gpu in ON_GPUS.items():
        assert (services[cpu]["profiles"], services[gpu]["profiles"]) == (["cpu"], ["gpu"])
        (device,) = services[gpu]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        kept = {"profiles", "deploy", "depends_on"}
        assert {word: services[cpu][word] for word in services[cpu].keys() - kept} == {
            word: services[gpu][word] for word in services[gpu].keys() - kept
        }
    assert "COMPOSE_PROFILES=cpu\n" in (REPOSITORY / ".env").read_text()
    assert [name for name in services if "profiles" not in services[name]] == [
        "init",
        "nats",
        "telemetry",
        "dataloader",
    ]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("compose*.yaml")), ids=lambda path: path.name)
def test_what_a_person_exports_for_their_own_commands_does_not_reach_the_services(path: Path) -> None:
    """docs/docker.md has them export the URL on loopback and their own key, in the shell that then says `up`."""
    assert not set(re.findall(r"\$\{(\w+)", path.read_text())) & {
        "RAILBUS_NATS_URL",
        "RAILBUS_NATS_KEY_FILE",
        "RAILBUS_ROOT",
    }


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cluster.yaml"])
def test_nats_is_begun_anew_where_what_makes_its_configuration_is(name: str) -> None:
    """Another image or the options of TLS: NATS itself is the same, and would go on with what it has read."""
    services = yaml.safe_load((REPOSITORY / name).read_text())["services"]
    nodes = [service for node, service in services.items() if node == "nats" or node.startswith("nats-")]
    assert nodes
    for node in nodes:
        makers = {maker: need for maker, need in node["depends_on"].items() if maker.startswith("init")}
        assert makers
        assert all(need["restart"] for need in makers.values())


def test_every_node_of_nats_is_asked_the_same() -> None:
    """Two files cannot share an anchor."""
    cluster = yaml.safe_load((REPOSITORY / "compose.cluster.yaml").read_text())["services"]
    asked = [COMPOSE["services"]["nats"], cluster["nats-2"], cluster["nats-3"]]
    assert len({str(node["healthcheck"]["test"]) for node in asked}) == 1


def test_images_have_an_exact_tag_which_a_variable_changes() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, flags=re.MULTILINE) == ["python:3.11-slim-bookworm"]
    assert COMPOSE["services"]["nats"]["image"] == "${NATS_IMAGE:-nats:2.15.1-alpine}"
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, flags=re.MULTILINE)
    assert stages[-1] == ("base", "runner")  # the classic builder builds all that stands above a target


def _base(name: str) -> str:
    return name.removesuffix("-gpu")
