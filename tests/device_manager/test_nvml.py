"""GPUs through NVML: without a driver, with a stand-in for its library, and with a real GPU where there is one.

The stand-in is a shared library of our own, so that the real binding with its structures and error classes is used. The
binding loads a library once per process; each test that wants the stand-in runs a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from railbus_device_manager.inventory import GpuSource
from railbus_device_manager.nvml import NvmlGpus

STUB = Path(__file__).with_name("nvml_stub.c")
GIB = 1 << 30


def has_driver() -> bool:
    try:
        return bool(ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() == 0)
    except OSError:
        return False


needs_no_driver = pytest.mark.skipif(has_driver(), reason="an NVIDIA driver is here")


@pytest.fixture
def needs_gpu() -> None:
    if not has_driver():
        pytest.skip("no NVIDIA GPU")


# --- no driver -------------------------------------------------------------------------------------------------------


@needs_no_driver
def test_a_host_without_a_driver_has_no_gpus_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    gpus: GpuSource = NvmlGpus("a")
    with caplog.at_level(logging.INFO):
        assert [gpus.scan() for _ in range(3)] == [[], [], []]
        assert gpus.faults() == []
        gpus.close()
        gpus.close()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "no NVIDIA GPUs on this host")
    ]


# --- a stand-in for the driver ---------------------------------------------------------------------------------------

CHILD = """
import json, os, sys
from pathlib import Path

from railbus_device_manager.nvml import NvmlGpus

gpus, fault, answers = NvmlGpus("a"), Path(os.environ["STUB_FAULT"]), []
for step in json.loads(sys.argv[1]):
    if step.startswith("fault "):
        fault.write_text(step.removeprefix("fault "))
    elif step == "scan":
        answers.append([device.to_map() for device in gpus.scan()])
    elif step == "faults":
        answers.append([[fault.uuid, fault.level, fault.words] for fault in gpus.faults()])
    else:
        gpus.close()
print(json.dumps(answers))
"""

Answer = Any
"""The devices of a scan, or faults, as JSON."""
Steps = Callable[..., list[Answer]]


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    """Runs steps against the stand-in in another process, and gives the answers of those that have one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in")
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, STUB], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "STUB_FAULT": str(tmp_path / "fault")}

    def run(*wanted: str) -> list[Answer]:
        command = [sys.executable, "-W", "error", "-c", CHILD, json.dumps(wanted)]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        answers: list[Answer] = json.loads(done.stdout)
        return answers

    return run


def health(answer: Answer) -> dict[str, str]:
    return {device["id"]: device["health_reason"] for device in answer}


ALL_WELL = {
    "a-gpu-00000000": "",
    "a-gpu-11111111": "7 uncorrected ECC errors since the last reset of the GPU",
    "a-mig-33333333": "",
    "a-mig-44444444": "",
}


def test_gpus_and_slices_are_read_with_what_they_support(steps: Steps) -> None:
    (found,) = steps("scan")
    assert health(found) == ALL_WELL
    assert [device["index"] for device in found] == [0, 1, 2, 3]
    assert [device["memory_bytes"] for device in found] == [40 * GIB, 40 * GIB, 5 * GIB, 5 * GIB]
    assert [device["memory_used_bytes"] for device in found] == [GIB] * 4
    assert [device.get("utilisation_frac") for device in found] == [0.25, 0.25, None, None]
    assert [device.get("temperature_c") for device in found] == [41, 42, 43, 43]
    assert [device["name"] for device in found] == ["Stub GPU", "Stub GPU", "Stub MIG 1g.5gb", "Stub MIG 1g.5gb"]
    assert [device["healthy"] for device in found] == [True, False, True, True]


@pytest.mark.parametrize(
    ("fault", "reason"), [("handle", "GPU is lost"), ("memory", "GPU is lost"), ("temperature", "Unknown Error")]
)
def test_a_gpu_that_fails_at_any_reading_is_unhealthy_and_the_others_are_not(
    steps: Steps, fault: str, reason: str
) -> None:
    before, during, after = steps("scan", f"fault {fault}", "scan", "fault none", "scan")
    assert health(before) == health(after) == ALL_WELL
    assert health(during) == {**ALL_WELL, "a-gpu-00000000": reason}
    assert [device["healthy"] for device in during] == [False, False, True, True]


def test_a_gpu_that_was_never_seen_and_cannot_be_named_is_left_out(steps: Steps) -> None:
    (found,) = steps("fault handle", "scan")
    assert set(health(found)) == set(ALL_WELL) - {"a-gpu-00000000"}


