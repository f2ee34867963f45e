"""Jobs: what a user asks for (`JobSpec`) and what is true of it now (`JobRecord`)."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Final, Literal, Self

import orjson
from pydantic import BeforeValidator, Field, field_validator, model_validator

from railbus_shared.contracts.model import (
    Contract,
    Count,
    EntrypointName,
    Id,
    Items,
    JsonMap,
    Name,
    Sha256,
    Time,
    TraceParent,
)

JobState = Literal["queued", "placed", "running", "checkpointing", "succeeded", "failed", "cancelled"]
FINAL_STATES: Final = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE_STATES: Final = frozenset({"placed", "running", "checkpointing"})

EndCause = Literal[
    "ok",
    "user_error",
    "bad_input",
    "signal",
    "host_oom",
    "device_oom",
    "time_limit",
    "cancelled",
    "preempted",
    "lease_lost",
    "runner_lost",
    "host_lost",
    "storage_full",
    "start_refused",
    "setup_failed",
    "device_fault",
    "hang",
]
"""Why an attempt ended, one word of a closed list.

`host_oom` is told by the control group's own count, `device_oom` by the driver; `setup_failed` is a trainer that could
not be made ready, `device_fault` a GPU that broke under it, `hang` a job that made no progress for its `stall_s`.
"""

DeviceKind = Literal["gpu", "cpu"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


class DevicePreference(Contract):
    """What a job wants of devices."""

    kind: Annotated[Items[DeviceKind], BeforeValidator(_one_or_many), Field(min_length=1, max_length=2)] = (
        "gpu",
        "cpu",
    )
    """Kinds in order of preference; a MIG slice counts as a gpu."""
    count: int = Field(default=1, ge=1, le=64)
    """How many devices, all or nothing."""
    min_memory_bytes: Count = 0
    """Least memory of each device."""
    labels: dict[str, str] = Field(default_factory=dict, max_length=16)
    """Labels that each device must carry."""
    same_host: bool = True
    """Whether all devices must be on one host. Without it one host is still preferred to several."""
    sharing: Literal["exclusive", "fraction"] = "exclusive"
    """`exclusive`: a device has one holder at a time. `fraction`: the job shares one GPU with others."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Part of a GPU's memory, with `sharing: fraction`: PyTorch's per-process memory fraction of the trainer."""

    @model_validator(mode="after")
    def _fraction_belongs_to_sharing(self) -> Self:
        if (self.fraction is not None) != (self.sharing == "fraction"):
            raise ValueError("`fraction` and `sharing: fraction` go together")
        if self.sharing == "fraction" and self.count != 1:
            raise ValueError("a job that shares has a `count` of 1")
        return self


class CheckpointPolicy(Contract):
    """When checkpoints are written and which are kept; one more is always written at the end."""

    every_steps: int | None = Field(default=None, ge=1)
    """After so many steps."""
    every_s: float | None = Field(default=600.0, gt=0)
    """Once so many seconds have passed since the last one was begun, so that a crash never costs much more; null for
    none."""
    mode: Literal["auto", "async", "sync"] = "auto"
    """`async`: the state is copied and the trainer goes on while another process writes the copy. `sync`: the trainer
    writes it itself, without a copy in memory. `auto`: async where the state is large enough to be felt and the copy
    fits into the attempt's memory."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a checkpoint that is due does while the one before it is still being written."""
    on_full: Literal["continue", "pause", "fail"] = "continue"
    """When the disk is full: train on and try again, stop stepping until there is room, or fail the job."""
    keep_last: int = Field(default=3, ge=1, le=1000)
    """Newest checkpoints of the job that are kept; older ones go once a newer one is durable."""
    keep_best: int = Field(default=0, ge=0, le=1000)
    """So many are kept because their `metric` is the best, also if they are not among the newest. For that `ctx.log` of
    the metric writes a checkpoint of its own where it would be one of them."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that are a multiple of this are never removed."""
    metric: str | None = Field(default=None, min_length=1, max_length=128)
    """The metric that `keep_best` goes by, as `ctx.log` or `ctx.step` names it: its value for the very state that the
    checkpoint holds. One that is missing, NaN or infinite is never best."""
    best: Literal["min", "max"] = "min"
    """Whether a low `metric` is good, or a high one."""

    @model_validator(mode="after")
    def _best_has_a_metric(self) -> Self:
        if (self.keep_best > 0) != (self.metric is not None):
            raise ValueError("`keep_best` and `metric` go together")
        return self


