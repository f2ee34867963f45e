"""What passes between a runner, its pre-warmed process and a trainer, and how it is framed on a socket.

A frame is a big-endian length of four bytes and a msgpack map whose key `f` names its kind. The two ends are always of
one version, so there is no version field. The sockets are Unix socket pairs: nobody else can reach them.

    runner  -> warm     fork                            (with four descriptors, see there)
    warm    -> runner   ready, forked, exited
    runner  -> trainer  plan, deadline, stop, save, verified, committed, refused, writer_opened (with a descriptor),
                        writer_refused, recorded
    trainer -> runner   events, moved, verify, ahead, saving, paused, commit, open_writer, awaits_writer, writer_lost,
                        ended
    runner  -> writer   plan, deadline, committed, refused
    writer  -> runner   events, commit
    trainer -> writer   make_arena, write, copied
    writer  -> trainer  arena_made (with a descriptor), no_arena, durable, not_written
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal, cast

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import CheckpointRef, ErrorBody, JobSpec
from railbus_shared.contracts.model import Contract, Count, Id, Items, JsonMap
from railbus_shared.contracts.requests import OpenedStream
from railbus_shared.errors import BadMessage

MAX_FRAME_BYTES: Final = 16 << 20
LENGTH: Final = struct.Struct(">I")


class Fork(Contract):
    """Start a trainer, or the process that writes its checkpoints.

    With the frame come the descriptors of its socket, stdout, stderr, and of a trainer's file of stacks or of a
    writer's socket to its trainer.
    """

    f: Literal["fork"] = "fork"
    attempt: str
    """`<job>.<lease_epoch>`."""
    role: Literal["trainer", "writer"] = "trainer"
    cgroup_procs: Items[str] = ()
    """Files `cgroup.procs` that the child writes itself into before anything else."""
    cores: Items[int] = ()
    """CPUs that the child may run on; all if empty."""
    env: dict[str, str] = Field(default_factory=dict)
    workdir: str = ""
    """Where the child is to work; where its parent does if empty."""
    may_gain_privileges: bool = False
    """Whether programs that it starts may have more rights than it has, as `sudo` gives them."""

    @property
    def process(self) -> str:
        """What the child is called in `forked` and `exited`."""
        return self.attempt if self.role == "trainer" else f"{self.attempt}/{self.role}"


class Ready(Contract):
    """The pre-warmed process has imported torch and can fork."""

    f: Literal["ready"] = "ready"
    pid: int
    torch: str
    seconds: float
    """That the imports took."""


class Forked(Contract):
    f: Literal["forked"] = "forked"
    process: str
    pid: int


class Exited(Contract):
    """A trainer or writer has been reaped."""

    f: Literal["exited"] = "exited"
    process: str
    pid: int
    status: int
    """As `os.waitstatus_to_exitcode` gives it: an exit code, or the negative number of a signal."""


class Plan(Contract):
    """Everything a trainer needs to begin; the first frame that it reads."""

    f: Literal["plan"] = "plan"
    job: Id
    spec: JobSpec
    attempt: int = Field(ge=1)
    lease_epoch: int = Field(ge=1)
    host: Id
    producer: Id
    """Of the trainer's events."""
    root: str
    devices: Items[DeviceInfo]
    stream: OpenedStream
    entrypoint_dirs: Items[str] = ()
    checkpoint: CheckpointRef | None = None
    """The last committed one of the job, whose meta may still have its temporary name."""
    deadline_boottime_s: float
    """On CLOCK_BOOTTIME; past it the trainer must not step or commit."""
    rank: Count = 0
    world_size: int = Field(default=1, ge=1)
    """Ranks that there are, once the trainer has forked them (`ranks`)."""
    trace: str | None = None
    """The attempt's span, as a `traceparent`."""


class Deadline(Contract):
    """The leases were renewed: the new deadline."""

    f: Literal["deadline"] = "deadline"
    boottime_s: float


