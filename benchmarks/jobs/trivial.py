"""A job that does nothing: what is left is what starting and ending a job costs."""

from __future__ import annotations

from railbus import TrainContext


def nothing(ctx: TrainContext) -> None:
    """End at once."""
