"""Settings from the environment: what is wrong names the variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nkeys
import pytest
from pydantic_settings import SettingsConfigDict

from railbus_shared.bus.access import read_seed
from railbus_shared.errors import BadSetting, InsecureUrl, NotAuthorized, RailbusError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, HttpSettings, check_urls, load, running_bus, without_password
from railbus_shared.subjects import Subjects, is_inbox, told_by


class _Service(HttpSettings):
    model_config = SettingsConfigDict(env_prefix="RAILBUS_THING_", frozen=True, extra="ignore")

    folders: tuple[Path, ...] = ()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("RAILBUS_"):
            monkeypatch.delenv(name)


def test_without_an_environment_the_defaults_hold() -> None:
    found = load(CommonSettings)
    assert (found.nats_url, found.subject_prefix, found.root) == ("nats://127.0.0.1:4222", "railbus", Path("learning"))


def test_the_environment_is_read_and_empty_values_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILBUS_ROOT", "/data")
    monkeypatch.setenv("RAILBUS_LEASE_TTL_S", "")
    monkeypatch.setenv("RAILBUS_THING_HTTP_PORT", "8709")
    assert load(CommonSettings).layout.datasets == Path("/data/datasets")
    assert load(CommonSettings).lease_ttl_s == 15
    assert load(_Service).http_port == 8709


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (CommonSettings, "RAILBUS_LEASE_TTL_S", "1"), (CommonSettings, "RAILBUS_LEASE_TTL_S", "abc"),
        (CommonSettings, "RAILBUS_LOG_LEVEL", "loud"), (CommonSettings, "RAILBUS_HOST", "Bad.Host"),
        (CommonSettings, "RAILBUS_INSECURE", "perhaps"), (CommonSettings, "RAILBUS_HEARTBEAT_S", "0"),
        (_Service, "RAILBUS_THING_HTTP_PORT", "70000"), (_Service, "RAILBUS_THING_GRACE_S", "-1"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_variable_and_itself(
    cls: type[CommonSettings], name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSetting) as caught:
        load(cls)
    assert f"setting {name} has value {value!r}" in str(caught.value)


def test_a_list_that_is_no_json_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILBUS_THING_FOLDERS", "/a,/b")
    with pytest.raises(BadSetting, match="folders"):
        load(_Service)


@pytest.mark.parametrize(
    "url",
    ["nats://127.0.0.1:4222", "nats://localhost", "nats://[::1]:4222", "nats://127.9.9.9", "tls://nats.example.com"],
)  # fmt: skip
def test_urls_that_stay_on_this_host_or_use_tls_are_accepted(url: str) -> None:
    check_urls(url, insecure=False)


@pytest.mark.parametrize(
    "url",
    ["nats://10.0.0.1:4222", "nats://nats.example.com", "nats://0.0.0.0", "nats://127.0.0.1.example.com", "nats://[::2]"],
)  # fmt: skip
def test_urls_that_leave_this_host_without_tls_are_refused_unless_allowed(url: str) -> None:
    with pytest.raises(InsecureUrl, match="RAILBUS_NATS_URL"):
        check_urls(url, insecure=False)
    check_urls(url, insecure=True)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:4222", "http://127.0.0.1", "nats://", "nats://[::1", "nats://127.0.0.1:99999", "nats://h:x"]
)
def test_what_is_no_url_is_a_bad_setting(url: str) -> None:
    with pytest.raises(BadSetting, match="RAILBUS_NATS_URL"):
        check_urls(url, insecure=True)


def test_several_urls_are_each_checked_and_all_of_one_kind() -> None:
    check_urls("nats://127.0.0.1:1, nats://127.0.0.1:2,nats://[::1]", insecure=False)
    check_urls("tls://a,tls://b:4223", insecure=False)
    with pytest.raises(InsecureUrl, match="nats://b"):
        check_urls("nats://127.0.0.1:1,nats://b", insecure=False)
    with pytest.raises(BadSetting, match="some of it is TLS"):
        check_urls("tls://a,nats://127.0.0.1", insecure=True)
    for bad in ("nats://127.0.0.1,", ",", "nats://127.0.0.1,http://b"):
        with pytest.raises(BadSetting, match="not a NATS URL"):
            check_urls(bad, insecure=True)
    with pytest.raises(RailbusError) as caught:
        check_urls("nats://a,nats://me:secret@10.0.0.1", insecure=False)
    assert "secret" not in str(caught.value)


def test_a_password_in_a_url_is_never_shown() -> None:
    with pytest.raises(RailbusError) as caught:
        check_urls("nats://me:secret@10.0.0.1", insecure=False)
    assert "secret" not in str(caught.value)
    assert without_password("nats://me:secret@h:1") == "nats://…@h:1"
    assert without_password("nats://h:1") == "nats://h:1"


def _seed() -> str:
    pair: Any = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    return bytes(pair.seed).decode()


def test_a_key_file_of_our_own_is_read(tmp_path: Path) -> None:
    path, seed = tmp_path / "key", _seed()
    path.write_text(seed + "\n")
    path.chmod(0o600)
    assert read_seed(path) == seed


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(_seed())
    path.chmod(mode)
    with pytest.raises(NotAuthorized, match=f"{mode:04o}") as caught:
        read_seed(path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"hello", b"SUgarbage", b"SU\xff\xfe", b"SAABCDEF"])
def test_a_key_file_without_a_seed_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(NotAuthorized) as caught:
        read_seed(path)
    assert "garbage" not in str(caught.value)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAuthorized, match="cannot be read"):
        read_seed(tmp_path / "nothing")


def test_the_bus_that_runs_on_a_root_is_found(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert running_bus(layout) is None
    layout.state.mkdir()
    (layout.state / "bus.json").write_text('{"url": "nats://127.0.0.1:1", "user_key_file": "/k"}')
    found = running_bus(layout)
    assert found is not None
    assert (found.nats_url, found.nats_key_file, found.root) == ("nats://127.0.0.1:1", Path("/k"), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"url": "x"}', "\xff"])
def test_a_damaged_bus_file_is_a_bad_setting(tmp_path: Path, content: str) -> None:
    layout = Layout(tmp_path)
    layout.state.mkdir()
    (layout.state / "bus.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadSetting, match=r"bus\.json"):
        running_bus(layout)


@pytest.mark.parametrize("prefix", ["railbus", "team_a", "a.b.c", "x-1"])
def test_a_prefix_stands_before_every_subject(prefix: str) -> None:
    subjects = Subjects(prefix)
    assert subjects.submit == f"{prefix}.jobs.submit"
    assert subjects.event("job", "j-1", "placed") == f"{prefix}.evt.job.j-1.placed"
    assert subjects.request("jobs", "get") == f"{prefix}.req.jobs.get"


@pytest.mark.parametrize("prefix", ["", ".", "a.", ".a", "A", "a..b", "a b", "a*", ">", "$KV", "a\n", "a.b.c.d.e"])
def test_a_bad_prefix_names_its_variable(prefix: str) -> None:
    with pytest.raises(BadSetting, match="RAILBUS_SUBJECT_PREFIX"):
        Subjects(prefix)


def test_the_names_under_the_default_prefix_are_those_of_the_design() -> None:
    subjects = Subjects()
    assert [subjects.jobs_stream, subjects.events_stream] == ["RAILBUS_JOBS", "RAILBUS_EVENTS"]
    assert [subjects.jobs, subjects.devices, subjects.leases, subjects.datasets, subjects.leader] == [
        "railbus_jobs", "railbus_devices", "railbus_leases", "railbus_datasets", "railbus_leader"
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["railbus", "team-a.railbus"])
def test_the_subject_of_an_event_says_which_person_told_it(prefix: str) -> None:
    subject = Subjects(prefix).event("app", "j-1", "made")
    assert told_by(f"{subject}.ann") == "ann"
    for of_nobody in (subject, f"{subject}.a.b", f"{prefix}.evt.app", f"{prefix}.jobs.submit", f"{prefix}.a.b.c.d", ""):
        assert told_by(of_nobody) == ""


def test_no_two_prefixes_share_a_stream_or_a_bucket() -> None:
    prefixes = ["a.b", "a_b", "a-b", "a__b", "a_.b", "a.b_", "a.b-c", "a_b.c", "a_b_c", "ab"]
    assert len({Subjects(prefix).jobs_stream for prefix in prefixes}) == len(prefixes)
    assert len({Subjects(prefix).jobs for prefix in prefixes}) == len(prefixes)


@pytest.mark.parametrize("subject", ["_INBOX.a.b", "_RINBOX.runner.Ab1.x", "_INBOX.x"])
def test_answers_may_go_to_inboxes(subject: str) -> None:
    assert is_inbox(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "", "_INBOX", "_INBOX.", "_INBOX.>", "_INBOX.*", "$KV.railbus_leases.x", "$JS.API.STREAM.DELETE.X", "railbus.x",
        "_INBOX.a\n", "_INBOX.a b", "_INBOXX.a", "x_INBOX.a", "_INBOX.a..b", "_INBOX.a.b.c.d.e", "_INBOX.é", "$SYS.x",
    ],
)  # fmt: skip
def test_answers_may_go_nowhere_else(subject: str) -> None:
    assert not is_inbox(subject)
