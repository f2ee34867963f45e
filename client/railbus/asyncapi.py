"""The AsyncAPI 3 document of everything on the bus, made from the contracts and the catalogue of what is said.

Channels are subjects, with a channel of its own for each request, its answer, each type of event and each kind of key
in a bucket. What a service does with a channel is an operation: it `receive`s requests and replies, it `send`s events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import orjson
from pydantic.json_schema import models_json_schema

from railbus_shared import contracts
from railbus_shared.catalogue import BUCKETS, EVENTS, HOST, ID, REQUESTS, Asked, Told
from railbus_shared.contracts.events import BATCHED_TYPES, Event, EventBatch, EventColumns
from railbus_shared.contracts.jobs import ErrorBody, JobSpec
from railbus_shared.contracts.model import Contract
from railbus_shared.field_docs import field_docs
from railbus_shared.subjects import Subjects

Json = dict[str, Any]

_VERSION: Final = "1"
"""Of the contracts, whose `v` it is."""
_TITLE: Final = "railbus"
_ABOUT: Final = (
    "Payloads are msgpack or JSON maps, told apart by their first byte; a request is answered in its own encoding. "
    "An error is an answer with the header `Nats-Service-Error-Code`."
)
_SUBJECTS: Final = Subjects()
_PARAMETERS: Final[Mapping[str, str]] = {
    HOST: "A host: a token of a-z, 0-9, '_' and '-'.",
    ID: "What it is about: a job, a device, a host or a dataset; else who tells it.",
}
_OWN: Final = Told("app.event", "trainers and scripts", "An event of the user's own: `app.<what>`.", None)


def document() -> Json:
    """The whole of it; raises nothing that depends on a bus."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": _TITLE,
            "version": _VERSION,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/msgpack",
        "servers": {"local": {"host": "127.0.0.1:4222", "protocol": "nats", "description": "As `railbus up` has it."}},
        "channels": dict(_channels()),
        "operations": dict(_operations()),
        "components": {"messages": dict(_messages()), "schemas": _schemas()},
    }


def page() -> str:
    """The document as it is committed: indented JSON."""
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2).decode() + "\n"


# --- channels ---------------------------------------------------------------------------------------------------------


def _channels() -> Iterator[tuple[str, Json]]:
    yield "jobs.submit", _channel(_SUBJECTS.submit, JobSpec.__name__, about="A job event; it waits in a stream.")
    for asked in REQUESTS:
        yield _name(asked), _channel(f"{_SUBJECTS.prefix}.req.{asked.tokens}", asked.request.__name__)
        yield f"{_name(asked)}.answer", _channel(None, asked.answer.__name__, ErrorBody.__name__)
    for told in (*EVENTS, _OWN):
        batch = [EventBatch.__name__, EventColumns.__name__] if told.type in BATCHED_TYPES else []
        what = "{what}" if told is _OWN else told.what
        yield f"event.{told.type}", _channel(_SUBJECTS.event(told.area, ID, what), told.type, *batch)
    for kept in BUCKETS:
        bucket = f"{_SUBJECTS.prefix}_{kept.bucket}"
        yield f"bucket.{bucket}.{_flat(kept.key)}", _channel(f"$KV.{bucket}.{kept.key}", kept.value.__name__)


def _channel(address: str | None, *messages: str, about: str = "") -> Json:
    found: Json = {"address": address, "messages": {name: _ref("messages", name) for name in messages}}
    named = [token for token in (address or "").split(".") if token.startswith("{")]
    if named:
        found["parameters"] = {
            token[1:-1]: {"description": _PARAMETERS.get(token, "The user's own word.")} for token in named
        }
    return found | ({"description": about} if about else {})


def _name(asked: Asked) -> str:
    return f"request.{_flat(asked.tokens)}"


def _flat(text: str) -> str:
    """A name without the braces of its parameters."""
    return text.replace("{", "").replace("}", "")


# --- operations -------------------------------------------------------------------------------------------------------


def _operations() -> Iterator[tuple[str, Json]]:
    yield "submit", _operation("receive", "jobs.submit", by="device_manager")
    for asked in REQUESTS:
        operation = _operation("receive", _name(asked), by=asked.served_by)
        answer = {"address": {"location": "$message.header#/reply"}, "channel": _of_channel(f"{_name(asked)}.answer")}
        yield _name(asked), operation | {"reply": answer}
    for told in (*EVENTS, _OWN):
        yield f"tell.{told.type}", _operation("send", f"event.{told.type}", by=told.told_by)


def _operation(action: str, channel: str, *, by: str) -> Json:
    return {"action": action, "channel": _of_channel(channel), "summary": f"By {by}."}


def _of_channel(name: str) -> Json:
    return {"$ref": f"#/channels/{name}"}


# --- messages and schemas ---------------------------------------------------------------------------------------------


def _messages() -> Iterator[tuple[str, Json]]:
    for contract in _used():
        told: Json = {"name": contract.__name__, "title": contract.__name__, "summary": _one_line(contract.__doc__)}
        yield contract.__name__, told | {"payload": _ref("schemas", contract.__name__)}
    for event in (*EVENTS, _OWN):
        yield (
            event.type,
            {"name": event.type, "title": event.type, "summary": event.meaning, "payload": _payload(event)},
        )


def _payload(told: Told) -> Json:
    if told is _OWN:
        return _ref("schemas", Event.__name__)
    data: Json = {"type": "object"}
    if told.data is not None:
        data |= {"properties": {name: {} for name in told.data}}
    own = {"type": "object", "properties": {"type": {"const": told.type}, "data": data}}
    return {"allOf": [_ref("schemas", Event.__name__), own]}


def _used() -> list[type[Contract]]:
    """Every contract that is a whole message or value, each once."""
    asked = (one for request in REQUESTS for one in (request.request, request.answer))
    told = (Event, EventBatch, EventColumns)
    return list(dict.fromkeys([JobSpec, *asked, ErrorBody, *told, *(kept.value for kept in BUCKETS)]))


def _schemas() -> Json:
    _, made = models_json_schema(
        [(contract, "validation") for contract in _used()], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = made["$defs"]
    known = {one.__name__: one for one in _contracts()}
    for name, schema in schemas.items():
        for field, meaning in field_docs(known[name]).items() if name in known else ():
            schema["properties"][field]["description"] = _one_line(meaning)
    return dict(sorted(schemas.items()))


def _contracts() -> Iterable[type[Contract]]:
    import importlib  # noqa: PLC0415 - with pkgutil, for this one walk
    import pkgutil  # noqa: PLC0415

    for module in pkgutil.iter_modules(contracts.__path__):
        for value in vars(importlib.import_module(f"{contracts.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Contract):
                yield value


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
