"""Everything that is said on the bus, as data: each request with its answer, each type of event, each bucket.

The AsyncAPI document and the table of events in the docs are made from it; tests compare it with what the services
serve, with what their sources tell, and with what was told under `railbus up`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared.contracts import checks, devices, jobs, logs, requests, saving, waiting
from railbus_shared.contracts.model import Contract

HOST: Final = "{host}"
ID: Final = "{id}"


@dataclass(frozen=True)
class Asked:
    """A request: `<prefix>.req.<area>.<verb>`, or `<prefix>.req.<area>.{host}.<verb>` of one host."""

    area: str
    verb: str
    request: type[Contract]
    answer: type[Contract]
    served_by: str

    @property
    def tokens(self) -> str:
        return f"{self.area}.{self.verb}"


@dataclass(frozen=True)
class Told:
    """A type of event: `<prefix>.evt.<area>.{id}.<what>`."""

    type: str
    told_by: str
    meaning: str
    data: tuple[str, ...] | None = ()
    """Names that may stand in its data; None where they are the user's own, or many."""

    @property
    def area(self) -> str:
        return self.type.partition(".")[0]

    @property
    def what(self) -> str:
        return self.type.partition(".")[2]


@dataclass(frozen=True)
class Kept:
    """Values of a bucket; the key tells which contract one has."""

    bucket: str
    key: str
    value: type[Contract]


def _asked(served_by: str, area: str, **verbs: tuple[type[Contract], type[Contract]]) -> tuple[Asked, ...]:
    return tuple(Asked(area, verb, request, answer, served_by) for verb, (request, answer) in verbs.items())


REQUESTS: Final = (
    *_asked(
        "device_manager",
        "jobs",
        submit=(jobs.JobSpec, jobs.JobRecord),
        get=(requests.JobRef, jobs.JobRecord),
        list=(requests.ListJobs, requests.JobList),
        cancel=(requests.CancelJob, jobs.JobRecord),
        hold=(requests.HoldJob, jobs.JobRecord),
        priority=(requests.SetPriority, jobs.JobRecord),
        retry=(requests.RetryJob, jobs.JobRecord),
        checkpoint=(saving.CheckpointJob, saving.SavedCheckpoint),
        why=(requests.JobRef, waiting.Why),
        dry_run=(jobs.JobSpec, waiting.Why),
    ),
    *_asked(
        "device_manager",
        "devices",
        list=(requests.Nothing, requests.DeviceList),
        lease=(requests.LeaseDevices, requests.HeldLeases),
        renew=(requests.HeldLeases, requests.HeldLeases),
        release=(requests.HeldLeases, requests.Nothing),
        revoke=(requests.RevokeLease, requests.Nothing),
        cordon=(requests.CordonDevice, requests.DeviceState),
        drain=(requests.DrainHost, requests.DrainedHost),
    ),
    *_asked("device_manager", f"devices.{HOST}", check=(checks.CheckDevices, checks.CheckedDevices)),
    *_asked(
        "runner",
        f"runner.{HOST}",
        start=(requests.StartAttempt, requests.Nothing),
        stop=(requests.StopAttempt, requests.Nothing),
        save=(saving.SaveAttempt, saving.SavedCheckpoint),
    ),
    *_asked(
        "dataloader",
        "data",
        list=(requests.Nothing, requests.DatasetList),
        describe=(requests.DatasetRef, requests.DatasetSummary),
        open=(requests.OpenStream, requests.OpenedStream),
        verify=(requests.VerifyShards, requests.VerifiedShards),
    ),
    *_asked(
        "dataloader",
        f"data.{HOST}",
        open=(requests.OpenStream, requests.OpenedStream),
        verify=(requests.VerifyShards, requests.VerifiedShards),
        progress=(requests.StreamProgress, requests.Nothing),
        close=(requests.CloseStream, requests.Nothing),
        shard=(requests.SendFile, requests.SendingFile),
    ),
    *_asked(
        "telemetry",
        "telemetry",
        query=(logs.QueryEvents, logs.EventLines),
        flush=(requests.Nothing, requests.Flushed),
    ),
)

