"""The Dockerfile and compose.yaml as they are: started, used from the host, hurt, stopped and started again."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any, cast

import nkeys
import pytest

import thief
from compose_stack import LEASE_TTL_S, SERVICES, Stack
from histories import violations
from until import until

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(2400),  # the first one that runs builds the images, torch among them
]

DIGITS: dict[str, Any] = {"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"}
PACED: dict[str, Any] = {
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 12, "pause_s": 0.05},
    "seed": 7,
    "checkpoint": {"every_steps": 20},
    "devices": {"kind": "cpu"},
}
BESIDE = ("telemetry", "nats", "device_manager", "dataloader")
"""Whom a trainer does not need."""
HELD = {"epochs": 400, "pause_s": 0.05}
"""Longer than any of this takes; cancelled or interrupted."""


def _paced(job: str, **changes: Any) -> dict[str, Any]:
    return {**PACED, "id": job, "model": job, **changes}


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_healthy_and_only_loopback_hears_it(stack: Stack) -> None:
    for service in SERVICES:
        assert stack.get(service, "/readyz") == 200
    for service, port in {**SERVICES, "nats": 4222}.items():  # the monitoring of NATS stays inside
        published = {name: at for name, at in stack.inspect(service)["NetworkSettings"]["Ports"].items() if at}
        assert published == {f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.ports[service])}]}


_FACTS = """
import importlib.util, json, os, psutil
service = psutil.Process(1).children()[0].pid
status = dict(line.split(":", 1) for line in open(f"/proc/{service}/status"))
roots = [line.split() for line in open("/proc/mounts") if line.split()[1] == "/"]
print(json.dumps({
    "ids": [*status["Uid"].split(), *status["Gid"].split(), *status["Groups"].split()],
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")],
    "bound": int(status["CapBnd"], 16),
    "no_new_privs": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "root": roots[-1][3].split(",")[0],
    "writable": [path for path in ("/", "/etc", "/opt/railbus", "/usr/local", "/run") if os.access(path, os.W_OK)],
    "secrets": os.listdir("/run/secrets"), "key": oct(os.stat("/run/secrets/railbus.nk").st_mode & 0o777),
    "torch": importlib.util.find_spec("torch") is not None, "seed": open("/run/secrets/railbus.nk").read().strip(),
}))
"""


BOUND_OF_RUNNER = 1 << 5 | 1 << 6 | 1 << 7
"""KILL, SETGID and SETUID."""


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_no_power_and_no_key_but_its_own(stack: Stack, service: str) -> None:
    facts = json.loads(stack.inside(service, _FACTS))
    assert set(facts["ids"]) == {"10001"}
    assert set(facts["capabilities"]) == {0}
    assert facts["bound"] == (BOUND_OF_RUNNER if service == "runner" else 0)  # what nothing there can gain any more
    assert (facts["no_new_privs"], facts["seccomp"], facts["root"], facts["writable"]) == ("1", "2", "ro", [])
    assert (facts["secrets"], facts["key"]) == (["railbus.nk"], "0o600")
    assert facts["seed"] == stack.seed(service)
    assert facts["torch"] == (service == "runner")
    mounted = {mount["Destination"] for mount in stack.inspect(service)["Mounts"]}
    assert mounted <= {"/learning", "/run/secrets/railbus.nk", "/entrypoints"}
    assert stack.inspect(service)["HostConfig"]["PidsLimit"] > 0


def test_nats_has_no_power_and_no_key(stack: Stack) -> None:
    status = stack.compose("exec", "-T", "nats", "grep", "-E", "^(Uid|CapEff|CapBnd|NoNewPrivs)", "/proc/1/status")
    words = [line.split() for line in status.splitlines()]
    assert words == [
        ["Uid:", *["10001"] * 4],
        ["CapEff:", "0" * 16],
        ["CapBnd:", "0" * 16],
        ["NoNewPrivs:", "1"],
    ]
    assert stack.compose("exec", "-T", "nats", "sh", "-c", "ls /deploy/keys 2>&1 || true").endswith("Permission denied")
    config = stack.compose("exec", "-T", "nats", "cat", "/deploy/nats.conf")
    assert not any(stack.seed(path.stem) in config for path in (stack.deploy / "keys").glob("*.nk"))
    mounts = {mount["Destination"]: mount["RW"] for mount in stack.inspect("nats")["Mounts"]}
    assert mounts == {"/data": True, "/deploy": False}


def test_the_keys_lie_beside_the_checkout_and_each_belongs_to_who_uses_it(stack: Stack) -> None:
    owner = stack.deploy.stat().st_uid
    owners = {"keys": owner, **{f"{service}.nk": 10001 for service in SERVICES}, "runner.nk": 0}
    for path in (stack.deploy / "keys", *(stack.deploy / "keys").iterdir()):
        found = path.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode) & 0o077) == (owners.get(path.name, owner), 0), path
    assert (stack.deploy / "keys" / "user.nk").stat().st_uid == owner
    assert stat.S_IMODE(stack.deploy.stat().st_mode) == 0o701  # passed through by NATS, and listed by nobody


def _connected(stack: Stack, **credentials: str) -> str:
    """What NATS says to a client's first words, after its greeting; `seed` signs what is to be signed."""
    with socket.create_connection(("127.0.0.1", stack.ports["nats"]), timeout=20) as connection:
        lines = connection.makefile("rb")
        nonce = json.loads(lines.readline().partition(b" ")[2])["nonce"]
        if seed := credentials.pop("seed", ""):
            key = nkeys.from_seed(seed.encode())
            signed = base64.urlsafe_b64encode(key.sign(nonce.encode())).decode().rstrip("=")
            credentials |= {"nkey": cast("bytes", key.public_key).decode(), "sig": signed}
        connection.sendall(f"CONNECT {json.dumps({'verbose': False, **credentials})}\r\nPING\r\n".encode())
        return lines.readline().decode().strip()


