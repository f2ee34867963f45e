"""Sweeps: one map of a job that stands for many, which differ in some of its values.

    sweep:
      grid: {lr: [0.1, 0.01], devices.count: [1, 2]}     every combination
      list: [{seed: 1, params.name: a}, {seed: 2}]       and each of these with each of those
      max: 100

A key whose first word is a field of a job names that field (`seed`, `devices.count`, `params.lr`); every other key is
one of the `params`. Jobs are numbered in the order of the file, the last key of the grid changing fastest, and the same
file gives the same ids: what was submitted before is not submitted again.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import Field

from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.contracts.model import Contract, Items, JsonMap
from railbus_shared.errors import BadMessage, Detail, InvalidField, InvalidName, WireError
from railbus_shared.names import checked_id

MAX_JOBS: Final = 1000
_NOT_SWEPT: Final = ("v", "id", "name", "group", "sweep")
_NOT_IN_ID: Final = re.compile(r"[^a-z0-9_-]+")
_MAX_ID: Final = 64
_MAX_NAME: Final = 200
_MAX_STEM: Final = 40
_GROUP_HASH: Final = 6

Values = Mapping[str, Any]


class SweepPlan(Contract):
    """The field `sweep` of a file: which values are tried."""

    grid: dict[str, Items[Any]] = Field(default_factory=dict, max_length=16)
    """Values of each key, every combination of which is tried."""
    points: Items[JsonMap] = Field(default=(), alias="list")
    """Maps of keys to values that belong together; each is tried with every combination of the grid."""
    max: int = Field(default=MAX_JOBS, ge=1, le=100_000)
    """A sweep of more jobs is refused."""


@dataclass(frozen=True)
class Swept:
    """One job of a sweep and the values that make it different from the others."""

    spec: JobSpec
    values: Values


def expand(job: Mapping[str, Any]) -> tuple[Swept, ...]:
    """The jobs of a map with a `sweep`; raises InvalidField or InvalidName, which name the field and the job."""
    plan = _plan(job)
    base = {name: value for name, value in job.items() if name not in {"sweep", "id", "name", "group"}}
    swept = [Swept(_spec(base, values, number=n), values) for n, values in enumerate(_points(plan), start=1)]
    group = _group(job, swept)
    title = job.get("name") or group
    return tuple(_named(one, group=group, title=str(title), number=n) for n, one in enumerate(swept, start=1))


def told(values: Values) -> str:
    """The values of one job, for people: `lr=0.1, devices.count=2`."""
    return ", ".join(f"{key}={_told(value)}" for key, value in values.items())


def _told(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plan(job: Mapping[str, Any]) -> SweepPlan:
    try:
        plan = SweepPlan.parse(job["sweep"]) if isinstance(job["sweep"], dict) else None
    except WireError as exc:
        field = str(exc.details.get("field"))
        message = exc.message.replace(field, f"sweep.{field}", 1)
        raise _again(exc, message, details={**exc.details, "field": f"sweep.{field}"}) from exc
    if plan is None or not (plan.grid or plan.points):
        raise InvalidField(
            field="sweep",
            value=job["sweep"],
            problem="it names no values",
            hint="give `grid: {lr: [0.1, 0.01]}` or `list: [{lr: 0.1, seed: 1}, …]`",
        )
    _check_keys(plan)
    _check_paths([*plan.grid, *(key for point in plan.points for key in point)])
    _check_size(plan)
    return plan


def _check_keys(plan: SweepPlan) -> None:
    for key, values in plan.grid.items():
        _check_key(key, where="sweep.grid")
        if not values:
            raise InvalidField(field=f"sweep.grid.{key}", value=[], problem="it has no values", hint="give some")
    for number, point in enumerate(plan.points):
        for key in point:
            _check_key(key, where=f"sweep.list.{number}")
            if key in plan.grid:
                raise InvalidField(
                    field=f"sweep.list.{number}.{key}",
                    value=point[key],
                    problem="the key stands in the grid as well",
                    hint="vary it in one of the two",
                )


def _check_key(key: str, *, where: str) -> None:
    first = key.partition(".")[0]
    if not all(key.split(".")) or first in _NOT_SWEPT:
        raise InvalidField(
            field=f"{where}.{key}",
            value=key,
            problem="this cannot be varied",
            hint="name one of the `params`, or another field of a job, such as seed or devices.count",
        )


def _check_paths(keys: Collection[str]) -> None:
    for key in keys:
        above = [one for one in keys if key.startswith(f"{one}.")]
        if above:
            raise InvalidField(
                field=f"sweep.grid.{key}",
                value=key,
                problem=f"it lies within {above[0]!r}, which is varied too",
                hint="vary one of the two",
            )


def _check_size(plan: SweepPlan) -> None:
    count = max(1, len(plan.points))
    for values in plan.grid.values():
        count *= len(values)
    if count > plan.max:
        raise InvalidField(
            field="sweep",
            value=f"{count} jobs",
            problem=f"more than `max`, which is {plan.max}",
            hint="raise sweep.max",
        )


def _points(plan: SweepPlan) -> Iterator[Values]:
    for point in plan.points or ({},):
        for combination in itertools.product(*plan.grid.values()):
            yield {**point, **dict(zip(plan.grid, combination, strict=True))}


def _group(job: Mapping[str, Any], swept: Sequence[Swept]) -> str:
    """The file's own `group` (or `id`); else one that is the same for the same jobs and another for others."""
    named = job.get("group") or job.get("id")
    if named is None:
        digest = hashlib.sha256("".join(_digest(one) for one in swept).encode()).hexdigest()
        stem = _NOT_IN_ID.sub("-", swept[0].spec.model)[:_MAX_STEM].strip("-_")
        return f"{stem}-{digest[:_GROUP_HASH]}"
    group = checked_id(str(named), kind="group")
    if len(group) > _MAX_ID - len(f"-{len(swept)}"):
        raise InvalidName(kind="group", value=group, rule=f"at most {_MAX_ID - len(f'-{len(swept)}')} characters")
    return group


def _digest(one: Swept) -> str:
    try:
        return one.spec.digest
    except TypeError as exc:  # JSON for hashing has the limits of the wire
        raise BadMessage(
            f"job ({told(one.values)}) holds a value that cannot be sent: {exc}",
            hint="write whole numbers beyond 64 bits as strings",
        ) from exc


def _spec(base: Values, values: Values, *, number: int) -> JobSpec:
    job = copy.deepcopy(dict(base))
    for key, value in values.items():
        _put(job, key, value)
    try:
        return JobSpec.parse(job)
    except WireError as exc:
        raise _again(exc, f"job {number} ({told(values)}): {exc.message}", details=exc.details) from exc


def _again(error: WireError, message: str, *, details: Mapping[str, Detail]) -> WireError:
    """The same error with another message."""
    again = InvalidField.__new__(type(error))
    WireError.__init__(again, message, hint=error.hint, details=details)
    return again


def _named(one: Swept, *, group: str, title: str, number: int) -> Swept:
    name = f"{title}: {told(one.values)}"
    shown = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
    return replace(one, spec=one.spec.changed(id=f"{group}-{number}", group=group, name=shown))


def _put(job: dict[str, Any], key: str, value: object) -> None:
    path = key.split(".")
    if path[0] not in JobSpec.model_fields:
        path = ["params", *path]
    *parents, last = path
    inner: Any = job
    for parent in parents:
        inner = inner.setdefault(parent, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise InvalidField(field=key, value=value, problem="its key leads through something that is no map")
    inner[last] = value