RuleCause = Literal[
    "user_error",
    "bad_input",
    "signal",
    "host_oom",
    "device_oom",
    "storage_full",
    "setup_failed",
    "device_fault",
    "hang",
]
"""Causes that a line of output may be evidence of; the others railbus knows by itself."""


class LogRule(Contract):
    """What a line of a failed attempt's output tells about the cause of its end."""

    pattern: str = Field(min_length=1, max_length=500)
    """A regular expression as Python has them, searched for in each line."""
    cause: RuleCause
    """The cause of the end where the line stands; retries go by it."""
    hint: str = Field(default="", max_length=500)
    """What to do about it, for people."""

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as exc:
            raise ValueError(f"not a regular expression: {exc}") from exc
        return pattern


class RetryPolicy(Contract):
    """When an attempt that failed is tried again, beside `max_attempts`."""

    backoff_s: float = Field(default=1.0, ge=0, le=86_400)
    """Wait before the first retry, seconds; doubled for each further one in a row, which a checkpoint ends.

    What mostly happens once (`signal`, `runner_lost`, `lease_lost`) is tried again at once the first time, and what
    does not count as an attempt is never waited for.
    """
    max_backoff_s: float = Field(default=300.0, ge=0, le=86_400)
    also_on: Items[EndCause] = ()
    """Causes that are retried although by default they end the job, for instance `user_error`."""
    never_on: Items[EndCause] = ()
    """Causes that end the job although by default they are retried."""
    log_rules: Items[LogRule] = Field(default=(), max_length=32)
    """Looked at before the runner's own rules."""

    @field_validator("also_on", "never_on")
    @classmethod
    def _causes_are_losses(cls, causes: tuple[EndCause, ...]) -> tuple[EndCause, ...]:
        if asked := {"ok", "cancelled"}.intersection(causes):
            raise ValueError(f"{min(asked)!r} always ends a job")
        return causes


_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
_ENV_REFUSED: Final = ("RAILBUS_", "LD_", "NATS_", "PYTHON")


