"""When a trainer counts as stalled; its stacks are had from real processes."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
from typing import cast

import pytest

from cluster_for_tests import job
from railbus_runner import processes
from railbus_runner.claim import Claim
from railbus_runner.forked import STACKS_SIGNAL
from railbus_runner.frames import Moved
from railbus_runner.moving import Pulse
from railbus_runner.processes import ProcessId
from railbus_runner.stacks import MAX_STACKS_CHARS, StacksFile, cut_stacks, take_stacks
from railbus_runner.stall_watch import StallWatch
from railbus_runner.stalling import StallClock, moving_every_s, watch
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.records import JobRecords
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from until import PATIENCE_S


def test_a_stall_is_due_once_until_there_is_progress_again() -> None:
    clock = StallClock(10.0, 0.0)
    assert [at for at in range(40) if clock.is_due(float(at))] == [10]
    clock.moved(40.0)
    assert [at for at in range(40, 80) if clock.is_due(float(at))] == [50]


def test_time_that_railbus_takes_does_not_count() -> None:
    clock = StallClock(10.0, 0.0)
    for at in range(30):
        clock.waits(float(at))
        assert not clock.is_due(float(at))
    assert [at for at in range(30, 60) if clock.is_due(float(at))] == [39]


async def test_a_watch_that_stood_still_itself_blames_nobody() -> None:
    """As after SIGSTOP and SIGCONT of the runner: what the trainer has sent meanwhile lies unread."""
    times = iter([0.0, 100.0, 100.0, *[100.0 + n / 100 for n in range(1000)]])
    told: list[float] = []
    clock = StallClock(0.08, 0.0)

    async def stalled() -> None:
        told.append(clock.moved_at_s)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await watch(clock, now_s=lambda: next(times), is_waiting=lambda: len(told) > 5, stalled=stalled)
    assert told == [100.0]


async def test_a_watch_tells_of_a_stall_and_not_while_the_trainer_waits_for_railbus() -> None:
    told = asyncio.Event()
    looks = 0

    def is_waiting() -> bool:
        nonlocal looks
        looks += 1
        return looks < 20

    async def stalled() -> None:
        told.set()

    loop = asyncio.get_running_loop()
    watching = asyncio.create_task(
        watch(StallClock(0.05, loop.time()), now_s=loop.time, is_waiting=is_waiting, stalled=stalled)
    )
    async with asyncio.timeout(PATIENCE_S):
        await told.wait()
    assert looks > 20
    watching.cancel()
    await asyncio.wait({watching})


def test_a_pulse_is_told_no_more_often_than_it_is_wanted() -> None:
    sent: list[Moved] = []
    now = 0.0
    pulse = Pulse(sent.append, every_s=1.0, clock_s=lambda: now)
    for step in range(1000):
        now = 10 + step / 100
        pulse.beat()
    assert len(sent) == 10
    Pulse(sent.append, every_s=None).beat()
    assert len(sent) == 10


@pytest.mark.parametrize(("stall_s", "every_s"), [(None, None), (0.8, 0.1), (3600.0, 1.0)])
def test_progress_is_told_often_enough_to_be_believed(stall_s: float | None, every_s: float | None) -> None:
    assert moving_every_s(stall_s) == every_s


# --- stacks ----------------------------------------------------------------------------------------------------------

STUCK = f"""
import ctypes, faulthandler, sys, threading
faulthandler.register({int(STACKS_SIGNAL)}, file=int(sys.argv[1]), all_threads=True)
def waits(): threading.Event().wait()
def stuck_in_c():
    sleep = ctypes.PyDLL(None).sleep
    print("ready", flush=True)
    while True: sleep(600)
threading.Thread(target=waits, daemon=True).start()
stuck_in_c()
"""
DEAF = "import time; print('ready', flush=True); time.sleep(600)"


def _started(code: str, file: StacksFile) -> tuple[subprocess.Popen[str], ProcessId]:
    command = [sys.executable, "-I", "-S", "-c", code, str(file.fd)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=(file.fd,))
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process, ProcessId(process.pid, processes.start_ticks(process.pid) or 0)


def test_the_stacks_of_all_threads_are_had_from_native_code_that_holds_the_interpreter() -> None:
    file = StacksFile()
    process, trainer = _started(STUCK, file)
    with process:
        told = [take_stacks(trainer, file) for _ in range(2)]  # the file goes on growing
        process.kill()
    for stacks in told:
        assert (stacks.count(" in stuck_in_c"), stacks.count(" in waits")) == (1, 1), stacks
        assert f"thread {process.pid} (" in stacks
    assert "has just ended" in take_stacks(trainer, file) or "does not handle" in take_stacks(trainer, file)
    file.close()


def test_a_trainer_without_the_handler_is_not_killed_by_the_question() -> None:
    file = StacksFile()
    process, trainer = _started(DEAF, file)
    with process:
        stacks = take_stacks(trainer, file)
        was_alive, handles = process.poll() is None, processes.handles(process.pid, signal.SIGTERM)
        process.kill()
    assert "does not handle" in stacks
    assert f"thread {process.pid} (" in stacks
    assert (was_alive, handles) == (True, False)
    file.close()


def test_of_stacks_that_are_too_long_the_end_stays_where_the_main_thread_is() -> None:
    text = "x" * (2 * MAX_STACKS_CHARS) + "main"
    assert len(cut_stacks(text)) == MAX_STACKS_CHARS
    assert cut_stacks(text).endswith("main")
    assert cut_stacks("short") == "short"


@pytest.mark.parametrize("moves", [False, True])
async def test_a_trainer_that_moves_while_its_stacks_are_taken_is_not_ended(
    common: CommonSettings, *, moves: bool
) -> None:
    spec = {"model": "m", "dataset": "d", "entrypoint": "classifier", "stall_s": 60, "on_stall": "end"}
    record = job("j-1").changed(spec=JobSpec.parse(spec), lease_epoch=1, state="running")
    telemetry, ended = LearningTelemetry("runner", host=common.host), list[str]()
    claim = Claim(AttemptRef(job="j-1", lease_epoch=1), record, records=cast("JobRecords", None), telemetry=telemetry)
    watch = StallWatch(claim, is_waiting=lambda: False, ended=ended.append)
    process, trainer = _started(STUCK, watch.file)
    with process:
        assert watch._clock.is_due(math.inf)
        telling = asyncio.create_task(watch._stalled(trainer))
        await asyncio.sleep(0)
        if moves:
            watch.moved()
        await telling
        process.kill()
    assert len(ended) == (0 if moves else 1)
    watch.close()
