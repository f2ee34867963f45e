"""Checkpoints on request: what a person asks, what the runner is told, and the answer once the bytes are durable."""

from __future__ import annotations

from pydantic import Field

from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.contracts.model import Contract, Count, Id, Name

MAX_WAIT_S = 3600.0


class CheckpointJob(Contract):
    """Asks a running job for a checkpoint at its next step; answered once that is durable."""

    id: Id
    timeout_s: float = Field(default=60.0, gt=0, le=MAX_WAIT_S)
    """How long to wait for it, seconds; then the answer is an error, and the trainer still writes it."""


class SaveAttempt(Contract):
    """device_manager asks a runner for a checkpoint of an attempt."""

    job: Id
    lease_epoch: int = Field(ge=1)
    timeout_s: float = Field(default=60.0, gt=0, le=MAX_WAIT_S)


class SavedCheckpoint(Contract):
    """Answer to CheckpointJob and SaveAttempt: the job record names the checkpoint."""

    job: Id
    model: Name
    checkpoint: CheckpointRef
    bytes: Count
    """Of all its files."""
    seconds: float = Field(ge=0)
    """From the order to the trainer until the job record named the checkpoint."""
