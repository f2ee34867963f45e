"""What the ranks of a job ask of a runner that knows one trainer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from railbus_runner import ranks
from railbus_runner.checkpointing import sharded
from railbus_runner.checkpointing.spread import is_spread, put_together, take_apart, whole
from railbus_runner.checkpointing.state_file import open_state
from railbus_runner.checkpointing.weights import Selection, load_weights
from railbus_runner.frames import Ahead, Plan, Verified, Verify
from railbus_runner.rank_shards import RankShards
from railbus_runner.team import Team
from railbus_runner.trainer import own_share
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import ErrorBody, JobSpec
from railbus_shared.contracts.requests import OpenedStream, ShardRange
from railbus_shared.errors import CheckpointCorrupt, NotSupported


def test_a_shard_is_asked_for_once_and_released_when_no_rank_holds_it() -> None:
    shards = RankShards(2)
    assert shards.asked(0, Verify(shards=(1, 2))) == (None, Verify(shards=(1, 2)))
    assert shards.asked(1, Verify(shards=(1, 2))) == (None, None), "it is asked for already"
    answered = shards.verified(Verified(shards=(1, 2)))
    assert answered == [(0, Verified(shards=(1, 2))), (1, Verified(shards=(1, 2)))]
    assert shards.asked(1, Verify(shards=(2,))) == (Verified(shards=(2,)), None), "it is known by now"
    assert shards.ahead(0, Ahead(shards=(3,), released=(1, 2))) == Ahead(shards=(3,))
    assert shards.ahead(1, Ahead(shards=(4, 3), released=(1,))) == Ahead(shards=(3, 4), released=(1,))
    assert shards.ahead(1, Ahead(shards=(4, 3))) is None, "that is nothing new"
    assert shards.asked(0, Verify(shards=(1, 2))) == (None, Verify(shards=(1,))), "of these one was let go"


def test_what_was_vouched_for_at_the_opening_is_held_by_whoever_reads_it() -> None:
    shards = RankShards(2, vouched=[ShardRange(first=0, shards=3)])
    assert shards.asked(0, Verify(shards=(0, 1))) == (Verified(shards=(0, 1)), None)
    assert shards.ahead(0, Ahead(released=(0,))) == Ahead(released=(0,))
    assert shards.asked(1, Verify(shards=(0, 1))) == (None, Verify(shards=(0,)))


def test_what_keeps_a_shard_from_being_read_is_told_to_every_rank_that_asked_and_none_holds_it() -> None:
    shards = RankShards(2)
    error = ErrorBody(code="SHARD_CORRUPT", message="damaged")
    for rank in (0, 1):
        shards.asked(rank, Verify(shards=(5,)))
    assert shards.verified(Verified(shards=(5,), error=error)) == [
        (rank, Verified(shards=(5,), error=error)) for rank in (0, 1)
    ]
    assert shards.asked(0, Verify(shards=(5,))) == (None, Verify(shards=(5,)))


# --- shares ----------------------------------------------------------------------------------------------------------


def plan_of(num_gpus: int, num_ranks: int, *, entrypoint: str = "a:b", rank: int = 0, world_size: int = 1) -> Plan:
    one = DeviceInfo(id="h-0", host="h", kind="cpu", name="x", index=0, cores=(0, 1), memory_bytes=1)
    device = one.model_copy(update={"kind": "gpu" if num_gpus else "cpu"})
    stream = OpenedStream(
        stream="s", dataset="d", schema_path="/s", index_path="/i", index_sha256="0" * 64, num_shards=1, shards_path="/"
    )
    return Plan(
        job="j-1",
        spec=JobSpec(model="m", dataset="d", entrypoint=entrypoint, ranks=num_ranks),
        attempt=1,
        lease_epoch=1,
        host="h",
        producer="t" * 64,
        root="/",
        devices=tuple(device.model_copy(update={"id": f"h-{number}"}) for number in range(max(1, num_gpus))),
        stream=stream,
        deadline_boottime_s=1.0,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "entrypoint", "problem"),
    [
        (0, 3, "a:b", ""),
        (4, 2, "a:b", ""),
        (3, 2, "a:b", "3 GPU(s) are leased, which so many ranks cannot share evenly"),
        (1, 2, "a:b", "1 GPU(s) are leased"),
        (0, 2, "classifier", "the built-in 'classifier' trains in one process"),
    ],
)
def test_ranks_that_could_not_share_the_work_are_refused(
    num_gpus: int, num_ranks: int, entrypoint: str, problem: str
) -> None:
    refusal = ranks.refusal(plan_of(num_gpus, num_ranks, entrypoint=entrypoint))
    assert (refusal is None) == (problem == "")
    assert problem in str(refusal)


def test_each_rank_is_told_its_number_its_gpus_and_a_producer_of_its_own() -> None:
    of = [ranks.plan_of(plan_of(4, 2), rank) for rank in range(2)]
    assert [(one.rank, one.world_size) for one in of] == [(0, 2), (1, 2)]
    gpus = tuple(torch.device("cuda", number) for number in range(4))
    assert [own_share(gpus, one) for one in of] == [gpus[:2], gpus[2:]]
    cpu = (torch.device("cpu"),)
    assert [own_share(cpu, one) for one in of] == [cpu, cpu]
    assert [one.producer for one in of] == ["t" * 64, "t" * 60 + "-r1"]


# --- the files of a spread state -------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._path),))


def test_a_metadata_that_names_anything_else_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    with pytest.raises(CheckpointCorrupt, match="which has no place in it"):
        sharded.read_parts(tmp_path, {"a": torch.zeros(1)}, proven=(), team=Team())
    assert not (tmp_path / "harm").exists()


def test_weights_are_not_loaded_into_a_model_that_is_spread_already(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard  # takes a second, which no other test is to spend

    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        fully_shard(model)
        with open_state(tmp_path / "w.pt") as file, pytest.raises(NotSupported, match="spread over ranks"):
            load_weights(model, cast("Any", file.state), file, Selection())
    finally:
        dist.destroy_process_group()


def test_a_state_that_is_not_spread_stays_as_it_is() -> None:
    state = {"parts": {"a": [torch.ones(2), (1, None)]}, "step": 3}
    assert not is_spread(state)
    common, tensors = take_apart(state)
    assert (str(common), tensors) == (str(state), {})
    assert put_together(common, target=whole) == (common, {})
