"""Nothing is published that is not documented: the catalogue is compared with what services serve and tell."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from histories import FINAL
from railbus import asyncapi
from railbus_shared.catalogue import BUCKETS, EVENTS, HOST, REQUESTS, undocumented
from railbus_shared.contracts.events import BATCHED_TYPES, Event
from railbus_shared.subjects import Subjects

REPO = Path(__file__).parents[1]
SOURCES = sorted([*REPO.glob("shared/*/**/*.py"), *REPO.glob("services/*/*/**/*.py")])
CATALOGUE = REPO / "shared/railbus_shared/catalogue.py"
AREAS = "|".join(sorted({told.area for told in EVENTS}))
EVENT = re.compile(rf"(?:{AREAS})\.[a-z_]+")
NAMES = {"bus.json", "train.py", "service.name", "service.namespace", "host.name"}
"""What looks like a type and is a file, or a word of OpenTelemetry."""
HOSTS = {"host": f"runner.{HOST}", "area": f"data.{HOST}", "own": f"devices.{HOST}"}
"""Arguments that are made of the host's name, as the services call them."""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def texts(path: Path) -> Iterator[str]:
    """Strings of a module, but for what documents it."""
    tree = tree_of(path)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            if called in names:
                yield node


def told_by_the_sources() -> set[str]:
    """Every type of event that a source names, whole or as the end of one."""
    found = {text for path in SOURCES if path != CATALOGUE for text in texts(path) if EVENT.fullmatch(text)} - NAMES
    for path in SOURCES:
        if path.parent.name == "checkpointing":
            ends = [call.args[0] for call in calls(path, "tell", "_tell") if call.args]
            found |= {f"checkpoint.{end.value!s}" for end in ends if isinstance(end, ast.Constant)}
    return found | FINAL


def test_every_event_that_a_source_tells_is_in_the_catalogue_and_nothing_else() -> None:
    listed = Counter(told.type for told in EVENTS)
    assert set(listed.values()) == {1}
    assert set(listed) == told_by_the_sources()
    assert set(listed) >= BATCHED_TYPES


def served() -> dict[str, tuple[str, str]]:
    """`<area>.<verb>` of every endpoint with the names of its request and its answer, as the sources say."""
    found = {}
    for path in SOURCES:
        for call in calls(path, "Endpoint"):
            if path.parent.name == "bus" or len(call.args) < 4:
                continue
            subject, request, handler = call.args[1:4]
            assert isinstance(subject, ast.Call), ast.unparse(subject)
            area, verb = subject.args
            tokens = f"{HOSTS.get(ast.unparse(area)) or ast.literal_eval(area)}.{ast.literal_eval(verb)}"
            name = ast.unparse(request)
            found[tokens] = name, answer_of(path, ast.unparse(handler).rpartition(".")[2], request=name)
    return found


def answer_of(path: Path, handler: str, *, request: str) -> str:
    """The annotation of the method that answers, in the module itself or in another one of its package."""
    for module in (path, *sorted(path.parent.glob("*.py"))):
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.AsyncFunctionDef) and node.name == handler and node.returns is not None:
                given = [one.annotation for one in node.args.args if one.annotation is not None]
                if [ast.unparse(one) for one in given] == [request]:
                    return ast.unparse(node.returns)
    raise AssertionError(f"{path}: nobody has {handler}({request})")


def test_every_request_that_is_served_is_in_the_catalogue_with_its_answer_and_nothing_else() -> None:
    listed = {one.tokens: (one.request.__name__, one.answer.__name__) for one in REQUESTS}
    assert listed == served()


def test_buckets_have_the_names_that_are_made() -> None:
    subjects = Subjects()
    made = {subjects.jobs, subjects.devices, subjects.leases, subjects.datasets, subjects.leader}
    assert {f"{subjects.prefix}_{kept.bucket}" for kept in BUCKETS} == made - {subjects.leader}


def test_what_an_event_says_beyond_the_catalogue_is_found() -> None:
    events: list[Mapping[str, object]] = [
        {"type": "job.placed", "data": {"devices": [], "mood": "good"}},
        {"type": "job.danced"},
        {"type": "app.danced", "data": {"x": 1}},
        {"type": "train.metrics", "data": {"loss": 1}},
        {"type": "job.placed", "data": {"mood": "bad"}},
    ]
    assert undocumented(events) == ["job.placed: mood", "job.danced"]


# --- the document -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return asyncapi.document()


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_reference_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert len(found) > 150
    for reference in found:
        part: Any = document
        for token in reference.removeprefix("#/").split("/"):
            part = part[token]


def test_an_event_is_judged_by_its_schema(document: dict[str, Any]) -> None:
    schema = {**document["components"]["messages"]["job.placed"]["payload"], "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    event = {
        "id": "p-1", "type": "job.placed", "time": "2026-11-26T10:00:00Z", "producer": "p", "number": 1,
        "source": "s", "host": "h", "job": "j-1", "data": {"devices": ["h-cpu0"]},
    }  # fmt: skip
    validator.validate(event)
    assert Event.parse(event)
    for wrong in ({"type": "job.started"}, {"number": "1"}, {"host": "../h"}, {"more": 1}):
        assert not validator.is_valid({**event, **wrong}), wrong


def test_addresses_name_their_parameters_and_every_channel_is_used(document: dict[str, Any]) -> None:
    for channel in document["channels"].values():
        assert set(re.findall(r"\{(\w+)\}", channel["address"] or "")) == set(channel.get("parameters", {}))
    used = set(references(document["operations"]))
    unused = {name for name in document["channels"] if f"#/channels/{name}" not in used}
    assert {name.partition(".")[0] for name in unused} == {"bucket"}
    addresses = [channel["address"] for channel in document["channels"].values() if channel["address"]]
    assert len(addresses) == len(set(addresses))


def test_the_document_is_json_that_says_nothing_twice(document: dict[str, Any]) -> None:
    assert json.loads(asyncapi.page()) == document
