"""What a checkpoint of a trainer holds: the parts that the entrypoint tracks, its streams, the generators, the step.

The state is made of tensors and plain containers only, so that it loads with `weights_only`.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, cast, runtime_checkable

import torch

from railbus_runner.checkpointing import fitting, generators, names
from railbus_runner.checkpointing.filling import Placement
from railbus_runner.checkpointing.rng import Generators, rng_state, set_rng_state
from railbus_shared.errors import Conflict, NotSupported, shorten

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


class Values(fitting.Values, Protocol):
    """A file that the tensors of a state get their values from."""

    def fill(self, state: object, placements: Iterable[Placement] = ()) -> int: ...


class Tracked:
    """Parts and streams by name; their state and its restoration.

    Attributes:
        extras: plain values of the entrypoint's own, saved and restored with all else.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.extras: dict[str, object] = {}
        self.streams: dict[str, TrackedStream] = {}
        self._pending_streams: dict[str, Mapping[str, object]] = {}
        self._generators: Generators | None = None

    @property
    def model(self) -> torch.nn.Module | None:
        """What is tracked as `model`, without wrappers."""
        model = self.parts.get("model")
        return names.unwrapped(model) if isinstance(model, torch.nn.Module) else None

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
        found = generators.part_of(part) or part
        if not isinstance(found, Part):
            raise TypeError(
                f"track() got {name}={shorten(part)}: it has no state_dict and load_state_dict; "
                "track models, optimizers, schedulers, generators and the like, and put plain values into ctx.extras"
            )
        self.parts[name] = found

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
            "parts": {name: _state_of(part) for name, part in self.parts.items()},
            "extras": dict(self.extras),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "rng": rng_state(self._generators),
        }
        _check_plain(self.extras, at="ctx.extras", remedy="put numbers, strings, tensors, lists and maps there only")
        _check_plain(state, at="state")
        return state

    @contextlib.contextmanager
    def with_generators(self, generators: Generators) -> Iterator[None]:
        """States that are taken meanwhile have the generators of an earlier moment."""
        self._generators = generators
        try:
            yield
        finally:
            self._generators = None

    def live(self, stored: Iterable[str]) -> set[str]:
        """Of names of stored tensors, such as `parts.model.fc.weight`, those that there is a live tensor for.

        A hint: what a file says of itself before it is proven decides nothing but where memory is taken early.
        """
        held: set[str] = set()
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                held |= {f"parts.{name}.{key}" for key in names.plain_state(part)}
            elif isinstance(part, torch.optim.Optimizer) and (part.state or _is_off_cpu(part)):
                held |= {stored_name for stored_name in stored if stored_name.startswith(f"parts.{name}.")}
        return held

    def restore(self, state: Mapping[str, object], *, values: Values | None = None) -> int:
        """Put the parts and extras back, and give the step; streams and generators come after.

        Nothing is changed before all of the state is known to fit. With `values`, the state's tensors have none yet:
        they are read from there, straight into live tensors where those are alike. Models come first and generators
        last, as what takes up its state may draw from one.

        Raises Conflict for a part that the state lacks, or that differs from it, and NotSupported for a later format.
        """
        if (found := state.get("format")) != FORMAT:
            raise NotSupported(
                f"the checkpoint has format {shorten(found)}",
                hint="use the railbus that wrote it, or a later one",
            )
        parts = cast("dict[str, Any]", state["parts"])
        if missing := sorted(self.parts.keys() - parts.keys()):
            raise Conflict(
                f"the checkpoint has no state of {', '.join(missing)}, only of {', '.join(sorted(parts)) or 'nothing'}",
                hint="track the parts under the names that they were saved by, or begin a new job",
            )
        mine = {name: _in_own_names(part, parts[name]) for name, part in self.parts.items()}
        self._check_fit(mine)
        if values is not None:
            placements = [
                placement for name, part in self.parts.items() for placement in _placed(part, mine[name], values)
            ]
            values.fill([mine, {key: value for key, value in state.items() if key != "parts"}], placements)
        for name, part in sorted(self.parts.items(), key=lambda item: _turn(item[1])):
            _take_up(part, mine[name])
        self.extras.clear()
        self.extras.update(cast("dict[str, object]", state.get("extras", {})))
        return cast("int", state["step"])

    def restore_generators(self, state: Mapping[str, object]) -> str:
        """Put the global generators back, once nothing more draws from them; says which could not be, if any."""
        return set_rng_state(cast("Mapping[str, object]", state["rng"]))

    def _check_fit(self, mine: Mapping[str, Any]) -> None:
        differences = {name: _difference(part, mine[name]) for name, part in self.parts.items()}
        told = {name: difference for name, difference in differences.items() if difference}
        if told:
            raise Conflict(
                "the checkpoint does not fit: "
                + "; ".join(f"{name} has {difference}" for name, difference in told.items()),
                hint="resume with the params that the checkpoint was made with, or load parts of it with ctx.load",
                details={name: str(difference) for name, difference in told.items()},
            )

    def restore_streams(self, state: Mapping[str, object]) -> None:
        """Put the streams back to their positions, also those that are yet to be added.

        Raises InvalidField if a position belongs to another dataset, split, seed or batch size.
        """
        self._pending_streams = dict(cast("dict[str, Mapping[str, object]]", state["streams"]))
        for name, stream in self.streams.items():
            if name in self._pending_streams:
                stream.load_state_dict(self._pending_streams.pop(name))


