"""What a checkpoint of a trainer holds: the parts that the entrypoint tracks, its streams, the generators, the step.

The state is made of tensors and plain containers only, so that it loads with `weights_only`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Protocol, cast, runtime_checkable

import torch

from railbus_runner.checkpointing.rng import rng_state, set_rng_state
from railbus_shared.errors import Conflict, shorten

FORMAT: Final = 1
_LEAVES: Final = {str, bytes, int, float, bool, complex, torch.Size, torch.dtype, torch.device, type(None)}
"""Exact types: a scalar of NumPy is a float too, and would not load."""


@runtime_checkable
class Part(Protocol):
    """A model, optimizer, scheduler, gradient scaler, or anything else that can say and take back its state."""

    def state_dict(self) -> Any:
        """Everything that a restart would lose."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go back to a state."""


class TrackedStream(Protocol):
    """The position in a dataset that a checkpoint remembers."""

    @property
    def epoch(self) -> int: ...

    @property
    def samples_seen(self) -> int: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: Mapping[str, object], /) -> None: ...


class Tracked:
    """Parts and streams by name; their state and its restoration."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.streams: dict[str, TrackedStream] = {}
        self._pending_streams: dict[str, Mapping[str, object]] = {}

    @property
    def model(self) -> torch.nn.Module | None:
        model = self.parts.get("model")
        return model if isinstance(model, torch.nn.Module) else None

    @property
    def epoch(self) -> int:
        return next((stream.epoch for stream in self.streams.values()), 0)

    @property
    def samples_seen(self) -> int:
        return next((stream.samples_seen for stream in self.streams.values()), 0)

    def add_part(self, name: str, part: object) -> None:
        """Raises ValueError for a name that is taken, TypeError for what has no state."""
        if name in self.parts:
            raise ValueError(f"track() has {name!r} already; give each part its own name")
        if not isinstance(part, Part):
            raise TypeError(
                f"track() got {name}={shorten(part)}: it has no state_dict and load_state_dict; "
                "track models, optimizers, schedulers and the like"
            )
        self.parts[name] = part

    def add_stream(self, split: str, stream: TrackedStream) -> None:
        """Tracked under its split's name, a second one of a split as `train-2`; takes up a position already loaded."""
        num_same = sum(name.partition("-")[0] == split for name in self.streams)
        name = split if num_same == 0 else f"{split}-{num_same + 1}"
        self.streams[name] = stream
        if name in self._pending_streams:
            stream.load_state_dict(self._pending_streams.pop(name))

    def state(self, *, step: int) -> dict[str, object]:
        """A checkpoint's content; it shares memory with the live tensors. Raises TypeError for foreign objects."""
        state: dict[str, object] = {
            "format": FORMAT,
            "step": step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "rng": rng_state(),
        }
        _check_plain(state, at="state")
        return state

    def restore(self, state: Mapping[str, object]) -> int:
        """Put parts and generators back; gives the step. Raises Conflict for a part that the state lacks."""
        parts = cast("dict[str, object]", state["parts"])
        if missing := sorted(self.parts.keys() - parts.keys()):
            raise Conflict(
                f"the checkpoint has no state of {', '.join(missing)}, only of {', '.join(sorted(parts)) or 'nothing'}",
                hint="track the parts under the names that they were saved by, or begin a new job",
            )
        for name, part in self.parts.items():
            part.load_state_dict(parts[name])
        set_rng_state(cast("Mapping[str, object]", state["rng"]))
        return cast("int", state["step"])

    def restore_streams(self, state: Mapping[str, object]) -> None:
        """Put the streams back to their positions, also those that are yet to be added.

        Raises InvalidField if a position belongs to another dataset, split, seed or batch size.
        """
        self._pending_streams = dict(cast("dict[str, Mapping[str, object]]", state["streams"]))
        for name, stream in self.streams.items():
            if name in self._pending_streams:
                stream.load_state_dict(self._pending_streams.pop(name))


def _check_plain(value: object, *, at: str) -> None:
    """Raises TypeError, naming the place, for what `weights_only` would refuse to load."""
    if type(value) in {dict, OrderedDict, Counter}:
        for key, item in cast("dict[object, object]", value).items():
            _check_plain(key, at=f"a key of {at}")
            _check_plain(item, at=f"{at}.{key}")
    elif type(value) in {list, tuple, set}:
        for number, item in enumerate(cast("list[object]", value)):
            _check_plain(item, at=f"{at}[{number}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in _LEAVES:
        raise TypeError(
            f"{at} holds {shorten(value)} of type {type(value).__name__}, which cannot be loaded safely; "
            "let state_dict() give tensors, numbers, strings, lists and maps only"
        )
