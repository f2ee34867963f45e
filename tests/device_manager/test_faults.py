"""What befalls GPUs, in words: XID messages, readings of the memory, and which GPUs NVLinks join."""

from __future__ import annotations

from pathlib import Path

import pytest

from railbus_device_manager.faults import PENDING, memory_fault, xid_fault
from railbus_device_manager.links import SWITCH, Linked, numa_node, peers

WHOLE = "GPU-0f1e2d3c-1111-2222-3333-444455556666"


@pytest.mark.parametrize(
    ("ecc_errors", "retired_pending", "remapped", "expected"),
    [
        (None, None, None, ""),
        (0, 0, (5, 0, 0, 0), ""),
        (2, None, None, "2 uncorrected ECC errors since the last reset of the GPU"),
        (None, 1, None, PENDING),
        (None, None, (0, 1, 1, 0), PENDING),
        (2, 1, (0, 1, 1, 1), "remapping a row of memory has failed: the GPU wants replacing"),
    ],
)
def test_the_worst_fault_of_the_memory_is_named(
    ecc_errors: int | None, retired_pending: int | None, remapped: tuple[int, ...] | None, expected: str
) -> None:
    assert memory_fault(ecc_errors=ecc_errors, retired_pending=retired_pending, remapped=remapped) == expected


@pytest.mark.parametrize("xid", [48, 62, 64, 74, 79, 94, 95, 119, 120, 140])
def test_an_xid_after_which_a_gpu_must_be_reset_is_a_fault(xid: int) -> None:
    fault = xid_fault(WHOLE, xid)
    assert (fault.uuid, fault.level, fault.xid) == (WHOLE, "fault", xid)
    assert fault.words.startswith(f"XID {xid}: ")


@pytest.mark.parametrize("xid", [63, 92])
def test_an_xid_of_memory_that_wears_lets_what_runs_finish(xid: int) -> None:
    assert xid_fault(WHOLE, xid).level == "worn"


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109, 999])
def test_an_xid_that_an_application_brought_upon_itself_or_that_is_not_known_is_noted(xid: int) -> None:
    assert xid_fault(WHOLE, xid).level == "note"


# --- links -----------------------------------------------------------------------------------------------------------

A, B, C, D = (f"00000000:{bus}:00.0" for bus in ("3B", "5E", "86", "AF"))


def linked(uuid: str, bus: str, *ends: str) -> Linked:
    return Linked(uuid, bus, frozenset(ends))


def test_gpus_are_peers_whose_links_lead_to_each_other() -> None:
    pairs = [linked("a", A, B), linked("b", B, A), linked("c", C, D), linked("d", D, C), linked("e", "x")]
    assert peers(pairs) == {"a": ("b",), "b": ("a",), "c": ("d",), "d": ("c",)}


def test_gpus_on_a_switch_all_reach_each_other() -> None:
    found = peers([linked("a", A, SWITCH), linked("b", B, SWITCH), linked("c", C, SWITCH), linked("d", D)])
    assert found == {"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b")}


def test_a_link_that_one_end_alone_tells_counts_for_both() -> None:
    assert peers([linked("a", A, B), linked("b", B)]) == {"a": ("b",), "b": ("a",)}


@pytest.mark.parametrize(("text", "expected"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)])
def test_the_numa_node_is_the_kernels_word_for_the_same_place(
    tmp_path: Path, text: str | None, expected: int | None
) -> None:
    folder = tmp_path / "bus/pci/devices/0000:3b:00.0"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "numa_node").write_text(text)
    assert numa_node(A, tmp_path) == expected
