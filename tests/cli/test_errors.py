"""What a user reads when something is wrong: one line that says what, one that says what to do, and a status."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment
from commands import railbus_here as railbus
from railbus.cli.session import Session, refusal
from railbus_shared.errors import BusUnavailable, NotAuthorized
from railbus_shared.settings import CommonSettings
from servers import Server
from until import PATIENCE_S


@pytest.fixture
def nowhere() -> dict[str, str]:
    """An environment that leads to a port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{probe.getsockname()[1]}"
    return {"RAILBUS_NATS_URL": url, "RAILBUS_CONNECT_TIMEOUT_S": "0.2"}


@pytest.mark.parametrize("command", [["jobs"], ["devices"], ["job", "@last"], ["cancel", "j-1"], ["events", "-f"]])
def test_without_a_bus_the_remedy_is_named(command: list[str], tmp_path: Path, nowhere: dict[str, str]) -> None:
    done = railbus(*command, cwd=tmp_path, env=nowhere)
    assert done.status == 5
    assert done.out == ""
    assert done.err.startswith("error[BUS_UNAVAILABLE]: NATS at nats://127.0.0.1:")
    assert "hint: start it with `railbus up`" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_a_traceback_is_shown_where_it_is_asked_for(where: str, tmp_path: Path, nowhere: dict[str, str]) -> None:
    env = {**nowhere, **({"RAILBUS_DEBUG": "1"} if where == "environment" else {})}
    words = {"before": ["--traceback", "jobs"], "after": ["jobs", "--traceback"], "environment": ["jobs"]}[where]
    done = railbus(*words, cwd=tmp_path, env=env)
    assert done.status == 5
    assert "Traceback" in done.err


def test_a_bad_setting_is_named_with_its_variable(tmp_path: Path) -> None:
    done = railbus("jobs", cwd=tmp_path, env={"RAILBUS_CONNECT_TIMEOUT_S": "soon"})
    assert done.status == 2
    assert done.err.startswith("error[BAD_SETTING]: setting RAILBUS_CONNECT_TIMEOUT_S has value 'soon'")


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    done = railbus("submit", "nope.yaml", cwd=tmp_path)
    assert done.status == 2
    assert "'nope.yaml' does not exist" in done.err


def test_a_reader_that_goes_away_is_no_trouble(tmp_path: Path) -> None:
    line = b'{"common": {"v": 1}, "events": [' + b",".join([b'{"number": 1}'] * 20_000) + b"]}"
    process = subprocess.Popen(
        [sys.executable, "-m", "railbus.cli.main", "decode"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment({}),
        cwd=tmp_path,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(line)
    process.stdin.close()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE_S) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("model: m\ndataset: [digits\n", "job.yaml:3:1", "not valid YAML"),
        ("model: m\n\tdataset: d\n", "job.yaml:2:1", "tab"),
        ("model: m\nmodel: n\n", "job.yaml:2:1", "the key 'model' stands here twice"),
        ("- model\n", "job.yaml", "not a map of fields"),
        ("", "job.yaml", "not a map of fields"),
        ("model: m\ndataset: d\nentrypoint: classifier\nprioritty: 3\n", "job.yaml:4:1", "did you mean 'priority'?"),
        ("model: m\ndataset: d\n", "job.yaml", "the field is required"),
        (
            "model: m\ndataset: d\nentrypoint: classifier\ndevices:\n  kind: gpu\n  cuont: 2\n",
            "job.yaml:6:3",
            "did you mean 'count'?",
        ),
        ("model: ../m\ndataset: d\nentrypoint: classifier\n", "job.yaml:1:1", "not a valid name"),
        ('{"model": "m", "dataset": "d", "entrypoint": "x", "seed": "7"}', "job.yaml:1:51", "without quotes"),
    ],
)
def test_a_bad_job_file_is_pointed_at(text: str, place: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    done = railbus("submit", "job.yaml", cwd=tmp_path)
    assert done.status == 6, done.err
    assert f"{place}: " in done.err
    assert problem in done.err
    assert "hint: " in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    "words", [["submit", "job.yaml", "--wait"], ["submit", "job.yaml", "-f"], ["logs", "-f", "j-1"]]
)
def test_whoever_waits_for_a_job_is_told_of_other_trouble_by_a_code_of_its_own(
    words: list[str], tmp_path: Path, nowhere: dict[str, str]
) -> None:
    (tmp_path / "job.yaml").write_text("model: m\n")
    done = railbus(*words, cwd=tmp_path, env=nowhere)
    assert (done.status, done.err.startswith("error[")) == (125, True), done.err


def test_a_server_that_was_named_and_refuses_the_key_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    server = Server(tmp_path / "nats", extra='authorization { user: "u", password: "p" }')
    server.start()
    try:
        done = railbus("jobs", cwd=tmp_path, env={"RAILBUS_NATS_URL": server.url})
    finally:
        server.stop()
    assert (done.status, done.err.startswith("error[NOT_AUTHORIZED]")) == (4, True), done.err