def test_strangers_are_refused(stack: Stack) -> None:
    assert _connected(stack, seed=stack.seed()) == "PONG"
    stranger = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
    password = {"user": "railbus", "pass": "railbus"}
    for credentials in ({}, {"seed": stranger}, password):
        assert _connected(stack, **credentials) == "-ERR 'Authorization Violation'"


def _keys(stack: Stack, *words: str) -> None:
    stack.compose("run", "--rm", "-T", "--no-deps", "init", "railbus", "keys", *words, "--deployment", "/deploy")
    for _ in range(2):  # the first reload brings an account without what it imports
        stack.compose("exec", "-T", "nats", "kill", "-HUP", "1")


async def test_a_person_is_let_in_and_shut_out_while_it_runs(stack: Stack) -> None:
    _keys(stack, "add", "ann")
    assert (stack.deploy / "keys" / "ann.nk").stat().st_uid == stack.deploy.stat().st_uid
    seed = stack.seed("ann")
    await until(lambda: _connected(stack, seed=seed) == "PONG")
    _keys(stack, "revoke", "ann")
    await until(lambda: _connected(stack, seed=seed) == "-ERR 'Authorization Violation'")
    assert _connected(stack, seed=stack.seed()) == "PONG"


# --- what it does ----------------------------------------------------------------------------------------------------


async def test_the_digits_job_is_published_from_the_host_and_its_files_are_in_the_volume(stack: Stack) -> None:
    stack.compose("exec", "-T", "dataloader", "railbus", "dataset", "import", "digits")
    await stack.publish({"id": "digits", **DIGITS})
    record = await stack.ended("digits")
    assert (record["state"], record["end_cause"], record["attempt"]) == ("succeeded", "ok", 1), record
    files = stack.files("models/digits-cnn/checkpoints")
    (meta,) = [
        meta
        for meta in (json.loads(data) for name, data in files.items() if name.endswith(".meta.json"))
        if meta["step"] == record["checkpoint"]["step"]
    ]
    number = record["checkpoint"]["number"]
    weights = files[f"checkpoints/checkpoint-{number:06d}.pt"]
    assert hashlib.sha256(weights).hexdigest() == record["checkpoint"]["sha256"]
    assert record["checkpoint"]["sha256"] in json.dumps(meta)


async def test_training_code_finds_no_way_to_the_key_of_its_runner(stack: Stack) -> None:
    seed = stack.seed("runner")
    what = thief.params(Path("/run/secrets/railbus.nk"), seed, Path("/learning/models/loot.json"))
    await stack.publish(_paced("thief", entrypoint="thief:steal", params=what))
    record = await stack.ended("thief")
    assert (record["state"], record["attempt"]) == ("succeeded", 1), record
    loot = json.loads(stack.files("models/loot.json")["loot.json"])
    assert loot["uids"] == ["10001"] * 4
    assert thief.has_stolen(loot, seed) == {}


async def test_a_runner_whose_key_is_replaced_goes_on_with_the_new_one_once_it_is_started_anew(stack: Stack) -> None:
    before = stack.seed("runner")
    _keys(stack, "rotate", "runner")
    found = (stack.deploy / "keys" / "runner.nk").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    stack.compose("restart", "runner")
    stack.up()
    assert stack.seed("runner") != before
    assert stack.get("runner", "/readyz") == 200


