"""What `python -m railbus.routes` leaves for the nodes of a cluster, and nats-servers that run with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus.deployment import deploy
from railbus.routes import NODE_VARIABLE, deploy_routes, render_cluster
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BadSetting, ConfigError, TransientError
from railbus_shared.settings import CommonSettings
from servers import server_binary
from until import PATIENCE_S, until

NODES = ("127.0.77.1", "127.0.77.2", "127.0.77.3")
STRANGER = "127.0.77.4"


def test_the_password_is_random_private_and_kept(tmp_path: Path) -> None:
    assert deploy_routes(tmp_path, NODES)
    password = (tmp_path / "keys" / "route").read_text().strip()
    assert len(password) == 48
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"keys": 0o700, "route": 0o600, "cluster.conf": 0o600}
    assert not deploy_routes(tmp_path, NODES)
    assert deploy_routes(tmp_path, ("a", "b", "c"))
    assert (tmp_path / "keys" / "route").read_text().strip() == password
    deploy_routes(tmp_path / "other", NODES)
    assert (tmp_path / "other" / "keys" / "route").read_text().strip() != password


def test_a_password_that_others_can_read_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    deploy_routes(tmp_path, NODES)
    path = tmp_path / "keys" / "route"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may use it"):
        deploy_routes(tmp_path, NODES)
    path.chmod(0o600)
    path.write_text('a"b')
    with pytest.raises(ConfigError, match="no password"):
        deploy_routes(tmp_path, NODES)


@pytest.mark.parametrize("nodes", ["", "a", "a b", "a b b", "a b c d", "a b c@d", "a b c:1", "a b -c"])
def test_nodes_that_make_no_cluster_are_refused(tmp_path: Path, nodes: str) -> None:
    with pytest.raises(BadSetting):
        deploy_routes(tmp_path, nodes.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [(), ("one",), ("/dev/null/folder", *NODES)])
def test_wrong_arguments_are_told_in_one_line_with_status_2(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "railbus.routes", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert json.loads(done.stderr)["level"] == "error"


@pytest.fixture(params=["plain", "tls"])
def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Three servers with the files as they are but for addresses and stores; a fourth guesses the password."""
    deploy(tmp_path, tls_hosts=NODES if request.param == "tls" else ())
    deploy_routes(tmp_path, NODES)
    running = [_started(tmp_path, node) for node in (*NODES, STRANGER)]
    yield tmp_path
    for process in running:
        process.kill()
        process.wait(PATIENCE_S)


def _started(deployed: Path, node: str) -> subprocess.Popen[bytes]:
    folder = deployed / node
    folder.mkdir()
    single = json.loads((deployed / "nats.conf").read_bytes())
    single |= {"listen": f"{node}:4222", "http": f"{node}:8222"}
    single["jetstream"]["store_dir"] = str(folder / "data")
    (folder / "nats.conf").write_text(json.dumps(single).replace('"/deploy/', f'"{deployed}/'))
    cluster = (deployed / "cluster.conf").read_text()
    if node == STRANGER:
        has_tls = (deployed / "tls").exists()
        cluster = render_cluster(NODES, password="0" * 48, has_tls=has_tls).decode()
    (folder / "cluster.conf").write_text(cluster.replace("0.0.0.0:", f"{node}:").replace('"/deploy/', f'"{deployed}/'))
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [server_binary(), "-c", str(folder / "cluster.conf")], env={NODE_VARIABLE: node}, stdout=log, stderr=log
        )


@pytest.mark.timeout(60)  # the nodes elect a leader first
async def test_servers_make_a_cluster_that_a_stranger_does_not_join(nodes: Path) -> None:
    authority = nodes / "tls" / "ca.crt"
    scheme, trusted = ("tls", authority) if authority.exists() else ("nats", None)
    urls = ",".join(f"{scheme}://{node}:4222" for node in NODES)
    key = nodes / "keys" / "device_manager.nk"
    settings = CommonSettings(
        root=nodes / "learning", nats_url=urls, nats_key_file=key, nats_ca_file=trusted, replicas=3
    )
    async with Bus.open(settings, name="device_manager", service=True) as bus:

        async def is_made() -> bool:
            try:
                await topology.ensure(bus, nodes / "store.json")
            except TransientError:
                return False
            return True

        await until(is_made)
        info = await bus.client.jetstream().stream_info(bus.subjects.jobs_stream)
        assert info.cluster is not None
        assert {info.cluster.leader, *(peer.name for peer in info.cluster.replicas or ())} == set(NODES)
    assert ('"ca_file"' in (nodes / "cluster.conf").read_text()) == authority.exists()
    await until(lambda: "Authorization Violation" in (nodes / STRANGER / "log").read_text())
