"""Bodies of requests, and of answers that are no record, report or file."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from railbus_shared.contracts.artifacts import FileName
from railbus_shared.contracts.devices import DeviceInfo, HeldLease, HostReport, RunnerReport
from railbus_shared.contracts.jobs import DevicePreference, JobRecord, JobState
from railbus_shared.contracts.model import Contract, Count, Id, Items, Name, Sha256, Time

MAX_VERIFIED_RANGES: Final = 1024
"""That an answer names; more would not make it wrong, but larger than a message may be."""


class Nothing(Contract):
    """A request without arguments, or an answer without content."""


class JobRef(Contract):
    """Names one job."""

    id: Id


class CancelJob(Contract):
    """Asks a job to end."""

    id: Id
    by: Id | None = None
    """Who asks, for the record."""
    now: bool = False
    """Without the grace in which a trainer writes a checkpoint."""


class HoldJob(Contract):
    """Asks that a waiting job be held back, or released again."""

    id: Id
    held: bool = True
    by: Id = "somebody"


class SetPriority(Contract):
    """Asks that a waiting job be given another priority."""

    id: Id
    priority: int = Field(ge=-100, le=100)


class RetryJob(Contract):
    """Asks for a new job like one that has ended; it begins from that one's last checkpoint."""

    id: Id
    from_scratch: bool = False
    """Begin from nothing instead."""


class ListJobs(Contract):
    """Asks for records, newest first."""

    states: Items[JobState] = ()
    """Only these states; all if empty."""
    owner: Id | None = None
    group: Id | None = None
    limit: int = Field(default=100, ge=1, le=500)
    before: Id | None = None
    """Only jobs that are older than this one: the last of the answer before, to read on."""


class JobList(Contract):
    """Answer to ListJobs: as many as were asked for, or as one message takes."""

    jobs: Items[JobRecord]
    total: Count
    """Records that met the request, also those beyond the limit and those before `before`."""


RetiredWord = Literal["draining", "cordoned", "unhealthy"]


class DeviceState(Contract):
    """A device and who has it."""

    device: DeviceInfo
    state: Literal["free", "leased", "reclaiming", "draining", "cordoned", "unhealthy"]
    holder: Id | None = None
    holders: Items[Id] = ()
    """Of the shares of a GPU that is shared; `state` is `free` while a share is."""
    free_shares: int = Field(default=0, ge=0)
    """Of a device with several `shares`."""
    retired: RetiredWord | None = None
    """Why the device is granted to nobody once its holders have gone; None for one that will be."""


class DeviceList(Contract):
    """Answer to `devices.list`."""

    devices: Items[DeviceState]
    hosts: Items[HostReport]
    runners: Items[RunnerReport]


class LeaseDevices(Contract):
    """Asks for devices by hand, all or nothing."""

    holder: Id
    devices: DevicePreference = DevicePreference()
    host: Id | None = None
    """Only devices of this host: whoever asks wants to use them where it runs."""
    ttl_s: int = Field(default=60, ge=1, le=86_400)


class HeldLeases(Contract):
    """Leases with their revisions; both the answer to LeaseDevices and the argument of renew and release."""

    leases: Items[HeldLease] = Field(min_length=1, max_length=512)
    ttl_s: int = Field(default=60, ge=1, le=86_400)


class RevokeLease(Contract):
    """Asks that what a person holds by hand be free again, for whom that person cannot be asked; not of jobs."""

    holder: Id


class CordonDevice(Contract):
    """Asks that a device take no new jobs, or take them again."""

    device: Id
    cordoned: bool = True
    reason: str = Field(default="", max_length=1000)
    by: Id = "somebody"


class DrainHost(Contract):
    """Asks a host to take no new jobs, or to take them again."""

    host: Id
    draining: bool = True


class DrainedHost(Contract):
    """Answer to DrainHost: what runs there still; a host that drains has been emptied once nothing does."""

    host: Id
    draining: bool
    jobs: Items[Id] = ()
    """That are placed or run there."""


class StartAttempt(Contract):
    """device_manager asks a runner to start a placed job."""

    job: Id
    lease_epoch: int = Field(ge=1)
    leases: Items[HeldLease] = Field(min_length=1)
    devices: Items[DeviceInfo] = Field(min_length=1)


class StopAttempt(Contract):
    """device_manager asks a runner to end an attempt gracefully, then hard."""

    job: Id
    lease_epoch: int = Field(ge=1)
    grace_s: float = Field(default=30.0, ge=0, le=3600)
    reason: Literal["cancelled", "preempted", "device_fault"] = "cancelled"
    why: str = Field(default="", max_length=1000)
    """Of a device that broke: what is wrong with it."""


class DatasetRef(Contract):
    """Names one dataset."""

    dataset: Name


class SplitSummary(Contract):
    """One split of a dataset."""

    samples: Count


class DatasetSummary(Contract):
    """What is true of a dataset now; key of its name in `railbus_datasets`, and the answer to `data.describe`."""

    v: Literal[1] = 1
    dataset: Name
    description: str = ""
    format: str
    samples: Count
    bytes: Count
    num_shards: Count
    splits: dict[str, SplitSummary]
    columns: Items[str]
    index_sha256: Sha256
    hosts: Items[Id] = ()
    described_at: Time


