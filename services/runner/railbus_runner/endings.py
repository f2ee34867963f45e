"""How a trainer ends from the inside, past user code that catches `Exception`.

    TrainerEnding (BaseException)
     |- RunnerGone       the runner's end of the socket is closed: the process ends at once and writes nothing more
     |- Stopped          a Stop was obeyed: the checkpoint is written, the attempt ends
     `- CommitRefused    the attempt is no longer the job's: whatever it would write does not count

None of them is an error of the job, and none leaves `trainer.main`.
"""

from __future__ import annotations

from railbus_shared.errors import RailbusError


class TrainerEnding(BaseException):
    """Root of the tree; never raised itself."""


class RunnerGone(TrainerEnding):
    """Nobody reads what this trainer says."""


class Stopped(TrainerEnding):
    """The trainer was asked to stop, and may."""


class CommitRefused(TrainerEnding):
    """The runner could not name a checkpoint in the job record."""

    def __init__(self, error: RailbusError) -> None:
        super().__init__(str(error))
        self.error = error
