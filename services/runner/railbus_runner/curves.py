"""Metrics as events (`train.metrics`): thinned to what a person can see, but the last value is always told.

Metrics that are logged together form a series; each series is told at most twenty times a second. A tensor is read only
when it is told, so that a thinned step does not wait for the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import JsonValue

from railbus_runner.recorder import Recorder
from railbus_shared.errors import shorten
from railbus_shared.plain_values import plain

_PERIOD_S: Final = 0.05


@dataclass
class _Series:
    told_s: float = -1.0
    waiting: tuple[int, Mapping[str, object]] | None = None


class Curves:
    """The metrics of one trainer.

    Attributes:
        latest: the value of each metric that was told last; after `flush` the last that was logged.
    """

    def __init__(self, recorder: Recorder, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.latest: dict[str, JsonValue] = {}
        self._recorder = recorder
        self._clock_s = clock_s
        self._series: dict[tuple[str, ...], _Series] = {}
        self._steps: dict[str, int] = {}

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Tell the metrics, or let them wait for the next of their series. Raises TypeError for what is no number."""
        if not metrics:
            return
        series = self._series.setdefault(tuple(metrics), _Series())
        now_s = self._clock_s()
        if series.told_s < 0 or now_s - series.told_s >= _PERIOD_S:
            series.told_s, series.waiting = now_s, None
            self._tell(step, metrics)
        else:
            series.waiting = (step, {name: _detached(value) for name, value in metrics.items()})

    def of_step(self, step: int) -> dict[str, JsonValue]:
        """The value of each metric whose last one was told at this step; after `flush` whose last one was logged."""
        return {name: value for name, value in self.latest.items() if self._steps[name] == step}

    def flush(self) -> None:
        """Tell what waits."""
        for series in self._series.values():
            if series.waiting is not None:
                (step, metrics), series.waiting = series.waiting, None
                self._tell(step, metrics)

    def _tell(self, step: int, metrics: Mapping[str, object]) -> None:
        numbers = {name: number(value, name=name) for name, value in metrics.items()}
        self.latest.update(numbers)
        self._steps.update(dict.fromkeys(numbers, step))
        self._recorder.record("train.metrics", step=step, data=numbers)


def number(value: object, *, name: str) -> JsonValue:
    """A metric as JSON can say it; NaN and the infinities as words. Raises TypeError for what is not one number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return plain(value.item())
    told = plain(value)
    if isinstance(told, int | float) or told in ("NaN", "Infinity", "-Infinity"):
        return told
    raise TypeError(f"metric {name!r} has value {shorten(value)}: log one number per metric, and texts by log_text()")


def _detached(value: object) -> object:
    """Without its graph, which would otherwise live until the value is told."""
    return value.detach() if isinstance(value, torch.Tensor) else value
