"""The file of `railbus submit`: a JobSpec or a sweep, as YAML or JSON, with errors that point to line and column.

YAML is read as version 1.2 reads it where 1.1 surprises: `1e-3` is a number, `2026-01-01` a string, and a key must not
stand twice in a map.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import yaml

from railbus.sweeping import Swept, expand
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.errors import BadMessage, InvalidField, InvalidName, WireError

STDIN: Final = "-"
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_MAX_NODES: Final = 100_000
_NO_FIELDS: Final[Mapping[str, object]] = MappingProxyType({})


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


@dataclass(frozen=True)
class JobFile:
    """What a file asks for: one job, or those of a sweep."""

    swept: tuple[Swept, ...]
    is_sweep: bool

    @property
    def specs(self) -> tuple[JobSpec, ...]:
        return tuple(one.spec for one in self.swept)


def read_spec(
    text: str, *, where: str, settings: Sequence[str] = (), fields: Mapping[str, object] = _NO_FIELDS
) -> JobSpec:
    """The one job in a file's text, with `key=value` settings put into its `params`, and with these fields.

    Raises BadMessage, InvalidField or InvalidName, whose message begins with `where:line:column`.
    """
    file = read_jobs(text, where=where, settings=settings, fields=fields)
    if file.is_sweep:
        raise InvalidField(field="sweep", value=len(file.swept), problem="one job is wanted here, not a sweep")
    return file.specs[0]


def read_jobs(
    text: str, *, where: str, settings: Sequence[str] = (), fields: Mapping[str, object] = _NO_FIELDS
) -> JobFile:
    """The job in a file's text, or those of its `sweep`; otherwise like `read_spec`."""
    job = _load(text, where=where)
    if not isinstance(job, dict):
        raise BadMessage(
            f"{where}: this is not a map of fields", hint="it begins with `model:`, `dataset:`, `entrypoint:`"
        )
    for setting in settings:
        _set(job, setting)
    job.update(fields)
    try:
        if "sweep" in job:
            return JobFile(expand(job), is_sweep=True)
        return JobFile((Swept(JobSpec.parse(job), {}),), is_sweep=False)
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
    root = yaml.compose(text, Loader=_Loader)
    paths = list(_paths(str(error.details.get("field", ""))))
    places = [(_place(root, path), len(path)) for path in paths]
    (depth, line, column), _ = min(places, key=lambda found: (found[0][0] == 0, found[1] - found[0][0]))
    located = f"{where}:{line}:{column}" if depth else where
    moved = InvalidName.__new__(type(error))
    WireError.__init__(moved, f"{located}: {error.message}", hint=error.hint, details=error.details)
    return moved


def _paths(field: str) -> Iterator[Sequence[str]]:
    """Where a field's value may have come from: its own place, or a key of the sweep's, in which dots stay."""
    yield field.split(".")
    if field.startswith("sweep.grid."):
        yield ["sweep", "grid", field.removeprefix("sweep.grid.")]
    elif field.startswith("sweep.list."):
        yield field.split(".", 3)
    else:
        yield ["sweep", "grid", field]
        yield ["sweep", "grid", field.removeprefix("params.")]


def _place(node: yaml.Node | None, path: Sequence[str]) -> tuple[int, int, int]:
    """How many parts of the path are in the file, and line and column of the last of them."""
    found = 0, 0, 0
    for depth, part in enumerate(path, start=1):
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            key = node = node.value[int(part)]
        elif isinstance(node, yaml.MappingNode):
            keys: Mapping[str, tuple[yaml.Node, yaml.Node]] = {
                str(key.value): (key, value) for key, value in node.value
            }
            if part not in keys:
                break
            key, node = keys[part]
        else:
            break
        found = depth, key.start_mark.line + 1, key.start_mark.column + 1
    return found
