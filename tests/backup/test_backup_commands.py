"""`railbus backup` and `railbus restore` as an operator types them: who may, what is killed, and how much memory."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backup_stores import EVENTS, JOBS, another_server, ensured, event, joined, messages, newest, set_key
from commands import environment, railbus
from railbus.embedded.permissions import HUMAN, OPERATOR
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.snapshots import stream_info
from railbus_shared.errors import StoreMissing
from railbus_shared.settings import CommonSettings
from railbus_shared.store_marker import StoreMarker, marker_path, read_marker, write_marker
from servers import Server
from until import until
from users_for_tests import running_cluster

NUM_KILLS = 8


@pytest.fixture
async def empty(tmp_path: Path) -> AsyncIterator[Server]:
    with another_server(tmp_path / "target") as server:
        yield server


@pytest.mark.timeout(60)  # starts four commands
@pytest.mark.parametrize("user", [HUMAN, "device_manager"])
async def test_only_the_key_of_the_operator_backs_up_and_restores(tmp_path: Path, user: str) -> None:
    with running_cluster(tmp_path / "servers") as cluster:
        async with cluster.bus("device_manager") as bus:
            await topology.ensure(bus, tmp_path / "store.json")
            await event(bus, 1)

        def typed(*words: str, by: str) -> tuple[int, str]:
            key = str(cluster.keys[by].seed_path)
            env = {"RAILBUS_NATS_URL": cluster.server.url, "RAILBUS_NATS_KEY_FILE": key}
            done = railbus(*words, cwd=tmp_path, env=env)
            return done.status, done.err

        status, said = typed("backup", "mine", by=user)
        assert status == 4, said
        assert "error[NOT_AUTHORIZED]" in said
        assert not any((tmp_path / name).exists() for name in ("mine", ".mine.tmp"))
        assert typed("backup", "monday", by=OPERATOR)[0] == 0
        status, said = typed("restore", "monday", "--replace", by=user)
        assert status == 4, said
        async with cluster.bus("device_manager") as bus:
            assert len(await messages(bus, EVENTS)) == 1
            await topology.check(bus, tmp_path / "store.json")
            await event(bus, 2)
        assert typed("restore", "monday", "--replace", by=OPERATOR)[0] == 0
        async with cluster.bus("device_manager") as bus:
            assert len(await messages(bus, EVENTS)) == 1
            assert await ensured(bus, tmp_path / "fresh.json")


@pytest.mark.timeout(60)  # likewise
async def test_a_deployment_is_backed_up_with_its_own_key_and_told_as_json(
    bus: Bus, server: Server, tmp_path: Path
) -> None:
    assert railbus("init", "deploy", cwd=tmp_path).status == 0
    await event(bus, 1)
    env = {"RAILBUS_NATS_URL": server.url}
    done = railbus("backup", "monday", "-d", "deploy", "--json", cwd=tmp_path, env=env)
    assert done.status == 0, done.err
    told = done.json()
    assert isinstance(told, dict)
    assert (told["folder"], told["incarnation"]) == ("monday", bus.incarnation)
    assert told["streams"][-1]["name"] == EVENTS
    assert told["streams"][-1]["messages"] == 1
    files = {path.name: path.stat() for path in (tmp_path / "monday").iterdir()}
    assert told["bytes"] == sum(stat.st_size for name, stat in files.items() if name != "manifest.json")
    assert {stat.st_mode & 0o777 for stat in files.values()} == {0o600}
    assert (tmp_path / "monday").stat().st_mode & 0o777 == 0o700
    (tmp_path / "deploy" / "keys" / "operator.nk").unlink()
    refused = railbus("backup", "tuesday", "-d", "deploy", cwd=tmp_path, env=env)
    assert (refused.status, "there is no key of the operator" in refused.err) == (4, True)
    nowhere = railbus("backup", "tuesday", cwd=tmp_path)
    assert (nowhere.status, "nothing runs on" in nowhere.err) == (5, True)


@pytest.mark.timeout(60)  # likewise
async def test_the_root_that_restores_knows_the_store_and_other_hosts_join(
    bus: Bus, server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    marker = marker_path(common.layout)
    env = {"RAILBUS_NATS_URL": server.url}
    assert railbus("backup", "monday", cwd=tmp_path, env=env).status == 0
    other = tmp_path / "other" / ".railbus" / "store.json"
    await ensured(bus, other)
    done = railbus("restore", "monday", "--replace", "--json", cwd=tmp_path, env=env)
    assert done.status == 0, done.err
    told = done.json()
    assert isinstance(told, dict)
    assert read_marker(marker).incarnation == told["incarnation"] != told["backed_up"]
    assert told["root_accepted"]
    assert await ensured(bus, marker) == told["incarnation"]
    assert railbus("--root", "other", "restore", "--join", cwd=tmp_path).status == 0
    assert await ensured(bus, other) == told["incarnation"]
    of_another_store = StoreMarker("another", (JOBS,))
    write_marker(marker, of_another_store)
    again = railbus("restore", "monday", "--replace", cwd=tmp_path, env=env)
    assert (again.status, "on every host, with its root" in again.err) == (0, True)
    assert read_marker(marker) == of_another_store


@pytest.mark.timeout(150)  # starts nine commands
async def test_a_restore_that_is_killed_at_any_moment_leaves_nothing_that_is_taken_for_a_store(
    bus: Bus, server: Server, empty: Server, tmp_path: Path
) -> None:
    for number in range(1, 101):
        await event(bus, number, num_bytes=300_000)
        await set_key(bus, "railbus_datasets", f"k{number % 20}", bytes([number]) * 100_000)
        await bus.publish(Outgoing(bus.subjects.submit, b"{}", f"job-{number}"))
    env = {"RAILBUS_NATS_URL": server.url}
    assert railbus("backup", "monday", cwd=tmp_path, env=env).status == 0
    command = [sys.executable, "-m", "railbus.cli.main", "restore", "monday"]
    states = set()
    for number in range(NUM_KILLS):
        running = subprocess.Popen(command, cwd=tmp_path, env=environment({"RAILBUS_NATS_URL": empty.url}))
        async with joined(empty, tmp_path) as target:
            await until(functools.partial(_has_begun, running, target))
            await asyncio.sleep(number * 0.25)  # a moment, whichever it is
            running.kill()
            running.wait()
            states.add(await _state_of_the_store(target, tmp_path / f"fresh{number}.json"))
    assert "refused" in states
    assert states <= {"empty", "refused", "whole"}
    last = railbus("restore", "monday", "--replace", cwd=tmp_path, env={"RAILBUS_NATS_URL": empty.url})
    assert last.status == 0, last.err
    async with joined(empty, tmp_path) as target:
        assert await ensured(target, tmp_path / "at-last.json")
        for name in (JOBS, EVENTS, "KV_railbus_datasets"):
            assert await messages(target, name) == await messages(bus, name)


async def _has_begun(running: subprocess.Popen[bytes], target: Bus) -> bool:
    return await stream_info(target, JOBS) is not None or running.poll() is not None


async def _state_of_the_store(target: Bus, marker: Path) -> str:
    """Whether a service takes it: if so, it must be whole."""
    if await stream_info(target, JOBS) is None:
        assert await stream_info(target, EVENTS) is None
        return "empty"
    try:
        await topology.ensure(target, marker)
    except StoreMissing as exc:
        return "refused" if "not whole" in exc.message else exc.message
    assert len(await messages(target, EVENTS)) == 100
    assert len(await messages(target, JOBS)) == 100
    assert len(await newest(target, "KV_railbus_datasets")) == 20
    return "whole"


@pytest.mark.timeout(150)  # starts as many
async def test_a_backup_that_is_killed_at_any_moment_is_no_backup_and_the_next_one_is(
    bus: Bus, server: Server, tmp_path: Path
) -> None:
    for number in range(1, 81):
        await event(bus, number, num_bytes=300_000)
    env = {"RAILBUS_NATS_URL": server.url}
    command = [sys.executable, "-m", "railbus.cli.main", "backup", "monday"]
    litter = tmp_path / ".monday.tmp"
    num_killed = 0
    while num_killed < NUM_KILLS:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment(env))
        await until(lambda process=running: litter.exists() or process.poll() is not None)  # type: ignore[misc]
        await asyncio.sleep(num_killed * 0.02)
        running.kill()
        num_killed += running.wait() != 0
        assert not (tmp_path / "monday").exists() or (tmp_path / "monday" / "manifest.json").exists()
        if (tmp_path / "monday").exists():
            if num_killed >= 2:
                break
            shutil.rmtree(tmp_path / "monday")  # it was quicker than who was to kill it
    if not (tmp_path / "monday").exists():
        assert railbus("backup", "monday", cwd=tmp_path, env=env).status == 0
    assert not litter.exists()
    assert railbus("restore", "monday", "--replace", cwd=tmp_path, env=env).status == 0
    assert len(await messages(bus, EVENTS)) == 80


@pytest.mark.timeout(240)  # 200 MB are stored, copied, hashed and put back
async def test_200_mb_are_copied_and_put_back_in_little_memory(
    bus: Bus, server: Server, empty: Server, tmp_path: Path
) -> None:
    filler = [os.urandom(500_000) for _ in range(4)]
    env = {"RAILBUS_NATS_URL": server.url}
    small_kb, _ = _measured("backup", "small", cwd=tmp_path, env=env)
    for number in range(1, 411):
        await bus.publish(Outgoing("railbus.evt.app.a.b", filler[number % 4], f"p-{number}"))
    backup_kb, backup_s = _measured("backup", "monday", cwd=tmp_path, env=env)
    restore_kb, restore_s = _measured("restore", "monday", cwd=tmp_path, env={"RAILBUS_NATS_URL": empty.url})
    size = sum(path.stat().st_size for path in (tmp_path / "monday").iterdir())
    print(f"{size:,} bytes: {backup_s} s out, {restore_s} s back; peaks {small_kb}, {backup_kb}, {restore_kb} KiB")
    assert size > 200_000_000
    assert max(backup_kb, restore_kb) - small_kb < 48 << 10
    async with joined(empty, tmp_path) as target:
        info = await stream_info(target, EVENTS)
        assert info is not None
        assert info["state"]["messages"] == 410


_MEASURE = """
import resource, subprocess, sys, time
began = time.monotonic()
status = subprocess.run([sys.executable, "-m", "railbus.cli.main", *sys.argv[1:]], stdout=sys.stderr).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, round(time.monotonic() - began, 2))
"""
"""In a small process between: the peak of a process counts what its parent had when it was forked."""


def _measured(*words: str, cwd: Path, env: dict[str, str]) -> tuple[int, float]:
    """Peak memory of a command in KiB, and how long it took in seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *words],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        check=True,
    )
    status, peak_kb, took_s = done.stdout.split()
    assert status == "0", done.stderr
    return int(peak_kb), float(took_s)
