"""A job's file is read as people mean it."""

from __future__ import annotations

import pytest

from railbus.cli.spec_file import read_jobs, read_spec
from railbus_shared.errors import BadMessage, InvalidField, WireError

_HEAD = "model: m\ndataset: d\nentrypoint: classifier\n"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("3", 3),
        ("-7", -7),
        ("true", True),
        ("2026-11-23", "2026-11-23"),
        ("'3'", "3"),
        ("[1, two]", [1, "two"]),
        ("null", None),
        ("1.2.3", "1.2.3"),
    ],
)
def test_values_are_what_they_look_like(written: str, meant: object) -> None:
    in_file = read_spec(f"{_HEAD}params:\n  x: {written}\n", where="job.yaml").params["x"]
    by_option = read_spec(_HEAD, where="job.yaml", settings=[f"x={written}"]).params["x"]
    assert (in_file, type(in_file)) == (meant, type(meant))
    assert (by_option, type(by_option)) == (meant, type(meant))


def test_json_is_read_as_well() -> None:
    spec = read_spec('{"model": "m", "dataset": "d", "entrypoint": "classifier", "priority": 5}', where="stdin")
    assert spec.priority == 5


def test_a_setting_replaces_what_the_file_says_and_reaches_into_maps() -> None:
    text = f"{_HEAD}params:\n  lr: 0.1\n  net: {{width: 64, depth: 2}}\n"
    spec = read_spec(text, where="job.yaml", settings=["lr=1e-4", "net.width=128", "new.deep=x"])
    assert spec.params == {"lr": 0.0001, "net": {"width": 128, "depth": 2}, "new": {"deep": "x"}}


@pytest.mark.parametrize("setting", ["lr", "=3", "lr.x=3"])
def test_a_setting_that_cannot_be_used_is_refused(setting: str) -> None:
    with pytest.raises(InvalidField, match="--set"):
        read_spec(f"{_HEAD}params:\n  lr: 0.1\n", where="job.yaml", settings=[setting])


def test_aliases_cannot_blow_up_a_small_file() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    with pytest.raises((BadMessage, InvalidField)):
        read_spec(bomb, where="job.yaml")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BadMessage, match="nested too deep"):
        read_spec("[" * 5000, where="job.yaml")


@pytest.mark.parametrize(
    ("sweep", "place"),
    [
        ("sweep:\n  grid:\n    lr: 3\n", "s.yaml:6:5"),
        ("sweep:\n  grid:\n    devices.cuont: [1]\n", "s.yaml:6:5"),
        ("sweep:\n  grid:\n    seed: [-1]\n", "s.yaml:6:5"),
        ("sweep:\n  list:\n    - {a: 1}\n    - {id: 1}\n", "s.yaml:7:8"),
        ("sweep:\n  gird: {}\n", "s.yaml:5:3"),
        ("sweep: {}\n", "s.yaml:4:1"),
        ("group: Foo\nsweep: {grid: {a: [1]}}\n", "s.yaml:4:1"),
        ("prioritty: 3\nsweep: {grid: {a: [1]}}\n", "s.yaml:4:1"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_pointed_at(sweep: str, place: str) -> None:
    with pytest.raises(WireError) as raised:
        read_jobs(f"{_HEAD}{sweep}", where="s.yaml")
    assert raised.value.message.startswith(f"{place}: ")


def test_settings_and_options_hold_for_every_job_of_a_sweep() -> None:
    text = f"{_HEAD}sweep: {{grid: {{lr: [1, 2]}}}}\n"
    file = read_jobs(text, where="s.yaml", settings=["epochs=3"], fields={"priority": 7, "owner": "ana"})
    assert file.is_sweep
    assert [spec.params for spec in file.specs] == [{"epochs": 3, "lr": 1}, {"epochs": 3, "lr": 2}]
    assert {(spec.priority, spec.owner) for spec in file.specs} == {(7, "ana")}


def test_where_one_job_is_wanted_a_sweep_is_refused() -> None:
    with pytest.raises(InvalidField, match="not a sweep"):
        read_spec(f"{_HEAD}sweep: {{grid: {{lr: [1, 2]}}}}\n", where="s.yaml")