class Stop(Contract):
    """End at the next step, with a checkpoint."""

    f: Literal["stop"] = "stop"
    reason: Literal["cancelled", "preempted", "shutdown", "device_fault", "terminated"]
    """`terminated` is a trainer's own word for a SIGTERM that it got."""
    why: str = ""
    """Of a device that broke: what is wrong with it."""
    deadline_boottime_s: float | None = None
    """On CLOCK_BOOTTIME: when what is left of the attempt is killed."""


class Save(Contract):
    """Write a checkpoint at the next step."""

    f: Literal["save"] = "save"
    number: int = 0
    """Of this order among those of the attempt, from 1 on; 0 where nobody waits for an answer."""


class Verify(Contract):
    """The trainer is about to read these shards for the first time."""

    f: Literal["verify"] = "verify"
    shards: Items[int] = Field(min_length=1)


class Verified(Contract):
    """Answer to Verify; with an error none of them may be read."""

    f: Literal["verified"] = "verified"
    shards: Items[int]
    error: ErrorBody | None = None


class Ahead(Contract):
    """What the trainer will read next, and what it has unmapped; nobody answers."""

    f: Literal["ahead"] = "ahead"
    shards: Items[int] = ()
    """In the order in which they will be read for the first time, from the trainer's place on."""
    released: Items[int] = ()


class Saving(Contract):
    """What becomes of every Save up to this number: a checkpoint of this step is begun, or an error says why not.

    It may come again, with an error, for a checkpoint that had begun and failed.
    """

    f: Literal["saving"] = "saving"
    number: int
    step: int = Field(ge=0)
    error: ErrorBody | None = None


class Paused(Contract):
    """The trainer takes no step until a checkpoint is written; the commit of one ends that."""

    f: Literal["paused"] = "paused"
    reason: str = Field(max_length=1000)


class Commit(Contract):
    """The checkpoint's data is durable and its meta lies flushed under its temporary name."""

    f: Literal["commit"] = "commit"
    meta: CheckpointMeta


class Committed(Contract):
    """The job record names the checkpoint: the meta may take its final name."""

    f: Literal["committed"] = "committed"
    number: int


class Refused(Contract):
    """The job record could not be changed, because the attempt is no longer the job's; the trainer must end."""

    f: Literal["refused"] = "refused"
    number: int
    error: ErrorBody


class OpenWriter(Contract):
    """The trainer wants a process that writes its checkpoints; `writer_opened` or `writer_refused` comes later."""

    f: Literal["open_writer"] = "open_writer"


class WriterOpened(Contract):
    """There is a writer; the trainer's end of a socket pair to it comes with the frame."""

    f: Literal["writer_opened"] = "writer_opened"


class WriterRefused(Contract):
    """No writer can be had."""

    f: Literal["writer_refused"] = "writer_refused"
    error: ErrorBody


class AwaitsWriter(Contract):
    """The trainer has begun, or has ceased, to wait for its writer; meanwhile it does not stall."""

    f: Literal["awaits_writer"] = "awaits_writer"
    is_waiting: bool


class WriterLost(Contract):
    """The writer has closed its socket to the trainer; the answer comes once it is gone and its last word is heard."""

    f: Literal["writer_lost"] = "writer_lost"


class Recorded(Contract):
    """Answer to WriterLost: the checkpoint that the job record names now."""

    f: Literal["recorded"] = "recorded"
    checkpoint: CheckpointRef | None = None


class MakeArena(Contract):
    """Make an arena of this size in place of the one before, which nobody uses any more."""

    f: Literal["make_arena"] = "make_arena"
    nbytes: int = Field(ge=1)


class ArenaMade(Contract):
    """The arena is there, with all of its pages; its descriptor comes with the frame."""

    f: Literal["arena_made"] = "arena_made"
    nbytes: int


class NoArena(Contract):
    """There was no memory for the arena."""

    f: Literal["no_arena"] = "no_arena"
    why: str


