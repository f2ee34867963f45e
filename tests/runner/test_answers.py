"""What a trainer asks of its runner is answered in the end, whoever was killed meanwhile; over a real NATS."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from railbus_runner import answers
from railbus_runner.answers import Answers
from railbus_runner.claim import Claim
from railbus_runner.commits import Commits
from railbus_runner.frames import AwaitsWriter, FrameBuffer, Paused, Verified, Verify, pack
from railbus_runner.link import TrainerLink
from railbus_runner.reaping import AttemptLedger
from railbus_runner.saving import SaveRequests
from railbus_runner.warm_process import WarmProcess
from railbus_runner.writers import Writers
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint, serving
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.requests import OpenedStream, OpenStream, VerifiedShards, VerifyShards
from railbus_shared.metrics import Metrics
from railbus_shared.records import JobRecords
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from until import PATIENCE_S

SHA = "0" * 64
TIME = "2026-11-23T21:45:35.000000001Z"
RECORD = JobRecord.parse(
    {
        "id": "j-1", "spec": {"model": "m", "dataset": "d", "entrypoint": "classifier"}, "spec_sha256": SHA,
        "sequence": 1, "incarnation": "ab", "state": "running", "submitted_at": TIME, "changed_at": TIME,
        "lease_epoch": 1, "host": "testhost", "attempt": 1,
    }
)  # fmt: skip


class Forgetful:
    """A dataloader that takes the first question to verify and never answers it, as one that was killed then."""

    def __init__(self) -> None:
        self.asked: list[VerifyShards] = []

    async def open(self, request: OpenStream) -> OpenedStream:
        return OpenedStream(
            stream="s-1",
            dataset=request.dataset,
            schema_path="",
            index_path="",
            index_sha256=SHA,
            num_shards=0,
            shards_path="",
            ttl_s=60,
        )

    async def verify(self, request: VerifyShards) -> VerifiedShards:
        self.asked.append(request)
        if len(self.asked) == 1:
            await asyncio.sleep(2)  # its answer comes when nobody listens for it any more
        return VerifiedShards(dataset=request.dataset, shards=request.shards, bytes=1)


async def test_a_question_whose_answer_was_lost_is_asked_again_and_a_pause_stands_in_the_record(
    common: CommonSettings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_VERIFY_S", 0.3)
    dataloader, telemetry = Forgetful(), LearningTelemetry("runner", host=common.host)
    area = f"railbus.req.data.{common.host}"
    endpoints: list[AnyEndpoint] = [
        Endpoint("open", f"{area}.open", OpenStream, dataloader.open),
        Endpoint("verify", f"{area}.verify", VerifyShards, dataloader.verify),
    ]
    context = Context(common, bus, telemetry, Metrics("runner"), asyncio.Event())
    records = JobRecords(Bucket(bus, bus.subjects.jobs))
    await records.create(RECORD)
    claim = Claim(AttemptRef(job="j-1", lease_epoch=1), RECORD, records=records, telemetry=telemetry)
    async with (
        Bus.open(common, name="dataloader", service=True) as own,
        serving(own, "dataloader", "", endpoints, metrics=Metrics("dataloader"), rejected=lambda *_: None),
    ):
        await own.client.flush()
        with contextlib.closing(TrainerLink()) as link:
            saves = SaveRequests("j-1", link.send)
            commits = Commits(claim, saves, refused=lambda: None)
            warm, ledger = WarmProcess(env={}), AttemptLedger(common.root)
            writers = Writers(link, commits, ref=claim.ref, warm=warm, ledger=ledger, forward=lambda _: None)
            asked = Answers(
                link,
                claim,
                context,
                commits=commits,
                saves=saves,
                writers=writers,
                moved=lambda: None,
                forward=lambda _: None,
            )
            await asked.open_stream()
            for is_waiting in (True, False):
                asked._hear(AwaitsWriter(is_waiting=is_waiting))
                assert asked.is_owing is is_waiting
            link.theirs.setblocking(False)
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(asked.serve())
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(
                    link.theirs, pack(Verify(shards=(3,))) + pack(Paused(reason="paused for storage"))
                )
                frames = FrameBuffer().feed(await loop.sock_recv(link.theirs, 1 << 16))
                link.give_away()
    assert frames == [Verified(shards=(3,))]
    assert (await records.get("j-1")).record.reason == "paused for storage"
    assert len(dataloader.asked) >= 2
    assert {(one.shards, one.stream) for one in dataloader.asked} == {((3,), "s-1")}
