"""What a trainer says of the exception that ended its entrypoint."""

from __future__ import annotations

import traceback
from typing import Final

import torch

from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.errors import Detail, EntrypointFailed, OutOfMemory, RailbusError

MAX_TRACEBACK_CHARS: Final = 8192
_MAX_MESSAGE_CHARS: Final = 1000
_NO_HOST_MEMORY: Final = ("can't allocate memory", "not enough memory: you tried to allocate")
"""How torch's CPU allocator words what is a MemoryError elsewhere."""


def error_body(exc: BaseException) -> ErrorBody:
    """The error of the attempt: one of railbus as it is, memory as OutOfMemory, all else as EntrypointFailed."""
    return ErrorBody.parse(_as_railbus_error(exc).to_wire())


def _as_railbus_error(exc: BaseException) -> RailbusError:
    if isinstance(exc, RailbusError):
        return exc
    if isinstance(exc, torch.OutOfMemoryError):
        return _out_of_memory(exc, memory="device")
    if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and any(w in str(exc) for w in _NO_HOST_MEMORY)):
        return _out_of_memory(exc, memory="host")
    if isinstance(exc, SystemExit):
        return _failed(exc, f"the entrypoint called sys.exit({exc.code!r})", hint="return from the entrypoint instead")
    return _failed(exc, traceback.format_exception_only(exc)[-1].strip())


def _out_of_memory(exc: BaseException, *, memory: str) -> OutOfMemory:
    return OutOfMemory(
        f"the {memory} ran out of memory: {_first_line(exc)}",
        hint="use a smaller batch or model, or ask for a device with more memory (devices.min_memory_bytes)",
        details={"memory": memory, "traceback": _traceback(exc)},
    )


def told(exc: BaseException) -> dict[str, Detail]:
    """Where an exception came from, for an error that stands for it."""
    return {"traceback": _traceback(exc)}


def _failed(exc: BaseException, message: str, *, hint: str = "") -> EntrypointFailed:
    return EntrypointFailed(message[:_MAX_MESSAGE_CHARS], hint=hint, details={"traceback": _traceback(exc)})


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:_MAX_MESSAGE_CHARS]


def _traceback(exc: BaseException) -> str:
    """The end of the traceback, from the entrypoint's own frame on."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_next is not None and _is_ours(frames.tb_frame.f_globals):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(exc), exc, frames))
    return text if len(text) <= MAX_TRACEBACK_CHARS else f"…{text[1 - MAX_TRACEBACK_CHARS :]}"


def _is_ours(module: dict[str, object]) -> bool:
    return module.get("__name__") == "railbus_runner.trainer"