def _state_of(part: Part) -> Any:
    return names.plain_state(part) if isinstance(part, torch.nn.Module) else part.state_dict()


def _in_own_names(part: Part, saved: Any) -> Any:
    return fitting.for_model(part, saved) if isinstance(part, torch.nn.Module) and isinstance(saved, dict) else saved


def _difference(part: Part, saved: Any) -> fitting.Difference:
    match part:
        case torch.nn.Module():
            return fitting.model_difference(part, saved)
        case torch.optim.Optimizer():
            return fitting.optimizer_difference(part, saved)
        case _:
            return fitting.Difference()


def _placed(part: Part, saved: Any, values: Values) -> Iterable[Placement]:
    """Only parts that are known to copy, or to keep, the tensors they are given may be given their own."""
    match part:
        case torch.nn.Module():
            return fitting.place_model(part, saved, values)
        case torch.optim.Optimizer():
            return fitting.place_optimizer(part, saved, values)
        case _:
            return ()


def _turn(part: Part) -> int:
    match part:
        case torch.nn.Module():
            return 0
        case torch.optim.Optimizer():
            return 1
        case generators.TorchGenerator() | generators.NumpyGenerator() | generators.PythonGenerator():
            return 3
        case _:
            return 2


def _take_up(part: Part, saved: Any) -> None:
    (names.unwrapped(part) if isinstance(part, torch.nn.Module) else part).load_state_dict(saved)


def _is_off_cpu(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.device.type != "cpu" for group in optimizer.param_groups for parameter in group["params"])


def _check_plain(
    value: object, *, at: str, remedy: str = "let state_dict() give tensors, numbers, strings, lists and maps only"
) -> None:
    """Raises TypeError, naming the place, for what `weights_only` would refuse to load."""
    if type(value) in {dict, OrderedDict, Counter}:
        for key, item in cast("dict[object, object]", value).items():
            _check_plain(key, at=f"a key of {at}", remedy=remedy)
            _check_plain(item, at=f"{at}.{key}", remedy=remedy)
    elif type(value) in {list, tuple, set}:
        for number, item in enumerate(cast("list[object]", value)):
            _check_plain(item, at=f"{at}[{number}]", remedy=remedy)
    elif not isinstance(value, torch.Tensor) and type(value) not in _LEAVES:
        raise TypeError(
            f"{at} holds {shorten(value)} of type {type(value).__name__}, which cannot be loaded safely; {remedy}"
        )
