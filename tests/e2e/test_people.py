"""What people do: the client without `await`, sweeps, leases for a notebook, orders about jobs that wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import railbus
from commands import environment
from commands import railbus as command
from histories import untold
from railbus.client import Client
from railbus.sweeping import expand
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.contracts.waiting import WaitWord
from railbus_shared.errors import Conflict, InvalidField, JobNotFound, LeaseLost, NoFreeDevice, RequestTimeout
from railbus_shared.files import sha256_file
from railbus_shared.layout import checkpoint_stem
from running_up import RunningUp, finished, until_event
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(180)  # each needs services that import torch

PACED: dict[str, Any] = {
    "model": "people",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 200, "pause_s": 0.05},
    "devices": {"kind": "cpu"},
}
BRIEF = {**PACED, "params": {"epochs": 1, "pause_s": 0}}

_HOLDS_AND_WAITS = """
import sys, time
import railbus
client = railbus.connect(sys.argv[1])
lease = client.lease(cpus=1, holder=sys.argv[2], ttl_s=2, wait_s=100)
print(lease.holder, flush=True)
{then}
"""


@pytest.fixture(scope="module")
def up(two_slots: RunningUp) -> RunningUp:
    """One for all tests of this module; each leaves it whole."""
    return two_slots


def _holders(states: tuple[DeviceState, ...]) -> set[str]:
    return {str(one.holder) for one in states if one.holder is not None}


def test_without_await_a_job_is_submitted_followed_and_waited_for(up: RunningUp) -> None:
    with railbus.connect(settings=up.settings) as client:
        job = client.submit(BRIEF)
        kinds = [event["type"] for event in job.events()]
        record = job.wait()
        assert (kinds[0], kinds[-1], record.state) == ("job.queued", "job.succeeded", "succeeded")
        assert client.attach(job.id).record == record == client.job(job.id)
        assert client.jobs(limit=1).jobs == (record,)
        with pytest.raises(JobNotFound):
            client.attach("j-000000-0")
        with pytest.raises(Conflict):
            job.hold()
        again = job.retry()
        assert (again.wait().state, again.record.retry_of) == ("succeeded", job.id)
    client.close()  # a second time is no trouble
    with pytest.raises(RuntimeError, match="closed"):
        client.devices()


async def test_the_client_without_await_works_where_a_loop_runs_already(up: RunningUp) -> None:
    """As in a notebook, whose cells run inside one."""
    with railbus.connect(settings=up.settings) as client:
        job = client.submit(PACED)
        with pytest.raises(RequestTimeout, match="has not ended"):
            job.wait(timeout_s=0.2)
        stories = job.events()
        assert next(stories)["type"] == "job.queued"
        stories.close()  # type: ignore[attr-defined]  # an iterator that is left early
        assert job.cancel(now=True).wait().state == "cancelled"


async def test_a_job_that_is_held_waits_until_it_is_released_and_says_so(up: RunningUp) -> None:
    async with up.client() as client:
        job = await client.submit({**BRIEF, "held": True, "owner": "ana"})
        assert (job.state, job.record.held_by) == ("queued", "ana")
        assert (await job.set_priority(7)).record.priority == 7
        assert (await job.why()).headline == "held"
        assert "held by ana" in command("why", job.id, cwd=up.root, env=_env(up)).out
        await job.hold(held=False)
        assert (await job.wait(timeout_s=PATIENCE_S)).state == "succeeded"


async def test_a_running_job_writes_a_checkpoint_when_it_is_asked_to_and_the_answer_comes_when_it_is_durable(
    up: RunningUp,
) -> None:
    async with up.client() as client:
        job = await client.submit(PACED)
        await until_event(client, job.id, "job.first_step")
        first = await job.checkpoint()
        assert (await client.job(job.id)).checkpoint == first.checkpoint
        done = command("checkpoint", "now", job.id, "--json", cwd=up.root, env=_env(up))
        second: Any = done.json()
        assert (second["model"], second["checkpoint"]["number"] > first.checkpoint.number) == ("people", True)
        name = checkpoint_stem(second["checkpoint"]["number"])
        path = up.layout.checkpoints("people") / f"{name}.pt"
        assert second["checkpoint"]["sha256"] == sha256_file(path)
        await job.cancel(now=True)
        assert (await job.wait(timeout_s=PATIENCE_S)).state == "cancelled"
        refused = command("checkpoint", "now", job.id, cwd=up.root, env=_env(up))
        assert (refused.status, "is cancelled and writes no checkpoint now" in refused.err) == (1, True)


async def test_a_jobs_curves_are_written_for_tensorboard_while_it_trains(up: RunningUp, tmp_path: Path) -> None:
    async with up.client() as client:
        job = (await client.submit({**PACED, "params": {"epochs": 2, "pause_s": 0.01}})).id
        words = ("export", "tensorboard", "-f", job, "--json")
        done = await asyncio.to_thread(command, *words, cwd=tmp_path, env=_env(up), timeout_s=PATIENCE_S)
        told = [event async for event in client.follow(job) if event["type"] == "train.metrics"]
    assert done.status == 0, done.err
    found = done.json()
    assert isinstance(found, dict)
    assert (found["job"], found["metrics"], found["points"]) == (job, ["loss"], len(told))
    size = (tmp_path / found["path"]).stat().st_size
    again = command("export", "tensorboard", job, cwd=tmp_path, env=_env(up))
    assert (again.status, (tmp_path / found["path"]).stat().st_size) == (0, size)


def test_a_lease_keeps_a_device_from_jobs_until_its_block_ends(up: RunningUp) -> None:
    with railbus.connect(settings=up.settings) as client:
        count = len(client.devices().devices)
        with client.lease(cpus=count, holder="ana", ttl_s=2, wait_s=PATIENCE_S) as lease:
            assert lease.cores
            assert lease.environment["CUDA_VISIBLE_DEVICES"] == ""
            assert _holders(client.devices().devices) == {"ana"}
            with pytest.raises(NoFreeDevice), client.lease(cpus=1):
                raise AssertionError("there was nothing left")
            job = client.submit(BRIEF)
            with pytest.raises(RequestTimeout):
                job.wait(timeout_s=2.5)  # longer than a lease lives that nobody renews
            lease.check()
            assert job.refresh().state == "queued"
            for why in (job.why(), client.dry_run(BRIEF)):
                assert (why.headline, {one.holder for one in why.holders}) == ("resources", {"ana"})
        assert job.wait().state == "succeeded"
        for gpus, cpus in ((0, 0), (1, 1)):
            with pytest.raises(InvalidField, match="either"), client.lease(gpus=gpus, cpus=cpus):
                raise AssertionError("neither or both cannot be leased")


async def test_a_lease_that_is_revoked_is_told_to_whom_held_it(up: RunningUp) -> None:
    async with up.client() as client:
        with pytest.raises(LeaseLost):  # noqa: PT012 - the block itself ends with it
            async with client.lease(cpus=1, holder="ana", ttl_s=2, wait_s=PATIENCE_S) as lease:
                await client.revoke("ana")
                assert "ana" not in _holders((await client.devices()).devices)
                async with asyncio.timeout(PATIENCE_S):
                    await lease.lost()
                with pytest.raises(LeaseLost, match="someone else's"):
                    lease.check()


@pytest.mark.parametrize("then", ["time.sleep(600)", "sys.exit()"], ids=["killed", "ends"])
async def test_a_lease_ends_with_its_process(up: RunningUp, then: str) -> None:
    holder = "left-behind"
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDS_AND_WAITS.format(then=then), str(up.root), holder],
        stdout=subprocess.PIPE,
        env=environment({}),
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == holder.encode()
    async with up.client() as client:
        if "sleep" in then:
            assert holder in _holders((await client.devices()).devices)
            process.kill()
        assert process.wait(PATIENCE_S) == (-9 if "sleep" in then else 0)
        process.stdout.close()

        async def is_free() -> bool:
            return holder not in _holders((await client.devices()).devices)

        if "sleep" in then:
            await until(is_free)
        else:
            assert await is_free()  # given back at the exit, not lapsed


def test_a_command_runs_on_leased_devices_and_its_code_is_told(up: RunningUp) -> None:
    code = "import os, sys; print(sorted(os.sched_getaffinity(0))); sys.exit(42)"
    done = command(
        "lease",
        "--cpus",
        "1",
        "--wait",
        "20",
        "--name",
        "ana",
        "--",
        sys.executable,
        "-c",
        code,
        cwd=up.root,
        env=_env(up),
    )
    assert done.status == 42
    assert done.out.startswith("[")
    assert "ana holds " in done.err
    assert command("lease", "--cpus", "64", "--", "true", cwd=up.root, env=_env(up)).status == 125
    assert command("lease", cwd=up.root, env=_env(up)).err.startswith("nothing is held by hand")


def test_hosts_and_devices_are_taken_out_of_service_and_back(up: RunningUp) -> None:
    def do(*words: str) -> str:
        done = command("devices", *words, cwd=up.root, env=_env(up))
        assert done.status == 0, done.err
        return done.out

    device = do("-q").split()[0]
    assert do("cordon", device, "--reason", "noisy fan") == f"{device} takes no new jobs\n"
    assert [line.split()[2] for line in do().splitlines() if line.startswith(device)] == ["cordoned"]
    assert "noisy fan" in do("list")
    assert do("uncordon", device) == f"{device} takes jobs again\n"
    assert do("drain", up.settings.host, "--wait").splitlines()[1] == f"nothing runs on {up.settings.host} any more"
    assert "draining" in do()
    do("undrain", up.settings.host)
    assert command("devices", "drain", "nowhere", cwd=up.root, env=_env(up)).status == 3


def test_what_would_become_of_jobs_is_told_without_submitting_them(up: RunningUp) -> None:
    sweep = Path(__file__).parents[2] / "examples" / "sweep.yaml"
    done = command("submit", str(sweep), "--dry-run", cwd=up.root, env=_env(up))
    assert (done.status, "6 jobs of group digits-cnn-" in done.err) == (0, True), done.err
    assert "lr=0.001, seed=3" in done.out
    assert up.settings.host in done.out
    word = command("submit", str(sweep), "--dry-run", "-q", cwd=up.root, env=_env(up)).out.strip()
    assert word in get_args(WaitWord)  # which one depends on what the tests before have left
    with railbus.connect(settings=up.settings) as client:
        assert not client.jobs(group=str(done.err.split("group ")[1].split(";")[0])).total


def test_waiting_for_a_job_exits_with_its_code(up: RunningUp) -> None:
    spec = up.root / "job.yaml"
    spec.write_text("model: people\ndataset: digits\nentrypoint: paced:leave\nparams: {code: 42}\nmax_attempts: 1\n")
    done = command("submit", str(spec), "--wait", cwd=up.root, env=_env(up), timeout_s=PATIENCE_S)
    assert done.status == 42, done.err
    spec.write_text("model: people\ndataset: nowhere\nentrypoint: paced:leave\n")
    assert command("submit", str(spec), "--wait", cwd=up.root, env=_env(up)).status == 125
    assert command("submit", str(spec), cwd=up.root, env=_env(up)).status == 3


async def test_events_are_piped_on_and_read_from_the_bus_each_at_least_once_over_kills(
    up: RunningUp, tmp_path: Path
) -> None:
    with _shipping(up, tmp_path, "first") as first:
        async with up.client() as client:
            job = (await client.submit({**PACED, "params": {"epochs": 2, "pause_s": 0.02}})).id
            await until_event(client, job, "checkpoint.written")
            await until((tmp_path / "place").exists)
            first.kill()
            await finished(client, job)
            await client.flush()
    read = [sys.executable, "-m", "railbus.cli.main", "logs", "-f", job, "--json"]
    piped = subprocess.run(
        ["/bin/sh", "-c", f"{' '.join(read)} | cat"], env=environment(_env(up)), capture_output=True, check=True
    )
    lines = up.log_lines()
    assert _keys(piped.stdout) == {(line["producer"], line["number"]) for line in lines if line.get("job") == job}
    with _shipping(up, tmp_path, "second"):
        wanted = {(line["producer"], line["number"]) for line in lines}
        await until(lambda: wanted <= set().union(*(_keys(file.read_bytes()) for file in tmp_path.glob("*.jsonl"))))
    assert not _keys((tmp_path / "second.jsonl").read_bytes()) >= wanted, "it went on where the first was"


@contextlib.contextmanager
def _shipping(up: RunningUp, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The example that reads every event from the bus, into a file of its own."""
    program = Path(__file__).parents[2] / "examples/ship_events.py"
    where = up.settings.nats_url, str(up.settings.nats_key_file)
    with (folder / f"{name}.jsonl").open("wb") as out:
        process = subprocess.Popen([sys.executable, program, folder / "place", *where], stdout=out)
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_S)