def test_a_driver_that_fails_makes_all_gpus_unhealthy_until_it_is_back(steps: Steps) -> None:
    before, during, after = steps("scan", "fault count", "scan", "fault none", "scan")
    assert health(during) == dict.fromkeys(ALL_WELL, "Unknown Error")
    assert health(before) == health(after) == ALL_WELL


def test_a_driver_that_is_loaded_later_is_found(steps: Steps) -> None:
    without, within = steps("fault driver", "scan", "fault none", "scan")
    assert without == []
    assert health(within) == ALL_WELL


def test_a_closed_source_opens_again(steps: Steps) -> None:
    assert health(steps("scan", "close", "close", "scan")[1]) == ALL_WELL


def test_processes_are_named_by_gpu_and_slice_and_a_silent_driver_makes_them_unhealthy(steps: Steps) -> None:
    before, silent = steps("scan", "fault processes", "scan")
    assert [device.get("compute_pids", []) for device in before] == [[11, 21], [], [110, 120], [112, 122]]
    assert health(silent) == {**dict.fromkeys(ALL_WELL, "GPU is lost"), "a-gpu-11111111": "GPU is lost"}
    assert [device.get("compute_pids", []) for device in silent] == [[]] * 4


def test_gpus_that_an_nvlink_joins_are_peers_and_slices_have_none(steps: Steps) -> None:
    (found,) = steps("scan")
    assert [device.get("nvlink_peers", []) for device in found] == [
        ["GPU-11111111-aaaa"],
        ["GPU-00000000-aaaa"],
        [],
        [],
    ]


# --- faults ----------------------------------------------------------------------------------------------------------

ECC = ["GPU-11111111-aaaa", "fault", "7 uncorrected ECC errors since the last reset of the GPU"]


def test_memory_that_failed_is_told_at_every_scan(steps: Steps) -> None:
    _, first, again, _, later = steps("scan", "faults", "faults", "scan", "faults")
    assert (first, again, later) == ([ECC], [], [ECC])


@pytest.mark.parametrize("fault", ["handle", "memory"])
def test_a_gpu_that_is_lost_at_a_reading_is_told_as_a_fault(steps: Steps, fault: str) -> None:
    _, _, _, told = steps("scan", "faults", f"fault {fault}", "scan", "faults")
    assert sorted(told) == sorted([["GPU-00000000-aaaa", "fault", "GPU is lost"], ECC])


def test_a_reading_that_fails_for_another_reason_is_no_fault_of_the_gpu(steps: Steps) -> None:
    _, _, _, told = steps("scan", "faults", "fault temperature", "scan", "faults")
    assert told == [ECC]


def test_an_xid_event_is_told_once_for_its_gpu(steps: Steps) -> None:
    _, _, told, again = steps("scan", "faults", "fault xid:0:79:0", "faults", "faults")
    assert told == [["GPU-00000000-aaaa", "fault", "XID 79: it has fallen off the bus"]]
    assert again == []


@pytest.mark.parametrize(
    ("instance", "slices"), [(0, ["MIG-33333333-aaaa", "MIG-44444444-aaaa"]), (3, ["MIG-44444444-aaaa"])]
)
def test_an_xid_event_of_a_divided_gpu_is_told_for_the_slice_it_names_or_all(
    steps: Steps, instance: int, slices: list[str]
) -> None:
    _, _, told = steps("scan", "faults", f"fault xid:2:94:{instance}", "faults")
    assert [uuid for uuid, _, _ in told] == slices


def test_events_that_cannot_be_read_are_asked_for_anew_after_the_next_scan(steps: Steps) -> None:
    answers = steps("scan", "faults", "fault events", "faults", "scan", "fault xid:0:48:0", "faults")
    assert answers[2] == []
    assert ["GPU-00000000-aaaa", "fault", "XID 48: an uncorrectable ECC error"] in answers[4]


# --- a real GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_gpu")
def test_a_real_gpu_is_found_twice_under_one_id() -> None:
    gpus = NvmlGpus("a")
    first, second = gpus.scan(), gpus.scan()
    assert first
    assert [device.id for device in first] == [device.id for device in second]
    for device in first:
        assert device.memory_bytes > GIB
        assert device.uuid.startswith(("GPU-", "MIG-"))
        assert device.healthy, device.health_reason
        assert all(pid > 0 for pid in device.compute_pids)
    gpus.close()