@pytest.mark.parametrize("service", BESIDE)
async def test_a_job_does_not_notice_that_one_is_killed(stack: Stack, service: str) -> None:
    job, restarts = f"beside-{service}", stack.inspect(service)["RestartCount"]
    await stack.publish(_paced(job))
    await stack.has_checkpoint(job)
    stack.kill(service)
    record = await stack.ended(job)
    assert (record["state"], record["attempt"], record["lease_epoch"]) == ("succeeded", 1, 1), record
    await until(lambda: stack.is_healthy(service, restarts=restarts + 1), seconds=90)


async def test_a_killed_runner_comes_back_and_its_job_goes_on(stack: Stack) -> None:
    restarts = stack.inspect("runner")["RestartCount"]
    await stack.publish(_paced("killed"))
    await stack.has_checkpoint("killed")
    stack.kill("runner")
    record = await stack.ended("killed")
    assert (record["state"], record["attempt"], record["lease_epoch"]) == ("succeeded", 2, 2), record
    await until(lambda: stack.is_healthy("runner", restarts=restarts + 1), seconds=90)
    await _nothing_is_left(stack)


async def test_a_runner_paused_past_its_lease_leaves_nothing_behind_and_the_job_goes_on(stack: Stack) -> None:
    await stack.publish(_paced("paused", params=HELD))
    before = await stack.has_checkpoint("paused")
    stack.compose("pause", "runner")
    try:
        await until(lambda: stack.has("paused", lambda record: record["state"] == "queued"), seconds=LEASE_TTL_S * 12)
    finally:
        stack.compose("unpause", "runner")
    record = await stack.has_checkpoint("paused", after=before["checkpoint"]["step"])
    assert record["lease_epoch"] == 2, record
    await stack.ask("jobs.cancel", {"id": "paused", "now": True})
    assert (await stack.ended("paused"))["state"] == "cancelled"
    await _nothing_is_left(stack)


async def _nothing_is_left(stack: Stack) -> None:
    """No process of a trainer in the runner's container, and no device that is not free."""

    def is_alone() -> bool:
        """The init, the runner, and the one process from which trainers are forked."""
        forks = [line for line in stack.processes("runner") if "railbus_runner.warm" in line]
        return len(forks) == 1 and len(stack.processes("runner")) == 3

    await until(is_alone, seconds=90)
    await until(lambda: _all_are_free(stack), seconds=60)


async def _all_are_free(stack: Stack) -> bool:
    return {device["state"] for device in (await stack.ask("devices.list", {}))["devices"]} == {"free"}


async def test_nats_is_restarted_under_a_running_job(stack: Stack) -> None:
    await stack.publish(_paced("restarted"))
    await stack.has_checkpoint("restarted")
    stack.compose("restart", "nats")
    record = await stack.ended("restarted")
    assert (record["state"], record["attempt"]) == ("succeeded", 1), record


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_what_is_taken_down_goes_on_where_it_was(stack: Stack) -> None:
    await stack.publish(_paced("interrupted", params=HELD))
    step = (await stack.has_checkpoint("interrupted"))["checkpoint"]["step"]
    stack.compose("stop")
    statuses = {service: stack.inspect(service)["State"]["ExitCode"] for service in (*SERVICES, "nats")}
    assert statuses == dict.fromkeys(statuses, 0)
    _everything_was_written_down_and_closed(stack)
    seeds = {service: stack.seed(service) for service in (*SERVICES, "user")}

    stack.compose("down")
    stack.up()
    assert {service: stack.seed(service) for service in (*SERVICES, "user")} == seeds
    assert (await stack.record("digits"))["state"] == "succeeded"
    record = await stack.has_checkpoint("interrupted", after=step)
    assert record["lease_epoch"] == 2, record
    await stack.ask("jobs.cancel", {"id": "interrupted", "now": True})
    assert (await stack.ended("interrupted"))["state"] == "cancelled"


def _everything_was_written_down_and_closed(stack: Stack) -> None:
    files = stack.files("logs")
    logs = sorted(name for name in files if name.rpartition("/")[2].startswith("trainer.log"))
    assert logs
    assert all(name.endswith("trainer.log.jsonl.gz") for name in logs)
    lines = [json.loads(line) for name in logs for line in gzip.decompress(files[name]).splitlines()]
    keys = [(line["producer"], line["number"]) for line in lines]
    assert len(keys) == len(set(keys))
    assert violations(lines) == []
    ends = [line["job"] for line in lines if line["type"] == "job.succeeded"]
    assert sorted(ends) == sorted(["digits", "thief", "killed", "restarted", *(f"beside-{name}" for name in BESIDE)])
    stopped = [line["data"]["service"] for line in lines if line["type"] == "service.stopped"]
    assert stopped[0] == "runner"
    assert set(stopped) == set(SERVICES) - {"telemetry"}  # its own last word comes after the log is closed