def _keys(lines: bytes) -> set[tuple[str, int]]:
    """Of whole lines; one that was cut by a kill is told again."""
    whole = lines[: lines.rfind(b"\n") + 1].splitlines()
    return {(event["producer"], event["number"]) for event in map(json.loads, whole)}


async def test_a_sweep_ends_with_every_job_succeeded_though_its_runner_is_killed_twice(up: RunningUp) -> None:
    sweep = {**BRIEF, "group": "twenty", "sweep": {"grid": {"lr": [0.1, 0.01], "seed": list(range(10))}}}
    sweep |= {"max_attempts": 20, "retry": {"backoff_s": 0.0}}
    specs = [one.spec for one in expand(sweep)]
    async with up.client() as client:
        jobs = await client.submit_all(specs)
        for share in (3, 10):
            await until(lambda share=share: _have_ended(client, share), seconds=120)  # type: ignore[misc]
            up.kill("runner")
        records = await client.wait([job.id for job in jobs])
        assert [job.id for job in await client.submit_all(specs)] == [f"twenty-{n}" for n in range(1, 21)]
        async with asyncio.timeout(60):  # every story ends, with or without an event that says so
            assert all(await asyncio.gather(*(finished(client, job.id) for job in jobs)))
        listed = command("jobs", "--group", "twenty", cwd=up.root, env=_env(up))
        await until(lambda: _is_told_once(client, up, [job.id for job in jobs]))
    assert {record.state for record in records} == {"succeeded"}
    assert len(records) == 20
    assert {record.devices for record in records if record.devices} <= {(f"{up.settings.host}-cpu{n}",) for n in (0, 1)}
    assert "20 jobs of group twenty: 20 succeeded" in listed.err


async def _is_told_once(client: Client, up: RunningUp, jobs: list[str]) -> bool:
    """Whether the log holds the end of each job exactly once, also of one whose runner was killed before it told it."""
    await client.flush()
    counts = untold(up.log_lines(), jobs)
    assert not [job for job, count in counts.items() if count > 1]
    return not counts


async def _have_ended(client: Client, count: int) -> bool:
    return (await client.jobs(states=("succeeded",), group="twenty", limit=1)).total >= count


def _env(up: RunningUp) -> dict[str, str]:
    return {"RAILBUS_ROOT": str(Path(up.root).resolve())}
