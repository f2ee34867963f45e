"""What is told of checkpoints: events `checkpoint.<what>`, each naming the checkpoint and its model."""

from __future__ import annotations

from railbus_runner.recorder import Recorder
from railbus_shared.layout import checkpoint_stem


class CheckpointEvents:
    """Tells of the checkpoints of one model."""

    def __init__(self, recorder: Recorder, *, model: str) -> None:
        self._recorder = recorder
        self._model = model

    def tell(self, what: str, number: int, *, step: int | None = None, is_bad: bool = False, **data: object) -> None:
        """Record that something happened to a checkpoint; a bad thing is a warning."""
        self._recorder.record(
            f"checkpoint.{what}",
            step=step,
            severity="warning" if is_bad else "info",
            data={"checkpoint": checkpoint_stem(number), "model": self._model, **data},
        )