def test_a_server_at_the_usual_port_that_nobody_named_belongs_to_something_else(tmp_path: Path) -> None:
    """So that the logs of a root are read from its files, whatever else runs on the machine."""
    refused = NotAuthorized("NATS refused the credentials", hint="check RAILBUS_NATS_KEY_FILE")
    told = refusal(refused, CommonSettings(root=tmp_path), Session(tmp_path))
    assert isinstance(told, BusUnavailable)
    assert str(tmp_path) in told.message
    assert "railbus up" in told.hint
    assert refusal(refused, CommonSettings(nats_key_file=tmp_path / "key"), Session(tmp_path)) is refused


_ASKING: list[list[str]] = [["jobs"], ["logs"], ["logs", "j-1"], ["logs", "-n", "3"], ["events"], ["watch", "--once"]]
_ASKING += [["job", "@last"], ["devices"], ["dataset", "list"], ["export", "tensorboard", "@last"]]


@pytest.mark.parametrize("words", _ASKING)
@pytest.mark.parametrize("named", ["from --root", "from RAILBUS_ROOT", "the default"])
def test_a_root_that_does_not_exist_is_named_with_whoever_named_it(
    words: list[str], named: str, tmp_path: Path
) -> None:
    root = tmp_path / ("learning" if named == "the default" else "wrong")
    env = {"RAILBUS_ROOT": str(root)} if named == "from RAILBUS_ROOT" else {}
    done = railbus(*(["--root", "wrong"] if named == "from --root" else []), *words, cwd=tmp_path, env=env)
    assert (done.status, done.out) == (5, ""), done.err
    assert f"root '{root}' ({named}) does not exist, and " in done.err
    assert "--root DIR or RAILBUS_ROOT" in done.err
    assert "RAILBUS_NATS_URL" in done.err
    assert not root.exists()


_READING: list[list[str]] = [["checkpoints"], ["checkpoints", "verify"], ["checkpoints", "show", "m"], ["restore"]]
_READING += [["dataset", verb, "d"] for verb in ("show", "verify", "sample", "stats")]
_READING += [["keys"], ["keys", "add", "ann"], ["keys", "revoke", "ann"]]
_READING += [["checkpoints", "prune", "--dry-run", "--offline"]]


@pytest.mark.parametrize("words", _READING)
def test_files_of_a_root_that_does_not_exist_are_not_found(words: list[str], tmp_path: Path) -> None:
    done = railbus("--root", "wrong", *words, cwd=tmp_path)
    assert (done.status, done.out) == (3, ""), done.err
    assert done.err.startswith(f"error[NOT_FOUND]: root '{tmp_path / 'wrong'}' (from --root) does not exist\nhint: ")


def test_on_a_root_on_which_nothing_runs_that_is_said(tmp_path: Path) -> None:
    done = railbus("--root", str(tmp_path), "jobs", cwd=tmp_path)
    assert done.status == 5
    assert f"nothing runs on root '{tmp_path}' (from --root), and " in done.err
    assert "`railbus up`" in done.err


@pytest.mark.parametrize("before", [True, False])
def test_an_option_counts_more_than_the_environment_wherever_it_stands(before: bool, tmp_path: Path) -> None:
    words = ["--root", "wrong", "jobs"] if before else ["jobs", "--root", "wrong"]
    done = railbus(*words, cwd=tmp_path, env={"RAILBUS_ROOT": str(tmp_path / "other")})
    assert f"root '{tmp_path / 'wrong'}' (from --root)" in done.err


_OF_A_JOB = ["job", "why", "cancel", "retry", "hold", "release", "checkpoint now", "export trace", "logs", "logs -f"]


@pytest.mark.parametrize("command", [*_OF_A_JOB, "jobs --owner", "jobs --group", "cancel --group"])
@pytest.mark.parametrize("name", ["NO SUCH", "", "j.1", "../x"])
def test_a_name_that_can_be_none_is_a_mistake_of_whoever_typed_it(command: str, name: str, server: Server) -> None:
    """And no fault of railbus; here nobody answers, so only what needs no answer can tell."""
    env = {"RAILBUS_NATS_URL": server.url}
    done = railbus(*command.split(), name, cwd=server.folder, env=env)
    assert done.status != 0
    assert "error[BUG]" not in done.err


@pytest.mark.root
def test_what_root_brings_up_has_no_runner_of_another_user(tmp_path: Path) -> None:
    done = railbus("up", "--root", str(tmp_path / "learning"), cwd=tmp_path, env={"RAILBUS_RUNNER_USER": "nobody"})
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error[CONFIG_ERROR]: setting RAILBUS_RUNNER_USER is not for this command")
    assert not (tmp_path / "learning").exists()
