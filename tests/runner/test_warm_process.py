"""The pre-warmed process with real forks, real signals and both event loops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from railbus_runner import processes
from railbus_runner.forked import EXIT_SETUP_FAILED
from railbus_runner.frames import Fork
from railbus_runner.warm_process import WarmProcess
from railbus_shared.errors import RunnerLost, TrainerLost
from until import PATIENCE_S, until

HERE = Path(__file__).parent
SECRETS = {"RAILBUS_RUNNER_NATS_KEY": "secret", "NATS_CREDS": "secret", "railbus_lower": "secret"}
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(90),  # importing torch alone takes 4 s, and several times that on a busy machine
]


def environment() -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(HERE),
        "BASE": "base",
        "BOTH": "base",
        **SECRETS,
    }


class Child:
    """A forked trainer seen from the test: its socket, its output, its pid."""

    def __init__(self, sock: socket.socket, output: Path) -> None:
        self.sock = sock
        self.output = output
        self.pid = 0
        self._lines = sock.makefile("rb")

    async def line(self) -> bytes:
        return await asyncio.to_thread(self._lines.readline)

    def order(self, **order: object) -> None:
        self.sock.sendall(json.dumps(order).encode() + b"\n")

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


@asynccontextmanager
async def running() -> AsyncIterator[WarmProcess]:
    """A pre-warmed process of the test's own, for tests that kill it."""
    warm = WarmProcess(env=environment(), target="trainer_for_tests:main")
    task = asyncio.create_task(warm.run())
    try:
        await warm.wait_ready(PATIENCE_S)
        yield warm
    finally:
        await warm.close()
        await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm() -> AsyncIterator[WarmProcess]:
    """One for all tests that leave it alive."""
    async with running() as shared:
        yield shared


async def forked(warm: WarmProcess, attempt: str, folder: Path, **fields: object) -> Child:
    ours, theirs = socket.socketpair()
    output = folder / f"{attempt}.out"
    with theirs, output.open("wb") as out:
        child = Child(ours, output)
        fork = Fork.model_validate({"attempt": attempt, **fields})
        try:
            child.pid = await warm.fork(fork, sock=theirs, stdout_fd=out.fileno(), stderr_fd=out.fileno(), extra_fd=2)
        except BaseException:
            child.close()
            raise
    return child


async def gone(pid: int, *, within_s: float = PATIENCE_S) -> bool:
    until_s = time.monotonic() + within_s
    while processes.process_info(pid) is not None:
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(0.01)
    return True


async def test_a_trainer_is_forked_and_its_exit_code_comes_back(warm: WarmProcess, tmp_path: Path) -> None:
    child = await forked(warm, "j.1", tmp_path)
    taken_s = float(await child.line())
    child.order(do="exit", code=7)
    assert await warm.wait_exit("j.1") == 7
    assert await gone(child.pid)
    assert taken_s < 0.5  # of a core, however busy the machine is; an import of torch takes more
    child.close()


