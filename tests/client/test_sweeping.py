"""From one map to many jobs: the same file is the same jobs, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus.sweeping import Swept, expand, told
from railbus_shared.errors import BadMessage, InvalidField, InvalidName, WireError

_JOB: dict[str, Any] = {"model": "m.v2", "dataset": "d", "entrypoint": "classifier", "params": {"epochs": 2}}


def _sweep(sweep: object, **fields: object) -> tuple[Swept, ...]:
    return expand({**_JOB, **fields, "sweep": sweep})


def test_a_grid_is_every_combination_and_the_last_key_changes_fastest() -> None:
    swept = _sweep({"grid": {"lr": [0.1, 0.01], "seed": [1, 2]}})
    assert [dict(one.values) for one in swept] == [
        {"lr": 0.1, "seed": 1},
        {"lr": 0.1, "seed": 2},
        {"lr": 0.01, "seed": 1},
        {"lr": 0.01, "seed": 2},
    ]
    assert [(one.spec.params["lr"], one.spec.seed) for one in swept] == [(0.1, 1), (0.1, 2), (0.01, 1), (0.01, 2)]
    assert all(one.spec.params["epochs"] == 2 for one in swept)


def test_each_entry_of_the_list_is_tried_with_each_combination_of_the_grid() -> None:
    swept = _sweep({"grid": {"seed": [1, 2]}, "list": [{"model": "a", "lr": 1.0}, {"model": "b", "lr": 2.0}]})
    assert [(one.spec.model, one.spec.params["lr"], one.spec.seed) for one in swept] == [
        ("a", 1.0, 1),
        ("a", 1.0, 2),
        ("b", 2.0, 1),
        ("b", 2.0, 2),
    ]


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("lr", 0.5, ("params", "lr")),
        ("net.width", 64, ("params", "net", "width")),
        ("params.seed", 3, ("params", "seed")),
        ("seed", 3, ("seed",)),
        ("devices.count", 2, ("devices", "count")),
        ("devices.kind", ["cpu"], ("devices", "kind")),
        ("checkpoint.every_steps", 10, ("checkpoint", "every_steps")),
        ("env.MODE", "x", ("env", "MODE")),
        ("entrypoint", "causal_lm", ("entrypoint",)),
    ],
)
def test_a_key_is_a_field_of_the_job_if_it_begins_with_one_and_else_a_parameter(
    key: str, value: object, path: tuple[str, ...]
) -> None:
    (one,) = _sweep({"grid": {key: [value]}})
    found: Any = one.spec.to_map()
    for part in path:
        found = found[part]
    assert found == value


def test_ids_groups_and_names_tell_the_jobs_apart() -> None:
    swept = _sweep({"grid": {"lr": [0.1, 0.01]}}, group="first", name="try")
    assert [(one.spec.id, one.spec.group, one.spec.name) for one in swept] == [
        ("first-1", "first", "try: lr=0.1"),
        ("first-2", "first", "try: lr=0.01"),
    ]


def test_without_a_group_the_same_content_has_the_same_ids_and_other_content_others() -> None:
    def ids(**fields: Any) -> list[str | None]:
        return [one.spec.id for one in _sweep({"grid": {"lr": [0.1, 0.01]}}, **fields)]

    assert ids() == ids()
    assert ids(name="only the name differs") == ids()
    assert ids()[0] != ids(priority=1)[0]
    assert str(ids()[0]).startswith("m-v2-")


def test_jobs_of_a_sweep_do_not_share_what_can_be_changed() -> None:
    first, second = _sweep({"grid": {"net.width": [1, 2]}}, params={"net": {"depth": 1}})
    assert (first.spec.params, second.spec.params) == (
        {"net": {"depth": 1, "width": 1}},
        {"net": {"depth": 1, "width": 2}},
    )


def test_values_are_told_as_they_are_written() -> None:
    assert told({"lr": 0.001, "devices.kind": ["gpu"], "mode": "fast", "flag": True}) == (
        'lr=0.001, devices.kind=["gpu"], mode=fast, flag=true'
    )


@pytest.mark.parametrize(
    ("sweep", "field", "problem"),
    [
        ({}, "sweep", "names no values"),
        ([1], "sweep", "names no values"),
        ({"grid": {"lr": 3}}, "sweep.grid.lr", "give a list"),
        ({"grid": {"lr": []}}, "sweep.grid.lr", "no values"),
        ({"gird": {"lr": [1]}}, "sweep.gird", "did you mean 'grid'"),
        ({"grid": {"id": ["a"]}}, "sweep.grid.id", "cannot be varied"),
        ({"grid": {"group": ["a"]}}, "sweep.grid.group", "cannot be varied"),
        ({"grid": {"a..b": [1]}}, "sweep.grid.a..b", "cannot be varied"),
        ({"grid": {"lr": [1]}, "list": [{"x": 1}, {"lr": 2}]}, "sweep.list.1.lr", "stands in the grid"),
        ({"grid": {"net": [1]}, "list": [{"net.width": 2}]}, "sweep.grid.net.width", "lies within 'net'"),
        ({"grid": {"seed": [1, -2]}}, "seed", "job 2 (seed=-2)"),
        ({"grid": {"devices.cuont": [1]}}, "devices.cuont", "did you mean 'count'"),
        ({"grid": {"epochs.deep": [1]}}, "epochs.deep", "no map"),
        ({"grid": {"a": list(range(40)), "b": list(range(40))}}, "sweep", "more than `max`, which is 1000"),
        ({"max": 3, "grid": {"a": [1, 2], "b": [1, 2]}}, "sweep", "more than `max`, which is 3"),
    ],
)
def test_what_is_wrong_is_named_before_any_job_is_submitted(sweep: object, field: str, problem: str) -> None:
    with pytest.raises(WireError) as raised:
        _sweep(sweep)
    assert raised.value.details["field"] == field
    assert problem in str(raised.value)


def test_a_number_that_no_message_can_carry_is_refused() -> None:
    with pytest.raises(BadMessage, match="cannot be sent"):
        _sweep({"grid": {"lr": [2**80]}})


@pytest.mark.parametrize("group", ["Foo", "a/b", "x" * 63, ""])
def test_a_group_must_leave_room_for_the_numbers_of_its_jobs(group: str) -> None:
    if group == "":
        assert _sweep({"grid": {"lr": [1]}}, group=group)[0].spec.group  # as if there were none
        return
    with pytest.raises(InvalidName, match="group"):
        _sweep({"grid": {"lr": list(range(10))}}, group=group)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), min_size=1
    )
)
def test_a_grid_has_as_many_jobs_as_combinations_all_with_ids_of_their_own(grid: dict[str, list[int]]) -> None:
    count = 1
    for values in grid.values():
        count *= len(values)
    assert len({one.spec.id for one in _sweep({"grid": grid})}) == count


def test_a_point_that_leads_through_a_value_is_refused() -> None:
    with pytest.raises(InvalidField, match="no map"):
        _sweep({"grid": {"epochs.first": [1]}})