class DatasetList(Contract):
    """Answer to `data.list`."""

    datasets: Items[DatasetSummary]


class OpenStream(Contract):
    """A runner asks its dataloader for the shards of a job's dataset."""

    job: Id
    lease_epoch: int = Field(ge=1)
    dataset: Name
    seed: int = 0
    rank: int = Field(default=0, ge=0)
    world_size: int = Field(default=1, ge=1)


class ShardRange(Contract):
    """Shards one after the other."""

    first: Count
    shards: int = Field(ge=1)


class OpenedStream(Contract):
    """Answer to OpenStream: where the schema, the index and the shards lie on this host.

    It has the same size for any number of shards: their names and hashes stand in the index.
    """

    stream: Id
    dataset: Name
    schema_path: str
    index_path: str
    index_sha256: Sha256
    num_shards: Count
    shards_path: str
    """Of the folder that holds the shards, or with `is_cached` those that have been fetched."""
    is_cached: bool = False
    """Whether each shard has a folder of its own there: `<key[:2]>/<key>/`, where the key is the SHA-256 of its line
    `<sha256>  <file>\\n`, and of one more for its sidecar."""
    verified: Items[ShardRange] = Field(default=(), max_length=MAX_VERIFIED_RANGES)
    """Shards that may be mapped at once; every other must be asked for with VerifyShards, which is quick for one that
    is verified already."""
    ttl_s: float = Field(default=30.0, gt=0)
    """A stream that is not heard of for so long counts as closed."""


class VerifyShards(Contract):
    """Asks that shards be verified before they are read; without numbers, all of them."""

    dataset: Name
    shards: Items[Count] = ()
    again: bool = False
    """Whether to hash also what is remembered as verified."""
    stream: Id | None = None
    """The stream whose trainer is about to map them: they stay where they are until it releases them."""


class VerifiedShards(Contract):
    """Answer to VerifyShards: every shard asked for has the hash that the index states."""

    dataset: Name
    shards: Items[Count]
    bytes: Count


class StreamProgress(Contract):
    """A runner tells its dataloader what the trainer of a stream reads next, and what it no longer holds.

    A stream that is not heard of for a while counts as closed.
    """

    stream: Id
    dataset: Name | None = None
    """With it, a dataloader that was started since takes the stream up again."""
    number: Count = 0
    """Of this word among those on the stream, from 1 on: one that comes after a later one is not heeded."""
    ahead: Items[Count] = ()
    """Shards in the order in which the trainer will read them for the first time, from its place on."""
    held: Items[Count] = ()
    """Shards that were verified for the trainer and that it has not unmapped."""
    released: Items[Count] = ()
    """Shards that the trainer has unmapped."""


class CloseStream(Contract):
    """The trainer of a stream has ended."""

    stream: Id


class SendFile(Contract):
    """A dataloader asks another for a file of a dataset; the bytes come in chunks into an inbox of its own."""

    dataset: Name
    index_sha256: Sha256
    """The version of the dataset: the file is sent only if it is the one that is there."""
    file: FileName
    """`schema`, `index`, or the name of a shard or of a sidecar."""
    offset: Count = 0
    """Where to begin, for one that has the bytes before it."""
    window_bytes: int = Field(ge=1 << 19, le=1 << 26)
    """Credit to begin with: so many bytes may be under way at once."""
    to: str = Field(max_length=256)
    """The inbox for the chunks."""
    asker: Id
    """The host that asks; hosts that ask a lot wait longer than others."""


class SendingFile(Contract):
    """Answer to SendFile: the chunks are about to come."""

    bytes: Count
    """Of the whole file."""
    credit: str
    """The inbox for GrantCredit."""


class GrantCredit(Contract):
    """The receiver of a file takes more of it; sent without being asked for, and not answered."""

    up_to: Count
    """The offset in the file before which everything may be sent."""
    done: bool = False
    """Nothing more is wanted."""


class Flushed(Contract):
    """Answer to `telemetry.flush`: everything published before the request is in closed files."""

    files: Items[str]
    """Paths under the root, of the files that the flush closed."""


__all__ = [
    "CancelJob",
    "CloseStream",
    "CordonDevice",
    "DatasetList",
    "DatasetRef",
    "DatasetSummary",
    "DeviceList",
    "DeviceState",
    "DrainHost",
    "DrainedHost",
    "Flushed",
    "GrantCredit",
    "HeldLeases",
    "HoldJob",
    "JobList",
    "JobRef",
    "LeaseDevices",
    "ListJobs",
    "Nothing",
    "OpenStream",
    "OpenedStream",
    "RetryJob",
    "RevokeLease",
    "SendFile",
    "SendingFile",
    "SetPriority",
    "ShardRange",
    "SplitSummary",
    "StartAttempt",
    "StopAttempt",
    "StreamProgress",
    "VerifiedShards",
    "VerifyShards",
]
