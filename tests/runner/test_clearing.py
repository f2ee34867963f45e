"""GPUs after an attempt: who is to blame for its end, which may be granted again, and what if nobody can say."""

from __future__ import annotations

import pytest

from railbus_runner.clearing import Clearing, blamed, unclear
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.checks import CheckDevices, CheckedDevice, CheckedDevices
from railbus_shared.contracts.devices import AttemptRef, ReclaimMark
from railbus_shared.contracts.jobs import EndCause, ErrorBody
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings

REF = AttemptRef(job="j-1", lease_epoch=3)
ERROR = ErrorBody(code="ENTRYPOINT_FAILED", message="CUDA error: unspecified launch failure")
WELL = CheckedDevices(devices=(CheckedDevice(device="a-gpu-1", clear=True),))
BROKEN = CheckedDevices(
    devices=(*WELL.devices, CheckedDevice(device="a-gpu-2", fault="XID 79: it has fallen off the bus", clear=False))
)


@pytest.mark.parametrize("cause", ["user_error", "signal", "hang", "runner_lost", "start_refused", "setup_failed"])
def test_a_failure_on_a_gpu_that_broke_is_the_gpus_and_says_what_the_trainer_said(cause: EndCause) -> None:
    found, error = blamed(cause, ERROR, BROKEN)
    assert found == "device_fault"
    assert error is not None
    assert error.code == "DEVICE_BROKEN"
    assert "a-gpu-2: XID 79" in error.message
    assert ERROR.message in error.message
    assert blamed(cause, None, BROKEN)[0] == "device_fault"
    assert blamed(cause, ERROR, WELL) == blamed(cause, ERROR, None) == (cause, ERROR)


@pytest.mark.parametrize(
    "cause", ["ok", "bad_input", "device_oom", "host_oom", "time_limit", "cancelled", "preempted", "storage_full"]
)
def test_an_end_that_a_broken_gpu_does_not_explain_is_left_as_it_is(cause: EndCause) -> None:
    assert blamed(cause, ERROR, BROKEN) == (cause, ERROR)


def test_gpus_are_unclear_that_are_not_known_to_be_clear() -> None:
    gpus = ["a-gpu-1", "a-gpu-2", "a-gpu-3"]
    assert unclear(BROKEN, gpus) == ["a-gpu-2", "a-gpu-3"]
    assert unclear(None, gpus) == gpus
    assert unclear(None, []) == []


async def test_the_device_manager_of_the_host_is_asked_and_marks_are_made(common: CommonSettings, bus: Bus) -> None:
    asked: list[CheckDevices] = []

    async def check(request: CheckDevices) -> CheckedDevices:
        asked.append(request)
        return BROKEN

    leases = Bucket(bus, bus.subjects.leases)
    clearing = Clearing(bus, leases, host=common.host)
    assert await clearing.check(REF, ["a-gpu-1"]) is None  # nobody is there to answer
    endpoint = Endpoint("check", f"railbus.req.devices.{common.host}.check", CheckDevices, check)
    async with (
        Bus.open(common, name="device_manager", service=True) as own,
        serving(own, "device_manager", "", [endpoint], metrics=Metrics("x"), rejected=lambda *_: None),
    ):
        await own.client.flush()
        assert await clearing.check(REF, []) == CheckedDevices(devices=())
        assert await clearing.check(REF, ["a-gpu-1", "a-gpu-2"]) == BROKEN
    assert asked == [CheckDevices(job="j-1", lease_epoch=3, devices=("a-gpu-1", "a-gpu-2"))]
    await clearing.mark(REF, ["a-gpu-2"])
    entry = await leases.get("a-gpu-2.reclaim")
    assert entry is not None
    mark = ReclaimMark.parse(entry.value or {})
    assert (mark.device, mark.host, mark.job, mark.lease_epoch) == ("a-gpu-2", common.host, "j-1", 3)
