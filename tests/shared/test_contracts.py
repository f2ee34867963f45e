"""Every contract goes over the wire and back; what is no valid message is refused by field, value and remedy."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from railbus_shared import contracts, wire
from railbus_shared.contracts.jobs import DevicePreference, JobRecord, JobSpec
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import HeldLeases, ListJobs, OpenStream
from railbus_shared.errors import InvalidField, InvalidName, WireError

SHA = "0" * 64
TIME = "2026-11-23T21:45:35.000000001Z"
SPEC = {"model": "cnn", "dataset": "digits", "entrypoint": "classifier"}
_DEVICE = {"id": "h-cpu0", "host": "h", "kind": "cpu", "name": "cpu", "index": 0, "memory_bytes": 1}
_LEASE = {"device": "h-cpu0", "host": "h", "holder": "j-1", "lease_epoch": 1, "nonce": "x", "granted_at": TIME}
_HELD = {"lease": _LEASE, "revision": 7}
_RECORD = {
    "id": "j-1", "spec": SPEC, "spec_sha256": SHA, "sequence": 1, "incarnation": "ab", "state": "failed",
    "submitted_at": TIME, "changed_at": TIME, "error": {"code": "X", "message": "y", "details": {"a": 1}},
    "end_cause": "user_error", "checkpoint": {"number": 1, "step": 2, "sha256": SHA},
    "host": "h", "devices": ["h-cpu0"],
}  # fmt: skip
_HOST = {"host": "h", "devices": [_DEVICE], "reported_at": TIME}
_RUNNER = {
    "host": "h",
    "runner": "r1",
    "ready": True,
    "attempts": [{"job": "j-1", "lease_epoch": 1}],
    "reported_at": TIME,
}
_EXTENT = {"offset": 0, "bytes": 4}
_SHARD = {
    "file": "shard-00000.data", "bytes": 4, "sha256": SHA, "first_sample": 0, "samples": 1, "columns": {"x": _EXTENT}
}  # fmt: skip
_FILE = {"file": "checkpoint-000001.pt", "bytes": 1, "sha256": SHA}
_COLUMN = {"dtype": "float32", "shape": [8, 8], "labels": ["a"]}
_SUMMARY = {
    "dataset": "digits", "format": "columns", "samples": 1, "bytes": 1, "num_shards": 1,
    "splits": {"train": {"samples": 1}},
    "columns": ["x"], "index_sha256": SHA, "hosts": ["h"], "described_at": TIME,
}  # fmt: skip

EXAMPLES: dict[str, dict[str, Any]] = {
    "CancelJob": {"id": "j-1", "by": "ann", "now": True},
    "CheckDevices": {"job": "j-1", "lease_epoch": 1, "devices": ["h-gpu-1"]},
    "CheckedDevice": {"device": "h-gpu-1", "clear": True},
    "CheckedDevices": {"devices": [{"device": "h-gpu-1", "fault": "XID 79", "clear": False}]},
    "Cordon": {"device": "h-gpu-1", "cause": "fault", "reason": "XID 79", "by": "h", "cordoned_at": TIME},
    "CordonDevice": {"device": "h-gpu-1", "reason": "noisy", "by": "ann"},
    "DeviceHolder": {"device": "h-cpu0", "holder": "j-2", "owner": "ann", "state": "running", "expected_end": TIME},
    "HoldJob": {"id": "j-1", "held": False, "by": "ann"},
    "HostReason": {"host": "h", "word": "resources", "text": "h has 1 leased by j-2", "fitting": 1, "free": 0},
    "LogRule": {"pattern": "NCCL .*", "cause": "signal", "hint": "look at the network"},
    "RetryJob": {"id": "j-1"},
    "RetryPolicy": {"backoff_s": 2.0, "also_on": ["user_error"], "log_rules": [{"pattern": "x", "cause": "hang"}]},
    "SetPriority": {"id": "j-1", "priority": 5},
    "Why": {
        "job": "j-1", "state": "queued", "headline": "resources", "text": "waits", "place": 1, "ahead": ["j-2"],
        "hosts": [{"host": "h", "word": "resources", "text": "t", "fitting": 1, "free": 0}],
        "holders": [{"device": "h-cpu0", "holder": "j-2"}], "expected_start": TIME, "expected_basis": "time limits",
    },
    "AttemptRef": {"job": "j-1", "lease_epoch": 1},
    "CheckpointFile": _FILE,
    "CheckpointMeta": {
        "number": 1, "model": "cnn", "job": "j-1", "attempt": 1, "lease_epoch": 1, "step": 1, "epoch": 0,
        "samples_seen": 1,
        "entrypoint": "classifier", "seed": 0, "dataset": "digits", "index_sha256": SHA, "devices": ["h-cpu0"],
        "precision": "float32", "libraries": {"torch": "2"}, "metrics": {"loss": 0.5}, "files": [_FILE], "parent": 3,
        "parent_sha256": SHA, "spec_sha256": SHA, "model_schema_sha256": SHA,
        "tensors": {"parts.model.w": {"dtype": "float32", "shape": [2, 2], "offset": 64, "bytes": 16}},
        "created_at": TIME,
    },
    "CheckpointPolicy": {"every_steps": 5, "every_s": 1.5, "keep_best": 1, "metric": "accuracy", "best": "max"},
    "CheckpointRef": {"number": 1, "step": 2, "sha256": SHA},
    "CheckpointJob": {"id": "j-1", "timeout_s": 5.0},
    "SaveAttempt": {"job": "j-1", "lease_epoch": 1, "timeout_s": 5.0},
    "SavedCheckpoint": {
        "job": "j-1", "model": "cnn", "checkpoint": {"number": 1, "step": 2, "sha256": SHA}, "bytes": 3, "seconds": 0.5,
    },
    "CloseStream": {"stream": "s-1"},
    "Column": _COLUMN,
    "ColumnExtent": _EXTENT,
    "DatasetList": {"datasets": [_SUMMARY]},
    "DatasetRef": {"dataset": "digits.v2"},
    "DatasetSchema": {"name": "digits", "columns": {"x": _COLUMN}, "splits": {"train": {"first": 0, "samples": 1}}},
    "DatasetSummary": _SUMMARY,
    "DeviceInfo": {**_DEVICE, "cores": [0, 1], "utilisation_frac": 0.5, "labels": {"a": "b"}},
    "DeviceList": {"devices": [{"device": _DEVICE, "state": "free"}], "hosts": [_HOST], "runners": [_RUNNER]},
    "DevicePreference": {"kind": ["cpu"], "labels": {"a": "b"}},
    "DeviceState": {"device": _DEVICE, "state": "leased", "holder": "j-1"},
    "DrainHost": {"host": "h"},
    "DrainedHost": {"host": "h", "draining": True, "jobs": ["j-1"]},
    "ErrorBody": {"code": "X", "message": "y"},
    "Event": {
        "id": "p-1", "type": "job.placed", "time": TIME, "producer": "p", "number": 1, "source": "runner", "host": "h",
        "job": "j-1", "data": {"a": [1, {"b": None}]},
    },
    "EventBatch": {"common": {"a": 1}, "events": [{"n": 1}, {"n": 2}]},
    "EventColumns": {
        "common": {"producer": "p"}, "time": {"first": TIME, "gaps_ns": [5]}, "number": 7, "step": [1, 2],
        "data": {"loss": [0.5, None]},
    },
    "EventLines": {"events": [{"a": 1}], "truncated": True, "older": "2026-11-23/40960/1234"},
    "EventTimes": {"first": TIME, "gaps_ns": [1, -1]},
    "Extent": {"offset": 8, "bytes": 16},
    "Flushed": {"files": ["logs/x"]},
    "HeldLease": _HELD,
    "GrantCredit": {"up_to": 1},
    "HeldLeases": {"leases": [_HELD]},
    "HostReport": _HOST,
    "IndexFile": {"dataset": "digits", "schema_sha256": SHA, "samples": 1, "bytes": 4, "shards": [_SHARD]},
    "JobList": {"jobs": [_RECORD], "total": 1},
    "JobRecord": _RECORD,
    "JobRef": {"id": "j-1"},
    "JobSpec": {**SPEC, "params": {"lr": 0.1, "n": [1, 2]}, "time_limit_s": 60, "after": ["j-0"], "env": {"A": "b"}},
    "Lease": _LEASE,
    "LeaseDevices": {"holder": "me", "host": "h"},
    "RevokeLease": {"holder": "me"},
    "ListJobs": {"states": ["queued"]},
    "ModelSchema": {
        "model": "cnn", "entrypoint": "classifier", "dataset": "digits", "index_sha256": SHA, "num_parameters": 1,
        "parameters": {"w": {"dtype": "float32", "shape": []}}, "libraries": {}, "created_by_job": "j-1",
        "created_at": TIME,
    },
    "Nothing": {},
    "OpenStream": {"job": "j-1", "lease_epoch": 1, "dataset": "digits"},
    "OpenedStream": {
        "stream": "s1", "dataset": "digits", "schema_path": "a", "index_path": "b", "index_sha256": SHA,
        "num_shards": 2, "shards_path": "p", "verified": [{"first": 1, "shards": 1}],
    },
    "Parameter": {"dtype": "float32", "shape": [1]},
    "QueryEvents": {"job": "j-1", "since": TIME, "until": TIME, "before": "2026-11-23/40960/1234"},
    "ReclaimMark": {"device": "h-cpu0", "host": "h", "job": "j-1", "lease_epoch": 1, "marked_at": TIME},
    "RowGroup": {"samples": 1},
    "RunnerReport": {**_RUNNER, "entrypoints": ["classifier", "pkg.mod:fn"]},
    "SampleRange": {"first": 0, "samples": 1},
    "Shard": _SHARD,
    "ShardRange": {"first": 0, "shards": 1},
    "Sidecar": {"file": "shard-00000.offsets", "bytes": 16, "sha256": SHA},
    "Split": {"first": 0, "samples": 1},
    "SplitSummary": {"samples": 1},
    "SendFile": {
        "dataset": "digits", "index_sha256": SHA, "file": "shard-00000.data", "offset": 0, "window_bytes": 1 << 24,
        "to": "_RINBOX.dataloader.x", "asker": "h",
    },
    "SendingFile": {"bytes": 1, "credit": "_RINBOX.dataloader.y"},
    "StartAttempt": {"job": "j-1", "lease_epoch": 1, "leases": [_HELD], "devices": [_DEVICE]},
    "StopAttempt": {"job": "j-1", "lease_epoch": 1},
    "StreamProgress": {"stream": "s-1", "dataset": "digits", "ahead": [3, 1], "held": [2], "released": [0]},
    "TensorPlace": {"dtype": "float32", "shape": [2], "offset": 64, "bytes": 8},
    "VerifiedShards": {"dataset": "digits", "shards": [0], "bytes": 4},
    "VerifyShards": {"dataset": "digits"},
}  # fmt: skip


def _contracts() -> Iterator[type[Contract]]:
    for module in pkgutil.iter_modules(contracts.__path__, "railbus_shared.contracts."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, Contract) and cls is not Contract and cls.__module__ == module.name:
                yield cls


CONTRACTS = {cls.__name__: cls for cls in _contracts()}


def test_every_contract_has_an_example_here() -> None:
    assert set(CONTRACTS) == set(EXAMPLES)


@pytest.mark.parametrize("encoding", wire.Encoding)
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_contract_goes_over_the_wire_and_back(name: str, encoding: wire.Encoding) -> None:
    contract = CONTRACTS[name].parse(EXAMPLES[name])
    data = wire.encode(contract.to_map(), encoding=encoding)
    assert CONTRACTS[name].parse(wire.decode(data)) == contract


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_contract_refuses_fields_that_it_does_not_know(name: str) -> None:
    with pytest.raises(InvalidField) as caught:
        CONTRACTS[name].parse({**EXAMPLES[name], "surprise": 1})
    assert caught.value.details["field"] == "surprise"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_contract_names_a_required_field_that_is_missing(name: str) -> None:
    for field, info in CONTRACTS[name].model_fields.items():
        if info.is_required():
            with pytest.raises(InvalidField) as caught:
                CONTRACTS[name].parse({key: value for key, value in EXAMPLES[name].items() if key != field})
            assert caught.value.details == {"field": field, "value": "'(missing)'"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_contract_refuses_every_field_with_a_value_of_a_wild_type(name: str) -> None:
    for field in CONTRACTS[name].model_fields:
        with pytest.raises(WireError) as caught:
            CONTRACTS[name].parse({**EXAMPLES[name], field: [[[-1.5]]]})
        assert str(caught.value.details["field"]).split(".")[0] == field


@functools.cache
def _json() -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers(-5, 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5)
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    )


@given(name=st.sampled_from(sorted(EXAMPLES)), data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_any_map_gives_a_contract_or_a_wire_error(name: str, data: st.DataObject) -> None:
    fields = st.sampled_from([*CONTRACTS[name].model_fields, "x"])
    changed = data.draw(st.dictionaries(fields, _json(), max_size=3))
    try:
        contract = CONTRACTS[name].parse({**EXAMPLES[name], **changed})
    except (InvalidField, InvalidName):
        return
    assert CONTRACTS[name].parse(contract.to_map()) == contract


@pytest.mark.parametrize(
    ("cls", "message", "field", "value", "remedy"),
    [
        (JobSpec, {**SPEC, "modle": "x"}, "modle", "'x'", "did you mean 'model'?"),
        (JobSpec, {**SPEC, "devices": {"cuont": 2}}, "devices.cuont", "2", "did you mean 'count'?"),
        (JobSpec, {**SPEC, "devices": {"count": "2"}}, "devices.count", "'2'", "give a whole number, without quotes"),
        (JobSpec, {**SPEC, "devices": {"count": True}}, "devices.count", "True", "give a whole number, without quotes"),
        (JobSpec, {**SPEC, "devices": {"count": 0}}, "devices.count", "0", "see docs/messages.md"),
        (JobSpec, {**SPEC, "priority": 101}, "priority", "101", "see docs/messages.md"),
        (JobSpec, {**SPEC, "params": [1]}, "params", "[1]", "give a map"),
        (JobSpec, {**SPEC, "after": "j-1"}, "after", "'j-1'", "give a list"),
        (JobSpec, {**SPEC, "name": 3}, "name", "3", "give a string"),
        (JobSpec, {**SPEC, "v": 2}, "v", "2", "see docs/messages.md"),
        (JobSpec, {"model": "m", "dataset": "d"}, "entrypoint", "'(missing)'", "give the field"),
        (ListJobs, {"states": ["asleep"]}, "states.0", "'asleep'", "see docs/messages.md"),
        (HeldLeases, {"leases": []}, "leases", "[]", "see docs/messages.md"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_a_remedy(
    cls: type[Contract], message: dict[str, object], field: str, value: str, remedy: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        cls.parse(message)
    assert caught.value.details == {"field": field, "value": value}
    assert caught.value.hint == remedy
    assert f"field {field!r} has value {value}" in str(caught.value)


def test_what_a_check_of_ours_says_is_said_without_the_words_of_the_library() -> None:
    with pytest.raises(InvalidField, match=r"^field 'checkpoint' has value .*: `keep_best` and `metric` go together"):
        JobSpec.parse({**SPEC, "checkpoint": {"keep_best": 1}})


@pytest.mark.parametrize("value", ["../x", "", "a" * 200, "a\0", "a\n", "ａ", "A", "-x", ".x", "%2e"])
@pytest.mark.parametrize("field", ["model", "dataset", "id", "owner", "entrypoint"])
def test_a_bad_name_is_refused_with_the_rule(field: str, value: str) -> None:
    with pytest.raises(InvalidName) as caught:
        JobSpec.parse({**SPEC, field: value})
    assert caught.value.details["field"] == field
    assert caught.value.hint.startswith(("use 1 to", "use a built-in"))


def test_names_inside_lists_are_checked() -> None:
    with pytest.raises(InvalidName) as caught:
        JobSpec.parse({**SPEC, "after": ["j-1", "../x"]})
    assert caught.value.details["field"] == "after.1"


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "PYTHONPATH", "RAILBUS_ROOT", "NATS_URL", "ld_preload", "a=b", "", "a b", "1A"]
)
def test_an_environment_that_would_take_over_the_trainer_is_refused(name: str) -> None:
    with pytest.raises(InvalidField) as caught:
        JobSpec.parse({**SPEC, "env": {name: "x"}})
    assert caught.value.details["field"] == "env"


def test_an_environment_value_with_nul_is_refused() -> None:
    with pytest.raises(InvalidField):
        JobSpec.parse({**SPEC, "env": {"A": "x\0y"}})


@pytest.mark.parametrize(("given", "kinds"), [("cpu", ("cpu",)), (["cpu", "gpu"], ("cpu", "gpu")), (["gpu"], ("gpu",))])
def test_device_kinds_are_one_word_or_a_list(given: object, kinds: tuple[str, ...]) -> None:
    assert DevicePreference.parse({"kind": given}).kind == kinds


@pytest.mark.parametrize(
    "resume", ["checkpoint-1", "../checkpoint-000001", "checkpoint-000001\n", "checkpoint-000001.pt"]
)
def test_what_is_no_checkpoint_cannot_be_resumed_from(resume: str) -> None:
    with pytest.raises(InvalidField):
        JobSpec.parse({**SPEC, "resume_from": resume})


def test_the_digest_of_a_spec_does_not_depend_on_what_is_left_out_or_on_the_order() -> None:
    spec = JobSpec.parse({**SPEC, "params": {"a": 1, "b": 2}})
    assert JobSpec.parse({"params": {"b": 2, "a": 1}, "priority": 0, **SPEC}).digest == spec.digest
    assert JobSpec.parse({**SPEC, "params": {"a": 1, "b": 3}}).digest != spec.digest


def test_a_changed_copy_is_checked_anew() -> None:
    record = JobRecord.parse(_RECORD)
    assert record.changed(reason="x").reason == "x"
    with pytest.raises(ValueError, match="attempt"):
        record.changed(attempt=-1)


def test_a_noisy_value_does_not_fill_the_message() -> None:
    with pytest.raises(WireError) as caught:
        OpenStream.parse({**EXAMPLES["OpenStream"], "dataset": "x/" * 100_000})
    assert len(str(caught.value)) < 400
