"""The file of `railbus submit`: a JobSpec as YAML or JSON, with errors that point to line and column.

YAML is read as version 1.2 reads it where 1.1 surprises: `1e-3` is a number, `2026-01-01` a string, and a key must not
stand twice in a map.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import yaml

from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.errors import BadMessage, InvalidField, InvalidName, WireError

STDIN: Final = "-"
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_MAX_NODES: Final = 100_000


class _Loader(yaml.SafeLoader):
    """Safe, with numbers as in YAML 1.2, without dates, and without a key twice."""

    num_nodes = 0

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)
        found: object = super().construct_object(node, deep=deep)
        return found

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        assert isinstance(node, yaml.MappingNode)  # noqa: S101 - PyYAML calls it for nothing else
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands here twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_spec(text: str, *, where: str, settings: Sequence[str] = ()) -> JobSpec:
    """The job in a file's text, with `key=value` settings put into its `params`.

    Raises BadMessage, InvalidField or InvalidName, whose message begins with `where:line:column`.
    """
    spec = _load(text, where=where)
    if not isinstance(spec, dict):
        raise BadMessage(
            f"{where}: this is not a map of fields", hint="it begins with `model:`, `dataset:`, `entrypoint:`"
        )
    for setting in settings:
        _set(spec, setting)
    try:
        return JobSpec.parse(spec)
    except WireError as exc:
        raise _located(exc, text=text, where=where) from exc


def _load(text: str, *, where: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise BadMessage(f"{place}: not valid YAML: {exc.problem or exc.context}", hint=_hint(text, exc)) from exc
    except yaml.YAMLError as exc:
        raise BadMessage(f"{where}: not valid YAML: {exc}", hint="the file must be UTF-8 text") from exc
    except RecursionError as exc:
        raise BadMessage(f"{where}: nested too deep", hint="flatten it") from exc


def _hint(text: str, error: yaml.MarkedYAMLError) -> str:
    if "\t" in text:
        return "YAML is indented with spaces, and there is a tab in this file"
    if "twice" in (error.problem or ""):
        return "remove one of the two"
    return "check the indentation, and that every key is followed by a colon and a space"


def _set(spec: dict[str, object], setting: str) -> None:
    """Put `a.b=value` into `params`; the value is read like one in the file."""
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise InvalidField(
            field="--set", value=setting, problem="it is not key=value", hint="for instance --set lr=0.01"
        )
    params = spec.setdefault("params", {})
    *parents, last = key.split(".")
    for parent in parents:
        params = params.setdefault(parent, {}) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        raise InvalidField(field="--set", value=setting, problem="its key leads through something that is no map")
    params[last] = _load(value, where=f"--set {key}")


def _located(error: WireError, *, text: str, where: str) -> WireError:
    """The same error, with the place in the file in front of its message."""
    place = _place(yaml.compose(text, Loader=_Loader), str(error.details.get("field", "")).split("."))
    located = f"{where}:{place[0]}:{place[1]}" if place else where
    moved = InvalidName.__new__(type(error))
    WireError.__init__(moved, f"{located}: {error.message}", hint=error.hint, details=error.details)
    return moved


def _place(node: yaml.Node | None, path: Sequence[str]) -> tuple[int, int] | None:
    """Line and column of the deepest key on the path that is in the file; None if not even the first is."""
    found: tuple[int, int] | None = None
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            break
        keys: Mapping[str, tuple[yaml.Node, yaml.Node]] = {str(key.value): (key, value) for key, value in node.value}
        if part not in keys:
            break
        key, node = keys[part]
        found = key.start_mark.line + 1, key.start_mark.column + 1
    return found