_END: Final = ("cause", "exit_code", "error", "checkpoint", "revision", "metrics", "seconds")

EVENTS: Final = (
    Told("job.queued", "device_manager", "A job was accepted.",
         ("model", "dataset", "entrypoint", "revision", "parent_span")),
    Told("job.rejected", "device_manager", "A job event was refused, and why.", ("error", "bytes")),
    Told("job.placed", "device_manager", "Devices were leased for the job.", ("placed_on", "devices", "revision")),
    Told("job.started", "runner", "An attempt runs.", ("devices", "revision", "start_s")),
    Told("job.first_step", "trainer", "The first step of an attempt has ended.", ("seconds",)),
    Told("job.checkpointed", "runner", "A checkpoint stands in the job's record, and so counts.",
         ("checkpoint", "sha256", "bytes", "model", "reason", "revision")),
    Told("job.succeeded", "runner", "The job ended well.", _END),
    Told("job.failed", "runner, or device_manager", "The job ended for a cause that no retry would mend.", _END),
    Told("job.cancelled", "runner, or device_manager", "The job ended because somebody asked for it.", (*_END, "by")),
    Told("job.requeued", "runner, or device_manager", "An attempt ended, and the job waits for another one.",
         (*_END, "why", "backoff_s")),
    Told("job.cancel_requested", "device_manager", "Somebody asked that the job end.", ("by", "revision")),
    Told("job.held", "device_manager", "The job does not start before it is released.", ("by", "revision")),
    Told("job.released", "device_manager", "The job may start again.", ("revision",)),
    Told("job.priority_set", "device_manager", "The job has another priority.", ("priority", "before", "revision")),
    Told("job.preempting", "device_manager", "The job is asked to make room for another one.", ("by", "revision")),
    Told("job.stalled", "runner", "The trainer took no step for `stall_s`.", ("stall_s", "pid", "stacks", "on_stall")),
    Told("job.lease_awaited", "trainer", "The trainer stood still until its lease was renewed.", ("seconds",)),
    Told("job.output", "runner", "A line that the trainer printed.", ("stream", "line")),
    Told("job.output_dropped", "runner", "Lines that were too many at once.", ("stream", "lines", "bytes")),
    Told("attempt.fenced", "runner", "The attempt is no longer the job's: nothing of it counts.", None),
    Told("attempt.leaked", "runner", "Processes that a trainer had left behind were ended.", ("count", "processes")),
    Told("attempt.stuck", "runner", "Processes of an attempt cannot be ended.", ("pids",)),
    Told("attempt.workdir_removed", "runner", "Files went with the working directory.", ("files", "names")),
    Told("train.metrics", "trainer", "Metrics of one step, by the names that the entrypoint gave them.", None),
    Told("train.text", "trainer", "A text that the entrypoint logged.", ("name", "text")),
    Told("checkpoint.written", "trainer", "A checkpoint lies on disk.", None),
    Told("checkpoint.completed", "trainer", "One that the record names was given its final name.", None),
    Told("checkpoint.resumed", "trainer", "The attempt goes on from it.", None),
    Told("checkpoint.loaded", "trainer", "Weights or a state were taken from it, of this job or another.", None),
    Told("checkpoint.rejected", "trainer", "It is not used, and why.", None),
    Told("checkpoint.removed", "trainer", "It went because newer ones are kept.", None),
    Told("checkpoint.swept", "trainer", "What was left of one that never counted was removed.", None),
    Told("checkpoint.skipped", "trainer", "One that was due was not written.", None),
    Told("checkpoint.failed", "trainer", "One could not be written, and the trainer goes on.", None),
    Told("checkpoint.paused", "trainer", "The trainer waits for room on the disk.", None),
    Told("dataset.described", "dataloader", "A host has a dataset.",
         ("dataset", "samples", "bytes", "shards", "index_sha256")),
    Told("dataset.withdrawn", "dataloader", "A host has a dataset no longer.", ("dataset",)),
    Told("dataset.opened", "dataloader", "A trainer's stream begins.", ("dataset", "shards", "verified")),
    Told("dataset.verified", "dataloader", "Shards were hashed, and are what the index says.",
         ("dataset", "shards", "bytes")),
    Told("dataset.damaged", "dataloader", "A shard or an index is not what it should be.", ("dataset", "error")),
    Told("dataset.fetched", "dataloader", "A shard came from elsewhere.",
         ("dataset", "file", "bytes", "seconds", "waited_s", "source")),
    Told("dataset.evicted", "dataloader", "A shard left the cache, or cannot.", ("key", "cache_bytes", "problem")),
    Told("device.leased", "device_manager", "A person holds a device.", ("device", "holder")),
    Told("device.released", "device_manager", "A person gave it back, or it was taken back.",
         ("device", "holder", "revoked")),
    Told("device.reclaimed", "device_manager", "Nothing of a lost attempt is left on it.", ("device",)),
    Told("device.cordoned", "device_manager", "It takes no new jobs.", ("device", "cause", "reason", "by")),
    Told("device.uncordoned", "device_manager", "It takes jobs again.", ("device", "by", "why", "reason")),
    Told("device.xid", "device_manager", "The driver reported a fault.", ("device", "xid", "words")),
    Told("device.leaked", "device_manager", "It is used though nobody has leased it.", ("device", "pids")),
    Told("host.drained", "device_manager", "The host takes no new jobs.", ("host_id", "jobs")),
    Told("host.undrained", "device_manager", "The host takes jobs again.", ("host_id", "jobs")),
    Told("logs.moved", "telemetry", "The log of this NATS goes on in another root than before.",
         ("path", "before", "host_before")),
    Told("logs.removed", "telemetry", "The log of a day went, because it was too old or all were too large.",
         ("day", "bytes", "reason")),
    Told("service.started", "every service", "It serves.", ("service", "version", "pid", "url")),
    Told("service.stopped", "every service", "It has drained.", ("service", "pid")),
    Told("bus.rejected", "whoever was to read it", "A message is no valid one; what it began with.",
         ("subject", "error", "bytes", "payload", "payload_encoding", "recorded_by")),
    Told("events.dropped", "whoever lost them",
         "What a full buffer had no room for, of a job or of none: how many, by severity and by type.",
         ("dropped", "types")),
    Told("log.line", "every process", "A record of Python's logging.", ("logger", "message", "fields", "traceback")),
)  # fmt: skip
"""Beside these a user's own: `app.<what>` and whatever `ctx.event` and `LearningTelemetry` are given."""