class Write(Contract):
    """A checkpoint is being copied into the arena as the bytes of its file (Copied tells how far): write it down, and
    remove what is to go for it."""

    f: Literal["write"] = "write"
    nbytes: int = Field(ge=1)
    """Of the file, from the start of the arena on."""
    step: int
    fields: JsonMap
    """Of its meta, all but the number and the files."""
    damaged: Items[int] = ()
    """Numbers of older ones that cannot be read, and are not to be relied on when others are removed."""
    began_s: float
    """When the save began, on CLOCK_MONOTONIC."""
    waited_s: float
    """That the loop had stood still before, for the checkpoint before this one."""


class Copied(Contract):
    """So much of the file that was ordered lies in the arena."""

    f: Literal["copied"] = "copied"
    nbytes: int
    """From the start of the arena on."""
    stall_s: float
    """How long the loop has stood still for it by now."""


class Durable(Contract):
    """The checkpoint exists."""

    f: Literal["durable"] = "durable"
    number: int
    step: int
    nbytes: int
    seconds: float
    """From the beginning of its save, after waiting for the one before."""


class NotWritten(Contract):
    """The checkpoint does not exist, and nothing of it is left."""

    f: Literal["not_written"] = "not_written"
    step: int
    error: ErrorBody
    is_refused: bool = False
    """Whether the attempt is no longer the job's; the trainer must end."""


class Moved(Contract):
    """The trainer makes progress; sent now and then, and only where the job has a `stall_s`."""

    f: Literal["moved"] = "moved"


class Events(Contract):
    """Events of the trainer, complete but for id and number; see `contracts.events.Event`."""

    f: Literal["events"] = "events"
    events: Items[JsonMap]


class Ended(Contract):
    """The last frame of a trainer that ends by itself."""

    f: Literal["ended"] = "ended"
    outcome: Literal["succeeded", "stopped", "failed"]
    error: ErrorBody | None = None
    metrics: JsonMap = Field(default_factory=dict)


Frame = (
    Fork | Ready | Forked | Exited
    | Plan | Deadline | Stop | Save | Verified | Committed | Refused
    | WriterOpened | WriterRefused | Recorded
    | Events | Moved | Verify | Ahead | Saving | Paused | Commit | Ended
    | OpenWriter | AwaitsWriter | WriterLost
    | MakeArena | Write | Copied | ArenaMade | NoArena | Durable | NotWritten
)  # fmt: skip

_FRAME: Final[TypeAdapter[Frame]] = TypeAdapter(Annotated[Frame, Field(discriminator="f")])


def pack(frame: Frame) -> bytes:
    """A frame as it goes into the socket; of text that is no Unicode, such as a file's name may be, the escapes."""
    plain = {"f": frame.f, "events": frame.events} if isinstance(frame, Events) else frame.model_dump(mode="json")
    body = cast("bytes", msgpack.packb(plain, unicode_errors="backslashreplace"))
    if len(body) > MAX_FRAME_BYTES:
        raise BadMessage(f"a {frame.f!r} frame has {len(body)} bytes, more than {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Collects bytes of a socket and gives the frames that are complete."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by `data`; raises BadMessage for bytes that are no frame."""
        self._bytes += data
        frames: list[Frame] = []
        while len(self._bytes) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._bytes)
            if length > MAX_FRAME_BYTES:
                raise BadMessage(f"a frame claims {length} bytes, more than {MAX_FRAME_BYTES}")
            if len(self._bytes) < LENGTH.size + length:
                break
            body = bytes(self._bytes[LENGTH.size : LENGTH.size + length])
            del self._bytes[: LENGTH.size + length]
            frames.append(_parse(body))
        return frames


def _parse(body: bytes) -> Frame:
    try:
        return _FRAME.validate_python(msgpack.unpackb(body, raw=False))
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, ValidationError) as exc:
        raise BadMessage(f"not a frame: {exc}") from exc
