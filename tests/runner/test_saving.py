"""Who waits for a checkpoint is answered by the first that holds nothing older than the order, or by an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from railbus_runner.frames import Save, Saving
from railbus_runner.saving import SaveRequests
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.saving import SavedCheckpoint
from railbus_shared.errors import Conflict, RequestTimeout, StorageFull
from until import PATIENCE_S, until

SHA = "0" * 64


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        number=step, model="m", job="j-1", attempt=1, lease_epoch=1, step=step, epoch=0, samples_seen=0,
        entrypoint="classifier", seed=0, dataset="d", index_sha256=SHA, devices=(), precision="float32", libraries={},
        created_at="2026-01-01T00:00:00.000000000Z",
        files=(CheckpointFile(file=f"checkpoint-{step:06d}.pt", bytes=7, sha256=SHA),),
    )  # fmt: skip


class Asked:
    """Requests, the trainer that they go to, and those who wait."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.orders: list[int] = []
        self.requests = SaveRequests("j-1", self._send)
        self._tasks = tasks

    async def _send(self, save: Save) -> bool:
        self.orders.append(save.number)
        return True

    async def ask(self, *, timeout_s: float = PATIENCE_S) -> asyncio.Task[SavedCheckpoint | Exception]:
        """Somebody who waits, once the trainer has the order."""

        async def outcome() -> SavedCheckpoint | Exception:
            try:
                return await self.requests.ask(timeout_s=timeout_s)
            except (Conflict, RequestTimeout, StorageFull) as exc:
                return exc

        count = len(self.orders)
        waiting = self._tasks.create_task(outcome())
        await until(lambda: len(self.orders) > count)
        return waiting


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    async with asyncio.TaskGroup() as tasks:
        one = Asked(tasks)
        sending = tasks.create_task(one.requests.run())
        yield one
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending


def step_of(answer: SavedCheckpoint | Exception) -> int:
    assert isinstance(answer, SavedCheckpoint), answer
    assert (answer.job, answer.model, answer.bytes) == ("j-1", "m", 7)
    return answer.checkpoint.step


async def test_the_checkpoint_that_was_begun_for_an_order_or_a_later_one_answers_it(asked: Asked) -> None:
    first = await asked.ask()
    asked.requests.committed(meta(3))  # it was under way before the order
    asked.requests.heed(Saving(number=1, step=5))
    second = await asked.ask()
    asked.requests.committed(meta(5))
    assert step_of(await first) == 5
    assert not second.done(), "its order came after that state was taken"
    asked.requests.heed(Saving(number=2, step=8))
    asked.requests.committed(meta(9))
    assert step_of(await second) == 9
    assert asked.orders == [1, 2]


async def test_a_commit_that_is_heard_before_the_word_that_it_has_begun_counts(asked: Asked) -> None:
    waiting = await asked.ask()
    asked.requests.committed(meta(5))
    asked.requests.heed(Saving(number=1, step=5))
    assert step_of(await waiting) == 5


async def test_what_it_could_not_be_written_for_is_the_answer_also_when_it_had_begun(asked: Asked) -> None:
    waiting = [await asked.ask(), await asked.ask()]
    asked.requests.heed(Saving(number=2, step=5))
    asked.requests.heed(Saving(number=2, step=5, error=ErrorBody(code="STORAGE_FULL", message="no space")))
    assert [type(await one) for one in waiting] == [StorageFull, StorageFull]


async def test_a_trainer_that_takes_no_step_and_one_that_writes_for_long_are_told_apart(asked: Asked) -> None:
    never = await asked.ask(timeout_s=0.05)
    assert "took no step within 0.05 s" in str(await never)
    slow = await asked.ask(timeout_s=0.3)
    asked.requests.heed(Saving(number=2, step=5))
    assert "of step 5 of job 'j-1' is not durable" in str(await slow)


async def test_when_the_attempt_ends_those_who_wait_and_those_who_come_are_told(asked: Asked) -> None:
    waiting = await asked.ask()
    asked.requests.close()
    assert "ended its attempt before" in str(await waiting)
    with pytest.raises(Conflict):
        await asked.requests.ask(timeout_s=PATIENCE_S)