BUCKETS: Final = (
    Kept("jobs", ID, jobs.JobRecord),
    Kept("devices", HOST, devices.HostReport),
    Kept("devices", f"{HOST}.runner", devices.RunnerReport),
    Kept("devices", f"{ID}.cordon", devices.Cordon),
    Kept("leases", ID, devices.Lease),
    Kept("leases", f"{ID}.reclaim", devices.ReclaimMark),
    Kept("datasets", ID, requests.DatasetSummary),
)

_BY_TYPE: Final[Mapping[str, Told]] = {one.type: one for one in EVENTS}
_AREAS: Final = frozenset(one.area for one in EVENTS)
_OF_TRAINERS: Final = frozenset(
    one.type for one in EVENTS if one.told_by in {"trainer", "every process", "whoever lost them"}
)
_AREAS_OF_SERVICES: Final = frozenset(one.area for one in EVENTS if one.type not in _OF_TRAINERS)


def may_be_told_by_trainers(kind: str) -> bool:
    """Whether training code may tell such an event: its own, or one of a trainer's; never what services answer for."""
    return kind in _OF_TRAINERS or kind.partition(".")[0] not in _AREAS_OF_SERVICES


def undocumented(events: Iterable[Mapping[str, object]]) -> list[str]:
    """What events say that stands nowhere here: `<type>` of one of ours, or `<type>: <name in its data>`."""
    found: dict[str, None] = {}
    for event in events:
        kind, data = str(event.get("type")), event.get("data")
        told = _BY_TYPE.get(kind)
        if told is None and kind.partition(".")[0] in _AREAS:
            found[kind] = None
        elif told is not None and told.data is not None and isinstance(data, dict):
            found |= dict.fromkeys(f"{kind}: {name}" for name in data if name not in told.data)
    return list(found)