class JobSpec(Contract):
    """What a user asks for; immutable once accepted."""

    v: Literal[1] = 1
    model: Name
    """Name of the model; its checkpoints lie in `models/<model>/`."""
    dataset: Name
    """Name of the dataset under the root."""
    entrypoint: EntrypointName
    """A built-in's short name, or `package.module:function` from a folder that the runner allows."""
    id: Id | None = None
    """The submit key: same id and same spec is the same job, another spec is CONFLICT."""
    name: str | None = Field(default=None, max_length=200)
    """A name for people."""
    owner: Id | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    """Higher goes first."""
    held: bool = False
    """Accepted as held back: it is not placed until it is released."""
    params: JsonMap = Field(default_factory=dict, max_length=256)
    """Passed to the entrypoint."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the data order and of every random number generator of the trainer."""
    devices: DevicePreference = DevicePreference()
    ranks: int = Field(default=1, ge=1, le=64)
    """Processes that train together on the host, by `torch.distributed`; they share the GPUs evenly."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """Starts that may count as attempts; preemption and a lost host do not count."""
    time_limit_s: float | None = Field(default=None, gt=0, le=366 * 86_400)
    """Longest run of one attempt, seconds."""
    after: Items[Id] = Field(default=(), max_length=64)
    """Jobs that must have succeeded before this one is placed."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    retry: RetryPolicy = RetryPolicy()
    stop_grace_s: float = Field(default=30.0, ge=0, le=3600)
    """How long a trainer that is told to stop may take, for instance to write a checkpoint; then it is killed."""
    stall_s: float | None = Field(default=None, gt=0, le=366 * 86_400)
    """A trainer that completes no step for so long is reported with the stacks of its threads."""
    on_stall: Literal["report", "end"] = "report"
    """Whether such an attempt is also ended, with the cause `hang`."""
    preemptible: bool = True
    """Whether a job of higher priority may take its devices, after a checkpoint."""
    wait_for_hosts: bool = False
    """Wait although no host that is known could ever meet the request, for one that is still to come."""
    group: Id | None = None
    """Jobs that were submitted together, such as those of one sweep."""
    resume_from: str | None = Field(default=None, pattern=r"^checkpoint-[0-9]{6,12}$")
    """A checkpoint of the same model to begin from, for instance `checkpoint-000123`."""
    trace: TraceParent | None = None
    """The span that submits the job, a W3C `traceparent`: the job's spans come below it. No part of what the job is."""
    env: dict[str, str] = Field(default_factory=dict, max_length=64)
    """Environment variables of the trainer."""
    workdir: str | None = Field(default=None, max_length=1000, pattern=r"^/")
    """Working directory of the trainer, absolute; one that the runner's settings allow. By default a fresh one."""

    @field_validator("env")
    @classmethod
    def _env_is_harmless(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _ENV_NAME.match(name) or "\0" in value:
                raise ValueError(f"{name!r} cannot be an environment variable")
            if name.upper().startswith(_ENV_REFUSED):
                raise ValueError(
                    f"{name!r} is set by the runner; names beginning with {', '.join(_ENV_REFUSED)} are refused"
                )
        return env

    @property
    def digest(self) -> str:
        """Hex SHA-256 of what differs from the defaults, but for `trace`; two specs are the same job if it is equal.

        Without the defaults, so that a field that a later version adds does not make another job of it.
        """
        said = self.model_dump(mode="json", exclude_defaults=True, exclude={"trace"})
        return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()


class ErrorBody(Contract):
    """An error as it stands in a record, an event or an error reply."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class CheckpointRef(Contract):
    """A committed checkpoint of a job."""

    number: int = Field(ge=1)
    step: Count
    sha256: Sha256
    """Of the `.pt` file."""


class JobRecord(Contract):
    """What is true of a job now; a value in the bucket `railbus_jobs`, changed only by compare-and-set."""

    v: Literal[1] = 1
    id: Id
    spec: JobSpec
    spec_sha256: Sha256
    sequence: Count
    """Of the submission in the stream of jobs: the job's age."""
    incarnation: str
    state: JobState = "queued"
    reason: str = ""
    """Why it is in this state, for people: what a queued job waits for, why a failed one failed."""
    attempt: int = Field(default=0, ge=0)
    """Starts that counted."""
    retries: int = Field(default=0, ge=0)
    """Ends in a row that were followed by another try; the back-off grows with it."""
    backoff_s: float = Field(default=0.0, ge=0)
    """How long the queued job is not placed after `changed_at`; counted by the placer's own clock."""
    priority: int = Field(default=0, ge=-100, le=100)
    """The spec's at first; a person may change it."""
    held_by: Id | None = None
    """Who holds the queued job back; it is not placed until released."""
    lease_epoch: int = Field(default=0, ge=0)
    """The fencing number: raised at every placement; a write with an older one is refused."""
    host: Id | None = None
    devices: Items[Id] = ()
    cancel_requested: bool = False
    cancelled_by: Id | None = None
    """Who asked; the owner of the request where it names one."""
    preempted_by: Id | None = None
    """The job for which the present attempt is to make room."""
    retry_of: Id | None = None
    """The ended job that this one was made from by `retry`."""
    trace: TraceParent | None = None
    """The job's own span; that of its submitter stands in the spec."""
    checkpoint: CheckpointRef | None = None
    """The last committed one."""
    end_cause: EndCause | None = None
    """Of the last attempt that ended."""
    exit_code: int | None = None
    """Of the last attempt's trainer: its exit code, or the negative number of the signal that ended it."""
    error: ErrorBody | None = None
    submitted_at: Time
    changed_at: Time
    started_at: Time | None = None
    """When the first attempt began to run."""
    ended_at: Time | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def is_active(self) -> bool:
        """Whether the record holds devices."""
        return self.state in ACTIVE_STATES