async def test_a_trainer_begins_as_a_fresh_process_would(warm: WarmProcess, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with (tmp_path / "held").open("w"):  # a descriptor of the runner's that a trainer must not have
        env = {"GIVEN": "given", "BOTH": "given", **SECRETS}
        child = await forked(warm, "j.1", tmp_path, cores=[core], env=env, workdir=str(tmp_path))
        await child.line()
        child.order(do="describe")
        seen = json.loads(await child.line())
        assert await warm.wait_exit("j.1") == 0
        child.close()
    assert seen.pop("env") == {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(HERE),
        "BASE": "base",
        "BOTH": "given",
        "GIVEN": "given",
        "TRAINER_COOKIE": f"{warm.cookie}/j.1",
    }
    del seen["cgroup"]
    assert seen.pop("cwd") == str(tmp_path)
    assert seen.pop("fds") == ["0", "1", "2", "3", "4"]
    assert seen == {
        "affinity": [core],
        "threads": 1,
        "torch_threads": 1,
        "session": True,
        "sigint": True,
        "sigterm": True,
        "sigchld": True,
        "blocked": 0,
        "arguments": [],
        "log_handlers": 0,
        "umask": 0o022,
        "warm_imports": True,
        "no_new_privs": 1,
        "core_bytes": [0, 0],
        "bounded_files": True,
    }


@pytest.mark.parametrize(
    ("order", "status", "says"),
    [
        ({"do": "nothing"}, 0, ""),
        ({"do": "exit", "code": 7}, 7, ""),
        ({"do": "leave", "code": 3}, 3, ""),
        ({"do": "leave", "code": None}, 0, ""),
        ({"do": "leave", "code": "no such file"}, 1, "no such file"),
        ({"do": "raise", "message": "ünlucky"}, 1, "RuntimeError: ünlucky"),
        ({"do": "signal", "number": 9}, -9, ""),
        ({"do": "signal", "number": 11}, -11, ""),
        ({"do": "signal", "number": 15}, -15, ""),
    ],
)
async def test_every_way_to_end_is_told_apart(
    warm: WarmProcess, tmp_path: Path, order: dict[str, object], status: int, says: str
) -> None:
    child = await forked(warm, "j.1", tmp_path)
    child.order(**order)
    assert await warm.wait_exit("j.1") == status
    assert says in child.output.read_text()
    child.close()


async def test_many_trainers_run_at_once_and_each_end_reaches_its_own_waiter(warm: WarmProcess, tmp_path: Path) -> None:
    names = [f"j.{number}" for number in range(1, 25)]
    children = await asyncio.gather(*(forked(warm, name, tmp_path) for name in names))
    waits = [asyncio.create_task(warm.wait_exit(name)) for name in names]
    assert len({child.pid for child in children}) == len(names)
    for code, child in reversed(list(enumerate(children))):
        child.order(do="exit", code=code)
    assert await asyncio.gather(*waits) == list(range(len(names)))
    for child in children:
        child.close()


async def test_a_frame_that_is_larger_than_the_socket_takes_at_once_arrives_whole(
    warm: WarmProcess, tmp_path: Path
) -> None:
    env = {f"V{number}": "x" * 10_000 for number in range(200)}
    children = await asyncio.gather(*(forked(warm, f"j.{number}", tmp_path, env=env) for number in range(1, 5)))
    for child in children:
        await child.line()
        child.order(do="describe")
        assert json.loads(await child.line())["env"].items() >= env.items()
        child.close()
    for number in range(1, 5):
        assert await warm.wait_exit(f"j.{number}") == 0


async def test_a_child_that_cannot_be_set_up_says_why_and_exits_with_a_code_of_its_own(
    warm: WarmProcess, tmp_path: Path
) -> None:
    missing = tmp_path / "group" / "cgroup.procs"
    child = await forked(warm, "j.1", tmp_path, cgroup_procs=[str(missing)])
    assert await warm.wait_exit("j.1") == EXIT_SETUP_FAILED
    assert f"No such file or directory: '{missing}'" in child.output.read_text()
    assert not missing.parent.exists()
    child.close()


async def test_an_attempt_has_one_trainer(warm: WarmProcess, tmp_path: Path) -> None:
    child = await forked(warm, "j.1", tmp_path)
    with pytest.raises(ValueError, match=r"j\.1"):
        await forked(warm, "j.1", tmp_path)
    child.order(do="nothing")
    assert await warm.wait_exit("j.1") == 0
    with pytest.raises(TrainerLost, match="no trainer"):
        await warm.wait_exit("j.1")
    child.close()


async def test_an_end_that_came_before_anyone_asked_is_kept(warm: WarmProcess, tmp_path: Path) -> None:
    child = await forked(warm, "j.1", tmp_path)
    child.order(do="exit", code=4)
    assert await gone(child.pid)
    await asyncio.sleep(0.1)
    assert await warm.wait_exit("j.1") == 4
    child.close()


@pytest.mark.parametrize("how", ["plain", "session", "forked"])
async def test_an_orphan_of_a_trainer_is_adopted_and_buried(warm: WarmProcess, tmp_path: Path, how: str) -> None:
    child = await forked(warm, "j.1", tmp_path)
    await child.line()
    child.order(do="grandchild", how=how, stay_s=0)
    orphan = int(await child.line())
    assert await warm.wait_exit("j.1") == 0
    info = processes.process_info(orphan)
    assert info is not None
    assert info.parent == warm.pid
    os.kill(orphan, signal.SIGKILL)
    await until(lambda: not Path(f"/proc/{orphan}").exists())  # a zombie would stay
    child.close()


async def test_neither_ctrl_c_nor_a_stop_of_the_whole_service_ends_it(warm: WarmProcess, tmp_path: Path) -> None:
    assert warm.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(warm.pid, number)
    child = await forked(warm, "j.1", tmp_path)
    child.order(do="nothing")
    assert await warm.wait_exit("j.1") == 0
    child.close()


async def test_it_has_one_thread_and_sleeps_when_there_is_nothing_to_do(warm: WarmProcess) -> None:
    folder = Path(f"/proc/{warm.pid}")

    async def has_slept() -> bool:
        before = (folder / "stat").read_text().split()[13:15]
        await asyncio.sleep(0.5)
        return (folder / "stat").read_text().split()[13:15] == before

    await until(has_slept)  # the tests before have left it something to do
    assert len(list((folder / "task").iterdir())) == 1


async def test_when_it_is_killed_its_trainers_die_the_waits_end_and_another_starts(tmp_path: Path) -> None:
    async with running() as warm:
        children = [await forked(warm, f"j.{number}", tmp_path) for number in range(1, 4)]
        first, cookie = warm.pid, warm.cookie
        assert first is not None
        waits = [asyncio.create_task(warm.wait_exit(f"j.{number}")) for number in range(1, 4)]
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        for wait in waits:
            with pytest.raises(TrainerLost, match="pre-warmed process died"):
                await wait
        assert all([await gone(child.pid) for child in children])
        assert not warm.is_alive
        with pytest.raises(TrainerLost, match="not ready"):
            await forked(warm, "j.9", tmp_path)
        await warm.wait_ready(PATIENCE_S)
        assert (warm.pid != first, warm.cookie != cookie) == (True, True)
        again = await forked(warm, "j.1", tmp_path)
        again.order(do="exit", code=5)
        assert await warm.wait_exit("j.1") == 5
        for child in (*children, again):
            child.close()


async def test_closing_it_ends_everything_below_and_every_wait(tmp_path: Path) -> None:
    async with running() as warm:
        child = await forked(warm, "j.1", tmp_path)
        await child.line()
        child.order(do="grandchild", how="session", stay_s=60)
        grandchild = int(await child.line())
        wait = asyncio.create_task(warm.wait_exit("j.1"))
        await asyncio.sleep(0)
        pid = warm.pid
        assert pid is not None
        await warm.close()
        with pytest.raises(RunnerLost):
            await wait
        for dead in (pid, child.pid, grandchild):
            assert await gone(dead)
        child.close()


async def test_a_process_that_cannot_start_is_waited_for_in_vain_and_tried_again() -> None:
    warm = WarmProcess(env=environment(), target="no_such_module:main")
    task = asyncio.create_task(warm.run())
    with pytest.raises(TrainerLost, match=r"not ready after 0\.1 s"):
        await warm.wait_ready(0.1)
    await warm.close()
    await task
    assert warm.pid is None


RUNNER = """
import asyncio, os, socket, sys
import uvloop
from railbus_runner.frames import Fork
from railbus_runner.warm_process import WarmProcess

async def fork(warm, attempt):
    ours, theirs = socket.socketpair()
    with theirs:
        return ours, await warm.fork(Fork(attempt=attempt), sock=theirs, stdout_fd=2, stderr_fd=2, extra_fd=2)

async def main():
    warm = WarmProcess(env=dict(os.environ), target="trainer_for_tests:main")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(warm.run())
        await warm.wait_ready(100)
        (first, pid), (second, other) = await fork(warm, "j.1"), await fork(warm, "j.2")
        with first, second:
            sys.stdout.write(f"{warm.pid} {pid} {other}\\n")
            sys.stdout.flush()
            first.sendall(b'{"do": "exit", "code": 7}\\n')
            status = await warm.wait_exit("j.1")
            await asyncio.to_thread(sys.stdin.readline)
            await warm.close()
    sys.exit(status)

loop = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.new_event_loop
with asyncio.Runner(loop_factory=loop, debug=True) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("is_killed", [True, False])
async def test_when_the_runner_ends_on_either_loop_the_process_and_its_trainers_end(loop: str, is_killed: bool) -> None:
    command = [sys.executable, "-Werror", "-c", RUNNER, loop]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as runner:
        assert runner.stdout is not None
        pids = [int(word) for word in (await asyncio.to_thread(runner.stdout.readline)).split()]
        assert len(pids) == 3
        assert all(processes.process_info(pid) is not None for pid in (pids[0], pids[2]))
        if is_killed:
            runner.kill()
        status = await asyncio.to_thread(runner.communicate, "close\n")
        assert runner.returncode == (-signal.SIGKILL if is_killed else 7), status
    for pid in pids:
        assert await gone(pid)


async def test_a_process_whose_parent_is_not_its_peer_ends_at_once() -> None:
    """As it happens when the runner dies while the process starts."""
    ours, theirs = socket.socketpair()
    code = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], close_fds=False)"
    command = [sys.executable, "-c", code, "-m", "railbus_runner.warm", str(theirs.fileno())]
    with ours, theirs:
        theirs.set_inheritable(True)
        between = await asyncio.create_subprocess_exec(*command, close_fds=False, env=environment())
        theirs.close()
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.get_running_loop().run_in_executor(None, ours.recv, 1) == b""
            assert await between.wait() == 0
